"""`trtqwen verify`: compare a checkpoint with the model that it was made from."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table

from trtqwen.cli.output import Json, print_json, progress_bars, stderr, stdout
from trtqwen.diagnostics import EngineError
from trtqwen.hf.config import load_config
from trtqwen.quantize.texts import HELDOUT, read_texts
from trtqwen.recipe import Int8LayoutChoice
from trtqwen.verify.samples import read_samples

if TYPE_CHECKING:
    from trtqwen.verify.compare import Comparison

_TEXTS = 50  # whose token ids are compared with transformers'


def command(
    checkpoint: Annotated[Path, typer.Argument(help="Verify this TensorRT-LLM checkpoint, or this export.")],
    model: Annotated[Path, typer.Option(help="Compare with this Hugging Face model directory.")],
    text: Annotated[
        Path | None, typer.Option(help="Run on this text or JSONL file. [default: bundled texts]")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=2, help="Run this many tokens, spread over the texts.")] = 4096,
    int8_layout: Annotated[
        Int8LayoutChoice | None,
        typer.Option(help="Set the INT8 layout of the weights. [default: that of the manifest]"),
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Write verify.json and verify.png to this directory.")] = None,
    max_layer_error: Annotated[float | None, typer.Option(min=0, help="Limit the relative error of a layer.")] = None,
    max_kl: Annotated[float | None, typer.Option(min=0, help="Limit the mean KL divergence, in nats.")] = None,
    min_top1: Annotated[
        float | None, typer.Option(min=0, max=1, help="Require this share of equal next tokens.")
    ] = None,
    max_perplexity: Annotated[float | None, typer.Option(help="Limit the relative increase of perplexity.")] = None,
    max_activation: Annotated[
        float | None, typer.Option(min=0, help="Limit activations in float16. [default: 32752]")
    ] = None,
    max_model_perplexity: Annotated[
        float | None,
        typer.Option(
            min=1, help="Limit the perplexity of the model itself. [default: that of the texts' token frequencies]"
        ),
    ] = None,
    reference: Annotated[
        Literal["own", "transformers"],
        typer.Option(help="Compare with transformers too: perplexity, token ids and chats. Loads the whole model."),
    ] = "own",
    json: Json = False,
) -> None:
    """Run every rank of a checkpoint layer by layer, compare with the original model, and fail above the limits.

    For a directory that `export` wrote, the command computes what vLLM would compute. Unless you set the limits, they
    depend on the precision.
    """
    if importlib.util.find_spec("torch") is None:
        raise EngineError("verify needs PyTorch, which is not installed", "`pip install 'trtqwen[torch]'`")
    from trtqwen.verify.plot import require_matplotlib
    from trtqwen.verify.reference import require_transformers
    from trtqwen.verify.run import verify, write_report  # the other commands start without PyTorch

    if report is not None:
        require_matplotlib("--report")
    limits = {
        "attention_error": max_layer_error,
        "mlp_error": max_layer_error,
        "kl": max_kl,
        "top1": min_top1,
        "perplexity": max_perplexity,
        "max_activation": max_activation,
        "model_perplexity": max_model_perplexity,
    }
    if reference == "transformers":
        require_transformers()
    layers = load_config(model).num_hidden_layers
    samples = read_samples(model, text or HELDOUT, max_tokens)
    with progress_bars() as bars:
        result = verify(
            checkpoint,
            model,
            samples,
            int8_layout=int8_layout,
            limits={name: limit for name, limit in limits.items() if limit is not None},
            texts=read_texts(text or HELDOUT)[:_TEXTS] if reference == "transformers" else None,
            progress=bars.add("verifying", layers, unit="layers"),
        )
    if report is not None:
        write_report(result, report)
    if json:
        print_json(result.as_json())
    elif result.comparison is not None:
        _print(result.comparison)
        if result.reference is not None:
            words = f"transformers {result.reference.version}: perplexity {result.reference.perplexity:.4f}"
            stdout.print(words, highlight=False)
    if problem := result.diagnostic:
        stderr.print(f"error: {problem.what}", style="bold red", markup=False, highlight=False, soft_wrap=True)
        stderr.print(f"hint: {problem.hint}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1)
    if not json:
        verdict = f"{checkpoint}: agrees with {model}, within the limits of {result.precision}"
        stdout.print(verdict, style="green", markup=False, highlight=False, soft_wrap=True)


def _print(comparison: Comparison) -> None:
    table = Table("layer", "attention", "mlp", "accumulated", "cosine", "largest |activation|")
    for layer in comparison.layers:
        errors = (layer.attention_error, layer.mlp_error, layer.accumulated_error)
        table.add_row(
            str(layer.layer),
            *(f"{error:.1e}" for error in errors),
            f"{layer.cosine:.6f}",
            f"{layer.max_activation:.4g}",
        )
    stdout.print(table)
    head = comparison.head
    stdout.print(
        f"{head.tokens} tokens: KL {head.kl_mean:.2e} nats (largest {head.kl_max:.2e}), "
        f"top-1 agreement {head.top1_agreement:.2%}, perplexity {head.model_perplexity:.4f} -> "
        f"{head.checkpoint_perplexity:.4f} ({head.perplexity_increase:+.3%})",
        highlight=False,
    )
