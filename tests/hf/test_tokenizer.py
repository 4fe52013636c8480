from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models import their_tokenizer
from trtqwen.demo import MODEL
from trtqwen.diagnostics import InputError, SourceError
from trtqwen.hf.chat_template import ChatTemplate
from trtqwen.hf.text_stream import CharacterStream
from trtqwen.hf.tokenizer import Tokenizer, render_chat

OURS = Tokenizer(MODEL)
token_ids = st.lists(st.integers(0, len(OURS) - 1), max_size=40)
TEXTS = ["plain text", "混合中文与日本語のテキスト", "👩‍👩‍👧‍👦 🏳️‍🌈 é ё ", "<|im_start|>user\nhi<|im_end|>\n", ""]


@settings(max_examples=80, deadline=None)
@given(st.one_of(st.text(max_size=40), st.sampled_from(TEXTS)))
def test_encoding_is_that_of_transformers(text: str) -> None:
    assert OURS.encode(text) == their_tokenizer()(text)["input_ids"]


def test_a_long_text_is_encoded_alike_while_others_go_on() -> None:
    text = "混合 mixed text, é 👩‍👩‍👧 <|im_end|>\n" * 10_000
    beats, done = 0, threading.Event()

    def beat() -> None:
        nonlocal beats
        while not done.wait(0.001):
            beats += 1

    other = threading.Thread(target=beat)
    other.start()
    ids = OURS.encode(text)
    done.set()
    other.join()
    assert ids == their_tokenizer()(text)["input_ids"]
    assert beats > 5  # with Python's lock held, one or two


@settings(max_examples=80, deadline=None)
@given(token_ids, st.booleans())
def test_decoding_is_that_of_transformers(ids: list[int], skip: bool) -> None:
    theirs = their_tokenizer().decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
    assert OURS.decode(ids, skip_special_tokens=skip) == theirs


def stream(ids: list[int]) -> list[str]:
    cutter = CharacterStream(OURS.token_bytes)
    pieces = [cutter.push([token]) for token in ids] + [cutter.flush()]
    assert [token for piece in pieces for token in piece] == ids
    return [OURS.decode(piece) for piece in pieces]


@settings(max_examples=300, deadline=None)
@given(token_ids)
def test_pieces_of_any_ids_join_to_the_whole(ids: list[int]) -> None:
    """Also for ids that are not text at all: broken bytes show the same U+FFFD streamed and whole."""
    assert "".join(stream(ids)) == OURS.decode(ids)


@settings(max_examples=150, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_no_piece_of_a_text_shows_a_broken_character(text: str) -> None:
    pieces = stream(OURS.encode(text))
    assert "".join(pieces) == OURS.decode(OURS.encode(text))
    assert "�" in text or not any("�" in piece for piece in pieces)


@pytest.mark.parametrize("text", ["你好，世界", "今日はいい天気", "😀👩‍🚀"])
def test_characters_really_split_over_tokens(text: str) -> None:
    ids = OURS.encode(text)
    assert any("�" in OURS.decode([token]) for token in ids)
    assert len([piece for piece in stream(ids) if piece]) > 1


def test_ids_beyond_the_tokenizer_stand_for_nothing() -> None:
    assert CharacterStream(OURS.token_bytes).push([len(OURS) + 5]) == [len(OURS) + 5]


def test_stop_ids_are_the_union_of_the_files() -> None:
    names = ["<|im_end|>", "<|endoftext|>"]
    assert OURS.stop_ids == tuple(their_tokenizer().convert_tokens_to_ids(names))
    assert OURS.end_id == their_tokenizer().eos_token_id
    assert OURS.pad_id == their_tokenizer().pad_token_id


def test_chat_is_rendered_as_transformers_renders_it() -> None:
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": '<b>你好</b> & "hi"'},
        {"role": "assistant", "content": "ok"},
        {"role": "user", "content": "more"},
    ]
    assert OURS.chat_template is not None
    for conversation in (messages, messages[1:2]):
        expected = their_tokenizer().apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        assert render_chat(OURS.chat_template, conversation) == expected


@pytest.mark.parametrize("template", ["{{ raise_exception('no tools') }}", "{% if %}", "{{ ''.__class__.__mro__ }}"])
def test_a_template_that_refuses_or_breaks_is_an_input_error(template: str) -> None:
    with pytest.raises(InputError, match="the chat template refuses"):
        ChatTemplate({"default": template}).render([])


def test_broken_directories(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"has no tokenizer\.json"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(SourceError, match="is not a tokenizer"):
        Tokenizer(tmp_path)
    content = json.loads((MODEL / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**content, "decoder": {"type": "Fuse"}}))
    with pytest.raises(SourceError, match="is not a byte-level BPE"):
        Tokenizer(tmp_path)
    shutil.copy(MODEL / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(SourceError, match="no file defines an end"):
        _ = Tokenizer(tmp_path).end_id
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(SourceError, match="is not JSON"):
        Tokenizer(tmp_path)
