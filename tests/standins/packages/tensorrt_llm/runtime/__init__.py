"""What `trtqwen/selftest/runner.py` uses of TensorRT-LLM 1.2: an engine that answers from a file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

PAD = 0


class ModelRunnerCpp:
    """`STANDIN_ANSWERS` names a JSON list: an answer for each prompt, by the prompts' order."""

    @classmethod
    def from_dir(
        cls,
        engine_dir: str,
        *,
        max_tokens_in_paged_kv_cache: int | None = None,
        enable_context_fmha_fp32_acc: bool | None = None,
    ) -> ModelRunnerCpp:
        print("[TensorRT-LLM][INFO] Engine version 1.2.1 found in the config file")
        if os.environ.get("STANDIN_FAIL") == "run":
            raise RuntimeError("Assertion failed: Can't allocate new blocks. No free blocks left.")
        assert (Path(engine_dir) / "rank0.engine").read_bytes() == b"engine of rank 0"
        return cls()

    def generate(
        self, batch_input_ids: list[torch.Tensor], *, max_new_tokens: int, end_id: int, pad_id: int, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        assert kwargs == {"top_k": 1, "return_dict": True, "output_sequence_lengths": True}
        assert all(ids.dtype == torch.int32 and ids.dim() == 1 for ids in batch_input_ids)
        answers = json.loads(Path(os.environ["STANDIN_ANSWERS"]).read_text())
        rows = [ids.tolist() + answer[:max_new_tokens] for ids, answer in zip(batch_input_ids, answers, strict=True)]
        longest = max(map(len, rows))
        padded = [row + [PAD] * (longest - len(row)) for row in rows]
        return {
            "output_ids": torch.tensor(padded, dtype=torch.int32)[:, None],
            "sequence_lengths": torch.tensor([[len(row)] for row in rows], dtype=torch.int32),
        }
