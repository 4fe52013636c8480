"""Triton model `tensorrt_llm` on an engine that trtqwen runs: token ids in, token ids out as they come."""

import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt
import triton_python_backend_utils as pb_utils

from trtqwen.diagnostics import EngineError
from trtqwen.hf.tokenizer import Tokenizer
from trtqwen.triton.contract import EXTENSIONS
from trtqwen.triton.engines import open_engine
from trtqwen.triton.metrics import INPUT_LENGTH, LENGTH_BUCKETS, LENGTH_LABEL, OUTPUT_LENGTH
from trtqwen.triton.model_parameters import (
    ENGINE_DEATH,
    FILES_VERIFIED,
    FROM_PROGRAM,
    HEARTBEAT,
    VLLM_PID,
    VLLM_SOCKET,
)
from trtqwen.triton.parameters import engine_parameters
from trtqwen.triton.service import EngineService
from trtqwen.triton.tensors import Limits
from trtqwen.vllm.server import VllmPlace

# One start of about 50, at a load of 30, hung after `initialize` had returned. Metrics are messages to Triton too and
# began at that moment; that they caused it is a guess, so they begin later, or with the first request.
_SETTLE_SECONDS = 1.0
_FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        parameters = engine_parameters(args)
        token_bytes = Tokenizer(parameters.tokenizer).token_bytes
        self._metrics = _Metrics({"model": args["model_name"], "version": args["model_version"]})
        verify = FILES_VERIFIED not in os.environ
        self._executor = open_engine(parameters.engine, parameters.executor, vllm=_vllm(), verify=verify)
        _beat()  # it has started: from now on, silence is a fault
        config = self._executor.engine_config
        limits = Limits(config.pretrained_config.vocab_size, config.build_config.max_batch_size)
        self._service = EngineService(
            self._executor,
            limits,
            token_bytes,
            exclude_input=parameters.exclude_input_in_output,
            on_finished=self._metrics.count,
        )
        self._stopping, self._settled = threading.Event(), threading.Event()
        self._threads = [
            self._every(parameters.cancellation_check_period, self._service.cancel_abandoned),
            self._every(parameters.stats_check_period, self._report, settle=True),
        ]

    def execute(self, requests: list["pb_utils.InferenceRequest"]) -> None:
        self._settled.set()
        for request in requests:
            inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            own = json.loads(request.parameters() or "{}")
            client_id = own.get(FROM_PROGRAM)
            sender = _Sender(request, from_program=client_id is not None)
            extensions = own.get(EXTENSIONS, "")
            self._service.handle(request.request_id(), inputs, sender, client_id=client_id, extensions=extensions)

    def _report(self) -> None:
        gauges = self._service.gauges()  # waits until a step has ended
        _beat()
        self._metrics.set(gauges)

    def is_ready(self) -> bool:
        """Return readiness. Triton calls it from releases after 2.51."""
        return self._executor.alive

    def finalize(self) -> None:
        self._stopping.set()
        self._settled.set()
        self._executor.shutdown()
        for thread in self._threads:
            thread.join()
        self._metrics.delete()

    def _every(self, period: float, action: Callable[[], None], *, settle: bool = False) -> threading.Thread:
        def repeat() -> None:
            if settle:
                self._settled.wait(_SETTLE_SECONDS)
            while not self._stopping.wait(period):
                try:
                    action()
                except EngineError as problem:  # the engine has stopped, and every request says so
                    if not self._stopping.is_set():
                        _tell_death(str(problem))
                    return
                except Exception as problem:  # without this thread, no client would be missed any more
                    pb_utils.Logger.log_error(f"what is done every {period} seconds failed: {problem!r}")

        thread = threading.Thread(target=repeat, daemon=True)
        thread.start()
        return thread


def _beat() -> None:
    """Signal the watchdog that the engine works."""
    if HEARTBEAT in os.environ:
        now = time.monotonic_ns()  # time stamps need no room on the disk
        Path(os.environ[HEARTBEAT]).touch()
        os.utime(os.environ[HEARTBEAT], ns=(now, now))


