"""Comparison of model and checkpoint on some texts, with one decoder layer of each in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from trtqwen.checkpoint.convert import ConversionPlan
from trtqwen.hf.forward import LayerwiseModel
from trtqwen.hf.names import EMBEDDING as HF_EMBEDDING
from trtqwen.hf.names import LM_HEAD as HF_LM_HEAD
from trtqwen.nn.ops import rms_norm, to_torch
from trtqwen.safetensors_io.format import Array
from trtqwen.verify.head import ROWS, HeadComparison, LogitsComparer

HF_NORM = "model.norm.weight"
Progress = Callable[[int], None]


class CandidateLayer(Protocol):
    """A decoder layer of the candidate."""

    def attention(self, hidden: Tensor) -> Tensor:
        """What attention adds to the hidden states of one sequence, [tokens, hidden]."""
        ...

    def mlp(self, hidden: Tensor) -> Tensor:
        """What the MLP adds to the hidden states, [tokens, hidden]."""
        ...


class Candidate(Protocol):
    """The candidate that is compared with the model: a checkpoint, or an export of one.

    Attributes:
        embedding_name, norm_name, head_name: of its tensors that are not quantized.
        non_finite: names of tensors read so far that hold infinities or NaNs, with their file.
        through_float16: whether these were rounded to float16 first; None if that is not known.
    """

    @property
    def embedding_name(self) -> str: ...
    @property
    def norm_name(self) -> str: ...
    @property
    def head_name(self) -> str: ...
    @property
    def non_finite(self) -> Sequence[str]: ...
    @property
    def through_float16(self) -> bool | None: ...

    def embed(self, token_ids: list[int]) -> Tensor:
        """Embeddings of a sequence, float32 [tokens, hidden]."""
        ...

    def embedding_rows(self, rows: Array) -> list[Array]:
        """Rows of the embedding, each [rows, hidden], in every copy it has."""
        ...

    def final_gains(self) -> list[Array]:
        """Weights of the final norm, [hidden], in every copy it has."""
        ...

    def head_rows(self, rows: Array) -> Array:
        """Rows of lm_head, [rows, hidden]."""
        ...

    def layer(self, index: int) -> CandidateLayer:
        """Load one decoder layer."""
        ...

    def release(self, name: str) -> None:
        """Release the memory of a tensor."""
        ...


@dataclass(frozen=True)
class LayerComparison:
    """One decoder layer, over all tokens. Errors are |checkpoint - model| / |model| of a token, averaged over tokens.

    Attributes:
        layer: index.
        attention_error, mlp_error: local: of what the block adds when it is fed with the model's own hidden states.
        accumulated_error: of the hidden states behind the layer, each side on its own stream since the embedding.
        cosine: smallest cosine of those hidden states over all tokens.
        max_activation: largest magnitude in the model's layer: inputs and outputs of its linears, hidden states.
    """

    layer: int
    attention_error: float
    mlp_error: float
    accumulated_error: float
    cosine: float
    max_activation: float


@dataclass(frozen=True)
class Comparison:
    """All measurements.

    Attributes:
        differing_rows: rows of embedding, final norm and lm_head that are not the model's, of those that differ.
        non_finite: tensors with infinities or NaNs.
    """

    layers: tuple[LayerComparison, ...]
    head: HeadComparison
    differing_rows: dict[str, int]
    non_finite: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """For json.dumps; numbers that are not finite become null."""
        content = asdict(self)
        content["head"]["perplexity_increase"] = self.head.perplexity_increase
        result: dict[str, Any] = _finite(content)
        return result


@dataclass
class _Blocks:
    """Observes a layer of the model: the outputs of its two blocks, and its largest activation."""

    attention: Tensor = field(default_factory=lambda: torch.empty(0))
    mlp: Tensor = field(default_factory=lambda: torch.empty(0))
    largest: float = 0.0

    def __call__(self, module: str, x: Tensor, y: Tensor) -> None:
        self.see(x)
        self.see(y)
        if module.endswith(".o_proj"):
            self.attention = y
        elif module.endswith(".down_proj"):
            self.mlp = y

    def see(self, tensor: Tensor) -> None:
        self.largest = max(self.largest, float(tensor.abs().max()))


@torch.inference_mode()
def compare(
    plan: ConversionPlan,
    checkpoint: Candidate,
    samples: Sequence[list[int]],
    device: torch.device,
    progress: Progress = lambda layers: None,
) -> Comparison:
    """Run both on `samples`, in float32.

    Resident memory: one decoder layer of each, a block of the heads, and the hidden states of all samples, twice.

    Args:
        plan: the conversion that would have made the checkpoint, for its source and roundings.
        samples: token ids, at least two each.
        progress: called with the number of layers done since the last call.
    """
    model = LayerwiseModel(plan.source, torch.float32, device, torch.float32)
    theirs = [model.embed(sample) for sample in samples]
    ours = [checkpoint.embed(sample) for sample in samples]
    differing = _differing_rows(plan, checkpoint, checkpoint.embedding_name, HF_EMBEDDING, checkpoint.embedding_rows)
    differing |= _differing_rows(
        plan, checkpoint, checkpoint.norm_name, HF_NORM, lambda rows: [g[rows] for g in checkpoint.final_gains()]
    )
    layers = []
    for index in range(model.num_layers):
        reference, layer = model.layer(index), checkpoint.layer(index)
        blocks = _Blocks()
        errors = []
        for number, (hidden, own) in enumerate(zip(theirs, ours, strict=True)):
            theirs[number] = reference(hidden, blocks)
            ours[number] = _forward(layer, own)
            blocks.see(theirs[number])
            errors.append(_errors(layer, hidden, blocks, theirs[number], ours[number]))
        joined = [torch.cat(values) for values in zip(*errors, strict=True)]
        attention, mlp, accumulated = (float(values.mean()) for values in joined[:3])
        layers.append(LayerComparison(index, attention, mlp, accumulated, float(joined[3].min()), blocks.largest))
        progress(1)
    head, stale = _compare_heads(plan, checkpoint, theirs, ours, samples, device)
    return Comparison(tuple(layers), head, differing | stale, tuple(checkpoint.non_finite))


def _forward(layer: CandidateLayer, hidden: Tensor) -> Tensor:
    middle = hidden + layer.attention(hidden)
    return middle + layer.mlp(middle)


def _errors(
    layer: CandidateLayer, hidden: Tensor, blocks: _Blocks, theirs: Tensor, ours: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Local errors of attention and MLP, accumulated error and cosine, [tokens] each."""
    return (
        _relative(layer.attention(hidden), blocks.attention),
        _relative(layer.mlp(hidden + blocks.attention), blocks.mlp),
        _relative(ours, theirs),
        F.cosine_similarity(ours, theirs, dim=-1),
    )


