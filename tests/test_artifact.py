from __future__ import annotations

import os
from pathlib import Path

import pytest

from trtqwen.artifact import cached, digest_file, finished_directory, read_manifest, stage_key, write_manifest
from trtqwen.errors import InputError, OutputError


def finish(output: Path, content: str = "x", *, force: bool = False) -> None:
    with finished_directory(output, force=force) as directory:
        (directory / "file").write_text(content)
        write_manifest(directory, "engine", {"source": "1"}, {"size": 2})


def test_a_finished_directory_has_its_files_and_nothing_beside_it(tmp_path: Path) -> None:
    finish(tmp_path / "deep" / "out")
    manifest = read_manifest(tmp_path / "deep" / "out", "engine")
    assert manifest.outputs["file"].digest == digest_file(tmp_path / "deep" / "out" / "file")
    assert manifest.key == stage_key("engine", {"source": "1"}, {"size": 2})
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


def test_an_exception_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), finished_directory(tmp_path / "out") as directory:
        (directory / "file").write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_what_exists_is_kept_unless_forced(tmp_path: Path) -> None:
    finish(tmp_path / "out", "old")
    with pytest.raises(OutputError, match="exists; pass --force"):
        finish(tmp_path / "out", "new")
    assert (tmp_path / "out" / "file").read_text() == "old"
    finish(tmp_path / "out", "new", force=True)
    assert (tmp_path / "out" / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_leftovers_of_dead_runs_are_swept_and_those_of_live_ones_kept(tmp_path: Path) -> None:
    dead = tmp_path / ".out.999999999.tmp"
    live = tmp_path / f".out.{os.getppid()}.tmp"
    for leftover in (dead, live):
        leftover.mkdir()
    finish(tmp_path / "out")
    assert not dead.exists()
    assert live.exists()


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        finish(tmp_path / "out")


def test_an_unfinished_or_changed_directory_is_not_accepted(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(InputError, match="is not a finished engine"):
        read_manifest(out, "engine")
    out.rmdir()
    finish(out)
    with pytest.raises(InputError, match="holds a finished engine, not a checkpoint"):
        read_manifest(out, "checkpoint")
    (out / "file").write_text("longer")
    with pytest.raises(InputError, match="has 6 bytes instead of 1"):
        read_manifest(out, "engine")
    (out / "file").unlink()
    with pytest.raises(InputError, match="file: is missing"):
        read_manifest(out, "engine")
    (out / "manifest.json").write_text("{}")
    with pytest.raises(InputError, match="is not a manifest"):
        read_manifest(out, "engine")


def test_a_cached_result_is_one_with_the_same_key(tmp_path: Path) -> None:
    finish(tmp_path / "out")
    key = stage_key("engine", {"source": "1"}, {"size": 2})
    assert cached(tmp_path / "out", "engine", key)
    assert not cached(tmp_path / "out", "engine", stage_key("engine", {"source": "2"}, {"size": 2}))
    assert not cached(tmp_path / "none", "engine", key)
