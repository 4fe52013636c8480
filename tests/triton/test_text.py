"""The text models' logic: prompts, stop ids, word lists, decoding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from trtqwen.demo import MODEL
from trtqwen.errors import RequestError
from trtqwen.hf.tokenizer import Tokenizer
from trtqwen.triton.text import decode_response, encode_request
from trtqwen.triton.words import unpack_words


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(MODEL)


def strings(*rows: str | bytes) -> np.ndarray:
    return np.array([[row if isinstance(row, bytes) else row.encode()] for row in rows], np.object_)


def inputs(*prompts: str | bytes, **tensors: Any) -> dict[str, np.ndarray]:
    return {"QUERY": strings(*prompts), "REQUEST_OUTPUT_LEN": np.full((len(prompts), 1), 4, np.int32), **tensors}


def test_rows_are_padded_and_their_lengths_told(tokenizer: Tokenizer) -> None:
    outputs = encode_request(tokenizer, inputs("你好", "Hello, who are you?"))
    prompts = [tokenizer.encode("你好"), tokenizer.encode("Hello, who are you?")]
    lengths = outputs["REQUEST_INPUT_LEN"]
    assert lengths.tolist() == [[len(prompt)] for prompt in prompts]
    assert [row[:n].tolist() for row, [n] in zip(outputs["INPUT_ID"], lengths, strict=True)] == prompts
    assert (outputs["INPUT_ID"][0, len(prompts[0]) :] == tokenizer.pad_id).all()
    assert outputs["OUT_END_ID"].tolist() == [[tokenizer.end_id]] * 2
    assert outputs["BAD_WORDS_IDS"].shape == (2, 2, 0)
    assert {name: value.dtype for name, value in outputs.items()} == {
        "INPUT_ID": np.int32,
        "REQUEST_INPUT_LEN": np.int32,
        "DECODER_INPUT_ID": np.int32,
        "REQUEST_DECODER_INPUT_LEN": np.int32,
        "BAD_WORDS_IDS": np.int32,
        "STOP_WORDS_IDS": np.int32,
        "EMBEDDING_BIAS": np.float32,
        "REQUEST_OUTPUT_LEN": np.int32,
        "OUT_END_ID": np.int32,
        "OUT_PAD_ID": np.int32,
        "OUT_PROMPT_TABLE_EXTRA_IDS": np.uint64,
    }


def test_no_chat_template_is_applied(tokenizer: Tokenizer) -> None:
    ids = encode_request(tokenizer, inputs("hi"))["INPUT_ID"]
    assert tokenizer.decode(ids[0].tolist(), skip_special_tokens=False) == "hi"


def test_every_stop_id_of_the_model_ends_an_answer(tokenizer: Tokenizer) -> None:
    further = tuple((stop,) for stop in tokenizer.stop_ids[1:])
    assert further
    outputs = encode_request(tokenizer, inputs("hi"))
    assert unpack_words("", outputs["STOP_WORDS_IDS"][0]) == further
    word = tuple(tokenizer.encode("stop"))
    outputs = encode_request(tokenizer, inputs("hi", STOP_WORDS_DICT=strings("stop")))
    assert unpack_words("", outputs["STOP_WORDS_IDS"][0]) == (word, *further)


def test_a_client_with_its_own_end_id_decides_alone(tokenizer: Tokenizer) -> None:
    outputs = encode_request(tokenizer, inputs("hi", END_ID=np.array([[77]], np.int32)))
    assert outputs["OUT_END_ID"].tolist() == [[77]]
    assert outputs["STOP_WORDS_IDS"].shape == (1, 2, 0)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (inputs(b"ok\xff"), "QUERY: byte 2 is not UTF-8"),
        (inputs(""), "QUERY: the prompt is empty"),
        (inputs("a", ""), "QUERY: the prompt is empty"),
        (inputs("a", STOP_WORDS_DICT=strings(b"\x80")), "STOP_WORDS_DICT: byte 0 is not UTF-8"),
        (inputs("a", EMBEDDING_BIAS_WORDS=strings("x")), "EMBEDDING_BIAS_WORDS: needs an embedding bias"),
        (inputs("a", DECODER_QUERY=strings("x")), "DECODER_QUERY: needs an encoder-decoder model"),
        (inputs("a", IMAGE_URL=strings("http://x")), "IMAGE_URL: needs a vision model"),
    ],
)
def test_what_cannot_be_used_is_named(tokenizer: Tokenizer, request_: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        encode_request(tokenizer, request_)


def test_empty_optional_texts_ask_for_nothing(tokenizer: Tokenizer) -> None:
    request = inputs("a", DECODER_QUERY=strings(""), STOP_WORDS_DICT=strings(""), BAD_WORDS_DICT=strings(""))
    assert encode_request(tokenizer, request)["BAD_WORDS_IDS"].shape == (1, 2, 0)


def test_decoding_stops_at_the_sequence_length(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("你好 world")
    tokens = np.array([[[*ids, 5, 5]]], np.int32)
    texts = decode_response(tokenizer, tokens, np.array([[len(ids)]]), skip_special_tokens=True)
    assert [text.decode() for text in texts] == ["你好 world"]
    ended = np.array([[[*ids, tokenizer.end_id]]], np.int32)
    lengths = np.array([[len(ids) + 1]])
    [plain] = decode_response(tokenizer, ended, lengths, skip_special_tokens=True)
    [whole] = decode_response(tokenizer, ended, lengths, skip_special_tokens=False)
    assert (plain.decode(), whole.decode()) == ("你好 world", "你好 world<|im_end|>")


def test_an_empty_sequence_is_an_empty_text(tokenizer: Tokenizer) -> None:
    texts = decode_response(
        tokenizer, np.zeros((1, 1, 0), np.int32), np.zeros((1, 1), np.int32), skip_special_tokens=True
    )
    assert texts.tolist() == [b""]
