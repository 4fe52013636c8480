"""A real Triton with the bundled model is well; a server that speaks the same protocol has every fault in turn."""

from __future__ import annotations

import http.server
import itertools
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import deserialize_bytes_tensor, np_to_triton_dtype, serialize_byte_tensor

from tests.doctor.conftest import check, trtllm_engine
from tests.triton.conftest import played_triton, repository, server  # noqa: F401 (fixtures)
from trtqwen.demo import MODEL
from trtqwen.diagnostics import ServerError
from trtqwen.doctor.endpoint import Endpoint
from trtqwen.doctor.subject import Subject, completed
from trtqwen.system.host import Host
from trtqwen.triton.server import TritonServer

LIVE = ("D28", "D29", "D30", "D31", "D32", "D33", "D34")
MAX_SEQ_LEN = 512


class Sick(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]  # the package has no types
    """Speaks the contract of the models; `fault` names what it gets wrong, "" nothing."""

    def __init__(self, fault: str) -> None:
        self.fault = fault
        self.used = 0
        self.wedged = False
        self._calls = itertools.count()
        self.shown = threading.Event()

    def ServerLive(self, request: Any, context: Any) -> Any:
        return service_pb2.ServerLiveResponse(live=True)

    def ModelConfig(self, request: Any, context: Any) -> Any:
        reply = service_pb2.ModelConfigResponse()
        reply.config.instance_group.add(count=4 if self.fault == "orchestrates" else 1)
        return reply

    def ModelInfer(self, request: Any, context: Any) -> Any:
        ids = list(deserialize_bytes_tensor(request.raw_input_contents[0])[0])
        outputs = {"INPUT_ID": np.array([ids], np.int32), "OUT_END_ID": np.array([[0]], np.int32)}
        return self._reply(outputs).infer_response

    def ModelStreamInfer(self, requests: Iterator[Any], context: Any) -> Iterator[Any]:
        answers = deque((request.id, self._answer(request, context)) for request in requests)
        while answers:
            name, answer = answers.popleft()
            reply = next(answer, None)
            if reply is None:
                continue
            if not reply.error_message:
                reply.infer_response.id = name
            yield reply
            if self.fault == "serial":
                answers.appendleft((name, answer))
            else:
                answers.append((name, answer))  # as a server with in-flight batching does

    def _answer(self, request: Any, context: Any) -> Iterator[Any]:
        inputs = {
            tensor.name: deserialize_bytes_tensor(raw)
            if tensor.datatype == "BYTES"
            else np.frombuffer(
                raw, {"INT32": np.int32, "UINT64": np.uint64, "FP32": np.float32}.get(tensor.datatype, bool)
            )
            for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True)
        }
        if request.model_name == "ensemble":
            yield from self._text(inputs)
        elif self.fault == "hangs":
            time.sleep(0.6)
        elif self.wedged:
            yield service_pb2.ModelStreamInferResponse(error_message="Stub process is not healthy.")
        elif len(inputs["input_ids"]) >= MAX_SEQ_LEN and self.fault != "lenient":
            self.wedged = self.fault == "wedge"
            yield service_pb2.ModelStreamInferResponse(error_message="Prompt length exceeds maximum input length")
        else:
            yield from self._tokens(int(inputs["request_output_len"][0]), context)

    def _tokens(self, limit: int, context: Any) -> Iterator[Any]:
        self.used += 1
        if self.fault != "keeps blocks":
            context.add_callback(self._free)
        answer = {"nan": [0] * 30, "stutter": [9] * 20, "silent": [], "endless": range(1, 999)}.get(
            self.fault, range(1, 12)
        )
        endless = itertools.cycle(range(1, 99)) if limit == 400 else answer  # the check for cancellation
        for number, token in enumerate(itertools.islice(endless, limit)):
            time.sleep(0.0005)
            if limit == 400 and number == 200:
                self.shown.wait(60)  # it lasts until the gauges have shown it, on any machine
            yield self._reply({"output_ids": np.array([[[token]]], np.int32)})

    def _free(self) -> None:
        self.used -= 1

    def _text(self, inputs: dict[str, Any]) -> Iterator[Any]:
        call = next(self._calls)
        seed = {"ignores seeds": 7, "invents seeds": call}.get(self.fault, int(inputs.get("seed", [0])[0]))
        for index in range(int(inputs["max_tokens"][0])):
            text = "\ufffd" if self.fault == "splits characters" and index == 3 else f"{seed} 聪明"
            yield self._reply({"text_output": np.array([text.encode()], np.object_)})

    def _reply(self, outputs: dict[str, Any]) -> Any:
        message = service_pb2.ModelStreamInferResponse()
        for name, value in outputs.items():
            message.infer_response.outputs.add(name=name, datatype=np_to_triton_dtype(value.dtype), shape=value.shape)
            raw = serialize_byte_tensor(value).item() if value.dtype == np.object_ else value.tobytes()
            message.infer_response.raw_output_contents.append(raw)
        return message


