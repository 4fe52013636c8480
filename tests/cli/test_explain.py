from __future__ import annotations

import json
import subprocess
from pathlib import Path

from tests.command_line import trtqwen

LOG = "fine\nRuntimeError: Required but not provided tensors:{'x'}\nAssertionError: Engine building failed\n"


def explain(*arguments: object, text: str = "") -> subprocess.CompletedProcess[str]:
    return trtqwen("explain", *arguments, text=text)


def test_a_log_file_is_explained_for_people_and_as_json(tmp_path: Path) -> None:
    (tmp_path / "log").write_text(LOG)
    result = explain(tmp_path / "log")
    assert result.returncode == 0
    assert result.stdout.startswith("line 2: RuntimeError: Required but not provided tensors:{'x'}\n  cause:  ")
    assert "  hint: convert again" in result.stdout
    printed = json.loads(explain("-", "--json", text=LOG).stdout)
    assert [finding["number"] for finding in printed["findings"]] == [2, 3]
    assert printed["log"] == "standard input"


def test_a_line_that_is_no_cause_is_not_called_one() -> None:
    log = "ok\nNCCL WARN something odd\nFATAL it ends\n"
    lines = explain("-", text=log).stdout.splitlines()
    assert lines[0] == "standard input: no line names the cause for certain; these say where to look"
    assert lines[1:3] == ["line 2: NCCL WARN something odd", lines[2]]
    assert lines[2].startswith("  means:  NCCL reports a failure")
    assert lines[-1] == "line 3: FATAL it ends"


def test_nothing_found_is_said_and_told_by_the_exit_code(tmp_path: Path) -> None:
    result = explain("-", text="all is well\n")
    assert (result.returncode, result.stdout) == (
        1,
        "standard input: the cause is not known to trtqwen\n  line 1: all is well\n",
    )
    result = explain(tmp_path / "none")
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert "none: cannot be read" in result.stderr
