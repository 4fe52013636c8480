"""An INT8 checkpoint goes the same way as a float one, to streamed text."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.slow import SLOW
from trtqwen.build import plan_build, run_build
from trtqwen.demo import MODEL
from trtqwen.executor.executor import Executor
from trtqwen.executor.request import Request
from trtqwen.hf.tokenizer import Tokenizer, render_chat
from trtqwen.recipe import load_recipe
from trtqwen.triton.client import stream
from trtqwen.triton.ports import Ports
from trtqwen.triton.server import TritonServer

QUESTION = "如何更改字体？"


@SLOW  # the gateway's tests serve INT8 weights, and the executor's tests compute SmoothQuant
@pytest.mark.triton
def test_smoothquant_is_served_like_any_other_checkpoint(tmp_path: Path) -> None:
    plan = plan_build(load_recipe("qwen2-tiny-int8-cpu"), MODEL, tmp_path / "engines", tmp_path / "repo")
    run_build(plan)
    tokenizer = Tokenizer(MODEL)
    assert tokenizer.chat_template is not None
    prompt = render_chat(tokenizer.chat_template, [{"role": "user", "content": QUESTION}])
    request = Request(
        id="a",
        input_token_ids=tuple(tokenizer.encode(prompt)),
        max_tokens=24,
        end_id=tokenizer.end_id,
        stop_words=((tokenizer.stop_ids[1],),),
    )
    with Executor(plan.engine.directory) as executor:
        (answer,) = executor.generate([request])
    expected = tokenizer.decode([token for response in answer for token in response.token_ids])
    assert len(expected) > 5
    with TritonServer(plan.repository.directory, ports=Ports(0, 0, 0), drain_seconds=2) as server:
        assert "".join(piece.text for piece in stream(server.grpc_url, QUESTION, 24)) == expected
