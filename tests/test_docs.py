"""The documentation: its generated pages, and the commands that it and the README show."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.core import TyperGroup
from typer.testing import CliRunner

from tests.commands import check_command, command_of, shown_commands
from trtqwen.cli import COMMANDS, app
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
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            there = page.parent / target if target else page
            assert there.exists(), target
            assert not anchor or anchor in anchors(there), f"{target}#{anchor}"


def anchors(page: Path) -> set[str]:
    """The ids of a page's headings, as the site and public forges make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_includes_are_in_the_form_that_the_site_reads() -> None:
    pages = {page: page.read_text(encoding="utf-8") for page in PAGES}
    found = [(page, line.strip()) for page, text in pages.items() for line in text.splitlines() if "--8" in line]
    assert found
    for page, line in found:
        included = re.fullmatch(r'--8<-- "(.+)"', line)
        assert included, f"{page}: {line}"
        assert (ROOT / included[1]).is_file(), f"{page}: {line}"


@pytest.mark.parametrize("group", ["", *(name for name in COMMANDS if isinstance(command_of(name), TyperGroup))])
def test_lists_of_commands_fit_a_terminal(group: str) -> None:
    text = CliRunner().invoke(app, [group, "--help"] if group else ["--help"], terminal_width=80).output
    cut = [line for line in text.splitlines() if line.endswith("...") and not line.startswith("Usage:")]
    assert not cut
