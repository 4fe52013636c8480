"""Files that people write: whatever is in them, a mapping or one sentence."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from trtqwen.diagnostics import InputError, RecipeError
from trtqwen.recipe import find_recipe, recipe_names
from trtqwen.yaml_file import read_mapping, with_fields


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: 1\na: 2\n", r"file\.yaml: line 2: duplicate key 'a'; correct the file"),
        (b"a:\n  b: 1\n  c: 2\n  b: 3\n", r"file\.yaml: line 4: duplicate key 'b'; correct the file"),
        (b"a: 2021-13-99\n", r"file\.yaml: has an invalid value \(month must be in 1\.\.12"),
        (b"? [a]\n: b\n", r"file\.yaml: line 1: found unhashable key; correct the file"),
        (b"a: !!python/object:os.system ls\n", r"line 1: could not determine a constructor for the tag"),
        (b"a: [\n", r"file\.yaml: is not YAML at line 2; correct the file"),
        (b"a: \x01\n", r"file\.yaml: is not YAML; correct the file"),
        (b"[" * 10000, "is nested too deeply"),
        (b"\xff\xfe\xfd", "cannot be read"),
        (b"", r"is not a mapping; write `name: value` lines"),
        (b"- a\n", "is not a mapping"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "file.yaml"
    file.write_bytes(content)
    with pytest.raises(RecipeError, match=message) as caught:
        read_mapping(file, RecipeError)
    assert "\n" not in str(caught.value)


def test_anchors_and_merges_are_yaml(tmp_path: Path) -> None:
    file = tmp_path / "file.yaml"
    file.write_text("base: &base {a: 1, b: 2}\nother: &other {c: 5}\nmine:\n  <<: *base\n  <<: *other\n  b: 3\n")
    assert read_mapping(file)["mine"] == {"a": 1, "b": 3, "c": 5}


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(content=st.dictionaries(st.text(), VALUES))
@settings(max_examples=50, deadline=None)
def test_what_yaml_writes_is_read(tmp_path_factory: pytest.TempPathFactory, content: dict[str, object]) -> None:
    file = tmp_path_factory.mktemp("yaml") / "file.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    assert read_mapping(file) == content


@given(content=st.binary())
@settings(max_examples=200, deadline=None)
def test_no_bytes_are_a_traceback(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.mktemp("yaml") / "file.yaml"
    file.write_bytes(content)
    with suppress(InputError):
        assert isinstance(read_mapping(file), dict)


COMMENTED = """\
# What it costs.
description: d   # short

engine:
  backend: torch
  max_batch_size: 16 # requests
  # a word on blocks
  tokens_per_block: 16

serve: {replicas: 1}
# the end
"""


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"engine.max_batch_size": 32}, "  max_batch_size: 32 # requests"),
        ({"engine.max_num_tokens": 512}, "  max_num_tokens: 512"),
        ({"serve.replicas": 4}, "serve: {replicas: 4}"),
        ({"serve.enable_chunked_context": False}, "serve: {replicas: 1, enable_chunked_context: false}"),
        ({"checkpoint.tp_size": 2}, "  tp_size: 2"),
        ({"description": "yes: no"}, "description: 'yes: no'   # short"),
        ({"serve.batch_scheduler_policy": "max_utilization", "serve.kv_cache_free_gpu_mem_fraction": 0.95}, ""),
    ],
)
def test_fields_change_and_comments_stay(changes: dict[str, Any], line: str) -> None:
    changed = with_fields(COMMENTED, changes)
    assert line in changed.splitlines() or not line
    assert [part for part in changed.splitlines() if "#" in part] == [
        part.replace("16", str(changes.get("engine.max_batch_size", 16))).replace(
            "description: d ", f"description: {_quoted(changes)} "
        )
        for part in COMMENTED.splitlines()
        if "#" in part
    ]
    for name, value in changes.items():
        section, _, field = name.rpartition(".")
        content = yaml.safe_load(changed)
        assert (content[section] if section else content)[field] == value


def _quoted(changes: dict[str, Any]) -> str:
    return "'yes: no'" if "description" in changes else "d"


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe_takes_changes(recipe: str) -> None:
    text = find_recipe(recipe).read_text(encoding="utf-8")
    changes = {
        "engine.max_batch_size": 24,
        "engine.tokens_per_block": 64,
        "serve.enable_kv_cache_reuse": True,
        "serve.kv_cache_free_gpu_mem_fraction": 0.85,
        "checkpoint.tp_size": 1,
        "serve.replicas": 2,
    }
    changed = with_fields(text, changes)
    assert [line for line in changed.splitlines() if line.startswith("#")] == [
        line for line in text.splitlines() if line.startswith("#")
    ]
    assert with_fields(changed, changes) == changed


def test_a_section_without_a_value_takes_fields() -> None:
    assert with_fields("serve:\n", {"serve.replicas": 2}) == "serve: {replicas: 2}\n"
