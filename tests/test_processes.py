"""What is passed on of other processes' words, and that they need not wait for it."""

from __future__ import annotations

import os
import subprocess
import sys

from trtqwen.system.processes import Relay

TALKS = """
import sys
for number in range(int(sys.argv[1])):
    print(number, "x" * 100)
print("error: enough")
"""


def talk(lines: int, target: int) -> tuple[Relay, subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, "-c", TALKS, str(lines)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return Relay(process.stdout, target, keep_back="error: "), process


def test_lines_are_passed_on_but_for_the_reason_of_the_end() -> None:
    heard, target = os.pipe()
    relay, process = talk(20, target)
    assert process.wait(timeout=60) == 0
    relay.join()
    assert [line.split()[0] for line in os.read(heard, 1 << 16).decode().splitlines()] == list(map(str, range(20)))
    assert relay.last_lines[-1] == "error: enough"
    os.close(heard)
    os.close(target)


def test_nobody_waits_for_who_does_not_read() -> None:
    """A pipe holds 64 KiB."""
    heard, target = os.pipe()
    relay, process = talk(50_000, target)
    assert process.wait(timeout=60) == 0
    relay.join(0.1)
    assert relay.last_lines[-1] == "error: enough"
    os.close(heard)  # the relay's write fails, and it ends
    relay.join()
    os.close(target)
