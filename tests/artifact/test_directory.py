from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest

from tests.processes import fork, in_child
from trtqwen.artifact import directory as directories
from trtqwen.artifact.digest import digest_file
from trtqwen.artifact.directory import check_output, finished_directory, locked, recover, write_file
from trtqwen.artifact.manifest import read_manifest, stage_key, write_manifest
from trtqwen.diagnostics import OutputError


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


def test_a_killed_run_leaves_what_was_there_and_the_next_clears_up(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for before in (None, "old"):
        if before:
            finish(out, before)

        def die() -> None:
            with finished_directory(out, force=True) as directory:
                (directory / "file").write_text("half")
                os.kill(os.getpid(), signal.SIGKILL)

        assert in_child(die) == -signal.SIGKILL
        assert (out / "file").read_text() == before if before else not out.exists()
        assert len(list(tmp_path.glob(".out.*"))) == 2  # its lock and its half
        finish(out, "new", force=True)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        shutil.rmtree(out)


def test_a_reader_finds_the_old_or_the_new_at_every_moment(tmp_path: Path) -> None:
    finish(tmp_path / "out", "a")

    def replace() -> None:
        for text in "bc" * 20:
            finish(tmp_path / "out", text, force=True)

    writer = threading.Thread(target=replace)
    writer.start()
    seen = set()
    while writer.is_alive():
        seen.add((tmp_path / "out" / "file").read_text())
    writer.join()
    assert seen <= set("abc")


def test_where_directories_cannot_be_exchanged_a_kill_between_the_renames_is_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    finish(out, "old")
    monkeypatch.setattr(directories, "_exchange", lambda one, other: False)

    def die() -> None:
        rename = Path.rename

        def once(path: Path, target: Path) -> Path:
            if path.suffix == ".tmp":
                os.kill(os.getpid(), signal.SIGKILL)
            return rename(path, target)

        Path.rename = once  # type: ignore[method-assign,assignment]
        finish(out, "new", force=True)

    assert in_child(die) == -signal.SIGKILL
    assert not out.exists()
    recover(out)
    assert (out / "file").read_text() == "old"
    finish(out, "new", force=True)
    assert (out / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_second_writer_is_refused_and_the_first_finishes(tmp_path: Path) -> None:
    with finished_directory(tmp_path / "out") as directory:
        (directory / "file").write_text("first")

        def second() -> None:
            with pytest.raises(OutputError, match=f"out: process {os.getppid()} is writing it"):
                finish(tmp_path / "out", "second")

        assert in_child(second) == 0
    assert (tmp_path / "out" / "file").read_text() == "first"


def test_a_lock_is_waited_for_and_a_dead_process_holds_none(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    told: list[int] = []
    held, waited = os.pipe(), os.pipe()

    def hold() -> None:
        with locked(lock, lambda pid: None):
            os.write(held[1], b"x")
            os.read(waited[0], 1)
            os.kill(os.getpid(), signal.SIGKILL)

    def wait(pid: int) -> None:
        told.append(pid)
        os.write(waited[1], b"x")

    holder = fork(hold)
    os.read(held[0], 1)
    with locked(lock, wait):
        assert os.waitstatus_to_exitcode(os.waitpid(holder, 0)[1]) == -signal.SIGKILL
    assert told == [holder]
    assert not lock.exists()


def test_one_process_at_a_time_holds_a_lock(tmp_path: Path) -> None:
    counter = tmp_path / "counter"
    counter.write_text("0")

    def count() -> None:
        for _ in range(25):
            with locked(tmp_path / "lock", lambda pid: None):
                value = int(counter.read_text())
                time.sleep(0.0002)
                counter.write_text(str(value + 1))

    children = [fork(count) for _ in range(4)]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
    assert counter.read_text() == "100"


def test_leftovers_that_cannot_be_removed_are_named_and_never_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".out.tmp").mkdir()
    monkeypatch.setattr(shutil, "rmtree", lambda path, ignore_errors: None)  # as for another user's files
    with pytest.raises(OutputError, match=r"\.out\.tmp: a killed run left it"):
        finish(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    os.mkfifo(tmp_path / "pipe")
    for name in ("out", "pipe"):
        with pytest.raises(OutputError, match="is not a directory"):
            check_output(tmp_path / name, force=True)
    with pytest.raises(OutputError, match="is the root of all directories"):
        check_output(Path("/"), force=True)


def test_what_a_result_is_made_from_is_never_replaced_by_it(tmp_path: Path) -> None:
    source = tmp_path / "models" / "source"
    source.mkdir(parents=True)
    (tmp_path / "link").symlink_to(source)
    for output in (source, source.parent, tmp_path / "link"):
        with (
            pytest.raises(OutputError, match=r"would be replaced, and .*/source lost"),
            finished_directory(output, force=True, sources=[source]),
        ):
            pass
    check_output(tmp_path / "models" / "result", force=False, sources=[source])


def test_a_link_is_kept_and_what_it_leads_to_is_replaced(tmp_path: Path) -> None:
    for name in ("link", "dangling"):
        (tmp_path / name).symlink_to(tmp_path / "real" / name)
    (tmp_path / "real" / "link").mkdir(parents=True)
    for name in ("link", "dangling"):
        finish(tmp_path / name)
        assert (tmp_path / name).is_symlink()
        assert read_manifest(tmp_path / "real" / name, "engine")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "link", "real"]


def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let files be made, and fail as they are written."""

    def write_text(path: Path, text: str, encoding: str = "") -> None:
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", write_text)


def test_a_full_disk_is_one_sentence_and_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("old")
    full_disk(monkeypatch)
    for name in ("file", "new"):
        with pytest.raises(
            OutputError, match=rf"{name}: cannot be created or written .No space left.*; free some space"
        ):
            write_file(tmp_path / name, "text")
    with pytest.raises(OutputError, match=r"out: cannot be created or written .No space left"):
        finish(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_a_lock_whose_process_id_cannot_be_written_is_no_leftover(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        with pytest.raises(OutputError, match=r"File too large"), locked(tmp_path / "lock", lambda pid: None):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "lock").exists()
