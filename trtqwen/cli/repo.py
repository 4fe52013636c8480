"""`trtqwen repo`: write the model repository of an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trtqwen.artifact.directory import check_output
from trtqwen.cli.output import Force, Json, print_json, stdout
from trtqwen.recipe import ServeRecipe, load_recipe
from trtqwen.triton.repository import write_repository


def command(
    engine: Annotated[Path, typer.Argument(help="Read this engine directory, which `trtqwen build` wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Write the model repository here.")],
    recipe: Annotated[str | None, typer.Option(help="Take the serving settings from this recipe.")] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Write the Triton model repository of an engine."""
    serve = load_recipe(recipe).serve if recipe else ServeRecipe()
    check_output(output, force=force, sources=[engine])
    manifest = write_repository(engine, serve, output, force=force)
    if json:
        print_json({"output": str(output), "files": sorted(manifest.outputs)})
    else:
        stdout.print(f"ready: trtqwen serve --repo {output}", highlight=False)
