"""The names of TensorRT-LLM and vLLM releases and graphics cards that trtqwen knows."""

from __future__ import annotations

from typing import Literal

Release = Literal["0.17.0", "0.18.2", "0.19.0", "0.20.0", "0.21.0", "1.0.0", "1.1.0", "1.2.0", "1.2.1"]
LlmApiRelease = Literal["1.2.1", "1.3.0"]
VllmRelease = Literal["0.24.0", "0.32.0"]
CardName = Literal["rtx-4090d", "rtx-4090", "h100-sxm", "h200-sxm"]
