"""Triton model `postprocessing`: token ids to text, each response on its own."""

import triton_python_backend_utils as pb_utils

from trtqwen.hf.tokenizer import Tokenizer
from trtqwen.triton.parameters import flag, read_parameters, tokenizer_path
from trtqwen.triton.text import decode_response


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        parameters = read_parameters(args)
        self._tokenizer = Tokenizer(tokenizer_path(args, parameters))
        self._skip_special_tokens = flag(parameters, "skip_special_tokens", True)

    def execute(self, requests: list["pb_utils.InferenceRequest"]) -> list["pb_utils.InferenceResponse"]:
        return [self._respond(request) for request in requests]

    def _respond(self, request: "pb_utils.InferenceRequest") -> "pb_utils.InferenceResponse":
        tokens, lengths = (
            pb_utils.get_input_tensor_by_name(request, name).as_numpy()
            for name in ("TOKENS_BATCH", "SEQUENCE_LENGTH")
        )
        texts = decode_response(self._tokenizer, tokens, lengths, skip_special_tokens=self._skip_special_tokens)
        return pb_utils.InferenceResponse([pb_utils.Tensor("OUTPUT", texts)])
