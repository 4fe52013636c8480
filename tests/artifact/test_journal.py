"""Journals: what was added is there after a kill at any byte, and never for other work."""

from __future__ import annotations

from pathlib import Path

import pytest

from trtqwen.artifact.journal import Journal
from trtqwen.diagnostics import OutputError


def journal(path: Path, digest: str = "one", *, force: bool = False) -> Journal:
    return Journal(path, digest, other="is of another search", hint="choose another", force=force)


def test_a_file_cut_at_any_byte_keeps_its_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    entries = [{"number": number, "text": "é\n" * number} for number in range(4)]
    written = journal(path)
    for entry in entries:
        written.add(entry)
    written.close()
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        again = journal(path)
        lines = whole[:size].count(b"\n")
        assert again.entries == entries[: max(0, lines - 1)]
        again.add({"more": True})
        again.close()
        assert journal(path).entries == [*again.entries, {"more": True}]


def test_the_journal_of_other_work_is_kept_unless_forced(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    first = journal(path)
    first.add({"a": 1})
    first.close()
    with pytest.raises(OutputError, match="is of another search"):
        journal(path, "two")
    assert journal(path).entries == [{"a": 1}]
    assert journal(path, "two", force=True).entries == []
    finished = journal(path, "two")
    finished.remove()
    assert not path.exists()


def test_a_place_that_cannot_be_used_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be read"):
        journal(tmp_path / "file" / "journal")
    with pytest.raises(OutputError, match="cannot be created or written"):
        journal(tmp_path / "nowhere" / "journal")