def _vllm() -> VllmPlace | None:
    """The vLLM that was started for this server."""
    if VLLM_SOCKET not in os.environ:
        return None
    pid = os.environ.get(VLLM_PID)
    return VllmPlace(Path(os.environ[VLLM_SOCKET]), int(pid) if pid else None)


def _tell_death(problem: str) -> None:
    """Report the engine's end to `serve`: Triton continues without it, and 2.51 still reports that it is ready."""
    pb_utils.Logger.log_error(problem)
    if ENGINE_DEATH in os.environ:
        Path(os.environ[ENGINE_DEATH]).write_text(problem, "utf-8")


class _Sender:
    """`carrier.Sender` of a Triton request.

    Sends only requested tensors: the stub frees others without Python's lock, and crashes in 3.12.
    """

    def __init__(self, request: "pb_utils.InferenceRequest", *, from_program: bool) -> None:
        self._sender = request.get_response_sender()
        self._wanted = frozenset(request.requested_output_names())
        self._from_program = from_program

    def send(self, tensors: Mapping[str, npt.NDArray[Any]], *, final: bool) -> None:
        outputs = [pb_utils.Tensor(name, value) for name, value in tensors.items() if name in self._wanted]
        response = pb_utils.InferenceResponse(outputs)
        self._sender.send(response, _FINAL if final else 0)

    def fail(self, error: str) -> None:
        try:
            response = pb_utils.InferenceResponse(error=pb_utils.TritonError(error))
            if self._from_program:
                # Triton loses an error that is not a program's first response, and the end of the stream with it.
                self._sender.send(response, 0)
                self._sender.send(flags=_FINAL)
            else:
                self._sender.send(response, _FINAL)
        except pb_utils.TritonModelException as problem:  # must not end the executor's reader thread
            pb_utils.Logger.log_error(f"an error was lost ({problem}): {error}")

    def abandoned(self) -> bool:
        return bool(self._sender.is_cancelled())


class _Metrics:
    """The engine's gauges and its histograms of lengths at Triton's metrics endpoint."""

    def __init__(self, labels: dict[str, str]) -> None:
        self._labels = labels
        self._families: dict[str, Any] = {}
        self._gauges: dict[tuple[str, str, str], Any] = {}
        self._last: dict[tuple[str, str, str], float] = {}
        self._lengths = [
            self._family(family, pb_utils.MetricFamily.HISTOGRAM).Metric(
                labels={**labels, LENGTH_LABEL: name}, buckets=list(LENGTH_BUCKETS)
            )
            for family, name in (INPUT_LENGTH, OUTPUT_LENGTH)
        ]

    def set(self, gauges: Mapping[tuple[str, str, str], float]) -> None:
        for key, value in gauges.items():
            if self._last.get(key) != value:  # each update is a message to the server
                self._gauge(*key).set(value)
                self._last[key] = value

    def count(self, num_input: int, num_output: int) -> None:
        """Count a finished answer."""
        for metric, length in zip(self._lengths, (num_input, num_output), strict=True):
            metric.observe(length)

    def delete(self) -> None:
        """Delete the metrics at Triton. Those that outlive `finalize` crash the stub as it ends."""
        self._gauges.clear()
        self._lengths.clear()
        self._families.clear()

    def _gauge(self, family: str, label: str, name: str) -> Any:
        key = (family, label, name)
        if key not in self._gauges:
            metrics = self._family(family, pb_utils.MetricFamily.GAUGE)
            self._gauges[key] = metrics.Metric(labels={**self._labels, label: name})
        return self._gauges[key]

    def _family(self, name: str, kind: Any) -> Any:
        if name not in self._families:
            self._families[name] = pb_utils.MetricFamily(
                name=name, description="TensorRT-LLM's metrics, of the embedded engine", kind=kind
            )
        return self._families[name]
