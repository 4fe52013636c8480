"""What a long command has done so far, in a file: run again after a kill, it goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from trtqwen.diagnostics import OutputError


def journal_digest(content: Any) -> str:
    """SHA-256 of everything that the entries of a journal depend on; `content` is what JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class Journal:
    """JSON objects, one a line, behind a first line with the digest of everything that they depend on.

    Args:
        other: what the file is if its digest differs, for the error: "is of another search".
        hint: what to do then.
        force: drop the entries of another digest.
        sync: have each entry on the disk before `add` returns, not only in the system's hands.

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
        temporary = path.with_name(f"{path.name}.new")
        try:
            temporary.write_text(text, encoding="utf-8")  # without a last line that a kill has cut
            os.replace(temporary, path)
            self._file = path.open("a", encoding="utf-8")
        except OSError as problem:
            raise OutputError(f"{path}: cannot be written ({problem.strerror})", "choose another --output") from None

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
        """The whole lines of the file; of a kill in the middle of one remains a part, which is dropped."""
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
