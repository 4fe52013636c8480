"""Workloads: the requests of a load test, made by name or read from a file, with a digest of the requests."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trtqwen.diagnostics import InputError, first_problem, why_unreadable
from trtqwen.hf.tokenizer import Tokenizer

_FACTS = Path(__file__).with_name("workloads.json")
_MOONCAKE_BLOCK = 512  # tokens for each of its hash ids


@dataclass(frozen=True)
class Ask:
    """One request of a workload.

    Attributes:
        token_ids: the prompt.
        max_tokens: length of the answer.
        at: seconds after the start at which the trace sends it; None if the workload has no times.
    """

    token_ids: tuple[int, ...]
    max_tokens: int
    at: float | None = None


@dataclass(frozen=True)
class Workload:
    """The requests of one run.

    Attributes:
        name: of the workload, or its file.
        digest: SHA-256 over prompts, lengths and times, so that two reports show that they sent the same.
        prefix_tokens: tokens at the start of each prompt that other prompts share.
    """

    name: str
    asks: tuple[Ask, ...]
    prefix_tokens: int = 0

    @property
    def digest(self) -> str:
        rows = [[ask.token_ids, ask.max_tokens, ask.at] for ask in self.asks]
        return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()

    @property
    def timed(self) -> bool:
        """Whether every request has a time of its own."""
        return all(ask.at is not None for ask in self.asks)

    @property
    def input_tokens(self) -> int:
        return sum(len(ask.token_ids) for ask in self.asks)


class Shape(BaseModel):
    """Lengths of a named workload, in tokens: mean and standard deviation.

    Attributes:
        prefix: tokens that the requests of a group share, in front of `input`.
        groups: how many different prefixes there are.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    description: str = ""
    input: tuple[int, int]
    output: tuple[int, int]
    prefix: int = 0
    groups: int = 1

    def changed(self, input_tokens: int | None, output_tokens: int | None, prefix_tokens: int | None) -> Shape:
        """The shape with fixed lengths in place of those that are given."""
        changes: dict[str, Any] = {}
        if input_tokens is not None:
            changes["input"] = (input_tokens, 0)
        if output_tokens is not None:
            changes["output"] = (output_tokens, 0)
        if prefix_tokens is not None:
            changes["prefix"] = prefix_tokens
        return self.model_copy(update=changes)


@cache
def shapes() -> dict[str, Shape]:
    """The named workloads."""
    content = json.loads(_FACTS.read_text(encoding="utf-8"))["workloads"]
    return {name: Shape.model_validate(shape) for name, shape in content.items()}


def synthetic(name: str, shape: Shape, count: int, vocabulary: Sequence[int], seed: int) -> Workload:
    """Draw a workload: random tokens in the lengths of a shape.

    Args:
        vocabulary: the ids to draw from.
        seed: another seed gives other prompts of the same lengths' distribution.
    """
    # The prefixes do not depend on the seed: a server that keeps them may use them in every repeat.
    shared = random.Random(f"prefix {name}")
    prefixes = [tuple(shared.choices(vocabulary, k=shape.prefix)) for _ in range(shape.groups)]
    drawn = random.Random(f"{seed} {name}")
    asks = []
    for index in range(count):
        length = _draw(drawn, *shape.input)
        body = tuple(drawn.choices(vocabulary, k=length))
        asks.append(Ask(prefixes[index % shape.groups] + body, _draw(drawn, *shape.output)))
    return Workload(name, tuple(asks), shape.prefix)


def _draw(drawn: random.Random, mean: int, deviation: int) -> int:
    return max(1, min(2 * mean, round(drawn.gauss(mean, deviation)))) if deviation else mean


def plain_vocabulary(tokenizer: Tokenizer) -> list[int]:
    """Return the ids of tokens with a space and a lowercase ASCII word, whose text encodes to the same ids again."""
    tokens = tokenizer.token_bytes
    words = [index for index, token in enumerate(tokens) if token[:1] == b" " and token[1:].isalpha()]
    plain = [index for index in words if tokens[index].isascii() and tokens[index].islower()]
    return plain or [index for index, token in enumerate(tokens) if token]


