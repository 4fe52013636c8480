"""Triton model `preprocessing`: prompts and word lists to token ids."""

from functools import cached_property
from pathlib import Path

import triton_python_backend_utils as pb_utils

from trtqwen.diagnostics import TrtQwenError
from trtqwen.hf.tokenizer import Tokenizer
from trtqwen.triton.model_parameters import read_parameters, tokenizer_path
from trtqwen.triton.text import encode_request


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        parameters = read_parameters(args)
        self._tokenizer = Tokenizer(tokenizer_path(args, parameters))
        self._engine = Path(parameters["gpt_model_path"])

    def execute(self, requests: list["pb_utils.InferenceRequest"]) -> list["pb_utils.InferenceResponse"]:
        return [self._respond(request) for request in requests]

    @cached_property
    def _vocab_size(self) -> int:
        # Loaded and read for the first request that needs it: of a missing engine, `tensorrt_llm` tells more.
        from trtqwen.engine.config import read_engine_config

        return read_engine_config(self._engine).pretrained_config.vocab_size

    def _respond(self, request: "pb_utils.InferenceRequest") -> "pb_utils.InferenceResponse":
        inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        try:
            outputs = encode_request(self._tokenizer, inputs, lambda: self._vocab_size)
        except TrtQwenError as problem:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(problem)))
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, value) for name, value in outputs.items()])
