"""`trtqwen export`: a TensorRT-LLM checkpoint back to a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trtqwen.cli.output import DryRun, Force, Json, print_json, progress_bars, size, stdout
from trtqwen.export.export import Activations, plan_export, run_export


def command(
    checkpoint: Annotated[
        Path, typer.Argument(help="Read this TensorRT-LLM checkpoint of trtqwen or NVIDIA's converter.")
    ],
    output: Annotated[Path, typer.Option(help="Write the Hugging Face directory here.")],
    tokenizer: Annotated[
        Path | None, typer.Option(help="Copy the tokenizer from here. [default: the checkpoint's own]")
    ] = None,
    activations: Annotated[
        Activations,
        typer.Option(
            help="Set the inputs of INT8 weight-only layers: 16-bit (W8A16), or INT8 (W8A8, also runs on CPUs)."
        ),
    ] = "16bit",
    force: Force = False,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Write a checkpoint of any number of ranks as a Hugging Face directory for transformers and vLLM.

    Float tensors stay equal bit for bit. INT8 tensors get the compressed-tensors format with the same codes and
    scales. The command lists what the new format cannot hold and what that costs.
    """
    plan = plan_export(checkpoint, activations)
    notes = list(plan.notes)
    if not dry_run:
        with progress_bars() as bars:
            progress = bars.add("exporting", plan.nbytes)
            notes = run_export(plan, output, tokenizer=tokenizer, force=force, progress=progress)
    if json:
        content = {"output": str(output), "bytes": plan.nbytes, "precision": plan.checkpoint.algo or "float"}
        print_json(content | {"notes": [note.as_json() for note in notes]})
        return
    verb = "would write" if dry_run else "wrote"
    stdout.print(f"{verb} {size(plan.nbytes)} to {output}", markup=False, highlight=False, soft_wrap=True)
    for note in notes:
        stdout.print(f"{note.level}: {note}", markup=False, highlight=False, soft_wrap=True)
