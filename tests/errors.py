"""What the command line prints when it fails."""

from __future__ import annotations


def parse_error(stderr: str) -> tuple[str, str]:
    """Return what is wrong and the hint; standard error holds an `error:` line and at most a `hint:` line."""
    error, *rest = stderr.splitlines()
    assert error.startswith("error: "), stderr
    assert len(rest) <= 1, stderr
    hint = rest[0] if rest else "hint: "
    assert hint.startswith("hint: "), stderr
    return error.removeprefix("error: "), hint.removeprefix("hint: ")
