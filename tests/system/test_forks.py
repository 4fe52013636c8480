"""Processes with limits, asked through the one that runs chat templates."""

from __future__ import annotations

import os
import signal
import socket
import time
from contextlib import suppress

import pytest

from tests.processes import children, in_child
from tests.waiting import GENEROUS
from trtqwen.hf import template_process
from trtqwen.hf.template_process import TemplateRefusal, TemplateTimeout, run_template
from trtqwen.system import forks
from trtqwen.system.processes import runs, stopped


def wait_for_stop(pid: int) -> None:
    while not stopped(pid):
        time.sleep(0.01)


@pytest.mark.parametrize("who", ["fork", "parent"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_is_killed_or_stopped_is_replaced(who: str, number: signal.Signals) -> None:
    assert run_template("{{ x }}", {"x": 1}) == "1"
    server = template_process._server()
    parent = server._parent.pid
    [fork] = children(parent)
    pids = [fork] if who == "fork" else [parent, fork]
    for pid in pids:
        os.kill(pid, number)
        if number is signal.SIGSTOP:
            wait_for_stop(pid)
    begun = time.monotonic()
    assert run_template("{{ x }}", {"x": 2}) == "2"
    assert time.monotonic() - begun < GENEROUS
    assert not runs(fork)


def test_ctrl_c_is_left_to_the_process_that_asks() -> None:
    assert run_template("{{ x }}", {"x": 1}) == "1"
    parent = template_process._server()._parent.pid
    processes = [parent, *children(parent)]
    for pid in processes:
        os.kill(pid, signal.SIGINT)
    assert run_template("{{ x }}", {"x": 2}) == "2"
    assert [parent, *children(parent)] == processes


def test_a_forked_process_shares_no_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may end between question and answer. Who forked it would read that answer as the next one of its own."""
    assert run_template("{{ x }}", {"x": 1}) == "1"

    def ask_and_end() -> None:
        receive = forks._receive

        def end_in_the_midst(fork: forks._Fork, seconds: float) -> bytes | None:
            answer = receive(fork, seconds)
            if answer is None or b"theirs" not in answer:  # the greeting of a new process
                return answer
            os._exit(3)

        monkeypatch.setattr(forks, "_receive", end_in_the_midst)
        monkeypatch.setattr(forks, "_read", peek)
        run_template("{{ x }}", {"x": "theirs"})

    def peek(source: socket.socket) -> bytes | None:
        """The next message, left where it is if it is the answer."""
        while True:
            with suppress(TimeoutError):
                message = source.recv(1 << 16, socket.MSG_PEEK)
                return message if b"theirs" in message else read(source)

    read = forks._read
    assert in_child(ask_and_end) == 3
    assert run_template("{{ x }}", {"x": "ours"}) == "ours"


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'a' * 10 ** 10 }}",
        "{% set n = namespace(x='0123456789') %}{% for a in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "{{ 'x' * 30000000 }}",
        "{{ %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_hostile_template_is_an_error_within_seconds(template: str) -> None:
    with pytest.raises(TemplateRefusal):
        run_template(template, {})
    assert run_template("{{ x }}", {"x": 1}) == "1"


def test_who_cannot_wait_is_told_soon() -> None:
    with pytest.raises(TemplateTimeout):
        run_template("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", {}, 0.05)
