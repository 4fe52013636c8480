"""SmoothQuant's rules hold no matrix; that their tensors are NVIDIA's, `test_golden` says."""

from __future__ import annotations

import itertools
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from trtqwen.checkpoint import smoothquant_tensors
from trtqwen.checkpoint.mapping import RankMapping
from trtqwen.checkpoint.rule import Precision
from trtqwen.demo import MODEL
from trtqwen.hf.config import load_config
from trtqwen.quantize.ranges import LINEARS
from trtqwen.quantize.smoothquant import ActivationRange, SmoothQuantMode
from trtqwen.safetensors_io.writer import SafetensorsWriter

HIDDEN, INNER = 1024, 8192
MODES = [SmoothQuantMode(*flags) for flags in itertools.product([False, True], repeat=2)]


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.quant_algo)
def test_no_matrix_is_held(mode: SmoothQuantMode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer with three matrices of 8 Mi weights is written with less than 8 MiB beside the sources."""
    monkeypatch.setattr(smoothquant_tensors, "THREADS", 2)
    shape = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_attention_heads": 8, "num_key_value_heads": 2}
    config = load_config(MODEL).model_copy(update=shape)
    most = np.ones(INNER, np.float32)
    ranges = {
        f"model.layers.0.{linear}": ActivationRange(most if "down" in linear else most[:HIDDEN], most)
        for linear in LINEARS
    }
    precision = Precision(np.dtype(np.float16), smoothquant=mode)
    rules = list(
        smoothquant_tensors.SmoothRules(config, RankMapping(2, 1), precision, mode).layer("t", "model.layers.0", 0)
    )
    plan = {name: spec for rule in rules for name, spec in rule.specs.items()}
    sources = [[np.full(shape, 0.5, ml_dtypes.bfloat16) for shape in rule.sources.values()] for rule in rules]
    files = [SafetensorsWriter(tmp_path / f"rank{rank}", plan) for rank in range(2)]
    tracemalloc.start()
    try:
        with files[0], files[1]:
            for rule, tensors in zip(rules, sources, strict=True):
                for file, parts in zip(files, rule.produce(tensors, ranges), strict=True):
                    for name in rule.specs:
                        file.write(name, parts[name])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < HIDDEN * INNER
    ranks = [load_file(file.path) for file in files]
    assert all((rank[f"t.mlp.{name}.weight"] == 127).all() for rank in ranks for name in ("fc", "gate", "proj"))
