"""Find recipes by path or by bundled name, and read them."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from trtqwen.diagnostics import RecipeError, first_hint, first_problem
from trtqwen.recipe.sections import Recipe
from trtqwen.yaml_file import parse_value, read_mapping

_PACKAGE = Path(__file__).parents[1]
BUNDLED = _PACKAGE / "recipes"
CHECKOUT = _PACKAGE.parent / "recipes"


def load_recipe(recipe: str, changes: Sequence[str] = ()) -> Recipe:
    """Load a recipe by path, or by the name of one that ships with trtqwen.

    Args:
        changes: fields to replace, each as `section.field=value` with the value in YAML: `engine.max_batch_size=32`.

    Raises:
        RecipeError: naming file and field, if the recipe is missing or not valid.
    """
    path, content = find_recipe(recipe), recipe_content(recipe, changes)
    if "name" in content:
        raise RecipeError(f"{path}: field 'name': the file's name is the recipe's name", "remove the field")
    where = f"{path} with {', '.join(changes)}" if changes else str(path)
    try:
        return Recipe.model_validate({**content, "name": path.stem})
    except ValidationError as problem:
        raise RecipeError(f"{where}: {first_problem(problem)}", _advice(problem, Recipe)) from None


def recipe_content(recipe: str, changes: Sequence[str] = ()) -> dict[str, Any]:
    """Return the content of a recipe's file with changes, before its validation; see `load_recipe`."""
    content = read_mapping(find_recipe(recipe), RecipeError)
    for change in changes:
        _change(content, change)
    return content


def _change(content: dict[str, Any], change: str) -> None:
    field, separator, text = change.partition("=")
    *sections, name = field.strip().split(".")
    if not separator or not name or not all(sections):
        raise RecipeError(f"{change!r} is not field=value", "write it like engine.max_batch_size=32")
    section: Any = content
    for depth, key in enumerate(sections, 1):
        if section.get(key) is None:  # a section without fields, or one that is left out
            section[key] = {}
        section = section[key]
        if not isinstance(section, dict):
            where = ".".join(sections[:depth])
            raise RecipeError(f"{change!r}: {where} is not a section of the recipe", "name section and field")
    section[name] = parse_value(text, RecipeError)


def find_recipe(recipe: str) -> Path:
    """The file of a recipe, by path or by name.

    Raises:
        RecipeError: if there is none.
    """
    path = Path(recipe)
    if path.suffix in (".yaml", ".yml") or path.exists():
        if not path.is_file():
            raise RecipeError(f"{path}: no such recipe file", "check the path, or name one of `trtqwen recipe list`")
        return path
    for directory in (CHECKOUT, BUNDLED):
        if (directory / f"{recipe}.yaml").is_file():
            return directory / f"{recipe}.yaml"
    near = get_close_matches(recipe, recipe_names(), n=1)
    hint = f"did you mean {near[0]!r}?" if near else "name one that `trtqwen recipe list` prints, or a .yaml file"
    raise RecipeError(f"{recipe}: no such recipe", hint)


def recipe_names() -> list[str]:
    """Names of the recipes that ship with trtqwen."""
    directory = CHECKOUT if CHECKOUT.is_dir() else BUNDLED
    return sorted(path.stem for path in directory.glob("*.yaml"))


def _advice(problem: ValidationError, model: type[BaseModel]) -> str:
    first = problem.errors()[0]
    if first["type"] == "missing":
        return "add the field"
    if first["type"] == "extra_forbidden":
        near = _near_field(".".join(map(str, first["loc"])), model)
        return f"did you mean {near!r}?" if near else "remove it; `trtqwen recipe show` prints the fields of a recipe"
    return first_hint(problem) or "correct the value"


def _near_field(field: str, model: type[BaseModel]) -> str | None:
    """Return the known field that is most similar to an unknown one, in its section or in another one."""
    section, _, key = field.rpartition(".")
    inside = {last: name for name, last in _fields(model) if name.removesuffix(last).rstrip(".") == section}
    elsewhere = {last: name for name, last in _fields(model)}
    for names in (inside, elsewhere):
        if match := get_close_matches(key, names, n=1, cutoff=0.75):
            return names[match[0]]
    return None


def _fields(model: type[BaseModel]) -> list[tuple[str, str]]:
    """Every field that a file may have: its dotted name and the last part of it."""
    fields = [(name, name) for name in model.model_fields if model is not Recipe or name != "name"]
    for name, info in model.model_fields.items():
        for section in (info.annotation, *get_args(info.annotation)):  # a section may be optional
            if isinstance(section, type) and issubclass(section, BaseModel):
                fields += [(f"{name}.{inner}", last) for inner, last in _fields(section)]
    return fields
