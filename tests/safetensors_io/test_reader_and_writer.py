from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from trtqwen.artifact.digest import digest_file
from trtqwen.diagnostics import InputError
from trtqwen.safetensors_io.format import TensorSpec
from trtqwen.safetensors_io.reader import SafetensorsReader
from trtqwen.safetensors_io.writer import SafetensorsWriter, write_to_all

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
files = st.dictionaries(
    st.text("abc.é0", min_size=1, max_size=6), st.tuples(shapes, st.sampled_from(sorted(DTYPES))), max_size=5
)


@settings(max_examples=60, deadline=None)
@given(files)
def test_the_library_reads_what_the_writer_writes(
    tmp_path_factory: pytest.TempPathFactory, plan: dict[str, tuple[tuple[int, ...], str]]
) -> None:
    path = tmp_path_factory.mktemp("st") / "file.safetensors"
    dtypes = {"bfloat16": np.dtype(ml_dtypes.bfloat16)}
    specs = {name: TensorSpec(shape, dtypes.get(kind) or np.dtype(kind)) for name, (shape, kind) in plan.items()}
    arrays = {
        name: np.arange(np.prod(spec.shape, dtype=int)).reshape(spec.shape).astype(spec.dtype)
        for name, spec in specs.items()
    }
    with SafetensorsWriter(path, specs) as writer:
        for name, array in arrays.items():
            writer.write(name, [array])
    loaded = safetensors.torch.load_file(path)
    assert set(loaded) == set(plan)
    for name, (shape, kind) in plan.items():
        assert loaded[name].dtype == DTYPES[kind]
        assert tuple(loaded[name].shape) == shape
        assert loaded[name].flatten().tolist() == arrays[name].astype(np.float64).flatten().tolist()
    assert path.stat().st_size == writer.size


@settings(max_examples=60, deadline=None)
@given(files)
def test_the_reader_reads_what_the_library_writes(
    tmp_path_factory: pytest.TempPathFactory, plan: dict[str, tuple[tuple[int, ...], str]]
) -> None:
    path = tmp_path_factory.mktemp("st") / "file.safetensors"
    tensors = {name: torch.arange(int(np.prod(s))).reshape(s).to(DTYPES[kind]) for name, (s, kind) in plan.items()}
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    reader = SafetensorsReader(path)
    assert set(reader) == set(tensors)
    for name, tensor in tensors.items():
        assert reader.spec(name).shape == tuple(tensor.shape)
        assert reader.tensor(name).astype(np.float64).tolist() == tensor.double().tolist()
        reader.release(name)
        assert reader.tensor(name).astype(np.float64).tolist() == tensor.double().tolist()


def test_parts_are_joined_and_cast_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trtqwen.safetensors_io.writer.BLOCK_BYTES", 64)
    source = np.random.default_rng(0).normal(size=(50, 10)).astype(np.float32)
    spec = TensorSpec((50, 5), np.dtype(np.float16))
    with SafetensorsWriter(tmp_path / "file", {"w": spec}) as writer:
        writer.write("w", [source[:7, ::2], source[7:, ::2]])
    written = safetensors.numpy.load_file(tmp_path / "file")["w"]
    np.testing.assert_array_equal(written, source[:, ::2].astype(np.float16))


def test_the_writer_keeps_to_its_plan(tmp_path: Path) -> None:
    specs = {name: TensorSpec((2,), np.dtype(np.float32)) for name in "ab"}
    zeros = np.zeros(2, np.float32)
    with (
        pytest.raises(ValueError, match="'b' written where 'a' is due"),
        SafetensorsWriter(tmp_path / "f", specs) as w,
    ):
        w.write("b", [zeros])
    with pytest.raises(ValueError, match="planned"), SafetensorsWriter(tmp_path / "f", specs) as w:
        w.write("a", [np.zeros(3, np.float32)])
    with pytest.raises(ValueError, match="1 planned tensors were never written"):  # noqa: SIM117
        with SafetensorsWriter(tmp_path / "f", specs) as w:
            w.write("a", [zeros])


def test_file_digest_follows_every_byte(tmp_path: Path) -> None:
    def digest(value: float) -> str:
        safetensors.numpy.save_file({"a": np.array([1.0, value]), "b": np.zeros(3)}, tmp_path / "f")
        reader = SafetensorsReader(tmp_path / "f")
        return reader.file_digest({name: reader.examine(name)[0] for name in reader})

    assert digest(2.0) == digest(2.0) != digest(3.0)


def good_file(path: Path) -> bytes:
    safetensors.numpy.save_file({"a": np.zeros((4, 4), np.float32)}, path)
    return path.read_bytes()


