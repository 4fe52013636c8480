"""The text side of a request: what `preprocessing` makes of strings and `postprocessing` of token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from trtqwen.errors import RequestError
from trtqwen.hf.tokenizer import Tokenizer
from trtqwen.triton.words import Words, pack_words

Array = npt.NDArray[Any]

_UNSUPPORTED = {
    "DECODER_QUERY": "an encoder-decoder model",
    "IMAGE_BYTES": "a vision model",
    "IMAGE_URL": "a vision model",
    "IMAGES": "a vision model",
    "VIDEO_BYTES": "a vision model",
    "EMBEDDING_BIAS_WORDS": "an embedding bias",
    "EMBEDDING_BIAS_WEIGHTS": "an embedding bias",
    "PROMPT_TABLE_EXTRA_ID": "a prompt table",
}


def encode_request(tokenizer: Tokenizer, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """The output tensors of `preprocessing` for its inputs, B rows each; prompts are taken as they are, without
    a chat template.

    Every stop id of the model beyond the first becomes a stop word, because `end_id` can carry only one; a client
    that names its own END_ID decides alone.

    Raises:
        RequestError: naming the tensor, if a text cannot be used or a feature is not served.
    """
    _refuse_unsupported(inputs)
    prompts = [_encode(tokenizer, "QUERY", text) for text in inputs["QUERY"].reshape(-1)]
    if not all(prompts):
        raise RequestError("QUERY: the prompt is empty; send at least one character")
    rows, width = len(prompts), max(map(len, prompts))
    pad = inputs.get("PAD_ID", np.full((rows, 1), tokenizer.pad_id, np.int32)).reshape(rows, 1)
    end = inputs.get("END_ID", np.full((rows, 1), tokenizer.end_id, np.int32)).reshape(rows, 1)
    further_stops: Words = () if "END_ID" in inputs else tuple((stop,) for stop in tokenizer.stop_ids[1:])
    ids = np.repeat(pad, width, axis=1)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    stop_words = [words + further_stops for words in _words(tokenizer, inputs, "STOP_WORDS_DICT", rows)]
    return {
        "INPUT_ID": ids,
        "REQUEST_INPUT_LEN": np.array([[len(prompt)] for prompt in prompts], np.int32),
        "DECODER_INPUT_ID": pad,
        "REQUEST_DECODER_INPUT_LEN": np.zeros((rows, 1), np.int32),
        "BAD_WORDS_IDS": pack_words(_words(tokenizer, inputs, "BAD_WORDS_DICT", rows)),
        "STOP_WORDS_IDS": pack_words(stop_words),
        "EMBEDDING_BIAS": np.zeros((rows, 0), np.float32),
        "REQUEST_OUTPUT_LEN": inputs["REQUEST_OUTPUT_LEN"],
        "OUT_END_ID": end,
        "OUT_PAD_ID": pad,
        "OUT_PROMPT_TABLE_EXTRA_IDS": np.zeros((rows, width), np.uint64),
    }


def decode_response(
    tokenizer: Tokenizer, tokens: Array, lengths: Array, *, skip_special_tokens: bool
) -> npt.NDArray[np.object_]:
    """The text of each sequence, UTF-8 bytes [B * beams], of INT32 tokens [B, beams, n] and lengths [B, beams]."""
    sequences = tokens.reshape(lengths.size, tokens.shape[-1])
    texts = [
        tokenizer.decode(sequence[:length].tolist(), skip_special_tokens=skip_special_tokens).encode()
        for sequence, length in zip(sequences, lengths.reshape(-1), strict=True)
    ]
    return np.array(texts, np.object_)


def _refuse_unsupported(inputs: Mapping[str, Array]) -> None:
    for name, need in _UNSUPPORTED.items():
        if name in inputs and inputs[name].any():
            raise RequestError(f"{name}: needs {need}, which this server does not have; leave the tensor out")


def _words(tokenizer: Tokenizer, inputs: Mapping[str, Array], name: str, rows: int) -> Sequence[Words]:
    if name not in inputs:
        return [()] * rows
    return [
        tuple(tuple(_encode(tokenizer, name, text)) for text in row if text) for row in inputs[name].reshape(rows, -1)
    ]


def _encode(tokenizer: Tokenizer, name: str, text: bytes) -> list[int]:
    try:
        return tokenizer.encode(text.decode("utf-8"))
    except UnicodeDecodeError as problem:
        raise RequestError(f"{name}: byte {problem.start} is not UTF-8; send the text as UTF-8") from None
