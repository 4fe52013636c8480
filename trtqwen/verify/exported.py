"""A directory that `trtqwen export` wrote, computed layer by layer as vLLM computes it.

compressed-tensors with INT8 inputs: a code of the input stands for `input_scale`, or for 1/127 of the largest
magnitude of its token. Without INT8 inputs, weights are multiplied out.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trtqwen.artifact.names import CONFIG
from trtqwen.diagnostics import CheckpointError
from trtqwen.hf.config import HfConfig, HfDtype, load_config
from trtqwen.hf.files import read_json
from trtqwen.hf.forward import DecoderLayer, Observer
from trtqwen.hf.names import EMBEDDING, LM_HEAD, NORM, expected_tensors
from trtqwen.hf.weights import open_weights
from trtqwen.nn.ops import to_torch
from trtqwen.nn.rotary import make_rotary
from trtqwen.recipe import CheckpointRecipe, override
from trtqwen.safetensors_io.format import Array
from trtqwen.safetensors_io.reader import SafetensorsReader

_SAME = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_size", "hidden_act", "rms_norm_eps", "rope_theta", "rope_scaling"),
)
_WEIGHTS = {"num_bits": 8, "type": "int", "symmetric": True}


def is_export(directory: Path) -> bool:
    """Return whether a directory holds a Hugging Face model instead of a TensorRT-LLM checkpoint."""
    path = directory / CONFIG
    content = read_json(path) if path.is_file() else {}
    return "model_type" in content and "mapping" not in content


class ExportedModel:
    """The model of such a directory; computes in float32 with the weights and scales it holds.

    Attributes:
        non_finite: names of tensors read so far that hold infinities or NaNs, with their file.

    Raises:
        SourceError: if config or weights are missing, damaged, or of another kind of model.
        CheckpointError: if the weights are quantized otherwise.
    """

    embedding_name, norm_name = EMBEDDING, NORM
    through_float16 = None  # depends on the checkpoint that it was made of

    def __init__(self, directory: Path, device: torch.device) -> None:
        self.config = load_config(directory, quantized=True)
        self._owner = open_weights(directory).owner
        self._device = device
        self.non_finite: list[str] = []
        self.int8_weights, self._inputs = _schemes(directory)
        self._rotary = make_rotary(self.config.rope_theta, self.config.head_size, self.config.rope_scaling, device)

    @property
    def head_name(self) -> str:
        return EMBEDDING if self.config.tie_word_embeddings else LM_HEAD

    @property
    def dtype(self) -> HfDtype:
        """The dtype of tensors that are not quantized."""
        return self.config.torch_dtype or "float32"

    @property
    def precision(self) -> str:
        """In words, such as `W8A8 bfloat16 (per token)`."""
        if not self.int8_weights:
            return self.dtype
        return {None: f"W8A16 {self.dtype}", "token": f"W8A8 {self.dtype} (per token)"}.get(
            self._inputs, f"W8A8 {self.dtype} (static)"
        )

    def recipe(self, source: HfConfig) -> CheckpointRecipe:
        """The settings whose conversion of the model would have this precision."""
        changes: dict[str, object] = {"dtype": self.dtype}
        scaling = self.config.rope_scaling
        if scaling and scaling.get("type") == "yarn" and source.rope_scaling is None:
            changes["yarn_factor"] = scaling.get("factor")
        if self._inputs is not None:
            changes |= {"quant": "int8_sq", "per_channel": True, "per_token": self._inputs == "token"}
        elif self.int8_weights:
            changes["quant"] = "int8_wo"
        return override(CheckpointRecipe(), changes)

    def problems(self, source: HfConfig) -> list[str]:
        """Fields of config.json that are not the model's, and tensors that are missing or of another shape."""
        found = [
            f"config.json says {name} {getattr(self.config, name)}, but the model has {getattr(source, name)}"
            for name in _SAME
            if not _alike(getattr(self.config, name), getattr(source, name))
        ]
        for name, shape in expected_tensors(self.config).items():
            if name != LM_HEAD or not self.config.tie_word_embeddings:
                found += [f"tensor {name!r} {problem}" for problem in self._problems(name, shape)]
        return found

    def _problems(self, name: str, shape: tuple[int, ...]) -> list[str]:
        packed, scale = f"{name}_packed", f"{name}_scale"
        if packed in self._owner:
            name, shape = packed, (shape[0], shape[1] // 4)
        if name not in self._owner:
            return ["is missing"]
        spec = self._owner[name].spec(name)
        if spec.shape != shape:
            return [f"has shape {list(spec.shape)}, where {list(shape)} is expected"]
        if spec.dtype.name in ("int8", "int32"):
            if scale not in self._owner:
                return ["has no scale"]
            rows, *_ = self._owner[scale].spec(scale).shape
            if rows != shape[0]:
                return [f"has {rows} scales for {shape[0]} rows"]
        return []

    def embed(self, token_ids: list[int]) -> Tensor:
        """Embeddings of a sequence, float32 [tokens, hidden]."""
        return to_torch(self.embedding_rows(np.array(token_ids))[0]).to(self._device, torch.float32)

    def embedding_rows(self, rows: Array) -> list[Array]:
        """Rows of the embedding, [rows, hidden]."""
        return [self._reader(EMBEDDING).rows(EMBEDDING, rows.tolist())]

    def final_gains(self) -> list[Array]:
        """Weights of the final norm, [hidden]."""
        return [self._tensor(NORM)]

    def head_rows(self, rows: Array) -> Array:
        """Rows of lm_head, [rows, hidden]."""
        return self._reader(self.head_name).rows(self.head_name, rows.tolist())

    def layer(self, index: int) -> ExportedLayer:
        """Load one decoder layer."""
        prefix = f"model.layers.{index}."
        names = [name for name in self._owner if name.startswith(prefix)]
        arrays = {name.removeprefix(prefix): self._tensor(name) for name in names}
        weights: dict[str, Tensor] = {}
        steps: dict[str, Tensor] = {}
        for name, array in arrays.items():
            module, _, kind = name.rpartition(".")
            if kind == "weight_packed":
                made = _unpacked(array, arrays[f"{module}.weight_scale"])
                weights[f"{module}.weight"] = torch.from_numpy(made).to(self._device)
            elif kind in ("weight", "bias", "input_scale"):
                weights[name] = to_torch(array).to(self._device, torch.float32)
            if kind == "weight" and array.dtype == np.int8:
                steps[module] = to_torch(arrays[f"{module}.weight_scale"]).to(self._device, torch.float32)[:, 0]
        for name in names:
            self.release(name)
        return ExportedLayer(self.config, prefix, weights, self._rotary, steps)

    def release(self, name: str) -> None:
        """Release the memory of a tensor."""
        self._reader(name).release(name)

    def _reader(self, name: str) -> SafetensorsReader:
        return self._owner[name]

    def _tensor(self, name: str) -> Array:
        array = self._reader(name).tensor(name)
        if array.dtype.kind not in "iu" and not np.isfinite(array).all():
            self.non_finite.append(f"{self._reader(name).path.name}: {name}")
        return array


class ExportedLayer(DecoderLayer):
    """A decoder layer of an export.

    Args:
        steps: what a code of the weights stands for, float32 [out], of each module with INT8 inputs.
    """

    def __init__(
        self, config: Any, prefix: str, weights: dict[str, Tensor], rotary: Any, steps: dict[str, Tensor]
    ) -> None:
        super().__init__(config, prefix, weights, rotary, torch.float32)
        self._steps = steps

    def _linear(self, hidden: Tensor, name: str, observe: Observer | None) -> Tensor:
        if name not in self._steps:
            return super()._linear(hidden, name, observe)
        static, bias = self._weights.get(f"{name}.input_scale"), self._weights.get(f"{name}.bias")
        step = static if static is not None else hidden.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
        codes = (hidden / step).round().clamp(-128, 127)
        output = F.linear(codes, self._weights[f"{name}.weight"]) * step * self._steps[name]
        output = output if bias is None else output + bias
        if observe is not None:
            observe(self._prefix + name, hidden, output)
        return output


def _unpacked(packed: Array, scale: Array) -> Array:
    """float32 [out, in] of int32 [out, in / 4], and scales [out, groups]."""
    codes = (np.ascontiguousarray(packed).view(np.uint8) ^ np.uint8(0x80)).view(np.int8)
    steps = scale.astype(np.float32)
    return codes * np.repeat(steps, codes.shape[1] // steps.shape[1], axis=1)


def _schemes(directory: Path) -> tuple[bool, str | None]:
    """Whether weights are INT8, and what an input's scale belongs to: `token`, `tensor`, or None for 16 bits."""
    path = directory / CONFIG
    content = read_json(path).get("quantization_config")
    if content is None:
        return False, None
    try:
        inputs = set()
        for group in content["config_groups"].values():
            if not _WEIGHTS.items() <= group["weights"].items():
                raise ValueError(f"weights {group['weights']}")
            given = group["input_activations"]
            if given is not None and not _WEIGHTS.items() <= given.items():
                raise ValueError(f"input_activations {given}")
            inputs.add(None if given is None else str(given["strategy"]))
        [strategy] = inputs
        if content["quant_method"] != "compressed-tensors" or strategy not in (None, "token", "tensor"):
            raise ValueError(f"quant_method {content['quant_method']}, strategy {strategy}")
    except (KeyError, TypeError, AttributeError, ValueError) as problem:
        raise CheckpointError(
            f"{path}: the weights are quantized in a way that `trtqwen export` does not write ({problem})",
            "verify a directory that it wrote",
        ) from None
    return True, strategy


def _alike(one: object, other: object) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_alike(one[key], other[key]) for key in one)
    if isinstance(one, float) and isinstance(other, float | int):
        return math.isclose(one, other, rel_tol=1e-6)
    return one == other
