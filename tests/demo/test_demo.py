from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.models import bundled_model
from tests.slow import SLOW
from trtqwen.checkpoint.mapping import RankMapping
from trtqwen.checkpoint.sharding import check_parallel
from trtqwen.demo import HELDOUT, MODEL
from trtqwen.hf.config import load_config
from trtqwen.hf.tokenizer import Tokenizer


@SLOW  # `make demo` runs it too
@pytest.mark.triton
def test_the_demo_goes_the_whole_way() -> None:
    start = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-m", "trtqwen", "demo", "--json"], capture_output=True, text=True, timeout=110
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    names = ["checkpoint", "engine", "repository", "triton up", "generation", "triton down"]
    assert [stage["name"] for stage in report["stages"]] == names
    assert sum(stage["seconds"] for stage in report["stages"]) <= time.monotonic() - start
    assert len(report["answers"]) == 8
    assert len({answer["language"] for answer in report["answers"]}) >= 4
    for answer in report["answers"]:
        assert answer["text"].strip()
        assert answer["tokens"] > 0
        assert "�" not in answer["text"]
    assert report["max_in_flight"] > 1
    assert report["iterations"] < report["tokens"]  # requests shared steps


def test_the_bundled_model_is_small_and_splits_over_four_ranks() -> None:
    config = load_config(MODEL)
    check_parallel(config, RankMapping(4))
    assert config.num_key_value_heads >= 4
    assert config.hidden_size // 4 % 64 == config.intermediate_size // 4 % 64 == 0
    assert not config.tie_word_embeddings
    assert sum(path.stat().st_size for path in Path(MODEL).parent.rglob("*") if path.is_file()) < 12e6


def test_the_bundled_model_has_learned_something() -> None:
    """Held-out perplexity far under that of a unigram model fitted on the held-out text itself."""
    tokenizer = Tokenizer(MODEL)
    model = bundled_model()
    lines = [json.loads(line) for line in HELDOUT.read_text(encoding="utf-8").splitlines()]
    documents = [tokenizer.encode(line["text"])[:256] for line in lines][::3]
    counts = torch.bincount(torch.tensor([token for ids in documents for token in ids])).double()
    unigram = (counts / counts.sum()).log()[counts > 0] @ (counts / counts.sum())[counts > 0]
    loss, total = 0.0, 0
    with torch.inference_mode():
        for ids in documents:
            tokens = torch.tensor([ids])
            loss += float(model(tokens, labels=tokens).loss) * (len(ids) - 1)
            total += len(ids) - 1
    assert loss / total < -float(unigram) - 2.0  # perplexity lower by more than e^2
