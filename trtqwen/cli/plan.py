"""`trtqwen plan`: estimate what a recipe needs and how fast it is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trtqwen.cli.output import Changes, Json, print_json, stdout
from trtqwen.plan.plan import plan_recipe
from trtqwen.plan.show import print_comparison, print_plan
from trtqwen.recipe import load_recipe


def command(
    recipe: Annotated[str, typer.Argument(help="Use this recipe: a bundled name, or a YAML file.")],
    other: Annotated[str | None, typer.Argument(help="Compare with this recipe.")] = None,
    model: Annotated[
        Path | None,
        typer.Option(help="Read this Hugging Face model directory. [default: the sizes of the recipe's model]"),
    ] = None,
    changes: Changes = None,
    json: Json = False,
) -> None:
    """Estimate memory, concurrency and speed of a recipe. Exit code 1 if it does not fit."""
    plans = [plan_recipe(load_recipe(name, changes or ()), model) for name in (recipe, other) if name is not None]
    if json:
        print_json(plans[0].as_json() if other is None else {"plans": [plan.as_json() for plan in plans]})
    elif other is None:
        print_plan(plans[0], stdout)
    else:
        print_comparison((plans[0], plans[1]), stdout)
    if not all(plan.fits for plan in plans):
        raise typer.Exit(1)
