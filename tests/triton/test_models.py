"""The watching threads of the models, with Triton and all that the models use played by the test."""

from __future__ import annotations

import importlib.util
import json
import queue
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

import trtqwen.triton
from tests.triton.conftest import played_triton
from trtqwen.triton.messages import infer_response, input_arrays
from trtqwen.triton.model_parameters import FROM_PROGRAM, GRPC_ADDRESS

SECONDS = 5.0  # more than anything here takes


class PlayedTriton(MagicMock):
    """`triton_python_backend_utils`."""

    TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
    TritonModelException = type("TritonModelException", (Exception,), {})

    @property
    def logged(self) -> list[str]:
        return [call.args[0] for call in self.Logger.log_error.call_args_list]


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> PlayedTriton:
    played = PlayedTriton()
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", played)
    return played


def load(model: str) -> ModuleType:
    """A model's module of its own, which finds the played Triton."""
    path = Path(trtqwen.triton.__file__).parent / "models" / f"{model}.py"
    spec = importlib.util.spec_from_file_location(model, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def request_of_a_client_that_has_gone() -> Any:
    request = MagicMock()
    request.inputs.return_value = []
    request.get_response_sender.return_value.is_cancelled.return_value = True
    return request


def test_a_stop_that_fails_is_logged_and_tried_again_and_others_are_stopped(
    triton: PlayedTriton, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = load("tensorrt_llm_bls")
    stops: queue.Queue[Any] = queue.Queue()
    ended = threading.Event()

    def stop(models: Any, settings: Any) -> None:
        stops.put(models.request_id)
        raise triton.TritonModelException("no shared memory is left")

    monkeypatch.setattr(program, "answer", lambda *_: ended.wait(SECONDS))
    monkeypatch.setattr(program, "stop", stop)
    model = program.TritonPythonModel()
    model.initialize({"model_config": json.dumps({"parameters": {}, "output": []})})
    try:
        model.execute([request_of_a_client_that_has_gone() for _ in range(2)])
        stopped: Counter[str] = Counter()
        while len(stopped) < 2 or min(stopped.values()) < 2:
            stopped[stops.get(timeout=SECONDS)] += 1
    finally:
        ended.set()
        model.finalize()
    for request_id in stopped:
        assert f"request {request_id} was not stopped: no shared memory is left" in triton.logged


class PlayedModels(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """The engine answers a stream with three tokens, and a stop with nothing; the text models answer once.

    Attributes:
        asked: model, id and parameter of each request.
    """

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, str]] = []

    def ModelStreamInfer(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        tokens = [
            {"output_ids": np.array([[[token_id]]], np.int32), "sequence_length": np.ones((1, 1), np.int32)}
            for token_id in (5, 6, 7)
        ]
        text = {"OUTPUT": np.array([b"x"], np.object_)}
        answers: dict[str, list[dict[str, Any]]] = {
            "preprocessing": [{}],
            "postprocessing": [text],
            "tensorrt_llm": tokens,
        }
        for request in requests:
            if "stop" not in input_arrays(request):
                self.asked.append((request.model_name, request.id, request.parameters[FROM_PROGRAM].string_param))
                for outputs in answers[request.model_name]:
                    yield service_pb2.ModelStreamInferResponse(infer_response=infer_response(outputs))


def test_the_program_asks_models_over_grpc_and_never_by_tritons_own_calls(
    triton: PlayedTriton, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton's own calls hang and crash where several run at a time."""
    triton.InferenceRequest.side_effect = AssertionError
    ended: queue.Queue[Any] = queue.Queue()
    sender = MagicMock(is_cancelled=lambda: False, send=lambda *parts, flags=0: ended.put((*parts, flags)))
    tensor = MagicMock(as_numpy=lambda: np.array([[b"prompt"]], np.object_))
    tensor.name.return_value = "text_input"
    request = MagicMock(
        inputs=lambda: [tensor],
        request_id=lambda: "mine",
        get_response_sender=lambda: sender,
        requested_output_names=lambda: ["text_output"],
    )
    models = PlayedModels()
    with played_triton(models) as address:
        monkeypatch.setenv(GRPC_ADDRESS, address)
        model = load("tensorrt_llm_bls").TritonPythonModel()
        model.initialize({"model_config": json.dumps({"parameters": {}, "output": []})})
        model.execute([request])
        sent = [ended.get(timeout=60) for _ in range(4)]
        model.finalize()
    assert [flags for *_, flags in sent] == [0, 0, 0, 1]
    assert [model for model, _, _ in models.asked].count("postprocessing") == 3
    assert {client_id for _, _, client_id in models.asked} == {"mine"}
    [inner_id] = {inner_id for _, inner_id, _ in models.asked}
    assert inner_id != "mine"


def test_a_look_for_gone_clients_that_fails_is_logged_and_the_engines_model_looks_again(
    triton: PlayedTriton, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load("tensorrt_llm")
    looks: queue.Queue[None] = queue.Queue()

    def cancel_abandoned() -> None:
        looks.put(None)
        raise triton.TritonModelException("no shared memory is left")

    service = SimpleNamespace(cancel_abandoned=cancel_abandoned)
    parameters = MagicMock(cancellation_check_period=0.01, stats_check_period=600)
    monkeypatch.setattr(engine, "engine_parameters", lambda args: parameters)
    monkeypatch.setattr(engine, "EngineService", lambda *args, **kwargs: service)
    for name in ("open_engine", "Tokenizer"):
        monkeypatch.setattr(engine, name, MagicMock())
    model = engine.TritonPythonModel()
    model.initialize({"model_name": "tensorrt_llm", "model_version": "1"})
    try:
        for _ in range(3):
            looks.get(timeout=SECONDS)
    finally:
        model.finalize()
    assert "no shared memory is left" in triton.logged[0]


def test_no_metric_outlives_the_engines_model(triton: PlayedTriton, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that do are deleted by a stub that has let go of its shared memory, and crash it."""
    made: list[weakref.ref[Any]] = []

    def family(**_: Any) -> Any:
        def metric(**_: Any) -> Any:
            made.append(weakref.ref(played := SimpleMetric()))
            return played

        made.append(weakref.ref(played := SimpleMetric(Metric=metric)))
        return played

    triton.MetricFamily = family
    family.HISTOGRAM = family.GAUGE = None  # type: ignore[attr-defined]
    engine = load("tensorrt_llm")
    reported = threading.Event()

    def gauges() -> dict[tuple[str, str, str], float]:
        reported.set()
        return {("family", "label", "value"): 1.0}

    service = SimpleNamespace(cancel_abandoned=lambda: None, gauges=gauges)
    parameters = MagicMock(cancellation_check_period=600, stats_check_period=0.01)
    monkeypatch.setattr(engine, "engine_parameters", lambda args: parameters)
    monkeypatch.setattr(engine, "EngineService", lambda *args, **kwargs: service)
    for name in ("open_engine", "Tokenizer", "_beat"):
        monkeypatch.setattr(engine, name, MagicMock())
    model = engine.TritonPythonModel()
    model.initialize({"model_name": "tensorrt_llm", "model_version": "1"})
    model.execute([])
    assert reported.wait(SECONDS)
    model.finalize()
    assert len(made) == 6  # two histograms, a gauge, and the family of each
    assert not [metric for metric in made if metric() is not None]


class SimpleMetric(SimpleNamespace):
    """A metric or a family of metrics."""