def _relative(ours: Tensor, theirs: Tensor) -> Tensor:
    error, size = ((tensor * tensor).sum(dim=-1).sqrt() for tensor in (ours - theirs, theirs))
    return error / size.clamp(min=1e-12)


def _compare_heads(
    plan: ConversionPlan,
    checkpoint: Candidate,
    theirs: Sequence[Tensor],
    ours: Sequence[Tensor],
    samples: Sequence[list[int]],
    device: torch.device,
) -> tuple[HeadComparison, dict[str, int]]:
    """Logits of all tokens but the last of each sample, and the rows of lm_head that are not the model's."""
    config, source = plan.source.config, plan.source
    gains = source.tensor(HF_NORM), checkpoint.final_gains()[0]
    normed = [
        rms_norm(
            torch.cat([hidden[:-1] for hidden in stream]),
            to_torch(gain).to(device, torch.float32),
            config.rms_norm_eps,
        )
        for stream, gain in zip((theirs, ours), gains, strict=True)
    ]
    targets = torch.tensor([token for sample in samples for token in sample[1:]], device=device)
    comparer = LogitsComparer(targets)
    head_name = HF_EMBEDDING if source.tied else HF_LM_HEAD
    head = source.tensor(head_name)

    def rows_of(rows: Array) -> list[Array]:
        mine = checkpoint.head_rows(rows)
        tables = (to_torch(table).to(device, torch.float32) for table in (head[rows], mine))
        comparer.add(int(rows[0]), *(F.linear(hidden, table) for hidden, table in zip(normed, tables, strict=True)))
        return [mine]

    stale = _differing_rows(plan, checkpoint, checkpoint.head_name, head_name, rows_of)
    return comparer.result(), stale


def _differing_rows(
    plan: ConversionPlan,
    checkpoint: Candidate,
    name: str,
    source_name: str,
    rows_of: Callable[[npt.NDArray[np.int64]], list[Array]],
) -> dict[str, int]:
    """How many rows of an unquantized tensor are not the source's, in the checkpoint's dtype; nothing if all are.

    Args:
        rows_of: the checkpoint's rows, in every copy it has.
    """
    source = plan.source.tensor(source_name)
    differing = 0
    for start in range(0, len(source), ROWS):
        rows = np.arange(start, min(start + ROWS, len(source)))
        expected = _rounded(plan, source[rows], checkpoint.through_float16)
        for copy in rows_of(rows):
            unequal = np.logical_and.reduce([copy != one for one in expected])
            differing += int(unequal.reshape(len(rows), -1).any(axis=1).sum())
        plan.source.finish(source_name)
        checkpoint.release(name)
    return {name: differing} if differing else {}


def _rounded(plan: ConversionPlan, tensor: Array, through_float16: bool | None) -> list[Array]:
    """What a tensor that is not quantized may have become."""
    ways = [tensor] if not through_float16 else []
    if through_float16 is not False:
        ways.append(tensor.astype(np.float16))
    return [way.astype(plan.precision.dtype) for way in ways]


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
