"""Text from tokens: the tokenizer's own decoding, whatever the borders; stop strings as a plain search finds them."""

from __future__ import annotations

import random
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtqwen.demo import MODEL
from trtqwen.hf.text_stream import StopStrings, TextStream
from trtqwen.hf.tokenizer import Tokenizer

TOKENIZER = Tokenizer(MODEL)

# Letters of 30 scripts and languages, and emoji of several code points.
ALPHABETS = [
    *(
        "abcdefghij .,",
        "äöüß ÄÖÜ",
        "àâçéèêëîï",
        "áéíñóú¿¡",
        "ãõçáàâê",
        "åæø",
        "ąćęłńóśźż",
        "čďěňřšťůž",
        "őűáé",
        "ğışçö",
    ),
    *("абвгдежзий", "єіїґ", "αβγδεζηθ", "אבגדהוזח", "ابتثجحخد", "پچژگ", "अआइईउऊ", "অআইঈ", "தமிழ்", "తెలుగు"),
    *("ไทยสวัสดี", "ພາສາລາວ", "မြန်မာ", "ភាសាខ្មែរ", "ქართული", "հայերեն", "한국어말글", "日本語ひらがなカタカナ"),
    *("中文汉字聪明龘", "繁體漢字"),
    *("😀🐱🚀", ["👨‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪", "👍🏽", "❤️", "e\u0301", "\u200d"]),
]


def streamed(ids: list[int]) -> str:
    stream = TextStream(TOKENIZER.token_bytes)
    pieces = [stream.push((token_id,)) for token_id in ids]
    return "".join(pieces) + stream.flush()


def random_text(generator: random.Random) -> str:
    letters = [letter for alphabet in generator.sample(ALPHABETS, 3) for letter in alphabet]
    return "".join(generator.choices(letters, k=generator.randint(1, 40)))


def test_random_texts_of_thirty_languages_come_out_exactly() -> None:
    generator = random.Random(5)
    for _ in range(10_000):
        text = random_text(generator)
        ids = TOKENIZER.encode(text)
        assert streamed(ids) == TOKENIZER.decode(ids) == unicodedata.normalize("NFC", text)


@given(st.lists(st.integers(0, len(TOKENIZER) + 3), max_size=40))
def test_any_ids_come_out_as_the_tokenizer_decodes_them(ids: list[int]) -> None:
    assert streamed(ids) == TOKENIZER.decode([token_id for token_id in ids if token_id < len(TOKENIZER)])


def test_no_piece_shows_half_a_character() -> None:
    ids = TOKENIZER.encode("聪明的🐱👨‍👩‍👧‍👦")
    assert len(ids) > 8
    stream = TextStream(TOKENIZER.token_bytes)
    assert not any("\ufffd" in stream.push((token_id,)) for token_id in ids)


@st.composite
def _cut_text(draw: st.DrawFn) -> tuple[list[str], list[str]]:
    pieces = draw(st.lists(st.text("abc", max_size=4), max_size=12))
    return pieces, draw(st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=4))


@given(_cut_text())
def test_stop_strings_end_the_text_wherever_it_is_cut(case: tuple[list[str], list[str]]) -> None:
    pieces, strings = case
    text = "".join(pieces)
    # Independently: the shortest beginning of the text that ends with a stop string.
    ends = [(end, string) for end in range(len(text) + 1) for string in strings if text[:end].endswith(string)]
    stops = StopStrings(strings)
    got = "".join(stops.push(piece) for piece in pieces)
    if ends:
        first = min(end for end, _ in ends)
        longest = max(len(string) for end, string in ends if end == first)
        assert got == text[: first - longest]
        assert stops.found is not None
    else:
        assert stops.found is None
        assert got + stops.flush() == text


@pytest.mark.parametrize("held", ["<", "<|stop", "x<|"])
def test_what_may_become_a_stop_string_waits(held: str) -> None:
    stops = StopStrings(["<|stop|>"])
    assert "<" not in stops.push(held)
    assert stops.flush() == held.lstrip("x")