@pytest.mark.parametrize("keep", [0, 5, 20, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "f.safetensors"
    path.write_bytes(good_file(path)[:keep])
    with pytest.raises(InputError, match=r"f\.safetensors: is cut short.*again"):
        SafetensorsReader(path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"not json", "is not a safetensors file"),
        (b"[]", "is not a safetensors file"),
        (b'{"a": {}}', "is not a safetensors file"),
        (b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}', "is damaged"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}', "is damaged"),
    ],
)
def test_a_damaged_header_is_refused(tmp_path: Path, header: bytes, message: str) -> None:
    path = tmp_path / "f"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(InputError, match=message):
        SafetensorsReader(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        SafetensorsReader(tmp_path / "none")


def test_headers_agree_with_the_library(tmp_path: Path) -> None:
    """Same header layout as upstream: aligned to 8 bytes, offsets relative to its end."""
    with SafetensorsWriter(tmp_path / "f", {"a": TensorSpec((3,), np.dtype(np.int8))}) as writer:
        writer.write("a", [np.zeros(3, np.int8)])
    raw = (tmp_path / "f").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert length % 8 == 0
    assert json.loads(raw[8 : 8 + length])["a"]["data_offsets"] == [0, 3]
    with safetensors.safe_open(tmp_path / "f", "numpy") as file:
        assert file.metadata() is None


@pytest.mark.parametrize("direct", [True, False])
def test_files_of_many_blocks_of_any_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct: bool) -> None:
    """Longer than the buffers and ending anywhere, with and without writes that pass by the page cache."""
    if not direct:
        real = os.open

        def refuse(path: Path, flags: int, mode: int = 0o777) -> int:
            if flags & os.O_DIRECT:
                raise OSError(errno.EINVAL, "Invalid argument")
            return real(path, flags, mode)

        monkeypatch.setattr(os, "open", refuse)
    rng = np.random.default_rng(0)
    tensors: dict[str, npt.NDArray[Any]] = {
        "odd": rng.integers(0, 255, 3).astype(np.uint8),
        "unaligned": rng.normal(size=(3001, 1501)).astype(np.float32),
        "half": rng.normal(size=(2000, 1777)).astype(np.float16),
    }
    plan = {name: TensorSpec(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    with SafetensorsWriter(tmp_path / "a", plan) as first, SafetensorsWriter(tmp_path / "b", plan) as second:
        for name, tensor in tensors.items():
            counts: list[int] = []
            write_to_all([first, second], name, [tensor[:2], tensor[2:]], progress=counts.append)
            assert sum(counts) == 2 * tensor.nbytes
    for writer in (first, second):
        assert writer.path.stat().st_size == writer.size > 20 << 20
        assert writer.digest() == digest_file(writer.path)
        for name, read in safetensors.torch.load_file(writer.path).items():
            np.testing.assert_array_equal(read.numpy(), tensors[name])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, ml_dtypes.bfloat16, np.int8])
@pytest.mark.parametrize(
    "values", [[1.5, -3.0, 0.0], [-1.0, -2.5], [0.0, -0.0], [1.0, np.inf], [np.nan, 7.0], [-np.inf]]
)
def test_examining_finds_the_largest_magnitude(tmp_path: Path, dtype: Any, values: list[float]) -> None:
    if dtype is np.int8:
        values = [1, -4]
    tensor = np.zeros(700_000, dtype)
    tensor[: len(values)] = values
    with SafetensorsWriter(tmp_path / "a", {"t": TensorSpec(tensor.shape, tensor.dtype)}) as writer:
        writer.write("t", [tensor])
    digest, largest = SafetensorsReader(tmp_path / "a").examine("t")
    assert digest == xxhash.xxh3_128_hexdigest(tensor.tobytes())
    if dtype is np.int8:
        assert largest == 0
    else:
        np.testing.assert_equal(abs(largest), np.abs(np.array(values, np.float32)).max())


def test_every_bfloat16_is_cast_as_the_library_casts_it(tmp_path: Path) -> None:
    """All 65536 of them, contiguous and as columns of a wider array; values beyond float16 become infinite."""
    values = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    expected = values.to(torch.float16)
    ours = values.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    wide = np.stack([ours.reshape(256, 256), np.zeros((256, 256), ours.dtype)], axis=1).reshape(256, 512)
    plan = {
        "flat": TensorSpec((65536,), np.dtype(np.float16)),
        "columns": TensorSpec((256, 256), np.dtype(np.float16)),
        "back": TensorSpec((65536,), ours.dtype),
    }
    with np.errstate(over="ignore", invalid="ignore"), SafetensorsWriter(tmp_path / "a", plan) as writer:
        writer.write("flat", [ours])
        writer.write("columns", [wide[:, :256]])
        writer.write("back", [ours], via=np.dtype(np.float16))
    loaded = safetensors.torch.load_file(tmp_path / "a")
    assert torch.equal(loaded["flat"].nan_to_num(1.25), expected.nan_to_num(1.25))
    assert torch.equal(loaded["columns"].reshape(-1).nan_to_num(1.25), expected.nan_to_num(1.25))
    assert torch.equal(loaded["back"].nan_to_num(1.25), expected.to(torch.bfloat16).nan_to_num(1.25))


def test_a_file_that_is_cut_short_is_an_error_where_it_is_not_mapped(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    values = np.arange(300_000, dtype=np.float32).reshape(300, 1000)
    with SafetensorsWriter(path, {"w": TensorSpec(values.shape, values.dtype)}) as writer:
        writer.write("w", [values])
    reader = SafetensorsReader(path, mapped=False)
    assert np.array_equal(reader.tensor("w"), values)
    assert np.array_equal(reader.rows("w", [7, 0, 299]), values[[7, 0, 299]])
    assert np.array_equal(np.concatenate(list(reader.blocks("w", 128))), values)
    os.truncate(path, 4096)
    for read in (
        lambda: reader.tensor("w"),
        lambda: reader.examine("w"),
        lambda: reader.rows("w", [299]),
        lambda: list(reader.blocks("w", 128)),
    ):
        with pytest.raises(InputError, match="was cut short while it was read"):
            read()
