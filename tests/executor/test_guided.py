"""Guides: what they let through, against other judges: `re`, `json`; and what cannot be compiled."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest
import torch

from tests.processes import children
from tests.slow import every
from trtqwen.demo import MODEL
from trtqwen.diagnostics import RequestError
from trtqwen.executor.guided import GuidedDecoder, check_installed
from trtqwen.executor.request import GuidedDecodingParams, Request
from trtqwen.hf.tokenizer import Tokenizer

PADDED = 4096 + 130  # rows beyond the tokenizer, not a multiple of 32


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(MODEL)


@pytest.fixture(scope="module")
def decoder() -> GuidedDecoder:
    return GuidedDecoder(MODEL, PADDED)


def guided(guide_type: str, guide: str = "", **options: object) -> Request:
    params = GuidedDecodingParams.model_validate({"guide_type": guide_type, "guide": guide})
    return Request(id="a", input_token_ids=(1,), max_tokens=200, guided_decoding=params, **options)  # type: ignore[arg-type]


def wander(decoder: GuidedDecoder, request: Request, seed: int, most: int = 400) -> list[int]:
    """Follow the guide by random choice, with a liking for the end, and return the ids up to it."""
    request, guide = decoder.prepare(request)
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    for _ in range(most):
        row = torch.zeros(PADDED)
        guide.mask(row)
        allowed = row.isfinite().nonzero().flatten()
        assert len(allowed)
        assert allowed.max() < 4096
        token_id = int(allowed[torch.randint(len(allowed), (), generator=generator)])
        if request.end_id in allowed.tolist():
            token_id = int(request.end_id or 0)
        guide.accept(token_id)
        if token_id == request.end_id:
            return ids
        ids.append(token_id)
    raise AssertionError("the guide never let the answer end")


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "n": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["红", "b"]}, "maxItems": 3},
    },
    "required": ["name", "n", "tags"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("seed", every(10, range(20)))
def test_whatever_a_schema_lets_through_is_valid(decoder: GuidedDecoder, tokenizer: Tokenizer, seed: int) -> None:
    text = tokenizer.decode(wander(decoder, guided("json_schema", json.dumps(SCHEMA)), seed))
    value = json.loads(text)
    assert set(value) == {"name", "n", "tags"}
    assert len(value["name"]) <= 5
    assert 0 <= value["n"] <= 99
    assert set(value["tags"]) <= {"红", "b"}


@pytest.mark.parametrize("seed", range(4))
def test_a_regular_expression_is_matched_whole(decoder: GuidedDecoder, tokenizer: Tokenizer, seed: int) -> None:
    pattern = r"(yes|no|可能): [0-9]{2,4}"
    assert re.fullmatch(pattern, tokenizer.decode(wander(decoder, guided("regex", pattern), seed)))


def test_a_grammar_is_followed(decoder: GuidedDecoder, tokenizer: Tokenizer) -> None:
    grammar = 'root ::= "<" digit digit ">"\ndigit ::= [0-9]'
    assert re.fullmatch("<[0-9][0-9]>", tokenizer.decode(wander(decoder, guided("ebnf_grammar", grammar), 1)))


def test_any_json_is_json(decoder: GuidedDecoder, tokenizer: Tokenizer) -> None:
    _, guide = decoder.prepare(guided("json"))
    for token_id in tokenizer.encode('{"a": [1, null, "天"]}'):
        row = torch.zeros(PADDED)
        guide.mask(row)
        assert row[token_id] == 0
        guide.accept(token_id)
    row = torch.zeros(PADDED)
    guide.mask(row)
    assert row.isfinite().nonzero().flatten().tolist() == [tokenizer.end_id]


def test_special_tokens_and_padding_never_come_but_for_the_end(decoder: GuidedDecoder, tokenizer: Tokenizer) -> None:
    further = tokenizer.stop_ids[1]
    _, guide = decoder.prepare(guided("regex", "a*", stop_words=((further,),)))
    row = torch.zeros(PADDED)
    guide.mask(row)
    allowed = set(row.isfinite().nonzero().flatten().tolist())
    assert tokenizer.end_id in allowed
    assert further not in allowed
    assert all(set(tokenizer.token_bytes[token_id]) <= {ord("a")} for token_id in allowed)


def test_a_guide_beyond_its_end_fails_with_a_sentence(decoder: GuidedDecoder) -> None:
    request, guide = decoder.prepare(guided("regex", "a"))
    for token_id in wander(decoder, request, 0):
        guide.accept(token_id)
    guide.accept(request.end_id or 0)
    with pytest.raises(RequestError, match="guided_decoding_guide: cannot be followed further"):
        guide.mask(torch.zeros(PADDED))


def test_an_answer_without_an_end_of_its_own_gets_the_tokenizers(
    decoder: GuidedDecoder, tokenizer: Tokenizer
) -> None:
    assert decoder.prepare(guided("json"))[0].end_id == tokenizer.end_id
    assert decoder.prepare(guided("json", end_id=77))[0].end_id == 77


@pytest.mark.parametrize(
    ("guide_type", "guide", "reason"),
    [
        ("json_schema", "{", "syntax error"),
        ("json_schema", '{"type": "nonsense"}', 'Unsupported type "nonsense"'),
        ("regex", "((a", "parenthesis is not closed"),
        ("ebnf_grammar", 'start ::= "a"', 'root rule with name "root" is not found'),
    ],
)
def test_a_guide_that_cannot_be_compiled_is_a_sentence(
    decoder: GuidedDecoder, guide_type: str, guide: str, reason: str
) -> None:
    with pytest.raises(
        RequestError, match=rf"^guided_decoding_guide: is not a usable {guide_type} .*{reason}.*; correct it$"
    ):
        decoder.prepare(guided(guide_type, guide))


def optional(count: int) -> str:
    """A schema whose compilation time grows faster than its size."""
    properties = {f"property_{index}": {"type": "string"} for index in range(count)}
    return json.dumps({"type": "object", "properties": properties})


def test_a_guide_that_compiles_for_long_is_refused_and_the_next_one_is_not(decoder: GuidedDecoder) -> None:
    """Alone, xgrammar compiles it for half a minute."""
    with pytest.raises(RequestError, match=r"^guided_decoding_guide: this json_schema is too large .*; simplify it$"):
        decoder.prepare(guided("json_schema", optional(1500)))
    assert wander(decoder, guided("regex", "[xyz]"), 0)


@pytest.mark.slow
def test_guides_are_compiled_again_after_the_process_that_tries_them_was_killed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("trtqwen.executor.guide_compiler.COMPILE_LIMIT", 0.5)
    decoder = GuidedDecoder(MODEL, PADDED)
    decoder.prepare(guided("regex", "a"))
    for child in children(os.getpid()):
        if "trtqwen.executor.guide_compiler" in Path(f"/proc/{child}/cmdline").read_text():
            os.kill(child, signal.SIGKILL)
    with pytest.raises(RequestError, match="too large"):  # the end of the child forked before
        decoder.prepare(guided("json_schema", optional(1500)))
    assert wander(decoder, guided("regex", "[xyz]"), 0)


def test_without_xgrammar_the_request_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_installed()
    monkeypatch.setitem(sys.modules, "xgrammar", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RequestError, match=r"needs xgrammar, .*`pip install 'trtqwen\[guided\]'`"):
        check_installed()
