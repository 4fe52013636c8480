"""The public Python API, and its example."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import trtqwen
from trtqwen.demo import MODEL

EXAMPLE = Path(__file__).parents[1] / "examples" / "python_api.py"


def test_every_name_is_there() -> None:
    for name in trtqwen.__all__:
        assert getattr(trtqwen, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = trtqwen.nothing


@pytest.mark.slow
@pytest.mark.triton
@pytest.mark.timeout(400)
def test_the_example_builds_serves_and_answers(tmp_path: Path) -> None:
    source = EXAMPLE.read_text(encoding="utf-8").replace("directory)", "directory, ports=Ports(0, 0, 0))")
    source = source.replace("import sys\n", "import sys\nfrom trtqwen.triton.ports import Ports\n", 1)
    command = [sys.executable, "-c", source, str(MODEL)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("fits: True\ncheckpoint: ")
    assert done.stdout.endswith("Hello! How can I help you?\n")
