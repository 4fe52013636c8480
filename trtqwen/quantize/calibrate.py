"""Calibration: the largest activations of every linear layer over some texts, with one layer in memory at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from trtqwen.artifact.digest import digest_file
from trtqwen.diagnostics import InputError, SourceError
from trtqwen.hf.source import HfModel
from trtqwen.hf.tokenizer import Tokenizer
from trtqwen.quantize.ranges import read_ranges
from trtqwen.quantize.smoothquant import ActivationRange
from trtqwen.quantize.texts import CALIBRATION, read_texts, tokenize
from trtqwen.recipe import CheckpointRecipe

MAX_SAMPLES = 512
MAX_TOKENS = 512
Progress = Callable[[int], None]


def calibration_inputs(settings: CheckpointRecipe) -> dict[str, str]:
    """Digests of the files that the activation ranges come from, by role.

    Raises:
        InputError: if the file cannot be read.
    """
    if not settings.calibrated:
        return {}
    if settings.act_ranges is not None:
        return {"act_ranges": _digest(Path(settings.act_ranges))}
    return {"calib": _digest(_calibration_file(settings))}


def activation_ranges(
    source: HfModel, settings: CheckpointRecipe, progress: Progress = lambda layers: None
) -> dict[str, ActivationRange]:
    """The ranges a conversion needs: read from `act_ranges`, or calibrated.

    Args:
        progress: called with the number of layers done since the last call.

    Raises:
        InputError: if the file of ranges or texts cannot be used, or the model has no tokenizer.
    """
    if settings.act_ranges is not None:
        ranges = read_ranges(Path(settings.act_ranges), source.config.num_hidden_layers)
        _check_sizes(ranges, source, settings.act_ranges)
        return ranges
    texts = read_texts(_calibration_file(settings))[:MAX_SAMPLES]
    samples = tokenize(texts, Tokenizer(source.directory), MAX_TOKENS, chat=settings.chat_template)
    return calibrate(source, samples, progress)


def calibrate(
    source: HfModel, samples: list[list[int]], progress: Progress = lambda layers: None
) -> dict[str, ActivationRange]:
    """Run the model in float16, as NVIDIA's converter does, and find the largest |input| and |output| of each linear.

    Resident memory: one decoder layer (in float32 on CPU) and the hidden states of all samples. Uses CUDA if it is
    there.

    Raises:
        SourceError: if an activation overflows float16.
    """
    import torch  # conversion without calibration does not need it

    from trtqwen.hf.forward import LayerwiseModel

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    model = LayerwiseModel(source, torch.float16, device, torch.float16 if cuda else torch.float32)
    largest: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def observe(module: str, x: torch.Tensor, y: torch.Tensor) -> None:
        seen = x.abs().amax(dim=0), y.abs().amax(dim=0)
        if module in largest:
            seen = torch.maximum(seen[0], largest[module][0]), torch.maximum(seen[1], largest[module][1])
        largest[module] = seen

    hidden = [model.embed(sample) for sample in samples]
    for index in range(model.num_layers):
        layer = model.layer(index)
        for place, states in enumerate(hidden):  # in place: the states of 512 long texts are 2 GB for 7B
            hidden[place] = layer(states, observe)
        progress(1)
    ranges = {
        module: ActivationRange(x.float().cpu().numpy(), y.float().cpu().numpy())
        for module, (x, y) in largest.items()
    }
    for module, span in ranges.items():
        if not (np.isfinite(span.x).all() and np.isfinite(span.y).all()):
            raise SourceError(
                (f"{source.directory}: activations of {module} overflow float16, in which TensorRT-LLM calibrates"),
                "use quant int8_wo or none, without an INT8 KV cache",
            )
    return ranges


def _check_sizes(ranges: dict[str, ActivationRange], source: HfModel, path: str) -> None:
    for module, span in ranges.items():
        out, inner = source.spec(f"{module}.weight").shape
        if (span.x.shape, span.y.shape) != ((inner,), (out,)):
            raise InputError(
                (
                    f"{path}: {module} has ranges of {span.x.size} inputs and {span.y.size} outputs, but the "
                    f"model's has {inner} and {out}"
                ),
                "use the ranges of this model",
            )


def _digest(path: Path) -> str:
    try:
        return digest_file(path)
    except OSError as problem:
        raise InputError(f"{path}: cannot be read ({problem.strerror})", "check the path") from None


def _calibration_file(settings: CheckpointRecipe) -> Path:
    return Path(settings.calib) if settings.calib else CALIBRATION
