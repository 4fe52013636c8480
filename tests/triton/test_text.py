"""The text models' logic: prompts, stop ids, word lists, decoding."""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.slow import slow
from trtqwen.demo import MODEL
from trtqwen.diagnostics import RequestError
from trtqwen.hf.tokenizer import Tokenizer
from trtqwen.triton.text import HoldingDecoder, decode_response, encode_request
from trtqwen.triton.words import unpack_words

VOCABULARY = 4096 + 64


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(MODEL)


def strings(*rows: str | bytes) -> npt.NDArray[Any]:
    return np.array([[row if isinstance(row, bytes) else row.encode()] for row in rows], np.object_)


def inputs(*prompts: str | bytes, **tensors: Any) -> dict[str, npt.NDArray[Any]]:
    return {"QUERY": strings(*prompts), "REQUEST_OUTPUT_LEN": np.full((len(prompts), 1), 4, np.int32), **tensors}


def encode(tokenizer: Tokenizer, request: dict[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    return encode_request(tokenizer, request, vocab_size=lambda: VOCABULARY)


def test_rows_are_padded_and_their_lengths_told(tokenizer: Tokenizer) -> None:
    outputs = encode(tokenizer, inputs("你好", "Hello, who are you?"))
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
    ids = encode(tokenizer, inputs("hi"))["INPUT_ID"]
    assert tokenizer.decode(ids[0].tolist(), skip_special_tokens=False) == "hi"


def test_every_stop_id_of_the_model_ends_an_answer(tokenizer: Tokenizer) -> None:
    further = tuple((stop,) for stop in tokenizer.stop_ids[1:])
    assert further
    outputs = encode(tokenizer, inputs("hi"))
    assert unpack_words("", outputs["STOP_WORDS_IDS"][0]) == further
    word = tuple(tokenizer.encode("stop"))
    outputs = encode(tokenizer, inputs("hi", STOP_WORDS_DICT=strings("stop")))
    assert unpack_words("", outputs["STOP_WORDS_IDS"][0]) == (word, *further)


def test_a_client_with_its_own_end_id_decides_alone(tokenizer: Tokenizer) -> None:
    outputs = encode(tokenizer, inputs("hi", END_ID=np.array([[77]], np.int32)))
    assert outputs["OUT_END_ID"].tolist() == [[77]]
    assert outputs["STOP_WORDS_IDS"].shape == (1, 2, 0)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (inputs(b"ok\xff"), "QUERY: byte 2 is not UTF-8"),
        (inputs(""), "QUERY: the prompt is empty"),
        (inputs("a", ""), "QUERY: the prompt is empty"),
        (inputs("a", STOP_WORDS_DICT=strings(b"\x80")), "STOP_WORDS_DICT: byte 0 is not UTF-8"),
        (inputs("a", EMBEDDING_BIAS_WORDS=strings("x")), "EMBEDDING_BIAS_WEIGHTS: has 0 values for 1 words"),
        (inputs("a", DECODER_QUERY=strings("x")), "DECODER_QUERY: needs an encoder-decoder model"),
        (inputs("a", IMAGE_URL=strings("http://x")), "IMAGE_URL: needs a vision model"),
    ],
)
def test_what_cannot_be_used_is_named(
    tokenizer: Tokenizer, request_: dict[str, npt.NDArray[Any]], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        encode(tokenizer, request_)


def test_empty_optional_texts_ask_for_nothing(tokenizer: Tokenizer) -> None:
    request = inputs("a", DECODER_QUERY=strings(""), STOP_WORDS_DICT=strings(""), BAD_WORDS_DICT=strings(""))
    assert encode(tokenizer, request)["BAD_WORDS_IDS"].shape == (1, 2, 0)


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


def test_a_bias_has_each_words_weight_at_all_of_its_ids(tokenizer: Tokenizer) -> None:
    words = np.array([[b"Hello", b"", "你好".encode()], [b"Hello", b"Hello", b""]], np.object_)
    weights = np.array([[1.5, 9.0, -2.0], [1.0, 2.0, 9.0]], np.float32)
    request = inputs("a", "b", EMBEDDING_BIAS_WORDS=words, EMBEDDING_BIAS_WEIGHTS=weights)
    bias = encode(tokenizer, request)["EMBEDDING_BIAS"]
    assert (bias.dtype, bias.shape) == (np.dtype(np.float32), (2, VOCABULARY))
    hello, greeting = tokenizer.encode("Hello"), tokenizer.encode("你好")
    assert len(hello) > 1 or len(greeting) > 1
    expected = np.zeros((2, VOCABULARY), np.float32)
    for row, token_id, weight in [
        *((0, token_id, 1.5) for token_id in hello),
        *((0, token_id, -2.0) for token_id in greeting),
        *((1, token_id, 3.0) for token_id in hello),
    ]:
        expected[row, token_id] += weight
    np.testing.assert_array_equal(bias, expected)
    assert encode(tokenizer, inputs("a"))["EMBEDDING_BIAS"].shape == (1, 0)


# Letters of 30 languages, and what makes emoji: faces, flags, skin tones, joiners, keycaps.
ALPHABETS = {
    "English": "abcdefghijklmnopqrstuvwxyz", "German": "äöüßABC", "French": "éèêçœà", "Spanish": "ñá¿¡",
    "Portuguese": "ãõç", "Polish": "ąęłż", "Czech": "řůěš", "Turkish": "ığşİ", "Vietnamese": "ếộươđ",
    "Icelandic": "ðþæ", "Hungarian": "őű", "Romanian": "ășț", "Greek": "αβγωά", "Russian": "абвыэюя",
    "Ukrainian": "іїєґ", "Georgian": "აბგდ", "Armenian": "աբգդ", "Hebrew": "אבגדָ", "Arabic": "ابتثَ",
    "Persian": "پچژگ", "Hindi": "कखाि्", "Bengali": "কখা্", "Tamil": "காி்", "Telugu": "కా్",
    "Thai": "กขิ้", "Khmer": "កា្", "Amharic": "ሀለሐ", "Chinese": "你好聪明龘䶮𠀀",
    "Japanese": "あいアイ東京゚", "Korean": "가나한국가",
    "emoji": "🎉😀🇨🇳👩‍💻👍🏽❤️1⃣",
}  # fmt: skip


@pytest.mark.parametrize("count", [2_000, slow(10_000)])
def test_texts_streamed_token_by_token_are_the_decoders(tokenizer: Tokenizer, count: int) -> None:
    """In 30 languages and emoji, all streams at once through one decoder, as a server's are."""
    random = Random(7)
    texts = []
    for index in range(count):
        own = list(ALPHABETS.values())[index % len(ALPHABETS)]
        mixed = random.choice(list(ALPHABETS.values())) + " .\n"
        texts.append(
            "".join(random.choice(own if random.random() < 0.8 else mixed) for _ in range(random.randint(1, 9)))
        )
    ids = [tokenizer.encode(text) for text in texts]
    decoder = HoldingDecoder(tokenizer, skip_special_tokens=True)
    streamed = [""] * len(texts)
    for position in range(max(map(len, ids))):
        for index, sequence in enumerate(ids):
            if position < len(sequence):
                token = np.array([[[sequence[position]]]], np.int32)
                [piece] = decoder.decode(f"request {index}", token, np.ones((1, 1), np.int32))
                streamed[index] += piece.decode()
    assert streamed == [tokenizer.decode(sequence) for sequence in ids]
    apart = sum("\ufffd" in tokenizer.decode([token_id]) for sequence in ids for token_id in sequence)
    assert apart > count  # tokens that end inside a character


def part(*ids: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    return np.array([[ids]], np.int32), np.array([[len(ids)]], np.int32)


def test_what_nobody_continues_is_forgotten(tokenizer: Tokenizer) -> None:
    time = 0.0
    decoder = HoldingDecoder(tokenizer, skip_special_tokens=True, forget_after=60, clock=lambda: time)
    first, *rest = next(ids for ids in (tokenizer.encode(c) for c in "龘䶮𠀀") if len(ids) > 1)
    whole = tokenizer.decode([first, *rest])
    assert decoder.decode("a", *part(first)).tolist() == [b""]
    time = 59.0
    assert decoder.decode("b", *part(first)).tolist() == [b""]
    assert decoder.decode("a", *part(*rest)).tolist() == [whole.encode()]
    time = 120.0
    assert decoder.decode("b", *part(*rest)).tolist() != [whole.encode()]


def test_a_torn_end_does_not_reach_the_next_answer_under_the_same_id(tokenizer: Tokenizer) -> None:
    decoder = HoldingDecoder(tokenizer, skip_special_tokens=True)
    first, *_ = next(ids for ids in (tokenizer.encode(c) for c in "龘䶮𠀀") if len(ids) > 1)
    assert decoder.decode("1", *part(first)).tolist() == [b""]
    assert decoder.decode("1", *part(*tokenizer.encode("ok"))).tolist() == [b"ok"]
    assert decoder.decode("1", *part(first)).tolist() == [b""]
    assert decoder.decode("1", *part(first)).tolist() == [b""]


def test_requests_without_an_id_share_nothing(tokenizer: Tokenizer) -> None:
    decoder = HoldingDecoder(tokenizer, skip_special_tokens=True)
    first, *_ = next(ids for ids in (tokenizer.encode(c) for c in "龘䶮𠀀") if len(ids) > 1)
    assert decoder.decode("", *part(first)).tolist() == [tokenizer.decode([first]).encode()]
    assert decoder.decode("", *part(*tokenizer.encode("ok"))).tolist() == [b"ok"]


def test_sequences_of_one_response_are_held_apart(tokenizer: Tokenizer) -> None:
    decoder = HoldingDecoder(tokenizer, skip_special_tokens=True)
    ids = next(ids for ids in (tokenizer.encode(c) for c in "龘䶮𠀀") if len(ids) > 1)
    letter = tokenizer.encode("a")[0]
    pieces = [b"", b""]
    for position, token_id in enumerate(ids):
        tokens = np.array([[[token_id], [letter]]], np.int32)
        texts = decoder.decode("a", tokens, np.ones((1, 2), np.int32))
        pieces = [piece + text for piece, text in zip(pieces, texts, strict=True)]
        assert (pieces[0] == b"") == (position < len(ids) - 1)
    assert pieces == [tokenizer.decode(ids).encode(), b"a" * len(ids)]
