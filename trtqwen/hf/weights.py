"""The files of a model's tensors, and the file of each tensor, chosen as transformers does.

If two files contain one tensor, they must agree: transformers and TensorRT-LLM silently choose different ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from trtqwen.diagnostics import Diagnostic, SourceError
from trtqwen.hf.directory import other_format
from trtqwen.hf.files import check_downloaded, read_json, shown
from trtqwen.safetensors_io.reader import SafetensorsReader

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_ROWS = 4096  # compared at a time


@dataclass(frozen=True)
class Weights:
    """The opened files.

    Attributes:
        readers: by path within the directory.
        owner: the file that each tensor is read from.
        findings: files that are not read.
    """

    readers: dict[str, SafetensorsReader]
    owner: dict[str, SafetensorsReader]
    findings: tuple[Diagnostic, ...]


def open_weights(directory: Path) -> Weights:
    """Open the files that transformers would read: `model.safetensors`, else the shards of the index.

    A directory without either is read whole, as TensorRT-LLM's converter reads it.

    Raises:
        SourceError: if a file is missing, damaged or no safetensors, or two files differ in a tensor.
    """
    placed = _index(directory)
    single = (directory / SINGLE).is_file()
    if placed is None:
        names = [SINGLE] if single else sorted(path.name for path in directory.glob("*.safetensors"))
        if not names:
            raise SourceError(*_nothing(directory))
        weights = _opened(directory, names)
        return _with_others(directory, weights) if single else weights
    shards = sorted(set(placed.values()))
    missing = [name for name in shards if not (directory / name).is_file()]
    if single and shards != [SINGLE]:
        return _beside_index(directory, [] if missing else shards)
    if missing:
        raise SourceError(
            f"{directory / missing[0]}: this shard of the index is missing"
            + (f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""),
            "download it again, or remove the index if it is of another model",
        )
    weights = _opened(directory, shards)
    for name, file in placed.items():
        if name not in weights.owner:
            raise SourceError(
                f"{directory / INDEX}: places tensor {name!r} in {file}, and no shard holds it", "download again"
            )
    return weights


def _index(directory: Path) -> dict[str, str] | None:
    """Where the index places each tensor; None without an index."""
    path = directory / INDEX
    if not path.is_file():
        return None
    placed = read_json(path).get("weight_map")
    if not isinstance(placed, dict) or not placed or not all(isinstance(file, str) for file in placed.values()):
        raise SourceError(f"{path}: is not a safetensors index", "download the file again")
    for file in placed.values():
        if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
            raise SourceError(f"{path}: names {shown(file)}, outside of the directory", "download the file again")
    return placed


def _opened(directory: Path, names: Iterable[str]) -> Weights:
    readers: dict[str, SafetensorsReader] = {}
    owner: dict[str, SafetensorsReader] = {}
    for file in names:
        path = directory / file
        if path.is_file():
            with path.open("rb") as opened:
                check_downloaded(path, opened.read(128))
        reader = readers[file] = SafetensorsReader(path, SourceError, mapped=False)
        for name in reader:
            if name in owner and not same_tensor(owner[name], name, reader, name):
                first = owner[name].path.relative_to(directory)
                raise SourceError(
                    f"{directory}: {first} and {file} both hold tensor {name!r}, with different values; transformers "
                    "takes the last file's",
                    "remove the file that does not belong to the model",
                )
            owner.setdefault(name, reader)
    return Weights(readers, owner, ())


def _with_others(directory: Path, weights: Weights) -> Weights:
    """Look at safetensors files next to `model.safetensors`, which transformers does not read."""
    others = sorted(path.name for path in directory.glob("*.safetensors") if path.name != SINGLE)
    _compare(directory, weights, others)
    findings = [_unread(directory, others, f"transformers reads {SINGLE}")] if others else []
    return Weights(weights.readers, weights.owner, tuple(findings))


def _beside_index(directory: Path, shards: list[str]) -> Weights:
    """`model.safetensors` where an index names other files too.

    Args:
        shards: of the index; empty if some are missing.
    """
    weights = _opened(directory, [SINGLE])
    _compare(directory, weights, [name for name in shards if name != SINGLE])
    finding = _unread(directory, [INDEX, *shards], f"transformers reads {SINGLE}")
    return Weights(weights.readers, weights.owner, (finding,))


def _compare(directory: Path, weights: Weights, others: Iterable[str]) -> None:
    for file in others:
        reader = SafetensorsReader(directory / file, SourceError, mapped=False)
        for name in reader:
            if name in weights.owner and not same_tensor(weights.owner[name], name, reader, name):
                raise SourceError(
                    f"{directory}: {SINGLE} and {file} both hold tensor {name!r}, with different values; "
                    f"transformers takes {SINGLE}, vLLM and TensorRT-LLM the other",
                    "remove the file that does not belong to the model",
                )


def _unread(directory: Path, files: list[str], why: str) -> Diagnostic:
    names = ", ".join(files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")
    return Diagnostic(
        f"{directory}: trtqwen does not read {names}: {why}", "remove what is left over", "warning", "weights"
    )


def same_tensor(first: SafetensorsReader, name: str, second: SafetensorsReader, other: str) -> bool:
    """Whether two tensors have equal shapes and values; dtypes may differ."""
    if first.spec(name).shape != second.spec(other).shape:
        return False
    for mine, theirs in zip(first.blocks(name, _ROWS), second.blocks(other, _ROWS), strict=True):
        if mine.tobytes() != theirs.tobytes() and not np.array_equal(mine, theirs):
            return False
    return True


def _nothing(directory: Path) -> tuple[str, str]:
    if any(directory.glob("*.bin")) or any(directory.glob("*.pt")) or any(directory.glob("*.pth")):
        return (
            f"{directory}: has no *.safetensors; only safetensors are read",
            "load it with transformers and save it with save_pretrained(..., safe_serialization=True)",
        )
    if form := other_format(directory):
        return f"{directory}: has no *.safetensors; it holds {form[0]}", form[1]
    return f"{directory}: has no *.safetensors; only safetensors are read", "download the model's weights"
