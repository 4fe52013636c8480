"""A journal of a long command, from which an interrupted run resumes."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from trtqwen.artifact.directory import write_file
from trtqwen.diagnostics import OutputError


def journal_digest(content: Any) -> str:
    """Return the SHA-256 of `content`, a JSON value with everything that the entries of a journal depend on."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class Journal:
    """A file of JSON objects, one per line. Its first line has the digest of everything that they depend on.

    Args:
        other: the error if the digest differs, such as "is of another search".
        hint: the hint of that error.
        force: drop the entries of another digest.
        sync: write each entry to the disk before `add` returns, not only to the page cache.

    Attributes:
        entries: those of earlier runs.

    Raises:
        OutputError: if the file is of another digest and `force` is not set, or cannot be read or written.
    """

    def __init__(
        self, path: Path, digest: str, *, other: str, hint: str, force: bool = False, sync: bool = True
    ) -> None:
        self._path, self._sync = path, sync
        try:
            lines = self._read()
        except OSError as problem:
            raise OutputError(f"{path}: cannot be read ({problem.strerror})", "choose another --output") from None
        if lines and lines[0].get("digest") != digest:
            if not force:
                raise OutputError(f"{path}: {other}", hint)
            lines = []
        self.entries = lines[1:]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in (lines or [{"digest": digest}]))
        write_file(path, text)  # without a last line that a kill has cut
        self._file = path.open("a", encoding="utf-8")

    def add(self, entry: dict[str, Any]) -> None:
        """Keep an entry, for later runs."""
        self._file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        self._file.flush()
        if self._sync:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Leave the file for a later run."""
        self._file.close()

    def remove(self) -> None:
        """Delete the file: its work is finished."""
        self._file.close()
        self._path.unlink()

    def _read(self) -> list[dict[str, Any]]:
        """Return the complete lines of the file, without a last line that a kill cut short."""
        try:
            text = self._path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return []
        lines = []
        for line in text.split("\n")[:-1]:
            try:
                lines.append(json.loads(line))
            except ValueError:
                break
        return lines
