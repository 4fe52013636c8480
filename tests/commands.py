"""trtqwen commands that texts show, compared with the real command line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import typer
from typer import Context
from typer.core import TyperGroup

from trtqwen.cli import app


def shown_commands(text: str) -> Iterator[list[str]]:
    """The words of every trtqwen command in a text: console lines, bash and indented blocks, and code spans."""
    text = text.replace("\\\n", " ")
    scripts = "\n".join(re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    console = re.findall(r"(?:^\$ |^    |`)(trtqwen [^`\n]*)", text, re.MULTILINE)
    for line in (*console, *re.findall(r"^trtqwen .*", scripts, re.MULTILINE)):
        words = line.partition("#")[0].split()[1:]
        if words and re.fullmatch(r"[a-z]+", words[0]):
            yield words


def command_of(name: str) -> Any:
    """The command of this name."""
    root = typer.main.get_command(app)
    assert isinstance(root, TyperGroup)
    return root.resolve_command(Context(root), [name])[1]


def check_command(words: list[str]) -> None:
    """Raise unless command, subcommand and every option exist."""
    command = typer.main.get_command(app)
    while isinstance(command, TyperGroup) and words:
        name, found, words = command.resolve_command(Context(command, resilient_parsing=True), words)
        assert found is not None, name
        command = found
    options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    given = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
    assert given <= options | {"-h", "--help"}, f"{given - options} in {words}"