def read_workload(path: Path, tokenizer: Tokenizer, count: int | None = None) -> Workload:
    """Read a workload file.

    Three formats are known by their content: ShareGPT (a JSON list of conversations: the first human turn is the
    prompt, the length of the answer to it the answer's), Mooncake (JSONL with `timestamp`, `input_length`,
    `output_length` and `hash_ids`) and JSONL with `prompt` or `token_ids`, `max_tokens` and, if wanted, `at`.

    Args:
        count: take this many requests from the start; None takes all.

    Raises:
        InputError: naming file and line, if it is none of the three.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise InputError(
            f"{path}: cannot be read ({why_unreadable(problem)})", "name a workload, or give a file of one"
        ) from None
    asks = []
    for ask in _sharegpt(path, text, tokenizer) if text.lstrip().startswith("[") else _lines(path, text, tokenizer):
        asks.append(ask)
        if len(asks) == count:
            break
    if not asks:
        raise InputError(f"{path}: holds no request", "give a file with at least one")
    return Workload(path.name, tuple(asks))


def _sharegpt(path: Path, text: str, tokenizer: Tokenizer) -> Iterator[Ask]:
    try:
        content = json.loads(text)
    except ValueError as problem:
        raise InputError(f"{path}: is not JSON ({problem})", "download the file again") from None
    for number, entry in enumerate(content):
        turns = entry.get("conversations", entry.get("conversation")) if isinstance(entry, dict) else None
        if not isinstance(turns, list):
            raise InputError(f"{path}: entry {number} has no conversations", "give a ShareGPT file")
        if len(turns) < 2:
            continue  # as vLLM's benchmark: nothing to answer, or no answer to take the length of
        prompt, answer = (str(turn.get("value", "")) for turn in turns[:2])
        ids, length = tuple(tokenizer.encode(prompt)), len(tokenizer.encode(answer))
        if ids and length:
            yield Ask(ids, length)


class _MooncakeLine(BaseModel):
    timestamp: float
    input_length: int = Field(gt=0)
    output_length: int = Field(gt=0)
    hash_ids: list[int] = []


class _OwnLine(BaseModel):
    model_config = ConfigDict(extra="forbid")

    prompt: str | None = None
    token_ids: list[int] | None = None
    max_tokens: int = Field(gt=0)
    at: float | None = None


def _lines(path: Path, text: str, tokenizer: Tokenizer) -> Iterator[Ask]:
    vocabulary = plain_vocabulary(tokenizer)
    first: float | None = None
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
            if "input_length" in content:
                trace = _MooncakeLine.model_validate(content)
                first = trace.timestamp if first is None else first
                ids = _mooncake_ids(trace, vocabulary)
                yield Ask(ids, trace.output_length, (trace.timestamp - first) / 1000)
            else:
                own = _OwnLine.model_validate(content)
                ids = tuple(own.token_ids or tokenizer.encode(own.prompt or ""))
                if not ids:
                    raise InputError(f"{path}: line {number}: has no prompt", "give it `prompt` or `token_ids`")
                yield Ask(ids, own.max_tokens, own.at)
        except ValidationError as problem:
            raise InputError(f"{path}: line {number}: {first_problem(problem)}", "correct the line") from None
        except (ValueError, TypeError) as problem:
            raise InputError(f"{path}: line {number}: is not a JSON object ({problem})", "correct the line") from None


def _mooncake_ids(trace: _MooncakeLine, vocabulary: Sequence[int]) -> tuple[int, ...]:
    """Tokens that are equal where hash ids are equal: each id stands for a block of 512."""
    ids: list[int] = []
    for block in trace.hash_ids:
        ids += random.Random(f"mooncake {block}").choices(vocabulary, k=_MOONCAKE_BLOCK)
    rest = trace.input_length - len(ids)
    if rest > 0:
        ids += random.Random(f"mooncake {trace.timestamp}").choices(vocabulary, k=rest)
    return tuple(ids[: trace.input_length])


def with_arrivals(workload: Workload, rate: float, seed: int) -> Workload:
    """The workload with Poisson arrivals, all drawn before the first request is sent.

    Args:
        rate: requests per second.
    """
    drawn, at = random.Random(f"arrivals {seed}"), 0.0
    asks = []
    for ask in workload.asks:
        asks.append(replace(ask, at=at))
        at += drawn.expovariate(rate)
    return replace(workload, asks=tuple(asks))
