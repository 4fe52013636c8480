"""The words that users and readers see: no phrase that STYLE.md bans."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Phrases that an independent review found hard to read, and British spelling. STYLE.md has the rules behind them.
BANNED = {
    r"\bbears?\b": "allows, tolerates",
    r"\bbeside\b": "next to, besides, compared with",
    r"\bwhatever\b": "any, regardless of",
    r"\b(no|any|some|every)body\b": "no client, a user",
    r"\bfor ever\b|\bin vain\b": "forever, for nothing",
    r"\bstands? twice\b": "is a duplicate",
    r"\breckons?\b": "estimates",
    r"\bput(s|ting)? up with\b": "accepts",
    r"\b(in turns|the weather)\b": "alternately",
    r"\bwhere no \w+ (is|can be)\b": "without",
    r"\bthe whole way\b": "end to end",
    r"\bremed(y|ies)\b": "hint",
    r"\b(a rank|a card)\b(?= *[:.,]|$)": "per rank, per card",
    r"\btold apart\b|\bkeeps? to it\b": "distinguished",
    r"\bask(s|ed)? for no\b": "requires no",
    r"\bas (it|they) (lies?|stands?)\b": "unchanged",
    r"\bof any origin\b|\botherwise than\b|\ball the more\b": "made by anyone, differently, especially",
    r"\blikeliest\b": "most likely",
    r"\bis no (directory|JSON|flag|file|number)\b": "is not a",
    r"\bgo(es)? on where\b|\banew\b": "resumes, again",
    r"\b(for|takes?|lasts?) so long\b|\b[Ss]o many\b(?! as)": "this long, this many",
    r"\b(is|are|was|be) told\b|\bare not told\b": "is reported, gets, is called with",
    r"\breckon\w*|\bat hand\b|\bput together\b|\b[Ww]hoever\b": "estimate, available, combined",
    r"\b(object|tokens?|requests|step|row|radians) a (line|second|minute|position|token)\b(?! from)": "per line",
    r"\ball the same\b|\bnow and then\b|\bmend(s|ed|ing)?\b": "anyway, sometimes, repairs",
    r"\bone behind the other\b|\bon (its|their) way\b|\b(has|have) gone\b": "contiguous, in flight, has ended",
    r"(?i)\b\w*(quantis|tokenis|initialis|normalis|optimis|serialis|recognis|organis|summaris)\w*\b": "US spelling",
    r"(?i)\b(\w*colour\w*|behaviours?|artefacts?|honoured|neighbours?|licences?|favourite)\b": "US spelling",
}
SKIPPED = (
    "demo/model/vocab",
    "demo/model/tokenizer",
    "docs/reference",
)  # data, and pages that are made from the code


def words_of(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of everything in a file that is written for people."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        yield from enumerate(text.splitlines(), 1)
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
    for number, line in enumerate(text.splitlines(), 1):
        yield number, line.partition("#")[2]  # a comment, or part of a string, which is read anyway


def files() -> Iterator[Path]:
    pages = (
        "README.md",
        "CONTRIBUTING.md",
        "SECURITY.md",
        "recipes/*.yaml",
        "docs/**/*.md",
        "trtqwen/demo/model/*.md",
    )
    for pattern in (*pages, "examples/*", "scripts/*.*", "engines/*.md", "triton_repo/*.md"):
        yield from sorted(ROOT.glob(pattern))
    for pattern in ("*.py", "*.json", "*.html"):
        yield from sorted((ROOT / "trtqwen").rglob(pattern))


def test_no_banned_phrase_is_left() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {match.group(0)!r}, say: {better}"
        for path in files()
        if not any(part in str(path.relative_to(ROOT)) for part in SKIPPED)
        for line, text in words_of(path)
        for banned, better in BANNED.items()
        for match in re.finditer(banned, text)
    ]
    assert not found, "\n" + "\n".join(found)
