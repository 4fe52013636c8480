from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.waiting import wait_for
from trtqwen.system import guardian
from trtqwen.system.guarded import start_guarded
from trtqwen.system.leftovers import SHARED_MEMORY, sweep, workspace
from trtqwen.system.processes import child

OWNER = """
import sys
from contextlib import ExitStack
from trtqwen.system.leftovers import shared_memory, workspace
with ExitStack() as stack:
    directory = stack.enter_context(workspace("test"))
    stack.enter_context(shared_memory(sys.argv[1]))
    print(directory, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_what_a_killed_owner_left_is_swept_and_the_rest_stays(temporary: Path) -> None:
    prefix = f"trtqwen-{os.getpid()}test-"
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, prefix],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(temporary)},
    )
    assert owner.stdout is not None
    assert owner.stdin is not None
    directory = Path(owner.stdout.readline().strip())
    region = SHARED_MEMORY / f"{prefix}region"
    region.write_bytes(b"")
    (directory / "file").write_text("kept while its owner lives")
    try:
        sweep()
        assert (directory / "file").exists()
        assert region.exists()
        owner.kill()
        owner.wait()
        with workspace() as mine:
            sweep()
            assert list(temporary.iterdir()) == [mine]
        # A server that starts elsewhere on this machine may be sweeping the same files.
        assert wait_for(lambda: not list(SHARED_MEMORY.glob(f"{prefix}*")))
    finally:
        region.unlink(missing_ok=True)
        owner.stdin.close()
        owner.stdout.close()


def test_a_directory_without_an_owner_may_get_one_for_a_minute(temporary: Path) -> None:
    young, old, full = (temporary / f"trtqwen-{name}" for name in ("young", "old", "full"))
    for directory in (young, old, full):
        directory.mkdir()
    (full / "file").write_text("someone's")
    for directory in (old, full):
        os.utime(directory, (0, time.time() - 120))
    sweep()
    assert sorted(temporary.iterdir()) == [full, young]


SHARER = """
import os, time
from multiprocessing.shared_memory import SharedMemory
memory = SharedMemory(create=True, size=10)
if os.fork():
    print(memory.name, flush=True)
time.sleep(3600)
"""


def test_shared_memory_of_a_killed_program_goes(tmp_path: Path) -> None:
    """vLLM's workers and its API server share some."""
    told = tmp_path / "told"
    with told.open("wb") as output:
        command = [sys.executable, "-c", SHARER]
        process = start_guarded(command, os.environ, tmp_path, output=output)
    try:
        assert wait_for(lambda: told.read_text().endswith("\n"))
        file = SHARED_MEMORY / told.read_text().strip()
        assert file.exists()
        os.kill(child(process.pid), signal.SIGKILL)
        process.wait(60)
        assert not file.exists()
    finally:
        process.kill()


MAPPER = """
import mmap, sys
with open(sys.argv[1], "rb") as file:
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
print("mapped", flush=True)
sys.stdin.read()
"""


def test_triton_s_empty_directories_go_with_their_server(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that another Triton may have made stay as long as it runs: it aborts at its end without its own."""
    library = temporary / "libtriton_of_this_test.so"
    library.write_bytes(b"python backend")
    monkeypatch.setattr(guardian, "ENVIRONMENT_HOME", str(temporary))
    monkeypatch.setattr(guardian, "PYTHON_BACKEND", f"/{library.name}")
    other = temporary / "python_env_before"
    other.mkdir()
    record = temporary / guardian.ENVIRONMENTS
    record.write_text(json.dumps({"before": guardian.environments(), "since": time.time()}))
    ours, used = temporary / "python_env_ours", temporary / "python_env_used"
    with subprocess.Popen(
        [sys.executable, "-c", MAPPER, str(library)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as another:
        assert another.stdout is not None
        assert another.stdout.readline() == "mapped\n"
        ours.mkdir()
        used.mkdir()
        (used / "python").write_text("an environment that was unpacked")
        guardian.remove_environments(str(record))
        assert ours.exists()
        another.kill()
    guardian.remove_environments(str(record))
    assert sorted(path.name for path in temporary.glob("python_env_*")) == ["python_env_before", "python_env_used"]
