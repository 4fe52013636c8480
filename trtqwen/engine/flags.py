"""The flags of `trtllm-build`: computed from a recipe and checked against `trtllm_build.json`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from trtqwen.diagnostics import EngineError
from trtqwen.facts.names import Release
from trtqwen.facts.releases import version
from trtqwen.recipe import CheckpointRecipe, EngineRecipe, Recipe

PROGRAM = "trtllm-build"
NOT_IN_RESULT = ("workers", "log_level")  # flags that leave the engine as it is
_FACTS = Path(__file__).with_name("trtllm_build.json")
_OPTION = re.compile(r"^  (-\S.*?)(?:  .*)?$", re.MULTILINE)  # argparse indents wrapped help deeper

FlagValue = int | str | Literal[True]
Flags = Mapping[str, FlagValue]


class Flag(BaseModel):
    """One flag, by its name without dashes.

    Attributes:
        kind: a `switch` takes no value.
        choices: the only values it takes, if they are few.
        last: the last release that has it; None if every one does.
        never: why trtqwen does not pass it.
        changed_because: why the builder may put another value into the engine.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["int", "str", "switch", "list"]
    source: Literal["build", "plugin"]
    choices: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    last: str | None = None
    never: str | None = None
    changed_because: str | None = None


class FlagFacts(BaseModel):
    """What is known of trtllm-build from release `first` to release `last`.

    Attributes:
        removed: flags that older releases had, and what took their place.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sources: dict[str, str]
    first: str
    last: str
    flags: dict[str, Flag]
    removed: dict[str, str]


@cache
def flag_facts() -> FlagFacts:
    """The facts of `trtllm_build.json`."""
    return FlagFacts.model_validate_json(_FACTS.read_text(encoding="utf-8"))


def build_flags(
    engine: EngineRecipe, checkpoint: CheckpointRecipe, *, gpus: int | None = None
) -> dict[str, FlagValue]:
    """Every flag but the paths.

    Flags that in-flight batching needs are passed even if they are the default, because defaults have changed before.

    Args:
        gpus: number of available GPUs; None if unknown, and then the recipe's `workers` is used.
    """
    # The builder has no paged context FMHA for an INT8 KV cache and would switch it off without an error.
    paged = engine.use_paged_context_fmha and checkpoint.kv_cache != "int8"
    flags: dict[str, FlagValue] = {
        "max_batch_size": engine.max_batch_size,
        "max_num_tokens": engine.max_num_tokens,
        "max_seq_len": engine.max_seq_len,
        "max_beam_width": 1,
        "kv_cache_type": "paged",
        "tokens_per_block": engine.tokens_per_block,
        "remove_input_padding": "enable",
        "context_fmha": "enable",
        "use_paged_context_fmha": _switch(paged),
        "gpt_attention_plugin": "auto",
        "gemm_plugin": engine.gemm_plugin,
        "multiple_profiles": _switch(engine.multiple_profiles),
        "logits_dtype": engine.logits_dtype,
    }
    if engine.opt_num_tokens is not None:
        flags["opt_num_tokens"] = engine.opt_num_tokens
    if engine.gather_context_logits:
        flags["gather_context_logits"] = True
    flags["workers"] = engine.workers if gpus is None else max(1, min(engine.workers, gpus))
    flags["log_level"] = "info"
    return flags


def build_command(recipe: Recipe, checkpoint: Path, output: Path, *, gpus: int | None = None) -> list[str]:
    """The `trtllm-build` call of a recipe, arguments apart."""
    flags = build_flags(recipe.engine, recipe.checkpoint, gpus=gpus)
    return command_line(flags, checkpoint, output, recipe.checkpoint.release)


def command_line(flags: Flags, checkpoint: Path, output: Path, release: Release) -> list[str]:
    """The call with these flags. The timing cache stays next to the engine and speeds up the next build.

    Without a name for it, trtllm-build drops a `model.cache` into the current directory.
    """
    timings = output.parent / f"timing-{release}.cache"
    paths: Flags = {
        "checkpoint_dir": str(checkpoint),
        "output_dir": str(output),
        "input_timing_cache": str(timings),
        "output_timing_cache": str(timings),
    }
    both = {**paths, **flags}
    return [PROGRAM, *(f"--{name}" if value is True else f"--{name}={value}" for name, value in both.items())]


def check_command(command: list[str], release: Release) -> None:
    """Check every flag of a command against the facts about a release.

    Raises:
        EngineError: naming the flag that the release does not have, or that has no effect there; or naming the
            release, if it is older than the facts.
    """
    first = flag_facts().first
    if version(release) < version(first):
        raise EngineError(
            f"trtllm-build is known from {first} on", f"set checkpoint.release to a newer one than {release}"
        )
    for name, value in _arguments(command):
        flag = flag_facts().flags.get(name)
        if flag is None:
            instead = flag_facts().removed.get(name)
            hint = f" ({instead})" if instead else ""
            raise EngineError(f"--{name}: is not a flag of trtllm-build in {release}{hint}", "leave it out")
        if flag.last is not None and version(release) > version(flag.last):
            raise EngineError(
                f"--{name}: TensorRT-LLM {release} has removed it, {flag.last} was the last", "leave it out"
            )
        if flag.never is not None:
            raise EngineError(f"--{name}: {flag.never}", "leave it out")
        _check_value(name, value, flag.choices, f"TensorRT-LLM {release}", switch=flag.kind == "switch")


def check_against_help(command: list[str], text: str) -> None:
    """Check every flag of a command against the output of the installed `trtllm-build --help`.

    Raises:
        EngineError: naming the flag.
    """
    known: dict[str, tuple[str, ...]] = {}
    for invocation in _OPTION.findall(text):
        braces = re.search(r"\{([^}]*)\}", invocation)
        choices = tuple(braces[1].split(",")) if braces else ()
        known.update(dict.fromkeys(re.findall(r"--(\w+)", invocation), choices))
    for name, value in _arguments(command):
        if name not in known:
            raise EngineError(
                f"--{name}: the installed trtllm-build does not know it, see `trtllm-build --help`",
                "it is not the release that it says it is: build in an unchanged image",
            )
        _check_value(name, value, known[name], "the installed trtllm-build")


def _arguments(command: list[str]) -> list[tuple[str, str | None]]:
    pairs = (argument.removeprefix("--").partition("=") for argument in command[1:])
    return [(name, value if equals else None) for name, equals, value in pairs]


def _check_value(name: str, value: str | None, choices: tuple[str, ...], who: str, *, switch: bool = False) -> None:
    if switch and value is not None:
        raise EngineError(f"--{name}: takes no value (got {value!r})", "leave it out")
    if choices and value not in choices:
        raise EngineError(f"--{name}: {who} takes {', '.join(choices)} (got {value!r})", "correct the recipe")


def _switch(on: bool) -> str:
    return "enable" if on else "disable"
