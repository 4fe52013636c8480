"""Plots of a comparison. matplotlib is an extra; it is imported when a plot is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtqwen.diagnostics import InputError
from trtqwen.verify.verdict import FLOAT16_MAX, Thresholds

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from trtqwen.verify.compare import Comparison, LayerComparison

_FLOOR = 1e-8  # where zero is drawn on a logarithmic axis
_INPUTS = {
    "self_attn.q_proj": "q, k, v",
    "self_attn.o_proj": "o",
    "mlp.gate_proj": "gate, up",
    "mlp.down_proj": "down",
}

NO_MATPLOTLIB = "matplotlib is not installed"


def can_plot() -> bool:
    """Tell whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def require_matplotlib(option: str) -> None:
    """Raise an InputError that names the command's option unless plots can be drawn."""
    if not can_plot():
        raise InputError(f"{option}: {NO_MATPLOTLIB}", "`pip install 'trtqwen[report]'`")


def plot_comparison(comparison: Comparison, limits: Thresholds, title: str, path: Path) -> None:
    """Errors and largest activations, layer by layer, as a PNG."""
    figure, (errors, activations) = _figure(title, 2)
    _draw_errors(errors, comparison.layers, limits)
    _draw(activations, "layer's largest", [layer.max_activation for layer in comparison.layers])
    _draw_limit(activations, "float16's largest", FLOAT16_MAX)
    _label(activations, "|activation|")
    figure.savefig(path)


def plot_quality(
    layers: Sequence[LayerComparison],
    outliers: Mapping[str, float],
    bias_norms: Sequence[float],
    bias_limit: float,
    title: str,
    path: Path,
) -> None:
    """Errors, activation outliers and k_proj bias norms, layer by layer, as a PNG; what is empty is left out.

    Args:
        outliers: largest by median channel, by Hugging Face module name.
        bias_limit: the norm above which an INT8 KV cache is refused.
    """
    figure, axes = _figure(title, bool(layers) + bool(outliers) + 1)
    free = iter(axes)
    if layers:
        _draw_errors(next(free), layers)
    if outliers:
        axis = next(free)
        for module, label in _INPUTS.items():
            _draw(axis, label, [outliers[f"model.layers.{layer}.{module}"] for layer in range(len(bias_norms))])
        _label(axis, "input channels: largest / median")
    axis = next(free)
    _draw(axis, "k_proj.bias", bias_norms)
    _draw_limit(axis, "limit of an INT8 KV cache", bias_limit)
    _label(axis, "norm")
    figure.savefig(path)


def _figure(title: str, count: int) -> tuple[Figure, Sequence[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 0.6 + 2.6 * count), dpi=110, layout="constrained")
    figure.suptitle(title)
    return figure, list(figure.subplots(count, 1, squeeze=False)[:, 0])


def _draw_errors(axis: Any, layers: Sequence[LayerComparison], limits: Thresholds | None = None) -> None:
    blocks = {"attention": "attention_error", "MLP": "mlp_error", "hidden states so far": "accumulated_error"}
    for label, name in blocks.items():
        line = _draw(axis, label, [getattr(layer, name) for layer in layers])
        if limits is not None and hasattr(limits, name):
            _draw_limit(axis, f"limit of {label}", getattr(limits, name), line.get_color())
    _label(axis, "relative error")


def _draw(axis: Any, label: str, values: Sequence[float]) -> Any:
    [line] = axis.plot([max(value, _FLOOR) for value in values], marker="o", markersize=4, label=label)
    return line


def _draw_limit(axis: Any, label: str, value: float, color: str = "tab:red") -> None:
    axis.axhline(max(value, _FLOOR), color=color, linestyle="--", linewidth=1, label=label)


def _label(axis: Any, what: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_yscale("log")
    axis.set_ylabel(what)
    axis.set_xlabel("layer")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.3)
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)
