from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trtqwen.system.guarded import start_guarded

_TELL = """
import os, pathlib
group = pathlib.Path("/proc/self/autogroup")
print(os.nice(0), group.read_text().split()[-1] if group.exists() else "none")
"""


@pytest.mark.parametrize("niceness", [0, 10])
def test_a_program_gives_way_to_others_as_far_as_it_is_told(tmp_path: Path, niceness: int) -> None:
    process = start_guarded(
        [sys.executable, "-c", _TELL], os.environ, tmp_path, output=subprocess.PIPE, niceness=niceness
    )
    assert process.stdout is not None
    with process.stdout:
        own, of_session = process.stdout.read().split()
    assert process.wait(60) == 0
    assert int(own) == os.nice(0) + niceness
    assert of_session in (str(niceness), "none")
    assert process.stdin is not None
    process.stdin.close()
