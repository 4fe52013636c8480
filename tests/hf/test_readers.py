"""`plan`, `convert`, `build`, `verify` and `doctor` say the same of one directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hf.layouts import LAYOUTS, Layout
from tests.slow import every
from trtqwen.build import plan_build
from trtqwen.checkpoint.convert import plan_conversion, run_conversion
from trtqwen.demo import MODEL
from trtqwen.diagnostics import TrtQwenError
from trtqwen.doctor.model import CHECKS
from trtqwen.doctor.run import run_check
from trtqwen.doctor.subject import Subject
from trtqwen.plan.plan import plan_recipe
from trtqwen.quantize.texts import HELDOUT
from trtqwen.recipe import CheckpointRecipe, Recipe, load_recipe
from trtqwen.system.host import Host
from trtqwen.verify.run import verify
from trtqwen.verify.samples import read_samples

SMALL = """description: a small engine
checkpoint: {dtype: float32}
engine: {backend: torch, max_batch_size: 4, max_num_tokens: 512, max_seq_len: 512, tokens_per_block: 16}
"""
DOCTOR = [check for check in CHECKS if check.id in ("D10", "D12", "D13", "D16")]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    path.write_text(SMALL)
    return load_recipe(str(path))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the bundled model, for `verify`."""
    directory = tmp_path_factory.mktemp("bundled") / "checkpoint"
    run_conversion(plan_conversion(MODEL, CheckpointRecipe(dtype="float32")), directory)
    return directory


def refusal(command: Callable[[], object]) -> tuple[str, str]:
    with pytest.raises(TrtQwenError) as caught:
        command()
    return caught.value.what, caught.value.hint


def bare(text: str, directory: Path) -> str:
    return text.removeprefix(f"{directory}: ")


def of_doctor(directory: Path) -> list[tuple[str, str, str]]:
    """Verdict, evidence and hint of each problem."""
    subject = Subject(Host(), model=directory)
    results = [run_check(check, subject) for check in DOCTOR]
    return [
        (result.verdict, bare(line, directory), result.hint)
        for result in results
        if result.verdict in ("warn", "fail")
        for line in result.evidence.splitlines()
    ]


@pytest.mark.parametrize(
    "layout", every(4, [layout for layout in LAYOUTS if layout.refused]), ids=lambda layout: layout.name
)
def test_a_bad_directory_is_refused_alike(layout: Layout, recipe: Recipe, checkpoint: Path, tmp_path: Path) -> None:
    directory = layout.make(tmp_path)
    said = refusal(lambda: plan_conversion(directory, recipe.checkpoint))
    assert layout.refused in said[0]
    assert refusal(lambda: plan_recipe(recipe, directory)) == said
    assert refusal(lambda: plan_build(recipe, directory, tmp_path / "engines", tmp_path / "repository")) == said
    assert refusal(lambda: verify(checkpoint, directory, read_samples(MODEL, HELDOUT, 16))) == said
    assert not (tmp_path / "engines").exists()
    failed = [(evidence, hint) for verdict, evidence, hint in of_doctor(directory) if verdict == "fail"]
    assert any(evidence == bare(said[0], directory) and said[1] in hint for evidence, hint in failed), failed


@pytest.mark.parametrize(
    "layout",
    [layout for layout in LAYOUTS if layout.warns or layout.name in ("qwen2.5-instruct", "yarn", "template-list")],
    ids=lambda layout: layout.name,
)
def test_a_good_directory_is_warned_of_alike(layout: Layout, recipe: Recipe, tmp_path: Path) -> None:
    directory = layout.make(tmp_path)
    conversion = plan_conversion(directory, recipe.checkpoint)
    said = {bare(finding.what, directory) for finding in conversion.findings if finding.level == "warning"}
    assert set(conversion.findings) <= set(plan_recipe(recipe, directory).findings)
    build = plan_build(recipe, directory, tmp_path / "engines", tmp_path / "repository")
    assert build.checkpoint.warnings() == [str(finding) for finding in conversion.findings]
    doctor = of_doctor(directory)
    assert {evidence for verdict, evidence, _ in doctor} == said, doctor
