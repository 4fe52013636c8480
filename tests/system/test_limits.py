from __future__ import annotations

import os
import resource
from types import SimpleNamespace

import pytest

from tests.processes import in_child
from trtqwen.diagnostics import ServerError
from trtqwen.system.limits import check_shared_memory, raise_file_limit


def test_the_soft_limit_of_files_becomes_the_hard_one() -> None:
    def work() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (600, 900))
        assert raise_file_limit() == 900
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (900, 900)
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        with pytest.raises(ServerError, match="limit of open files is 64, and a server needs 512"):
            raise_file_limit()

    assert in_child(work) == 0


def test_a_small_shared_memory_is_refused_with_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    check_shared_memory(1)
    small = SimpleNamespace(f_bavail=256, f_frsize=4096, f_flag=0)
    monkeypatch.setattr(os, "statvfs", lambda path: small)
    with pytest.raises(ServerError, match=r"has 1\.0 MB free, and .* need 4\.2 MB"):
        check_shared_memory(4 << 20)
    small.f_flag = os.ST_RDONLY
    with pytest.raises(ServerError, match="cannot be written"):
        check_shared_memory(1)
