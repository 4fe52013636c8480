"""`trtqwen convert`: convert Hugging Face weights to a TensorRT-LLM checkpoint."""

from __future__ import annotations

import time
from json import loads as load_json
from pathlib import Path
from typing import Annotated, Any

import typer

from trtqwen.artifact.directory import check_output
from trtqwen.artifact.names import rank_weights
from trtqwen.checkpoint.convert import (
    ConversionPlan,
    Inspect,
    Progress,
    check_kv_cache,
    plan_conversion,
    run_conversion,
)
from trtqwen.checkpoint.rule import Ranges
from trtqwen.cli.output import Bars, DryRun, Json, print_json, print_warnings, progress_bars, size, stdout
from trtqwen.facts.names import Release
from trtqwen.recipe import (
    CheckpointRecipe,
    DtypeChoice,
    EmbeddingSharding,
    Int8LayoutChoice,
    KvCache,
    Quant,
    load_recipe,
    override,
)
from trtqwen.verify.quality import QUALITY, has_int8, quality_report

NoQuality = Annotated[bool, typer.Option("--no-quality", help="Skip the quality report of an INT8 checkpoint.")]


def command(
    model: Annotated[Path, typer.Argument(help="Read this Hugging Face model directory.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Write the checkpoint here.")],
    recipe: Annotated[str | None, typer.Option(help="Take the settings below from this recipe.")] = None,
    dtype: Annotated[
        DtypeChoice | None,
        typer.Option(help="Set the dtype of the weights; auto keeps a 16-bit dtype. [default: auto]"),
    ] = None,
    tp: Annotated[
        int | None, typer.Option(min=1, max=8, help="Set the number of tensor-parallel ranks. [default: 1]")
    ] = None,
    pp: Annotated[
        int | None, typer.Option(min=1, max=4, help="Set the number of pipeline stages. [default: 1]")
    ] = None,
    quant: Annotated[
        Quant | None, typer.Option(help="Quantize: INT8 weight-only (W8A16) or SmoothQuant (W8A8). [default: none]")
    ] = None,
    sq_alpha: Annotated[
        float | None, typer.Option(min=0, max=1, help="Set the alpha of SmoothQuant. [default: 0.5]")
    ] = None,
    per_channel: Annotated[
        bool | None, typer.Option("--per-channel", help="Scale each output channel separately (SmoothQuant).")
    ] = None,
    per_token: Annotated[
        bool | None, typer.Option("--per-token", help="Scale each token separately (SmoothQuant).")
    ] = None,
    kv_cache: Annotated[
        KvCache | None, typer.Option(help="Set the KV cache precision; int8 adds its scales. [default: auto]")
    ] = None,
    int8_layout: Annotated[
        Int8LayoutChoice | None,
        typer.Option(help="Set the INT8 layout on disk: sm80 for RTX 4090D, plain for any GPU. [default: plain]"),
    ] = None,
    embedding_sharding: Annotated[
        EmbeddingSharding | None, typer.Option(help="Shard the embedding over the ranks. [default: none]")
    ] = None,
    yarn_factor: Annotated[
        float | None, typer.Option(help="Extend the context with YaRN: 4 turns 32,768 tokens into 131,072.")
    ] = None,
    calib: Annotated[
        str | None, typer.Option(help="Calibrate with this text or JSONL file. [default: bundled texts]")
    ] = None,
    chat_template: Annotated[
        bool | None, typer.Option("--chat-template", help="Render calibration texts as user messages first.")
    ] = None,
    act_ranges: Annotated[
        str | None, typer.Option(help="Read activation ranges from this file instead of calibrating.")
    ] = None,
    release: Annotated[
        Release | None, typer.Option(help="Set the TensorRT-LLM release that reads the checkpoint. [default: 1.2.1]")
    ] = None,
    no_quality: NoQuality = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="Replace existing files, and allow an INT8 KV cache that damages the answers."),
    ] = False,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Convert Hugging Face Qwen2/Qwen2.5 weights to a TensorRT-LLM checkpoint."""
    base = load_recipe(recipe).checkpoint if recipe else CheckpointRecipe()
    changes: dict[str, object] = {
        "dtype": dtype,
        "tp_size": tp,
        "pp_size": pp,
        "quant": quant,
        "sq_alpha": sq_alpha,
        "per_channel": per_channel,
        "per_token": per_token,
        "kv_cache": kv_cache,
        "int8_layout": int8_layout,
        "embedding_sharding": embedding_sharding,
        "yarn_factor": yarn_factor,
        "calib": calib,
        "chat_template": chat_template,
        "act_ranges": act_ranges,
        "release": release,
    }
    check_output(output, force=force, sources=[model])
    plan = plan_conversion(model, override(base, changes))
    check_kv_cache(plan, force=force)
    print_warnings(plan.findings)
    summary = _summary(plan, output)
    if not dry_run:
        start = time.perf_counter()
        with progress_bars() as bars:
            inspect = quality_inspector(bars, wanted=not no_quality)
            run_conversion(
                plan,
                output,
                force=force,
                calibrated=calibration_bar(bars, plan),
                progress=bars.add("converting", plan.nbytes),
                inspect=inspect,
            )
        summary["seconds"] = round(time.perf_counter() - start, 3)
        if quality := read_quality(output):
            summary["quality"] = quality
    if json:
        print_json(summary)
    else:
        _print(plan, summary)


def calibration_bar(bars: Bars, plan: ConversionPlan) -> Progress:
    """Make a progress bar for calibration if the conversion calibrates."""
    if not plan.settings.calibrated or plan.settings.act_ranges:
        return lambda layers: None
    return bars.add("calibrating", plan.source.config.num_hidden_layers, unit="layers")


def quality_inspector(bars: Bars, *, wanted: bool) -> Inspect:
    """Make the callback that writes the quality report of an INT8 checkpoint."""

    def inspect(plan: ConversionPlan, directory: Path, ranges: Ranges) -> None:
        if wanted and has_int8(plan):
            layers = bars.add("measuring quality", plan.source.config.num_hidden_layers, unit="layers")
            quality_report(plan, directory, ranges, layers)

    return inspect


def read_quality(checkpoint: Path) -> dict[str, Any] | None:
    """Read the summary of a checkpoint's quality report; None if it has none."""
    return _quality(checkpoint / QUALITY) if (checkpoint / QUALITY).is_file() else None


