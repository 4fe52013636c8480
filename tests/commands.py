"""trtqwen commands that texts show, held against the real command line."""

from __future__ import annotations

import re
from collections.abc import Iterator

import typer
from typer import Context
from typer.core import TyperGroup

from trtqwen.cli import app


def shown_commands(text: str) -> Iterator[list[str]]:
    """The words of every trtqwen command in a text: console lines and code spans."""
    for line in re.findall(r"(?:^\$ |`)(trtqwen [^`\n]*)", text.replace("\\\n", " "), re.MULTILINE):
        words = line.partition("#")[0].split()[1:]
        if words and re.fullmatch(r"[a-z]+", words[0]):
            yield words


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
