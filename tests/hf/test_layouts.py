"""Real-world directories beside transformers 4.57 and 5: ids, chats, ends of answers and perplexity, or a refusal."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.hf import oracle
from tests.hf.layouts import LAYOUTS, Layout, bundled_weights
from trtqwen.checkpoint.convert import ConversionPlan, plan_conversion, run_conversion
from trtqwen.demo import MODEL
from trtqwen.diagnostics import InputError, TrtQwenError
from trtqwen.hf.chat_template import ChatTemplate
from trtqwen.hf.source import HfModel
from trtqwen.hf.tokenizer import Tokenizer
from trtqwen.quantize.texts import HELDOUT
from trtqwen.recipe import CheckpointRecipe
from trtqwen.verify.compare import compare
from trtqwen.verify.ranks import CheckpointRanks
from trtqwen.verify.samples import read_samples

TRANSFORMERS_5 = Path(sys.prefix) / "transformers5"  # `make test-slow` installs it there
TEXTS = [
    "Hello, world! It's 2+2=4,  and\r\n\n  more\ttext ",
    " leading space",
    "混合中文与日本語のテキスト é 👩‍👩‍👧",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "call <tool> now<think>\nso</think>",
    "<｜User｜>hi<｜Assistant｜><｜end▁of▁sentence｜>",
    "a",
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "of a <city> & more",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
USER = {"role": "user", "content": '你好 <b>&</b> "hi" '}
ANSWER = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nfine "}
CALLS = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}],
}
DEEPSEEK_CALLS = CALLS | {
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": '{"city": "Köln"}'}}],
}
RESULT = {"role": "tool", "content": "rain"}
BEGIN = {"add_generation_prompt": True}
CHATS: list[dict[str, Any]] = [
    {"conversation": [USER], **BEGIN},
    {"conversation": [USER, ANSWER, USER], "add_generation_prompt": False},
    {"conversation": [{"role": "system", "content": "Be terse."}, USER, ANSWER, USER], **BEGIN},
    {"conversation": [USER], "tools": TOOLS, **BEGIN},
    {"conversation": [USER, CALLS, RESULT, RESULT], "tools": TOOLS, **BEGIN},
    {"conversation": [USER, DEEPSEEK_CALLS, RESULT], **BEGIN},
    {"conversation": [USER], "documents": [{"title": "t", "text": "d"}], **BEGIN},
    {"conversation": [USER], "enable_thinking": False, **BEGIN},
    {"conversation": [USER, {"role": "assistant", "content": "Sure, "}], "continue_final_message": True},
    {"conversation": [{"role": "user"}], **BEGIN},
]
NULL_CONTENT = CHATS.index({"conversation": [USER, DEEPSEEK_CALLS, RESULT], **BEGIN})
Answers = dict[str, dict[str, Any]]
TAKEN = [layout for layout in LAYOUTS if not layout.refused]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="module")
def samples() -> list[list[int]]:
    return read_samples(MODEL, HELDOUT, 160)


@pytest.fixture(scope="module")
def directories(home: Path) -> dict[str, Path]:
    return {layout.name: layout.make(home) for layout in LAYOUTS}


@pytest.fixture(scope="module")
def answers_of_5(
    request: pytest.FixtureRequest, home: Path, directories: dict[str, Path], samples: list[list[int]]
) -> Answers:
    """What transformers 5 answers, by directory that a test takes: a process of its own."""
    if not TRANSFORMERS_5.is_dir():
        pytest.skip("transformers 5 is not installed; `make test-slow` installs it")
    calls = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    tested = {params["layout"].name for params in calls if params.get("release") == 5}
    layouts = [layout for layout in TAKEN if layout.name in tested]
    asked, told = home / "questions.json", home / "answers.json"
    asked.write_text(json.dumps([question(layout, directories, samples) for layout in layouts]))
    path = os.pathsep.join(filter(None, [str(TRANSFORMERS_5), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, str(Path(oracle.__file__)), str(asked), str(told)],
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"},
        stderr=subprocess.PIPE,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    content = json.loads(told.read_text())
    assert content["version"].startswith("5.")
    return dict(zip([layout.name for layout in layouts], content["answers"], strict=True))


@pytest.fixture
def theirs(
    request: pytest.FixtureRequest,
    release: int,
    layout: Layout,
    directories: dict[str, Path],
    samples: list[list[int]],
) -> dict[str, Any]:
    """What a release of transformers answers."""
    if release == 5:
        answers: Answers = request.getfixturevalue("answers_of_5")
        return answers[layout.name]
    assert transformers.__version__.startswith("4.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return oracle.asked(question(layout, directories, samples))


def question(layout: Layout, directories: dict[str, Path], samples: list[list[int]]) -> dict[str, Any]:
    directory = str(directories[layout.name])
    return {"directory": directory, "texts": TEXTS, "chats": CHATS, "samples": samples if layout.weights else None}


def cases() -> Iterator[Any]:
    """Every layout with every release that reads it; quick are some with the installed release."""
    for weights, step in ((False, 3), (True, 6)):
        layouts = [layout for layout in TAKEN if bool(layout.weights) == weights]
        for release in (4, 5):
            read = [layout for layout in layouts if layout.oracle not in (4, 5) or layout.oracle == release]
            for index, layout in enumerate(read):
                marks = () if release == 4 and index % step == 0 else pytest.mark.slow
                yield pytest.param(layout, release, id=f"{layout.name}-{release}", marks=marks)


def taken(directory: Path) -> ConversionPlan:
    return plan_conversion(directory, CheckpointRecipe(dtype="float32"))


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout.refused], ids=lambda layout: layout.name)
def test_refused_by_name(layout: Layout, directories: dict[str, Path]) -> None:
    with pytest.raises(TrtQwenError) as caught:
        taken(directories[layout.name])
    assert layout.refused in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.hint


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("layout", "release"), list(cases()))
def test_as_transformers(
    layout: Layout,
    release: int,
    theirs: dict[str, Any],
    directories: dict[str, Path],
    samples: list[list[int]],
    tmp_path: Path,
) -> None:
    plan = taken(directories[layout.name])
    said = " ".join(map(str, plan.findings))
    assert layout.warns in said if layout.warns else "warning" not in [finding.level for finding in plan.findings], (
        said
    )
    run_conversion(plan, tmp_path / "checkpoint")
    assert "failed" not in theirs, theirs
    for tokenizer in (plan.tokenizer, Tokenizer(tmp_path / "checkpoint" / "tokenizer")):
        assert tokenizer is not None
        assert [tokenizer.encode(text) for text in TEXTS] == theirs["plain"]
        assert [tokenizer.encode_prompt(text) for text in TEXTS] == theirs["raw"]
        chats = [rendered(tokenizer.chat_template, options) for options in CHATS]
        if release == 5:  # it drops nulls from messages, which DeepSeek's template asks for
            chats[NULL_CONTENT] = theirs["chats"][NULL_CONTENT]
        assert chats == theirs["chats"]
        assert sorted(tokenizer.stop_ids) == theirs["ends"]
    if layout.name == "rope-null":
        return  # transformers does not compute it; "rope-absent" has the same config
    if not layout.weights:  # the perplexity is that of the bundled model, which other layouts compare
        assert computed(plan.source) == computed(HfModel(MODEL))
        assert (plan.source.directory / "model.safetensors").samefile(bundled_weights())
    else:
        ranks = CheckpointRanks(tmp_path / "checkpoint", "plain", torch.device("cpu"))
        head = compare(plan, ranks, samples, torch.device("cpu")).head
        for ours in (head.model_perplexity, head.checkpoint_perplexity):
            assert math.isclose(ours, theirs["perplexity"], rel_tol=1e-4), (ours, theirs["perplexity"])


def computed(source: HfModel) -> dict[str, Any]:
    """What of a config decides the logits."""
    said = {"findings", "eos_token_ids", "max_position_embeddings", "torch_dtype", "seq_length"}
    return source.config.model_dump(exclude=said)


def rendered(template: ChatTemplate | None, options: dict[str, Any]) -> str | None:
    fields = {"add_generation_prompt": False} | options
    messages = fields.pop("conversation")
    if template is None:
        return None
    try:
        return template.render(messages, **fields)
    except InputError:
        return None


def test_the_matrix_is_large_enough() -> None:
    assert len(LAYOUTS) >= 40
    assert len({layout.name for layout in LAYOUTS}) == len(LAYOUTS)


def test_bos_comes_once(directories: dict[str, Path]) -> None:
    tokenizer = Tokenizer(directories["r1-distill"])
    begin = tokenizer.token_id("<｜begin▁of▁sentence｜>")
    assert tokenizer.chat_template is not None
    chat = tokenizer.chat_template.render([USER])
    for text in ("The cat", chat):
        assert tokenizer.encode_prompt(text)[0] == begin
        assert tokenizer.encode_prompt(text).count(begin or 0) == 1
    assert tokenizer.encode_prompt(chat) == tokenizer.encode(chat)
    alone = ChatTemplate({"default": tokenizer.chat_template.standalone()})  # what the server hands to clients
    assert alone.render([USER]) == chat
