from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from trtqwen.diagnostics import SourceError
from trtqwen.system.steady import SteadyFiles


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    for change in (b"other", b"x", None):
        path.write_bytes(b"bytes")
        files = SteadyFiles([path])
        files.check()
        path.write_bytes(change) if change is not None else path.unlink()
        with pytest.raises(SourceError, match=r"weights: (was changed while|cannot be read)"):
            files.check()


def test_a_writer_waits_until_it_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"bytes")
    files, done = SteadyFiles([path]), threading.Event()

    def cut_short() -> None:
        os.truncate(path, 0)
        done.set()

    writer = threading.Thread(target=cut_short)
    with pytest.raises(SourceError, match=r"opens it for writing|was changed"), files.held():
        if not files._leases:
            pytest.skip("this file system has no leases")
        writer.start()
        while True:
            files.check()
            assert path.stat().st_size == 5
    assert done.wait(60)
    writer.join()
