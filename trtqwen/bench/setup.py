"""Workloads and tokenizer of a load test from the options of a command."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from trtqwen.artifact.names import TOKENIZER_DIRECTORY
from trtqwen.bench.workload import (
    Workload,
    plain_vocabulary,
    read_workload,
    shapes,
    synthetic,
    with_arrivals,
)
from trtqwen.diagnostics import InputError
from trtqwen.hf.tokenizer import Tokenizer


@dataclass(frozen=True)
class WorkloadOptions:
    """Options of a workload.

    Attributes:
        workload: name or file.
        requests: of each repeat.
        input_tokens, output_tokens, prefix_tokens: fix the lengths of a named workload.
        rate: requests per second of Poisson arrivals; None leaves the workload's own times, if it has some.
    """

    workload: str
    requests: int
    input_tokens: int | None = None
    output_tokens: int | None = None
    prefix_tokens: int | None = None
    rate: float | None = None
    seed: int = 0


def find_tokenizer(given: Path | None, about: Mapping[str, Any]) -> Tokenizer:
    """Return the given tokenizer, or that of the server's engine if the engine is on this machine.

    Raises:
        InputError: if there is none.
    """
    engine = Path(str(about.get("engine", ""))) / TOKENIZER_DIRECTORY
    if given is None and not engine.is_dir():
        raise InputError(
            "the tokenizer of the model is not known, but prompts are made with it",
            "pass --tokenizer with a directory that holds tokenizer.json",
        )
    return Tokenizer(given or engine)


def make_workloads(options: WorkloadOptions, tokenizer: Tokenizer, count: int) -> list[Workload]:
    """Make `count` workloads, with different seeds or from different parts of a file that is long enough.

    Raises:
        InputError: if there is no such workload or file.
    """
    if options.workload in shapes() or not Path(options.workload).is_file():
        return named_workloads(options, plain_vocabulary(tokenizer), count)
    return _arriving(options, _from_file(options, tokenizer, count))


def named_workloads(options: WorkloadOptions, vocabulary: Sequence[int], count: int) -> list[Workload]:
    """Draw `count` named workloads with different seeds.

    Args:
        vocabulary: the token ids to draw from.

    Raises:
        InputError: if there is no workload of that name.
    """
    named = shapes().get(options.workload)
    if named is None:
        near = get_close_matches(options.workload, list(shapes()), n=1)
        guess = f", did you mean {near[0]!r}" if near else ""
        raise InputError(
            f"{options.workload}: no such workload or file{guess}", f"name one of {', '.join(shapes())}, or a file"
        )
    shape = named.changed(options.input_tokens, options.output_tokens, options.prefix_tokens)
    made = [
        synthetic(options.workload, shape, options.requests, vocabulary, options.seed + number)
        for number in range(count)
    ]
    return _arriving(options, made)


def _arriving(options: WorkloadOptions, made: list[Workload]) -> list[Workload]:
    if options.rate is None:
        return made
    return [with_arrivals(one, options.rate, options.seed + number) for number, one in enumerate(made)]


def _from_file(options: WorkloadOptions, tokenizer: Tokenizer, count: int) -> list[Workload]:
    path = Path(options.workload)
    if any(value is not None for value in (options.input_tokens, options.output_tokens, options.prefix_tokens)):
        raise InputError(f"{path}: its requests have lengths of their own", "leave out the lengths")
    everything = read_workload(path, tokenizer, options.requests * count)
    asks, size = everything.asks, options.requests
    if everything.timed or len(asks) < size * count:
        return [replace(everything, asks=asks[:size])] * count
    return [replace(everything, asks=asks[size * number : size * (number + 1)]) for number in range(count)]
