"""A stand-in for the engine: a Triton model `tensorrt_llm` that repeats its prompt at a given pace.

The file is its own `model.py`; `write_stand_in_repository` puts it into a copy of a real repository. It answers a
chat with the last user's message and a bare prompt with the prompt itself, one token per step, then ends. A text may
begin with a command: `/again N TEXT` repeats the text N times, `/fail MESSAGE` ends with an error, `/break MESSAGE`
does so after one token, `/zeros` sends token 0 forever, `/hang` sends nothing, and `/sleep N TEXT` sends nothing to
any client for N seconds. A token's logarithmic probability is its id over -1000, and each response repeats those
of the tokens before.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from trtqwen.artifact.manifest import read_manifest, write_manifest
from trtqwen.hf.tokenizer import Tokenizer
from trtqwen.triton.parameters import read_parameters, tokenizer_path


def write_stand_in_repository(
    repository: Path, output: Path, *, step_ms: float = 0, chat_template: str | None = None, **parameters: str
) -> None:
    """Copy a finished repository and replace its engine.

    Args:
        step_ms: time between two tokens of an answer.
        chat_template: replaces the model's.
        parameters: further parameters of `tensorrt_llm`, such as `guided_decoding_backend`. `send_times` names a
            directory for the times, in seconds of the monotonic clock, at which each request's tokens were sent.
    """
    manifest = read_manifest(repository, "repository")
    shutil.copytree(repository, output, ignore=shutil.ignore_patterns("manifest.json", "__pycache__"))
    shutil.copyfile(__file__, output / "tensorrt_llm" / "1" / "model.py")
    path = output / "tensorrt_llm" / "config.pbtxt"
    config = text_format.Parse(path.read_text(encoding="utf-8"), ModelConfig())
    for key, value in {"step_ms": str(step_ms), **parameters}.items():
        config.parameters[key].string_value = value
    path.write_text(text_format.MessageToString(config, as_utf8=True), encoding="utf-8")
    if chat_template is not None:
        [tokenizer_config] = output.rglob("tokenizer_config.json")
        content = json.loads(tokenizer_config.read_text(encoding="utf-8"))
        tokenizer_config.write_text(json.dumps(content | {"chat_template": chat_template}), encoding="utf-8")
    write_manifest(output, "repository", manifest.inputs, manifest.parameters)


@dataclass
class _Answer:
    id: str
    sender: Any
    log_probs: bool
    tokens: Iterator[int] = field(default_factory=lambda: iter(()))
    left: int = 0
    error: str | None = None
    sent: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        import triton_python_backend_utils as pb_utils

        self._pb = pb_utils
        parameters = read_parameters(args)
        self._tokenizer = Tokenizer(tokenizer_path(args, parameters))
        self._step = float(parameters["step_ms"]) / 1000
        self._send_times = parameters.get("send_times")
        self._turn = tuple(self._tokenizer.encode("<|im_start|>user\n"))
        self._end = self._tokenizer.end_id
        self._wedged_until = 0.0
        self._answers: list[_Answer] = []
        self._arrived = threading.Condition()
        threading.Thread(target=self._run, daemon=True).start()

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            answer = self._plan(
                inputs["input_ids"].reshape(-1).tolist(),
                int(inputs["request_output_len"].item()),
                _Answer(request.request_id(), request.get_response_sender(), "return_log_probs" in inputs),
            )
            with self._arrived:
                self._answers.append(answer)
                self._arrived.notify()

    def _plan(self, prompt: list[int], max_tokens: int, answer: _Answer) -> _Answer:
        ids = self._message(prompt)
        command, _, rest = self._tokenizer.decode(ids).partition(" ")
        answer.tokens, answer.left = iter(ids), max_tokens
        if command == "/fail":
            answer.left, answer.error = 0, rest
        elif command == "/break":
            answer.left, answer.error = 1, rest
        elif command == "/zeros":
            answer.tokens = repeat(0)
        elif command == "/hang":
            answer.left = -1
        elif command == "/sleep":
            self._wedged_until = time.monotonic() + float(rest.split()[0])
        elif command == "/again":
            count, _, rest = rest.partition(" ")
            answer.tokens = chain.from_iterable(repeat(self._tokenizer.encode(rest), int(count)))
        return answer

    def _message(self, prompt: list[int]) -> list[int]:
        width = len(self._turn)
        for start in range(len(prompt) - width, -1, -1):
            if tuple(prompt[start : start + width]) == self._turn:
                message = prompt[start + width :]
                return message[: message.index(self._end)]
        return prompt

    def _run(self) -> None:
        due = time.monotonic()
        while True:
            with self._arrived:
                self._arrived.wait_for(lambda: self._answers)
                answers = list(self._answers)
            due = max(due + self._step, time.monotonic())
            time.sleep(max(0.0, due - time.monotonic()) or 0.0001)
            time.sleep(max(0.0, self._wedged_until - time.monotonic()))
            ended = [answer for answer in answers if self._advance(answer)]
            with self._arrived:
                self._answers = [answer for answer in self._answers if answer not in ended]

    def _advance(self, answer: _Answer) -> bool:
        """Send one token; whether that was the last."""
        pb = self._pb
        if len(answer.times) % 16 == 0 and answer.sender.is_cancelled():
            answer.sender.send(self._response([]), flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
            return True
        if answer.left < 0:
            return False
        token = list(islice(answer.tokens, 1)) if answer.left else []
        answer.left -= 1
        if token:
            answer.times.append(time.monotonic())
            answer.sender.send(self._response(token, answer))
            return False
        if self._send_times:
            Path(self._send_times, answer.id).write_text(json.dumps(answer.times))
        error = pb.InferenceResponse(error=pb.TritonError(answer.error)) if answer.error is not None else None
        answer.sender.send(error or self._response([]), flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        return True

    def _response(self, ids: list[int], answer: _Answer | None = None) -> Any:
        tensors: dict[str, npt.NDArray[Any]] = {
            "output_ids": np.array(ids, np.int32).reshape(1, 1, -1),
            "sequence_length": np.array([[len(ids)]], np.int32),
        }
        if answer is not None and answer.log_probs:
            answer.sent += ids
            tensors["output_log_probs"] = -np.array([[answer.sent]], np.float32) / 1000
        return self._pb.InferenceResponse([self._pb.Tensor(name, value) for name, value in tensors.items()])
