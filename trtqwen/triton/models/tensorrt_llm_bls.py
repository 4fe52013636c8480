"""Triton model `tensorrt_llm_bls`: prompts to text by calling the other models, many requests at a time."""

import json
import os
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy.typing as npt
import triton_python_backend_utils as pb_utils

from trtqwen.diagnostics import RequestError
from trtqwen.triton.bls import BlsSettings, answer, stop
from trtqwen.triton.loopback import Loopback
from trtqwen.triton.model_parameters import FROM_PROGRAM, GRPC_ADDRESS, flag, read_parameters

_FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
_MOST_REQUESTS = 256  # served at a time, each by a thread that mostly waits
_CANCELLATION_CHECK_PERIOD = 0.1  # seconds, as the engine's own

Array = npt.NDArray[Any]


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        parameters = read_parameters(args)
        config = json.loads(args["model_config"])
        outputs = (output["name"] for output in config["output"])
        self._settings = BlsSettings(
            llm=parameters.get("tensorrt_llm_model_name", "tensorrt_llm"),
            accumulate_tokens=flag(parameters, "accumulate_tokens", False),
            outputs=tuple(name for name in outputs if name != "text_output"),
        )
        # Who starts tritonserver by hand may not tell the address: then by Triton's own calls, which may hang.
        self._loopback = Loopback(os.environ[GRPC_ADDRESS]) if GRPC_ADDRESS in os.environ else None
        self._running: dict[_Sender, _Models] = {}
        self._threads = ThreadPoolExecutor(_MOST_REQUESTS)
        self._stopping = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def execute(self, requests: list["pb_utils.InferenceRequest"]) -> None:
        for request in requests:
            inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            models = _Models(request.request_id(), self._loopback)
            self._threads.submit(self._serve, models, inputs, _Sender(request))

    def finalize(self) -> None:
        self._stopping.set()
        self._watcher.join()
        self._threads.shutdown()
        if self._loopback is not None:
            self._loopback.close()

    def _serve(self, models: "_Models", inputs: dict[str, Array], sender: "_Sender") -> None:
        self._running[sender] = models
        try:
            answer(models, self._settings, inputs, sender)
        except Exception as problem:  # a thread of the pool would keep it to itself, and the client would wait
            sender.fail(f"tensorrt_llm_bls: {problem}")
        finally:
            del self._running[sender]

    def _watch(self) -> None:
        """Stop the requests of disconnected clients, because Triton does not pass a cancellation on to other models.

        It repeats until the request has ended, because a stop may fail or arrive before the request. A client counts
        as disconnected at the second check; `EngineService.cancel_abandoned` explains it.
        """
        gone: set[_Sender] = set()
        while not self._stopping.wait(_CANCELLATION_CHECK_PERIOD):
            before, gone = gone, set()
            for sender, models in list(self._running.items()):
                try:
                    if sender.abandoned():
                        gone.add(sender)
                        if sender in before:
                            stop(models, self._settings)
                except Exception as problem:  # without this thread, no client would be missed any more
                    pb_utils.Logger.log_error(f"request {models.request_id} was not stopped: {problem}")


class _Sender:
    """`carrier.Sender` of a Triton request. Thread-safe; silent after the final response.

    Sends only requested tensors: the stub frees others without Python's lock, and crashes in 3.12.
    """

    def __init__(self, request: "pb_utils.InferenceRequest") -> None:
        self._sender = request.get_response_sender()
        self._wanted = frozenset(request.requested_output_names())
        self._closed = False
        self._lock = threading.Lock()

    def send(self, tensors: Mapping[str, Array], *, final: bool) -> None:
        outputs = [pb_utils.Tensor(name, value) for name, value in tensors.items() if name in self._wanted]
        response = pb_utils.InferenceResponse(outputs)
        self._respond(response if tensors else None, final)

    def fail(self, error: str) -> None:
        self._respond(pb_utils.InferenceResponse(error=pb_utils.TritonError(error)), True)

    def abandoned(self) -> bool:
        with self._lock:
            return not self._closed and bool(self._sender.is_cancelled())

    def _respond(self, response: "pb_utils.InferenceResponse | None", final: bool) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = final
            flags = _FINAL if final else 0
            if response is None:
                self._sender.send(flags=flags)
            else:
                self._sender.send(response, flags)


class _Models:
    """`bls.Models` for one request, over gRPC.

    Clients may use one id twice or none, so the other models get a new id. The embedded engine also gets the client's
    id, for the client's stop request. TensorRT-LLM's backend has one id per request.
    """

    def __init__(self, client_id: str, loopback: Loopback | None) -> None:
        self.request_id = uuid.uuid4().hex
        self._client_id = client_id
        self._loopback = loopback

    def call(self, model: str, inputs: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        if self._loopback is None:
            return _read(self._request(model, inputs, outputs).exec())
        [response] = self.stream(model, inputs, outputs)
        return response

    def stream(self, model: str, inputs: Mapping[str, Array], outputs: Sequence[str]) -> Iterator[dict[str, Array]]:
        if self._loopback is not None:
            parameters = {FROM_PROGRAM: self._client_id}
            yield from self._loopback.stream(model, self.request_id, inputs, outputs, parameters)
        else:
            for response in self._request(model, inputs, outputs).exec(decoupled=True):
                yield _read(response)

    def _request(
        self, model: str, inputs: Mapping[str, Array], outputs: Sequence[str]
    ) -> "pb_utils.InferenceRequest":
        return pb_utils.InferenceRequest(
            model_name=model,
            request_id=self.request_id,
            inputs=[pb_utils.Tensor(name, value) for name, value in inputs.items()],
            requested_output_names=list(outputs),
            parameters={FROM_PROGRAM: self._client_id},
        )


def _read(response: "pb_utils.InferenceResponse") -> dict[str, Array]:
    if response.has_error():
        raise RequestError(response.error().message())
    return {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}
