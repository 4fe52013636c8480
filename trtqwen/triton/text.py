"""Text of requests: `preprocessing` from strings to token ids, and `postprocessing` back."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from time import monotonic
from typing import Any

import numpy as np
import numpy.typing as npt

from trtqwen.diagnostics import RequestError
from trtqwen.hf.text_stream import CharacterStream
from trtqwen.hf.tokenizer import Tokenizer
from trtqwen.triton.contract import refuse_unserved
from trtqwen.triton.words import Words, pack_words

Array = npt.NDArray[Any]
Clock = Callable[[], float]

_UNSUPPORTED = {
    "DECODER_QUERY": "an encoder-decoder model",
    "IMAGE_BYTES": "a vision model",
    "IMAGE_URL": "a vision model",
    "IMAGES": "a vision model",
    "VIDEO_BYTES": "a vision model",
    "PROMPT_TABLE_EXTRA_ID": "a prompt table",
}


def encode_request(
    tokenizer: Tokenizer, inputs: Mapping[str, Array], vocab_size: Callable[[], int]
) -> dict[str, Array]:
    """The output tensors of `preprocessing` for its inputs, B rows each; prompts are taken as they are, without
    a chat template, with what the tokenizer puts around a text (BOS, once).

    Every stop id of the model beyond the first becomes a stop word, because `end_id` can carry only one; a client
    that names its own END_ID decides alone.

    Args:
        vocab_size: tells the engine's, padding included: the length of an embedding bias.

    Raises:
        RequestError: naming the tensor, if a text cannot be used or a feature is not served.
    """
    refuse_unserved(inputs, _UNSUPPORTED)
    prompts = [_encode(tokenizer.encode_prompt, "QUERY", text) for text in inputs["QUERY"].reshape(-1)]
    if not all(prompts):
        raise RequestError("QUERY: the prompt is empty", "send at least one character")
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
        "EMBEDDING_BIAS": _embedding_bias(tokenizer, inputs, rows, vocab_size),
        "REQUEST_OUTPUT_LEN": inputs["REQUEST_OUTPUT_LEN"],
        "OUT_END_ID": end,
        "OUT_PAD_ID": pad,
        "OUT_PROMPT_TABLE_EXTRA_IDS": np.zeros((rows, width), np.uint64),
    }


def decode_response(
    tokenizer: Tokenizer, tokens: Array, lengths: Array, *, skip_special_tokens: bool
) -> npt.NDArray[np.object_]:
    """The text of each sequence, UTF-8 bytes [B * beams], of INT32 tokens [B, beams, n] and lengths [B, beams]."""
    texts = [
        tokenizer.decode(sequence, skip_special_tokens=skip_special_tokens).encode()
        for sequence in _sequences(tokens, lengths)
    ]
    return np.array(texts, np.object_)


class HoldingDecoder:
    """Decodes responses that may end inside a character: holds the beginning of one back until the rest comes.

    The beginnings are kept by request id, since nothing else tells the responses of one stream from another's.
    Requests without an id are decoded as they are, and rows or return sequences that share a request share what is
    held: clients stream them as requests of their own. No last response is marked, so a text without a successor is
    forgotten after `forget_after` seconds, or when the next answer under the id begins.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, skip_special_tokens: bool, forget_after: float = 600, clock: Clock = monotonic
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._forget_after = forget_after
        self._clock = clock
        # By request id, the longest unused first: when it was used, and the ids that each sequence holds back.
        self._held: OrderedDict[str, tuple[float, list[list[int]]]] = OrderedDict()

    def decode(self, request_id: str, tokens: Array, lengths: Array) -> npt.NDArray[np.object_]:
        """`decode_response` of what is complete."""
        if not request_id:
            return decode_response(self._tokenizer, tokens, lengths, skip_special_tokens=self._skip_special_tokens)
        self._forget_unused()
        sequences = _sequences(tokens, lengths)
        _, held = self._held.pop(request_id, (0.0, []))
        texts, rest = [], []
        for index, ids in enumerate(sequences):
            stream = CharacterStream(self._tokenizer.token_bytes)
            before = held[index] if index < len(held) and self._continues(ids) else []
            ready = stream.push([*before, *ids])
            texts.append(self._tokenizer.decode(ready, skip_special_tokens=self._skip_special_tokens).encode())
            rest.append(stream.flush())
        if any(rest):
            self._held[request_id] = (self._clock(), rest)
        return np.array(texts, np.object_)

    def _continues(self, ids: Sequence[int]) -> bool:
        """Whether tokens can go on inside a character; if not, what is held is the torn end of an older answer."""
        token_bytes = self._tokenizer.token_bytes
        known = (token_bytes[token_id] for token_id in ids if token_id < len(token_bytes))
        first = next((token[0] for token in known if token), None)
        return first is None or first & 0xC0 == 0x80  # UTF-8's continuation bytes

    def _forget_unused(self) -> None:
        before = self._clock() - self._forget_after
        while self._held and next(iter(self._held.values()))[0] < before:
            self._held.popitem(last=False)


def _sequences(tokens: Array, lengths: Array) -> list[list[int]]:
    sequences = tokens.reshape(lengths.size, tokens.shape[-1])
    return [sequence[:length].tolist() for sequence, length in zip(sequences, lengths.reshape(-1), strict=True)]


def _words(tokenizer: Tokenizer, inputs: Mapping[str, Array], name: str, rows: int) -> Sequence[Words]:
    if name not in inputs:
        return [()] * rows
    return [
        tuple(tuple(_encode(tokenizer.encode, name, text)) for text in row if text)
        for row in inputs[name].reshape(rows, -1)
    ]


def _embedding_bias(
    tokenizer: Tokenizer, inputs: Mapping[str, Array], rows: int, vocab_size: Callable[[], int]
) -> npt.NDArray[np.float32]:
    """FP32 [rows, vocab_size], each word's weight at all of its ids; [rows, 0] if no request has any."""
    words = inputs.get("EMBEDDING_BIAS_WORDS", np.zeros((rows, 0), np.object_)).reshape(rows, -1)
    weights = inputs.get("EMBEDDING_BIAS_WEIGHTS", np.zeros((rows, 0), np.float32)).reshape(rows, -1)
    if not words.any():
        return np.zeros((rows, 0), np.float32)
    if words.shape != weights.shape:
        raise RequestError(
            f"EMBEDDING_BIAS_WEIGHTS: has {weights.shape[1]} values for {words.shape[1]} words", "send one for each"
        )
    bias = np.zeros((rows, vocab_size()), np.float32)
    for row, row_words, row_weights in zip(bias, words, weights, strict=True):
        for word, weight in zip(row_words, row_weights, strict=True):
            np.add.at(row, _encode(tokenizer.encode, "EMBEDDING_BIAS_WORDS", word), weight)
    return bias


def _encode(encode: Callable[[str], list[int]], name: str, text: bytes) -> list[int]:
    try:
        return encode(text.decode("utf-8"))
    except UnicodeDecodeError as problem:
        raise RequestError(f"{name}: byte {problem.start} is not UTF-8", "send the text as UTF-8") from None
