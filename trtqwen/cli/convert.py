"""`trtqwen convert`: Hugging Face weights to a TensorRT-LLM checkpoint."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from trtqwen.artifact import check_output
from trtqwen.checkpoint.convert import ConversionPlan, plan_conversion, run_conversion
from trtqwen.cli.output import DryRun, Force, Json, byte_progress, print_json, size, stderr, stdout
from trtqwen.recipe import CheckpointRecipe, DtypeChoice, load_recipe


def command(
    model: Annotated[Path, typer.Argument(help="Hugging Face model directory.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Checkpoint directory to write.")],
    recipe: Annotated[str | None, typer.Option(help="Take the settings below from this recipe.")] = None,
    dtype: Annotated[
        DtypeChoice | None, typer.Option(help="dtype of the weights; auto keeps 16-bit dtypes. [default: auto]")
    ] = None,
    tp: Annotated[int | None, typer.Option(min=1, help="Tensor-parallel ranks. [default: 1]")] = None,
    force: Force = False,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Convert Hugging Face Qwen2/Qwen2.5 weights to a TensorRT-LLM checkpoint."""
    settings = load_recipe(recipe).checkpoint if recipe else CheckpointRecipe()
    check_output(output, force=force)
    plan = plan_conversion(model, dtype or settings.dtype, tp or settings.tp_size)
    summary = _summary(plan, output)
    if not dry_run:
        start = time.perf_counter()
        with byte_progress("converting", plan.nbytes) as progress:
            run_conversion(plan, output, force=force, progress=progress)
        summary["seconds"] = round(time.perf_counter() - start, 3)
    if json:
        print_json(summary)
    else:
        _print(plan, summary)


def _summary(plan: ConversionPlan, output: Path) -> dict[str, Any]:
    return {
        "output": str(output),
        "dtype": plan.dtype,
        "tp_size": plan.mapping.tp_size,
        "ranks": [
            {
                "file": f"rank{rank}.safetensors",
                "tensors": len(specs),
                "bytes": sum(spec.nbytes for spec in specs.values()),
            }
            for rank, specs in enumerate(plan.ranks)
        ],
        "bytes": plan.nbytes,
        "ignored": plan.ignored,
    }


def _print(plan: ConversionPlan, summary: dict[str, Any]) -> None:
    layout = f"{summary['dtype']}, {len(summary['ranks'])} rank(s), {size(summary['bytes'])}"
    if "seconds" in summary:
        rate = size(int(summary["bytes"] / summary["seconds"]))
        stdout.print(f"{summary['output']}: {layout} in {summary['seconds']:.1f} s ({rate}/s)", highlight=False)
    else:
        stdout.print(f"would write {summary['output']}: {layout}", highlight=False)
        for rank in summary["ranks"]:
            stdout.print(f"  {rank['file']}: {rank['tensors']} tensors, {size(rank['bytes'])}", highlight=False)
    for name in plan.ignored:
        stderr.print(f"note: source tensor {name} is not part of the checkpoint", highlight=False)
