"""Whether 16-bit matrices pay on this host: the decision follows the measured times."""

from __future__ import annotations

import torch

from trtqwen.executor.cpu.precision import PrecisionTrial, try_precision


def test_the_slowest_load_decides() -> None:
    assert PrecisionTrial(torch.bfloat16, {1: 2.0, 64: 1.8}).pays
    assert not PrecisionTrial(torch.bfloat16, {1: 2.0, 64: 0.3}).pays
    said = str(PrecisionTrial(torch.float16, {1: 0.5, 64: 2.0}))
    assert said == (
        "float16 matrices run at 0.50 times float32 for 1 rows, 2.00 times float32 for 64 rows: computing in float32"
    )


def test_a_trial_measures_every_load() -> None:
    trial = try_precision(torch.bfloat16, packed=True)
    assert set(trial.speedups) == {1, 64}
    assert all(speedup > 0 for speedup in trial.speedups.values())
