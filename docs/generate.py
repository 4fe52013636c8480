"""Write the reference pages of the documentation from the code: `python docs/generate.py [--check]`.

The pages lie in docs/reference. A test compares them with the code, so that they cannot drift.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from typer import Context
from typer.core import TyperGroup

from trtqwen.cli import COMMANDS, app
from trtqwen.doctor.run import CHECKS
from trtqwen.engine import explain
from trtqwen.gateway.api.compatibility import SCHEMAS, support
from trtqwen.gateway.config import GatewayConfig
from trtqwen.recipe import SECTIONS, Recipe, load_recipe, recipe_names

REFERENCE = Path(__file__).parent / "reference"
NOTE = "<!-- docs/generate.py writes this page from the code. Do not edit it. -->\n"


def cli_page() -> Iterator[str]:
    """Every command with its arguments and options, as `--help` prints them."""
    yield "# Command line"
    yield (
        "Every command has `-h`, `--help` and `--json`. With `--json`, standard output holds one JSON object; "
        "progress and logs go to standard error. The exit code is 0 for success, 1 for a failure and 2 for bad usage "
        "or bad input. A failure prints an `error:` line and a `hint:` line."
    )
    yield "\n".join(
        ["| command | purpose |", "| --- | --- |", *(f"| [`{n}`](#{n}) | {d} |" for n, d in COMMANDS.items())]
    )
    root = typer.main.get_command(app)
    assert isinstance(root, TyperGroup)
    context = Context(root, info_name="trtqwen")
    for name in COMMANDS:
        command: Any = root.resolve_command(context, [name])[1]
        yield f"## {name}"
        yield from _command(command, Context(command, info_name=f"trtqwen {name}"))


def _command(command: Any, context: Context) -> Iterator[str]:
    yield _plain(command.help or "")
    if isinstance(command, TyperGroup):
        for name, child in command.commands.items():
            yield f"### {context.info_name} {name}".replace("trtqwen ", "")
            yield from _command(child, Context(child, info_name=f"{context.info_name} {name}"))
        return
    usage = " ".join(command.collect_usage_pieces(context))
    yield f"```console\n$ {context.info_name} {usage}\n```"
    records = [record for parameter in command.params if (record := parameter.get_help_record(context))]
    if records:
        lines = [f"| {_code(names)} | {_cell(text)} |" for names, text in records]
        yield "\n".join(["| argument or option | meaning |", "| --- | --- |", *lines])


def recipe_page() -> Iterator[str]:
    """Every field of a recipe, and the bundled recipes."""
    yield "# Recipe"
    yield (
        "A recipe is one YAML file. `trtqwen recipe copy NAME FILE` copies a bundled one, `trtqwen recipe show` "
        "prints every field with its default, and `trtqwen recipe check` validates a file. "
        "`--set section.field=value` replaces a field for one run."
    )
    yield "## Bundled recipes"
    rows = [f"| `{name}` | {_cell(load_recipe(name).description)} |" for name in recipe_names()]
    yield "\n".join(["| recipe | purpose |", "| --- | --- |", *rows])
    yield "## Top level"
    yield _fields(Recipe, leave_out={"name", *SECTIONS})
    for name, section in SECTIONS.items():
        yield f"## Section {name}"
        yield _plain(inspect.getdoc(section) or "").split("\n\n")[0]
        yield _fields(section)


def gateway_page() -> Iterator[str]:
    """Every setting of the gateway."""
    yield "# Gateway settings"
    yield "The fields of the YAML file that `--gateway-config` of `serve` and `--config` of `gateway` name."
    yield _fields(GatewayConfig)


def checks_page() -> Iterator[str]:
    """Every check of `trtqwen doctor`."""
    yield "# Checks of trtqwen doctor"
    yield (
        "`trtqwen doctor` runs the checks that apply to what you name. An `error` check fails the command, a "
        "`warning` check does not."
    )
    for check in CHECKS:
        yield f"## {check.id}: {check.title}"
        outside = " It runs outside of containers only." if check.place == "host" else ""
        yield f"Level: {check.level}.{outside}"
        yield _plain(inspect.cleandoc(type(check).__doc__ or ""))


def failures_page() -> Iterator[str]:
    """Every failure that `trtqwen explain` knows."""
    yield "# Explained failures"
    yield "What `trtqwen explain LOG` recognizes: the pattern of the telling line, its cause and what to do."
    for failure in explain.failures():
        yield f"## {_title(failure.cause)}"
        yield f"```text\n{failure.pattern}\n```"  # in a fence: inline code lets `<![` through to the HTML parser
        yield f"Cause: {failure.cause}."
        yield f"Hint: {failure.hint}."
    yield "# Members of kinds"
    yield "What `{key}` of the pattern above can be, and what fills `{means}` and `{help}`."
    used = {failure.table: failure.cause for failure in explain.failures() if failure.table}
    for name, cause in used.items():
        yield f"## {name}: {cause}"
        for row in explain.tables()[name or ""]:
            yield f"{', '.join(f'`{key}`' for key in row.keys)}: {row.means}. Hint: {row.hint}."


def compatibility_page() -> Iterator[str]:
    """Every field of every API."""
    yield "# API compatibility"
    yield (
        "The gateway speaks OpenAI's chat, completions and responses, Anthropic's messages, and Triton's generate. "
        "Each table lists the fields of one request body. *honored*: the field does what its API says. *no effect*: "
        "the field is accepted and changes nothing. *refused*: a value that asks for something ends in 400; null, "
        "false, 0 and empty values are accepted."
    )
    yield (
        "The setting `unknown_fields` decides about fields that are in no table: `warn` (the default) logs each name "
        "once and lists the names in the response header `x-trtqwen-ignored`, `ignore` says nothing, and `refuse` "
        "answers with 400."
    )
    for title, schema in SCHEMAS.items():
        yield f"## {title}"
        lines = ["| field | | |", "| --- | --- | --- |"]
        for name, field in schema.model_fields.items():
            kind, why = support(field)
            lines.append(f"| `{field.alias or name}` | {kind} | {_cell(why)} |")
        yield "\n".join(lines)


PAGES = {
    "compatibility.md": compatibility_page,
    "cli.md": cli_page,
    "recipe.md": recipe_page,
    "gateway-settings.md": gateway_page,
    "checks.md": checks_page,
    "failures.md": failures_page,
}


def _fields(model: type[BaseModel], leave_out: Collection[str] = ()) -> str:
    meanings = _attributes(inspect.getdoc(model) or "")
    lines = ["| field | type | default | meaning |", "| --- | --- | --- | --- |"]
    for name, field in model.model_fields.items():
        if name in leave_out:
            continue
        default = "required" if field.is_required() else f"`{_json(field.get_default(call_default_factory=True))}`"
        schema = model.model_json_schema()["properties"].get(name, {})
        meaning = re.sub(r"\bNone\b", "`null`", meanings[name])
        lines.append(f"| `{name}` | {_cell(_type(schema))} | {default} | {_cell(meaning)} |")
    return "\n".join(lines)


def _type(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "anyOf" in schema:
        return " or ".join(_type(option) for option in schema["anyOf"])
    limits = [
        f"{sign} {schema[key]}"
        for key, sign in (("minimum", ">="), ("exclusiveMinimum", ">"), ("maximum", "<="), ("exclusiveMaximum", "<"))
        if key in schema
    ]
    name = schema.get("const") or schema.get("$ref", schema.get("type", "any")).rpartition("/")[2]
    return f"{name} ({', '.join(limits)})" if limits else str(name)


def _attributes(docstring: str) -> dict[str, str]:
    """The entries of a docstring's section `Attributes:`; one entry may name several fields."""
    _, _, section = docstring.partition("Attributes:\n")
    meanings = {}
    for names, text in re.findall(r"^ {4}([\w, ]+?): (.*(?:\n {8}.*)*)", section, re.MULTILINE):
        for name in names.split(", "):
            meanings[name] = " ".join(text.split())
    return meanings


def _json(value: Any) -> str:
    if value is PydanticUndefined or isinstance(value, BaseModel):
        return "see the section"
    return json.dumps(value, default=str)


def _title(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:].partition(":")[0].partition(";")[0]


def _plain(text: str) -> str:
    return inspect.cleandoc(text)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _code(text: str) -> str:
    return "`" + text.replace("|", "\\|") + "`"


def main() -> int:
    """Write the pages, or with `--check` name those that differ; exit code 1 if any does."""
    pages = {name: NOTE + "\n" + "\n\n".join(page()) + "\n" for name, page in PAGES.items()}
    if "--check" in sys.argv[1:]:
        paths = [REFERENCE / name for name in pages]
        old = [path.name for path in paths if not path.is_file() or path.read_text("utf-8") != pages[path.name]]
        print(f"out of date: {', '.join(old)}; run `make docs`" if old else "docs/reference is up to date")
        return 1 if old else 0
    REFERENCE.mkdir(exist_ok=True)
    for name, text in pages.items():
        (REFERENCE / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