def _quality(path: Path) -> dict[str, Any]:
    """Read the summary of a quality report."""
    content = load_json(path.read_text(encoding="utf-8"))
    return {key: content.get(key) for key in ("perplexity_increase", "top1_agreement", "not_measured", "not_plotted")}


def _summary(plan: ConversionPlan, output: Path) -> dict[str, Any]:
    return {
        "output": str(output),
        "dtype": plan.dtype,
        "quant": plan.settings.quant,
        "kv_cache": plan.settings.kv_cache,
        "tp_size": plan.mapping.tp_size,
        "pp_size": plan.mapping.pp_size,
        "ranks": [
            {
                "file": rank_weights(rank),
                "tensors": len(specs),
                "bytes": sum(spec.nbytes for spec in specs.values()),
            }
            for rank, specs in enumerate(plan.ranks)
        ],
        "bytes": plan.nbytes,
        "ignored": plan.ignored,
        "warnings": [finding.as_json() for finding in plan.findings],
    }


def _print(plan: ConversionPlan, summary: dict[str, Any]) -> None:
    layout = f"{summary['dtype']}, {len(summary['ranks'])} rank(s), {size(summary['bytes'])}"
    if "seconds" in summary:
        rate = size(int(summary["bytes"] / summary["seconds"]))
        stdout.print(f"{summary['output']}: {layout} in {summary['seconds']:.1f} s ({rate}/s)", highlight=False)
        if quality := summary.get("quality"):
            stdout.print(f"quality: {_quality_words(quality)}; see {QUALITY} there", highlight=False)
            if quality["not_plotted"]:
                stdout.print(f"quality plot: not drawn, {quality['not_plotted']}", highlight=False)
    else:
        stdout.print(f"would write {summary['output']}: {layout}", highlight=False)
        for rank in summary["ranks"]:
            stdout.print(f"  {rank['file']}: {rank['tensors']} tensors, {size(rank['bytes'])}", highlight=False)


def _quality_words(quality: dict[str, Any]) -> str:
    if quality["not_measured"]:
        return f"not measured, {quality['not_measured']}"
    return f"perplexity {quality['perplexity_increase']:+.2%}, top-1 agreement {quality['top1_agreement']:.1%}"
