from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from trtqwen.diagnostics import SourceError
from trtqwen.hf.source import HfModel
from trtqwen.hf.weights import INDEX


@pytest.mark.parametrize("max_shard_size", ["5GB", "200KB"])
def test_tensors_are_those_of_the_library(hf_directory: Callable[..., Path], max_shard_size: str) -> None:
    directory = hf_directory(dtype=torch.bfloat16, max_shard_size=max_shard_size)
    files = sorted(directory.glob("*.safetensors"))
    assert (len(files) > 2) == (max_shard_size != "5GB")
    model = HfModel(directory)
    expected = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert set(model) == set(expected)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(model.tensor(name).view(np.uint16), tensor.view(torch.uint16).numpy())


def test_digests_follow_the_content_not_the_place(hf_directory: Callable[..., Path], tmp_path: Path) -> None:
    directory = hf_directory()
    first = HfModel(directory).digests()
    moved = directory.rename(tmp_path / "moved")
    assert HfModel(moved).digests() == first
    path = moved / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] += 1
    save_file(tensors, path)
    changed = HfModel(moved).digests()
    assert {name for name in first if first[name] != changed[name]} == {"model.safetensors"}


def test_a_missing_shard_is_named(hf_directory: Callable[..., Path]) -> None:
    directory = hf_directory(max_shard_size="200KB")
    shard = sorted(directory.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(SourceError, match=rf"{shard.name}: this shard of the index is missing"):
        HfModel(directory)


def test_a_truncated_shard_is_named(hf_directory: Callable[..., Path]) -> None:
    directory = hf_directory(max_shard_size="200KB")
    shard = sorted(directory.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(SourceError, match=rf"{shard.name}: is cut short"):
        HfModel(directory)


def test_an_index_that_does_not_fit_is_refused(hf_directory: Callable[..., Path]) -> None:
    directory = hf_directory(max_shard_size="200KB")
    index = json.loads((directory / INDEX).read_text())
    files = list(index["weight_map"].values())
    # the first shares its shard with others
    names = sorted(index["weight_map"], key=lambda name: -files.count(index["weight_map"][name]))
    index["weight_map"][names[0]] = index["weight_map"][names[-1]]
    (directory / INDEX).write_text(json.dumps(index))
    assert names[0] in HfModel(directory)  # another shard holds it, and transformers reads them all
    index["weight_map"]["model.layers.9.extra"] = index["weight_map"][names[-1]]
    (directory / INDEX).write_text(json.dumps(index))
    with pytest.raises(SourceError, match=r"places tensor 'model\.layers\.9\.extra'"):
        HfModel(directory)
    (directory / INDEX).write_text("{}")
    with pytest.raises(SourceError, match="is not a safetensors index"):
        HfModel(directory)


def test_a_directory_without_safetensors_is_refused(hf_directory: Callable[..., Path]) -> None:
    directory = hf_directory()
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(SourceError, match="only safetensors are read"):
        HfModel(directory)
