"""The documentation: its generated pages, and the commands that it and the README show."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import check_command, shown_commands
from trtqwen.recipe import recipe_names

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").glob("*.md"))]


def test_the_reference_pages_are_those_of_the_code() -> None:
    command: list[str | Path] = [sys.executable, ROOT / "docs" / "generate.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_shown_command_exists(page: Path) -> None:
    for words in shown_commands(page.read_text(encoding="utf-8")):
        check_command(words)
        named = [word for word in words[1:] if re.fullmatch(r"qwen[\w.-]*", word)]  # in small letters: not a model
        assert {*named} <= {*recipe_names()}, words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), target
