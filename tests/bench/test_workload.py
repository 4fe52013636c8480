"""Workloads: drawn ones repeat, files of three formats are read, and bad ones name their line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trtqwen.bench.setup import WorkloadOptions, make_workloads
from trtqwen.bench.workload import plain_vocabulary, read_workload, shapes
from trtqwen.demo import MODEL
from trtqwen.diagnostics import InputError
from trtqwen.hf.tokenizer import Tokenizer

TOKENIZER = Tokenizer(MODEL)


def test_drawn_prompts_survive_being_written_as_text() -> None:
    vocabulary = plain_vocabulary(TOKENIZER)
    ids = vocabulary[:50]
    assert TOKENIZER.encode(TOKENIZER.decode(ids)) == ids


def test_a_named_workload_repeats_with_its_seed() -> None:
    options = WorkloadOptions("chat", 200)
    one, other = make_workloads(options, TOKENIZER, 2)
    again, _ = make_workloads(options, TOKENIZER, 2)
    assert one.digest == again.digest != other.digest
    mean = one.input_tokens / 200
    assert abs(mean - shapes()["chat"].input[0]) < 25


def test_prefixes_are_shared_between_requests_and_repeats() -> None:
    one, other = make_workloads(WorkloadOptions("shared-prefix", 16, prefix_tokens=40), TOKENIZER, 2)
    prefixes = {ask.token_ids[:40] for work in (one, other) for ask in work.asks}
    assert len(prefixes) == 8
    assert len({ask.token_ids for ask in one.asks}) == 16


def test_sharegpt(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "one two three"}, {"from": "gpt", "value": "four five"}]
    file = tmp_path / "share.json"
    file.write_text(json.dumps([{"conversations": turns}, {"conversations": turns[:1]}]))
    [ask] = read_workload(file, TOKENIZER).asks
    assert list(ask.token_ids) == TOKENIZER.encode("one two three")
    assert ask.max_tokens == len(TOKENIZER.encode("four five"))


def test_mooncake_blocks_with_one_hash_are_equal(tmp_path: Path) -> None:
    rows = [
        {"timestamp": 1000, "input_length": 1100, "output_length": 5, "hash_ids": [7, 8, 9]},
        {"timestamp": 1500, "input_length": 600, "output_length": 6, "hash_ids": [7, 10]},
    ]
    file = tmp_path / "trace.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    first, second = read_workload(file, TOKENIZER).asks
    assert (len(first.token_ids), len(second.token_ids)) == (1100, 600)
    assert first.token_ids[:512] == second.token_ids[:512]
    assert first.token_ids[512:600] != second.token_ids[512:600]
    assert (first.at, second.at) == (0.0, 0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no request"),
        ("[1]", "entry 0 has no conversations"),
        ("[{", "is not JSON"),
        ('{"prompt": "a", "max_tokens": 1}\n{"prompt": "b"}', "line 2: field 'max_tokens' is missing"),
        ('{"max_tokens": 1}', "line 1: has no prompt"),
        ("nonsense", "line 1: is not a JSON object"),
        ("5", "line 1: is not a JSON object"),
        ('{"timestamp": 0, "input_length": 0, "output_length": 1}', "line 1: field 'input_length'"),
    ],
)
def test_bad_files_name_their_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(text)
    with pytest.raises(InputError) as caught:
        read_workload(file, TOKENIZER)
    assert message in str(caught.value)


def test_a_name_that_is_nearly_right() -> None:
    with pytest.raises(InputError, match="did you mean 'chat'"):
        make_workloads(WorkloadOptions("chatt", 1), TOKENIZER, 1)
