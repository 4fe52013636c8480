"""`trtqwen recipe`: list, show, copy and check recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
import yaml
from rich.padding import Padding
from rich.text import Text

from trtqwen.artifact.directory import write_file
from trtqwen.cli.output import HELP, Changes, Force, Json, print_json, stdout
from trtqwen.diagnostics import Diagnostic, InputError
from trtqwen.plan.plan import model_config
from trtqwen.plan.show import layout_name
from trtqwen.recipe import Recipe, find_recipe, load_recipe, recipe_names

command = typer.Typer(
    add_completion=False,
    context_settings=HELP,
    help="List, show, copy and check recipes.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
Name = Annotated[str, typer.Argument(help="Use this recipe: a bundled name, or a YAML file.")]


@command.command("list")
def list_recipes(json: Json = False) -> None:
    """List the recipes that ship with trtqwen."""
    recipes = [load_recipe(name) for name in recipe_names()]
    if json:
        print_json({"recipes": [_summary(recipe) for recipe in recipes]})
        return
    width = max(len(recipe.name) for recipe in recipes)
    for recipe in recipes:
        name, model, precision, layout, card, description = _summary(recipe).values()
        line = Text.assemble((f"{name:<{width}}", "bold"), f"  {model:<12}  {precision:<8}  {layout:<7}  {card:<9}")
        if stdout.is_terminal:
            stdout.print(line)
            stdout.print(Padding(Text(description, style="dim"), (0, 0, 0, 4)))
        else:
            stdout.print(line + Text(f"  {description}"), soft_wrap=True)


@command.command()
def show(recipe: Name, changes: Changes = None, json: Json = False) -> None:
    """Print a recipe with every field, defaults included."""
    loaded = load_recipe(recipe, changes or ())
    content = loaded.model_dump(exclude={"name"})
    if json:
        print_json({"name": loaded.name, **content})
    else:
        text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=110)
        stdout.print(text, end="", highlight=False, markup=False, soft_wrap=True)


@command.command()
def copy(
    recipe: Name,
    file: Annotated[Path, typer.Argument(help="Write this YAML file.")],
    force: Force = False,
    json: Json = False,
) -> None:
    """Copy a recipe, with its comments, to a file of your own."""
    if file.exists() and not force:
        raise InputError(f"{file}: exists", "pass --force to replace it, or name another file")
    write_file(file, find_recipe(recipe).read_text(encoding="utf-8"))
    if json:
        print_json({"recipe": str(file)})
    else:
        stdout.print(f"{file}: edit it, then run `trtqwen plan {file}`", highlight=False, markup=False)


@command.command()
def check(
    recipes: Annotated[list[str], typer.Argument(help="Check these recipes: bundled names, or YAML files.")],
    json: Json = False,
) -> None:
    """Check recipes against the sizes of their models. Exit code 2 if one is wrong."""
    problems = {recipe: _problem(recipe) for recipe in recipes}
    if json:
        found = [(recipe, problem and problem.what, problem and problem.hint) for recipe, problem in problems.items()]
        results = [{"recipe": name, "ok": what is None, "problem": what, "hint": hint} for name, what, hint in found]
        print_json({"recipes": results})
    else:
        for recipe, problem in problems.items():
            if problem is None:
                stdout.print(f"{recipe}: ok", highlight=False, markup=False, soft_wrap=True)
                continue
            stdout.print(f"error: {problem.what}", style="red", highlight=False, markup=False, soft_wrap=True)
            stdout.print(f"hint: {problem.hint}", highlight=False, markup=False, soft_wrap=True)
    if any(problems.values()):
        raise typer.Exit(2)


def _problem(name: str) -> Diagnostic | None:
    try:
        recipe = load_recipe(name)
    except InputError as problem:
        return problem.diagnostic
    try:
        if recipe.model is not None:
            model_config(recipe)
    except InputError as problem:
        return Diagnostic(f"{name}: {problem.what}", problem.hint)
    return None


def _summary(recipe: Recipe) -> dict[str, str]:
    return {
        "name": recipe.name,
        "model": recipe.model or "",
        "precision": recipe.checkpoint.dtype if recipe.checkpoint.quant == "none" else recipe.checkpoint.quant,
        "layout": layout_name(recipe),
        "card": recipe.host.card if recipe.host else "cpu",
        "description": recipe.description,
    }
