"""The checks that rest on the plan and on the builder's flags."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.doctor.conftest import IN_IMAGE, check
from trtqwen.doctor.subject import Subject, System
from trtqwen.engine.flags import build_command
from trtqwen.recipe import Recipe, load_recipe
from trtqwen.system.host import Host


def recipe(model: str = "qwen2.5-7b", **sections: dict[str, Any]) -> Recipe:
    loaded = load_recipe("qwen2.5-7b-fp16-tp4-4090d").model_copy(update={"model": model})
    changed = {name: getattr(loaded, name).model_copy(update=values) for name, values in sections.items()}
    return loaded.model_copy(update=changed)


ONE_CARD: dict[str, Any] = {"checkpoint": {"tp_size": 1}}


@pytest.mark.parametrize(
    ("given", "fits", "at_once"),
    [
        (recipe(), "ok", "ok"),
        (recipe(**ONE_CARD), "ok", "ok"),
        (recipe("qwen2.5-32b", **ONE_CARD), "fail", "warn"),
        (recipe("qwen2.5-72b"), "fail", "warn"),
        (recipe(**ONE_CARD, engine={"max_seq_len": 120000}), "ok", "warn"),  # 1.06 sequences
        (recipe(**ONE_CARD, engine={"max_seq_len": 131072}), "fail", "warn"),  # 0.97
        (recipe(serve={"max_tokens_in_paged_kv_cache": 4096}), "fail", "warn"),
    ],
)
def test_memory_and_concurrency(given: Recipe, fits: str, at_once: str) -> None:
    assert check("D19", Subject(Host(), recipe=given)).verdict == fits
    result = check("D20", Subject(Host(), recipe=given))
    assert result.verdict == at_once
    assert ("sequential" in result.evidence) == (at_once == "warn")


def test_a_plan_needs_a_model_that_divides() -> None:
    assert check("D19", Subject(Host())).evidence == "give a RECIPE"
    nameless = recipe().model_copy(update={"model": None})
    assert check("D19", Subject(Host(), recipe=nameless)).evidence.startswith("give --model")
    assert "see D10 and D11" in check("D20", Subject(Host(), recipe=recipe("qwen2.5-0.5b"))).evidence


def help_text(names: list[str]) -> str:
    return "usage: trtllm-build [-h]\n\noptions:\n" + "\n".join(f"  --{name} {name.upper()}" for name in names)


def test_flags_are_held_against_the_installed_help(machine: Callable[..., System], tmp_path: Path) -> None:
    names = [flag[2:].partition("=")[0] for flag in build_command(recipe(), Path("c"), Path("e"))[1:]]
    host = replace(IN_IMAGE, trtllm_build=tmp_path / "bin" / "trtllm-build")
    whole = machine(programs={"trtllm-build": help_text(names)})
    result = check("D21", Subject(host, whole, recipe()))
    assert result.verdict == "ok", result
    assert "the installed --help" in result.evidence
    host.trtllm_build.write_text(f"#!/bin/sh\n/bin/cat <<'END'\n{help_text(names[:-3])}\nEND\n")  # type: ignore[union-attr]
    refused = check("D21", Subject(host, whole, recipe()))
    assert refused.verdict == "fail"
    assert refused.evidence.startswith(f"--{names[-3]}")
    host.trtllm_build.write_text("#!/bin/sh\nexit 1\n")  # type: ignore[union-attr]
    assert check("D21", Subject(host, whole, recipe())).verdict == "warn"


def test_flags_without_a_builder_are_held_against_the_table() -> None:
    assert "the table of 1.2.1" in check("D21", Subject(Host(), recipe=recipe())).evidence
    assert check("D21", Subject(Host(), recipe=load_recipe("qwen2-tiny-cpu"))).verdict == "skip"
