"""What fields of vLLM and SGLang do to an answer, by its content: through chats, completions and responses."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jsonschema
import pytest

from tests.gateway.conftest import Running
from tests.slow import slow
from trtqwen.demo import MODEL
from trtqwen.hf.tokenizer import Tokenizer

pytestmark = [pytest.mark.triton, pytest.mark.embedded("forms and sampling are its own")]
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
SCHEMA = {
    "type": "object",
    "properties": {"size": {"type": "integer", "minimum": 10, "maximum": 99}, "on": {"type": "boolean"}},
    "required": ["size", "on"],
    "additionalProperties": False,
}
TAG = {"type": "tag", "begin": "<answer>", "content": {"type": "regex", "pattern": "[x-z]{4}"}, "end": "</answer>"}
CHOICES = ["yes", "no", 'say "maybe"\n']
GRAMMAR = 'root ::= ("ab" | "cd") "-" [0-9] [0-9]'
HOT = {"temperature": 2.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0, "seed": 5}
COLD = {"temperature": 0, "repetition_penalty": 1.0}
TOKENIZER = Tokenizer(MODEL)


@dataclass
class Answer:
    """What an answer says, and what it counts."""

    text: str
    prompt_tokens: int
    output_tokens: int


def ask(live: Running, path: str, **fields: Any) -> Answer:
    prompt: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello!"}]}
    limit = "max_tokens"
    if path == "/v1/completions":
        prompt = {"prompt": "Hello, my name is"}
    if path == "/v1/responses":
        prompt, limit = {"input": "Hello!"}, "max_output_tokens"
    status, _, text = live.post(path, {"model": "qwen", **prompt, limit: 24, **fields})
    assert status == 200, text
    body = json.loads(text)
    usage = body["usage"]
    if path == "/v1/responses":
        written = "".join(part["text"] for item in body["output"] for part in item.get("content", ()))
        return Answer(written, usage["input_tokens"], usage["output_tokens"])
    [choice] = body["choices"]
    written = choice["text"] if path == "/v1/completions" else choice["message"]["content"]
    return Answer(written, usage["prompt_tokens"], usage["completion_tokens"])


def matches(pattern: str) -> Callable[[str], bool]:
    return lambda text: re.fullmatch(pattern, text) is not None


def keeps_to_schema(text: str) -> bool:
    return bool(jsonschema.Draft202012Validator(SCHEMA).is_valid(json.loads(text)))


FORMS: list[tuple[dict[str, Any], Callable[[str], bool]]] = [
    ({"structured_outputs": {"regex": "[a-c]{3}-[0-9]{2}"}}, matches("[a-c]{3}-[0-9]{2}")),
    ({"guided_regex": "(ja|nein)!"}, matches("(ja|nein)!")),
    ({"regex": "[A-F]{6}"}, matches("[A-F]{6}")),
    ({"structured_outputs": {"choice": CHOICES}}, CHOICES.__contains__),
    ({"guided_choice": ["one", "two"]}, ["one", "two"].__contains__),
    ({"structured_outputs": {"grammar": GRAMMAR}}, matches("(ab|cd)-[0-9]{2}")),
    ({"guided_grammar": GRAMMAR}, matches("(ab|cd)-[0-9]{2}")),
    ({"ebnf": GRAMMAR}, matches("(ab|cd)-[0-9]{2}")),
    ({"structured_outputs": {"json": SCHEMA}}, keeps_to_schema),
    ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, keeps_to_schema),
    ({"guided_json": SCHEMA}, keeps_to_schema),
    (
        {"structured_outputs": {"structural_tag": {"type": "structural_tag", "format": TAG}}},
        matches("<answer>[x-z]{4}</answer>"),
    ),
    ({"structural_tag": json.dumps({"type": "structural_tag", "format": TAG})}, matches("<answer>[x-z]{4}</answer>")),
]


@pytest.mark.parametrize(
    ("form", "holds"), FORMS, ids=lambda value: next(iter(value), "") if isinstance(value, dict) else ""
)
def test_an_answer_has_the_form_that_is_asked_for(
    live: Running, form: dict[str, Any], holds: Callable[[str], bool]
) -> None:
    for path, sampling in [(PATHS[0], COLD), *((path, HOT) for path in PATHS)]:
        answer = ask(live, path, **form, **sampling)
        assert holds(answer.text), (path, answer)


@pytest.mark.parametrize("path", [PATHS[0], *map(slow, PATHS[1:])])
def test_fields_choose_tokens_as_they_say(live: Running, path: str) -> None:
    greedy = ask(live, path, **COLD, ignore_eos=True)
    assert greedy.output_tokens == 24
    hot = ask(live, path, **HOT, ignore_eos=True)
    assert hot.text != greedy.text
    for sharp in ({"min_p": 1.0}, {"top_k": 1}, {"top_p": 0}):
        assert ask(live, path, **HOT | sharp, ignore_eos=True).text == greedy.text, sharp
    word = max(re.findall(r"[A-Za-z]{3,}", greedy.text), key=len)
    assert word not in ask(live, path, **COLD, bad_words=[word], ignore_eos=True).text
    digits = [token for token, text in enumerate(TOKENIZER.token_bytes) if text in b"0123456789" and len(text) == 1]
    assert re.fullmatch("[0-9]{24}", ask(live, path, **HOT, allowed_token_ids=digits, ignore_eos=True).text)
    ids = TOKENIZER.encode(greedy.text)
    cut = ask(live, path, **COLD, stop_token_ids=[ids[3]])
    assert cut.output_tokens <= 4
    assert greedy.text.startswith(cut.text)
    assert ask(live, path, **COLD, stop_token_ids=[ids[3]], min_tokens=12, ignore_eos=True).output_tokens >= 12
    stop = greedy.text[5:8]
    kept = ask(live, path, **COLD, stop=stop, include_stop_str_in_output=True, ignore_eos=True)
    assert kept.text == greedy.text[: greedy.text.index(stop) + 3]
    assert ask(live, path, **COLD, truncate_prompt_tokens=3, ignore_eos=True).prompt_tokens == 3
    neutral: dict[str, Any]
    for neutral in ({"priority": -7}, {"cache_salt": "mine"}, {"n": 1, "best_of": 1}, {"logit_bias": {}}):
        assert ask(live, path, **COLD, ignore_eos=True, **neutral).text == greedy.text, neutral
