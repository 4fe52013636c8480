"""`trtqwen image`: list NVIDIA's images with TensorRT-LLM, and build an image with trtqwen."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Column, Table

from trtqwen.cli.output import HELP, DryRun, Force, Json, print_json, stdout
from trtqwen.containers.dockerfile import build_image, plan_image
from trtqwen.diagnostics import InputError
from trtqwen.facts.releases import images, known_release, last_engine_release

command = typer.Typer(
    add_completion=False,
    context_settings=HELP,
    help="List NVIDIA's images, or build one that contains trtqwen.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@command.command("list")
def list_images(json: Json = False) -> None:
    """List the known images.

    The table has the versions of TensorRT-LLM, TensorRT and CUDA, and the oldest driver that runs each image.
    """
    if json:
        print_json({"images": [{**image.model_dump(), "oldest_driver": image.oldest_driver} for image in images()]})
        return
    names = ("tag", "TRT-LLM", "TensorRT", "CUDA", "driver", "built with")
    table = Table(*(Column(name, no_wrap=True) for name in names), box=None)  # fits 80 columns
    for image in images():
        table.add_row(
            image.image.partition(":")[2],
            image.tensorrt_llm,
            image.tensorrt,
            image.cuda,
            image.oldest_driver,
            image.driver,
        )
    stdout.print("Images of nvcr.io/nvidia/tritonserver, with the oldest driver that runs each:", highlight=False)
    stdout.print(table)


@command.command("build")
def build(
    output: Annotated[Path, typer.Option(help="Write the Dockerfile and the files that it copies here.")] = Path(
        "image"
    ),
    release: Annotated[str, typer.Option(help="Set the TensorRT-LLM release of the image.")] = last_engine_release(),
    base: Annotated[
        str | None, typer.Option(help="Build on this image. [default: the newest with the release]")
    ] = None,
    tag: Annotated[str | None, typer.Option(help="Set the tag of the image. [default: trtqwen:RELEASE]")] = None,
    force: Force = False,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Add trtqwen and its dependencies to NVIDIA's image.

    Pass it to other commands as --in-container --image TAG. They then start in seconds without a package index. The
    Dockerfile pins NVIDIA's image by digest and stays in --output.
    """
    known = known_release(release)
    if known is None:
        raise InputError(f"--release {release}: is not a known release", "choose one of `trtqwen image list`")
    plan = plan_image(known, tag, output, base)
    if dry_run:
        if json:
            print_json({"tag": plan.tag, "dockerfile": plan.dockerfile(None), "commands": plan.commands})
        else:
            stdout.print(plan.dockerfile(None), markup=False, highlight=False, soft_wrap=True)
            for line in plan.commands:
                stdout.print(shlex.join(line), markup=False, highlight=False, soft_wrap=True)
        return
    digest = build_image(plan, force=force)
    if json:
        print_json({"tag": plan.tag, "base": digest or plan.base, "context": str(plan.context)})
    else:
        stdout.print(f"ready: trtqwen build RECIPE --model DIR --in-container --image {plan.tag}", highlight=False)
