"""All checks together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.doctor.conftest import IN_IMAGE
from trtqwen.diagnostics import InputError
from trtqwen.doctor.check import Check, Result
from trtqwen.doctor.run import CHECKS, examine, run_check
from trtqwen.doctor.subject import Subject, System, completed
from trtqwen.recipe import load_recipe
from trtqwen.system.host import Host

IDS = [f"D{number:02}" for number in range(1, 43)]
WARNINGS = {"D06", "D08", "D15", "D20", "D23", "D24", "D27", "D30", "D34", "D37", "D38", "D39", "D40", "D41"}


def test_every_check_has_its_id_and_level() -> None:
    assert [check.id for check in CHECKS] == IDS
    assert {check.id for check in CHECKS if check.level == "warning"} == WARNINGS
    assert all(type(check).__doc__ for check in CHECKS), "docs/reference/checks.md shows what each is about"


def test_a_host_alone_is_examined_and_the_rest_says_what_it_needs(machine: Callable[..., System]) -> None:
    findings = {found.check.id: found.result for found in examine(Subject(Host(), machine()))}
    assert {name for name, result in findings.items() if result.verdict == "ok"} == {"D07", "D08"}
    assert all(result.verdict in ("ok", "skip") and result.evidence for result in findings.values())


def test_every_failed_check_has_a_hint(machine: Callable[..., System], tmp_path: Path) -> None:
    host = IN_IMAGE.__class__(**{**vars(IN_IMAGE), "tensorrt_llm": "1.3.0", "tensorrt": "11.0", "driver": "500.1"})
    subject = Subject(
        host,
        machine(environ={"SLURM_JOB_ID": "1"}, shm=0.06),
        load_recipe("qwen2.5-7b-fp16-tp4-4090d"),
        model=tmp_path,
        checkpoint=tmp_path,
        engine=tmp_path,
        repository=tmp_path,
        url="127.0.0.1:1",
    )
    findings = list(examine(subject))
    bad = [found for found in findings if found.result.verdict in ("warn", "fail")]
    assert {"D01", "D02", "D03", "D04", "D05", "D07", "D08", "D10", "D22", "D29"} <= {found.check.id for found in bad}
    for found in bad:
        assert found.result.hint, found
        assert found.check.level == "error" or found.result.verdict == "warn"


class Unreadable(Check):
    id, level, title = "D99", "error", "a file that the system refuses"

    def run(self, subject: Subject) -> Result:
        raise PermissionError(13, "Permission denied", "/secret")


def test_what_the_system_refuses_is_a_problem_of_its_check_alone(machine: Callable[..., System]) -> None:
    result = run_check(Unreadable(), Subject(Host(), machine()))
    assert (result.verdict, result.evidence) == ("fail", "/secret: Permission denied")


class Surprised(Check):
    id, level, title = "D98", "error", "a value that nobody expected"

    def run(self, subject: Subject) -> Result:
        return Result("ok", str(int("[N/A]")))


def test_a_check_that_fails_itself_ends_no_other(
    machine: Callable[..., System], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trtqwen.doctor.run.CHECKS", [Surprised(), *CHECKS])
    first, *others = examine(Subject(Host(), machine()))
    assert first.result.verdict == "warn"
    assert "the check itself failed (ValueError: invalid literal for int()" in first.result.evidence
    assert [found.check.id for found in others] == IDS


def test_what_was_built_of_a_recipe_is_found(tmp_path: Path) -> None:
    for name in ("engines/qwen2-tiny-cpu/checkpoint", "engines/qwen2-tiny-cpu/engine", "triton_repo/qwen2-tiny-cpu"):
        (tmp_path / name).mkdir(parents=True)
    subject = completed(Subject(Host(), System(work=tmp_path), load_recipe("qwen2-tiny-cpu")))
    assert subject.checkpoint == tmp_path / "engines/qwen2-tiny-cpu/checkpoint"
    assert subject.engine == tmp_path / "engines/qwen2-tiny-cpu/engine"
    assert subject.repository == tmp_path / "triton_repo/qwen2-tiny-cpu"
    nothing = completed(Subject(Host(), System(work=tmp_path / "elsewhere"), load_recipe("qwen2-tiny-cpu")))
    assert (nothing.checkpoint, nothing.engine, nothing.repository) == (None, None, None)


def test_a_repository_names_its_engine(filled: Callable[..., Path], tmp_path: Path) -> None:
    assert completed(Subject(Host(), repository=filled())).engine == tmp_path / "engine"
    assert completed(Subject(Host(), repository=filled(engine_dir="/nowhere"))).engine is None


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"model": Path("/nowhere")}, "correct --model"),
        ({"repository": Path("/nowhere")}, "correct --repo"),
        ({"url": "http://127.0.0.1:8001"}, "--url http://127.0.0.1:8001: is not host:port"),
        ({"metrics": "8002"}, "--metrics 8002"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], says: str) -> None:
    with pytest.raises(InputError, match=says):
        completed(Subject(Host(), **arguments))  # type: ignore[arg-type]
    for good in ("127.0.0.1:8001", "[::1]:8001", "gpu-7.example:8001"):
        completed(Subject(Host(), url=good))
