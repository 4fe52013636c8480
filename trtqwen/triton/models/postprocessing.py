"""Triton model `postprocessing`: token ids to text, response by response."""

from functools import partial

import triton_python_backend_utils as pb_utils

from trtqwen.hf.tokenizer import Tokenizer
from trtqwen.triton.model_parameters import HOLDS_CHARACTERS, flag, read_parameters, tokenizer_path
from trtqwen.triton.text import HoldingDecoder, decode_response


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        parameters = read_parameters(args)
        tokenizer = Tokenizer(tokenizer_path(args, parameters))
        skip_special_tokens = flag(parameters, "skip_special_tokens", True)
        if flag(parameters, HOLDS_CHARACTERS, False):
            self._decode = HoldingDecoder(tokenizer, skip_special_tokens=skip_special_tokens).decode
        else:
            decode = partial(decode_response, tokenizer, skip_special_tokens=skip_special_tokens)
            self._decode = lambda request_id, tokens, lengths: decode(tokens, lengths)

    def execute(self, requests: list["pb_utils.InferenceRequest"]) -> list["pb_utils.InferenceResponse"]:
        return [self._respond(request) for request in requests]

    def _respond(self, request: "pb_utils.InferenceRequest") -> "pb_utils.InferenceResponse":
        tokens, lengths = (
            pb_utils.get_input_tensor_by_name(request, name).as_numpy()
            for name in ("TOKENS_BATCH", "SEQUENCE_LENGTH")
        )
        texts = self._decode(request.request_id(), tokens, lengths)
        return pb_utils.InferenceResponse([pb_utils.Tensor("OUTPUT", texts)])
