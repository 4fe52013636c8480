"""Triton model `preprocessing`: prompts and word lists to token ids."""

import triton_python_backend_utils as pb_utils

from trtqwen.errors import TrtQwenError
from trtqwen.hf.tokenizer import Tokenizer
from trtqwen.triton.parameters import read_parameters, tokenizer_path
from trtqwen.triton.text import encode_request


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        self._tokenizer = Tokenizer(tokenizer_path(args, read_parameters(args)))

    def execute(self, requests: list["pb_utils.InferenceRequest"]) -> list["pb_utils.InferenceResponse"]:
        return [self._respond(request) for request in requests]

    def _respond(self, request: "pb_utils.InferenceRequest") -> "pb_utils.InferenceResponse":
        inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        try:
            outputs = encode_request(self._tokenizer, inputs)
        except TrtQwenError as problem:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(problem)))
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, value) for name, value in outputs.items()])
