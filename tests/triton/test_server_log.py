"""What is read out of a log, on lines as Triton 2.51 writes them."""

from __future__ import annotations

import signal

from trtqwen.engine.explain import explain
from trtqwen.triton.server_log import GONE, ServerLog, without_error

ADVICE = "see triton.log"
INFO = "I1127 04:00:00.000000 1 server.cc:674] \n"
LOADING = (
    "E1127 04:00:01.000000 1 model_lifecycle.cc:642] \"failed to load 'preprocessing' version 1: Internal: "
    "InputError: tokenizer: no tokenizer.json; copy the model's tokenizer files there\\n\\nAt:\\n  model.py(9)\"\n"
)
LATER = 'E1127 04:00:02.000000 1 main.cc:100] "unable to start"\n'


def test_an_error_of_trtqwen_in_a_model_is_told_apart_with_its_hint() -> None:
    assert ServerLog(INFO + LOADING, ADVICE).own_error == (
        "the model preprocessing does not load: tokenizer: no tokenizer.json",
        "copy the model's tokenizer files there (see triton.log)",
    )
    assert ServerLog(INFO + LATER, ADVICE).own_error is None


def test_a_model_that_does_not_load_says_more_than_a_later_error() -> None:
    line = ServerLog(INFO + LOADING + LATER, ADVICE).error("Triton ended").what
    assert line.startswith("Triton ended: failed to load 'preprocessing' version 1")
    assert "At:" not in line
    assert "(see triton.log)" in line
    assert ServerLog(INFO + LATER, ADVICE).error("Late").what == "Late: unable to start (see triton.log)"


def test_a_known_cause_is_named_and_its_hint_is_apart() -> None:
    text = 'E1127 04:00:01.000000 1 main.cc:1] "CUDA runtime error in ::cudaMallocAsync: out of memory"\n'
    error = ServerLog(INFO + text, ADVICE).error("Triton ended with code 1")
    [known] = [found for found in explain(text.splitlines()).findings if found.role == "cause"]
    assert error.what.endswith(f"(see triton.log); the cause: {known.cause}")
    assert error.hint == known.hint != ""


def test_a_log_without_an_error_is_said_to_have_none() -> None:
    harmless = 'E1127 04:00:01.000000 1 pinned_memory.cc:1] "CUDA driver version is insufficient for CUDA runtime"\n'
    log = ServerLog(harmless + "last line\n", ADVICE)
    assert log.error("Late").what == "Late: last line (see triton.log)"
    assert log.error("Late", GONE).what == f"Late: {GONE} (see triton.log)"
    assert ServerLog("", ADVICE).error("Late").what == "Late: its log is empty (see triton.log)"
    assert "killed" in (without_error(-signal.SIGKILL) or "")
    assert without_error(1) is None


def test_the_two_states_that_the_server_waits_for() -> None:
    fault = ServerLog("what():  boost::interprocess::lock_exception::what\n", ADVICE)
    ending = ServerLog(
        "I1 server.cc:1] Timeout 1: Found 2 live models and 0 in-flight non-inference requests\n", ADVICE
    )
    assert (fault.start_fault, fault.unloading) == (True, False)
    assert (ending.start_fault, ending.unloading) == (False, True)


def test_a_crash_is_placed_by_the_stack_that_triton_writes() -> None:
    stack = (
        "Signal (11) received.\n"
        " 0# 0x000055BE17BF452D in /opt/tritonserver/bin/tritonserver\n"
        " 1# 0x00007F3437E5A050 in /lib/x86_64-linux-gnu/libc.so.6\n"
        " 2# pthread_cond_clockwait in /lib/x86_64-linux-gnu/libc.so.6\n"
        " 3# 0x000055BE17BA10C4 in /opt/tritonserver/backends/python/libtriton_python.so\n"
    )
    named = f"{stack} 4# TRITONBACKEND_ModelInstanceExecute in /opt/tritonserver/lib/libtritonserver.so\n"
    crashed = without_error(-signal.SIGSEGV)
    for text, place in (
        (INFO, ""),
        (INFO + stack, " in libtriton_python.so"),
        (INFO + named, " in TRITONBACKEND_ModelInstanceExecute"),
    ):
        assert ServerLog(text, ADVICE).error("Late", crashed).what == f"Late: {crashed}{place} (see triton.log)"