@pytest.fixture
def sick(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Subject]:
    """A server with the fault that the test is parametrised with, and its metrics."""
    servicer = Sick(request.param)

    class Metrics(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if servicer.used:
                servicer.shown.set()
            self.send_response(200)
            self.end_headers()
            labels = 'model="tensorrt_llm",version="1",kv_cache_block_type="used"'
            self.wfile.write(f"nv_trt_llm_kv_cache_block_metrics{{{labels}}} {servicer.used}\n".encode())

        def log_message(self, *message: Any) -> None:
            pass

    with (
        played_triton(servicer, threads=12) as url,
        http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metrics) as metrics,
    ):
        threading.Thread(target=metrics.serve_forever, daemon=True).start()
        engine = trtllm_engine(tmp_path / "engine", build_config__max_seq_len=MAX_SEQ_LEN)
        yield Subject(Host(), engine=engine, url=url, metrics=f"127.0.0.1:{metrics.server_address[1]}")
        metrics.shutdown()


@pytest.mark.parametrize("sick", [""], indirect=True)
def test_a_server_without_faults_is_well(sick: Subject) -> None:
    for name in LIVE[1:]:
        result = check(name, sick)
        assert result.verdict == "ok", (name, result)


@pytest.mark.parametrize(
    ("sick", "name", "verdict", "says"),
    [
        ("nan", "D29", "fail", "token 0 ('!') 30 times in a row"),
        ("stutter", "D29", "fail", "20 tokens, but only 1 different"),
        ("silent", "D29", "fail", "empty answer"),
        ("endless", "D29", "fail", "not answered within 256 tokens"),
        ("serial", "D30", "warn", "one BLS instance"),
        ("keeps blocks", "D31", "fail", "1 blocks in use 1 s after the client left"),
        ("lenient", "D32", "fail", "a prompt of 512 tokens is answered"),
        ("wedge", "D32", "fail", "the next request fails: "),
        ("splits characters", "D33", "fail", "hold U+FFFD"),
        ("ignores seeds", "D34", "warn", "different seeds agree"),
        ("invents seeds", "D34", "warn", "with one seed differ"),
    ],
    indirect=["sick"],
)
def test_faults_are_seen(sick: Subject, name: str, verdict: str, says: str) -> None:
    result = check(name, sick)
    assert result.verdict == verdict, result
    assert says in f"{result.evidence} {result.hint}"


@pytest.mark.parametrize("sick", ["nan"], indirect=True)
def test_parity_needs_the_models_own_tokens(sick: Subject) -> None:
    result = check("D28", Subject(Host(), model=MODEL, url=sick.url))
    assert result.verdict == "fail"
    assert "of the greedy tokens alone are the model's" in result.evidence


@pytest.mark.parametrize("sick", ["hangs"], indirect=True)
def test_every_request_has_a_deadline(sick: Subject) -> None:
    with (
        Endpoint(str(sick.url), "", deadline=0.3) as endpoint,
        pytest.raises(ServerError, match="did not answer in time"),
    ):
        list(endpoint.tokens([1], 1))


def test_no_server_is_told_once() -> None:
    nobody = Subject(Host(), url="127.0.0.1:1")
    assert (check("D29", nobody).verdict, check("D33", nobody).evidence) == ("fail", "no server, see D29")
    assert {check(name, Subject(Host())).evidence for name in LIVE} == {"give --url"}


@pytest.mark.parametrize("sick", [""], indirect=True)
def test_cancellation_needs_metrics(sick: Subject) -> None:
    result = check("D31", Subject(Host(), url=sick.url, metrics="127.0.0.1:1"))
    assert (result.verdict, "give --metrics" in result.evidence) == ("skip", True)


@pytest.mark.parametrize("sick", ["orchestrates"], indirect=True)
def test_gauges_of_several_replicas_in_one_server_judge_nothing(sick: Subject) -> None:
    result = check("D31", sick)
    assert (result.verdict, "4 replicas in one server" in result.evidence) == ("skip", True)


@pytest.mark.triton
def test_a_real_server_is_well(server: TritonServer, repository: Path) -> None:  # noqa: F811
    subject = completed(
        Subject(Host(), model=MODEL, repository=repository, url=server.grpc_url, metrics=server.metrics_url)
    )
    results = {name: check(name, subject) for name in LIVE}
    assert {name: result.verdict for name, result in results.items()} == dict.fromkeys(LIVE, "ok"), results
    assert "Prompt length (512)" in results["D32"].evidence
    assert "send a seed" in results["D34"].evidence
