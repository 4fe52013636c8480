"""No hint names a command, an option or a field that does not exist."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import typer
from typer.core import TyperGroup

import trtqwen
from tests.commands import check_command, shown_commands
from trtqwen.cli import app
from trtqwen.recipe import SECTIONS

PACKAGE = Path(trtqwen.__file__).parent
HINT_ARGUMENT = {"found": 1, "Diagnostic": 1, "bad_request": 1, "unsupported": 1}  # position of the hint in a call
# Options of other programs that hints name.
DOCKER = {"--cap-add", "--gpus", "--ipc", "--pids-limit", "--runtime", "--shm-size", "--ulimit"}
OTHERS = DOCKER | {
    "--extra-index-url",
    "--allow-run-as-root",  # mpirun
    "--bind-to",  # mpirun
    "--enable-shared",  # Python's configure
    "--model-repository",  # tritonserver
    "--oversubscribe",  # mpirun
}
TRTLLM_BUILD = PACKAGE / "engine" / "trtllm_build.json"


def texts(node: ast.AST) -> str:
    """The constant parts of a string expression; a placeholder becomes one word."""
    if isinstance(node, ast.JoinedStr):
        return "".join(texts(value) for value in node.values)
    if isinstance(node, ast.FormattedValue):
        return "VALUE"
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    return " ".join(texts(child) for child in ast.iter_child_nodes(node))


@cache
def hints() -> tuple[tuple[str, str], ...]:
    """Every hint in the package, with the place where it stands."""
    return tuple(_hints())


def _hints() -> Iterator[tuple[str, str]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        where = str(path.relative_to(PACKAGE))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            target = node.targets[0] if isinstance(node, ast.Assign) else None
            if isinstance(target, ast.Name) and re.search(r"hint|advice", target.id):
                yield f"{where}:{target.lineno}", texts(node)
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            place = 1 if name.endswith("Error") or name in ("error", "_error") else HINT_ARGUMENT.get(name)
            given = [keyword.value for keyword in node.keywords if keyword.arg == "hint"]
            if place is not None and len(node.args) > place:
                given.append(node.args[place])
            for argument in given:
                yield f"{where}:{node.lineno}", texts(argument)
    for path in sorted(PACKAGE.rglob("*.json")):
        if "model" in path.parts:
            continue
        for hint in re.findall(r'"hint": ("(?:[^"\\]|\\.)*")', path.read_text(encoding="utf-8")):
            yield str(path.relative_to(PACKAGE)), json.loads(hint)


def options() -> set[str]:
    """Every option of every command."""
    found: set[str] = set()
    commands = [typer.main.get_command(app)]
    while commands:
        command = commands.pop()
        found.update(option for parameter in command.params for option in parameter.opts)
        if isinstance(command, TyperGroup):
            names = command.commands
            commands += [command.resolve_command(typer.Context(command), [name])[1] for name in names]  # type: ignore[misc]
    return found | {"--help"}


def test_there_are_hints() -> None:
    assert len(hints()) > 200


@pytest.mark.parametrize("section", SECTIONS)
def test_fields_of_the_recipe_exist(section: str) -> None:
    known = set(SECTIONS[section].model_fields)
    wrong = [
        (where, field, hint)
        for where, hint in hints()
        for field in re.findall(rf"\b{section}\.(\w+)", hint)
        if field not in known and field not in ("VALUE", "json", "py", "yaml")
    ]
    assert not wrong


def test_commands_exist() -> None:
    for where, hint in hints():
        for words in shown_commands(hint):
            try:
                check_command(words)
            except Exception as problem:
                raise AssertionError(f"{where}: {hint}") from problem


def test_options_exist() -> None:
    trtllm_build = {f"--{flag}" for flag in re.findall(r'"(\w+)":', TRTLLM_BUILD.read_text(encoding="utf-8"))}
    known = options() | OTHERS | trtllm_build
    outside = [
        (where, option, hint)
        for where, hint in hints()
        for option in re.findall(r"(?<![\w-])(--[a-z][\w-]*)", hint)
        if option not in known
    ]
    assert not outside
