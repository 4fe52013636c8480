"""The `docker run` lines: their parts, against the documents and Docker's own parsers."""

from __future__ import annotations

import argparse
import csv
import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtqwen.artifact.directory import finished_directory
from trtqwen.artifact.manifest import StageName, write_manifest
from trtqwen.containers.commands import (
    plan_build_container,
    plan_doctor_container,
    plan_selftest_container,
    plan_serve_container,
)
from trtqwen.containers.installed import PACKAGE
from trtqwen.containers.plan import ContainerPlan, csv_field
from trtqwen.containers.work import ContainerOptions
from trtqwen.demo import MODEL
from trtqwen.diagnostics import InputError
from trtqwen.recipe import Recipe, load_recipe, recipe_names

TP4 = load_recipe("qwen2.5-7b-fp16-tp4-4090d")


REPLICAS = load_recipe("qwen2.5-7b-int8-wo-tp1x4-4090d")


TINY = load_recipe("qwen2-tiny-cpu")


NEWEST = "nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3"


def build_plan(recipe: Recipe, home: Path, model: Path = MODEL, **options: object) -> ContainerPlan:
    said = ContainerOptions(**options)  # type: ignore[arg-type]
    return plan_build_container(recipe.name, recipe, model, home / "engines", home / "triton_repo" / "x", [], said)


def parsed(plan: ContainerPlan) -> argparse.Namespace:
    """The options, as Docker's command line knows them; any other is an error."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for flag in ("rm", "init"):
        parser.add_argument(f"--{flag}", action="store_true")
    for option in ("ipc", "gpus", "network", "user", "workdir", "entrypoint", "cap-drop", "security-opt"):
        parser.add_argument(f"--{option}")
    for option in ("env", "mount", "ulimit"):
        parser.add_argument(f"--{option}", action="append")
    found = parser.parse_args(plan.options)
    found.env = dict(pair.split("=", 1) for pair in found.env)
    rows = [next(csv.reader([mount])) for mount in found.mount]  # Docker reads them as one row of CSV
    found.mount = {}
    for kind, *fields in rows:
        assert kind == "type=bind"
        values = dict(field.partition("=")[::2] for field in fields)
        assert values["target"] not in found.mount
        found.mount[values["target"]] = (values["source"], "readonly" not in values)
    return found


def devices(plan: ContainerPlan) -> list[str] | None:
    gpus = parsed(plan).gpus
    return gpus and next(csv.reader([gpus]))[0].removeprefix("device=").split(",")


@pytest.mark.parametrize("name", [name for name in recipe_names() if "-torch-" not in name])
def test_every_recipe_has_its_container(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    plan = build_plan(recipe, tmp_path)
    options = parsed(plan)
    assert (options.rm, options.init, options.ipc) == (True, True, "host")
    assert sorted(options.ulimit) == ["memlock=-1", "stack=67108864"]
    assert options.user == f"{os.getuid()}:{os.getgid()}"
    assert plan.image == options.env["TRTQWEN_IMAGE"] == NEWEST
    assert "NCCL_SHM_DISABLE" not in options.env
    ranks = recipe.checkpoint.tp_size * recipe.checkpoint.pp_size
    several = recipe.host is not None and ranks > 1
    assert (options.env.get("NCCL_P2P_DISABLE"), options.env.get("NCCL_DEBUG")) == (
        ("1", "WARN") if several else (None, None)
    )
    assert len(devices(plan) or []) == (ranks if recipe.host else 0)


def test_what_is_written_is_mounted_where_it_is_and_the_rest_read_only(tmp_path: Path) -> None:
    mounts = parsed(build_plan(TP4, tmp_path)).mount
    package = str(PACKAGE)
    assert mounts.pop("/opt/trtqwen/trtqwen") == (package, False)
    assert mounts.pop("/opt/trtqwen/recipes") == (str(Path(package).parent / "recipes"), False)
    cache, writable = mounts.pop("/var/cache/trtqwen")
    assert (Path(cache).parent, writable) == (Path.home() / ".cache" / "trtqwen" / "containers", True)
    assert mounts == {
        str(MODEL): (str(MODEL), False),
        str(tmp_path / "engines"): (str(tmp_path / "engines"), True),
        str(tmp_path / "triton_repo"): (str(tmp_path / "triton_repo"), True),
    }


def test_a_model_of_links_is_mounted_with_what_they_lead_to(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in MODEL.iterdir():
        (blobs / file.name).write_bytes(b"x")
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", file.name))
    assert {str(snapshot), str(blobs)} <= parsed(build_plan(TP4, tmp_path, snapshot)).mount.keys()


def test_recipe_files_and_calibration_files_are_mounted(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.touch()
    (tmp_path / "calib.txt").touch()
    checkpoint = TP4.checkpoint.model_copy(update={"quant": "int8_sq", "calib": str(tmp_path / "calib.txt")})
    loaded = TP4.model_copy(update={"checkpoint": checkpoint})
    plan = plan_build_container(
        str(recipe), loaded, MODEL, tmp_path, tmp_path / "repo", ["--json"], ContainerOptions()
    )
    assert {str(recipe), str(tmp_path / "calib.txt")} <= parsed(plan).mount.keys()
    assert plan.arguments[:2] == ("build", str(recipe))
    assert plan.arguments[-1] == "--json"


def test_wheels_take_the_place_of_the_network(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels of mine"
    wheels.mkdir()
    options = parsed(build_plan(TINY, tmp_path, wheels=wheels))
    assert (options.env["PIP_NO_INDEX"], options.env["PIP_FIND_LINKS"]) == ("1", wheels.as_uri())
    assert str(wheels) in options.mount
    assert "PIP_NO_INDEX" not in parsed(build_plan(TINY, tmp_path)).env
    assert any(word.startswith("typer<0.30") for word in options.env["TRTQWEN_REQUIRES"].split())
    assert "torch" not in options.env["TRTQWEN_REQUIRES"]


@pytest.mark.parametrize("missing", ["model", "wheels"])
def test_what_is_to_be_read_must_exist(missing: str, tmp_path: Path) -> None:
    paths = {"model": MODEL, missing: tmp_path / "nowhere"}
    with pytest.raises(InputError, match="nowhere: does not exist"):
        build_plan(TP4, tmp_path, **paths)


def test_serving_takes_every_replicas_gpus_and_the_hosts_network(tmp_path: Path) -> None:
    engine, repository = tmp_path / "engines" / "e", tmp_path / "repo"
    finished(engine, "engine", {})
    finished(repository, "repository", {"engine": str(engine)})
    flags = ["--host=127.0.0.1", "--http-port=8000"]
    plan = plan_serve_container(REPLICAS, repository, flags, [], tmp_path / "logs" / "triton.log", ContainerOptions())
    options = parsed(plan)
    assert options.network == "host"
    assert devices(plan) == ["0", "1", "2", "3"]
    assert options.mount[str(engine)] == (str(engine), False)
    assert options.mount[str(repository)] == (str(repository), False)
    assert options.mount[str(tmp_path / "logs")] == (str(tmp_path / "logs"), True)
    assert plan.arguments == ("serve", f"--repo={repository}", *flags, f"--log={tmp_path / 'logs' / 'triton.log'}")
    assert "NCCL_P2P_DISABLE" not in options.env  # four ranks, but each alone


VLLM_IMAGE = "nvcr.io/nvidia/tritonserver:26.07-vllm-python-py3"


def vllm_recipe(**settings: object) -> Recipe:
    content = {"checkpoint": {"tp_size": 2}, "serve": {"replicas": 2}, "host": {"card": "rtx-4090d", "gpus": 4}}
    content["engine"] = {"backend": "vllm", "vllm": settings}
    return Recipe.model_validate({"name": "r", "description": "d", **content})


def test_vllm_runs_in_tritons_image_with_vllm(tmp_path: Path) -> None:
    engine, repository = tmp_path / "engines" / "e", tmp_path / "repo"
    finished(engine, "engine", {})
    finished(repository, "repository", {"engine": str(engine)})
    options = ContainerOptions(driver="610.43.02")
    plan = plan_serve_container(vllm_recipe(release="0.24.0"), repository, ["--json"], [], None, options)
    assert (plan.image, plan.warnings) == (VLLM_IMAGE, ())
    assert devices(plan) == ["0", "1", "2", "3"]
    assert parsed(plan).env["NCCL_P2P_DISABLE"] == "1"
    assert plan.arguments == ("serve", f"--repo={repository}", "--json")
    newer = plan_serve_container(vllm_recipe(), repository, [], [], None, options)
    assert [problem.what for problem in newer.warnings] == [
        f"{VLLM_IMAGE}: holds vLLM 0.24.0, but engine.vllm.release is 0.32.0"
    ]
    with pytest.raises(InputError, match=r"needs driver 580 or newer, and this host has 575\.57"):
        plan_serve_container(vllm_recipe(), repository, [], [], None, ContainerOptions(driver="575.57.08"))
    for settings in ({"image": "vllm/vllm-openai"}, {"python": "/opt/vllm/bin/python"}):
        with pytest.raises(InputError, match=next(iter(settings))):
            plan_serve_container(vllm_recipe(**settings), repository, [], [], None, options)


def finished(directory: Path, stage: StageName, parameters: dict[str, str]) -> None:
    with finished_directory(directory) as temporary:
        write_manifest(temporary, stage, {}, parameters)


@given(st.lists(st.text(st.characters(exclude_characters="\n\r", min_codepoint=32), min_size=1), min_size=1))
def test_a_mount_reads_back_as_docker_reads_it(fields: list[str]) -> None:
    assert next(csv.reader([",".join(map(csv_field, fields))])) == fields


def test_the_printed_line_can_be_pasted(tmp_path: Path) -> None:
    program = tmp_path / "docker"
    program.write_text("#!/usr/bin/env python3\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    program.chmod(0o755)
    awkward = tmp_path / """it's "a", $HOME, model"""
    awkward.mkdir()
    plan = build_plan(TP4, tmp_path, awkward)
    lines = plan.shell()
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    pasted = subprocess.run(["bash"], input=lines, env=environment, capture_output=True, text=True, check=True)
    assert ["docker", *json.loads(pasted.stdout)] == plan.command == shlex.split(lines.replace("\\\n", ""))
    assert str(awkward) in parsed(plan).mount
    assert len(lines.split(" \\\n  ")) == len(plan.options) + 3  # docker run, image, arguments


def test_selftest_and_doctor_have_containers_of_their_own(tmp_path: Path) -> None:
    plan = plan_selftest_container("1.2.1", tmp_path / "engines", True, ContainerOptions())
    assert (plan.image, devices(plan)) == (NEWEST, ["0"])
    assert plan.arguments == ("selftest", f"--engines={tmp_path}/engines", "--json")
    plan = plan_doctor_container(None, None, ["--gpu"], [MODEL], ContainerOptions())
    assert parsed(plan).gpus == "all"
    assert plan.arguments == ("doctor", "--gpu")
    assert str(MODEL) in parsed(plan).mount
    plan = plan_doctor_container(TP4.name, TP4, [], [], ContainerOptions())
    assert devices(plan) == ["0", "1", "2", "3"]
    assert parsed(plan).env["NCCL_P2P_DISABLE"] == "1"


@pytest.mark.skipif(shutil.which("docker") is None, reason="no docker command here")
def test_dockers_own_command_line_takes_every_recipes_options(tmp_path: Path) -> None:
    def docker(*command: str) -> str:
        environment = {**os.environ, "DOCKER_HOST": f"unix://{tmp_path}/nobody", "DOCKER_CONFIG": str(tmp_path)}
        return subprocess.run(command, env=environment, capture_output=True, text=True).stderr

    plans = [build_plan(load_recipe(name), tmp_path / "a, b") for name in recipe_names()]
    engine, repository = tmp_path / "engine", tmp_path / "repository"
    finished(engine, "engine", {})
    finished(repository, "repository", {"engine": str(engine)})
    plans += [
        plan_serve_container(load_recipe(name), repository, [], [], None, ContainerOptions())
        for name in recipe_names()
    ]
    plans.append(plan_selftest_container("1.2.1", tmp_path / "engines", False, ContainerOptions()))
    plans.append(plan_doctor_container(None, None, ["--gpu"], [MODEL], ContainerOptions()))
    options = {plan.options: plan.command for plan in plans}
    for command in options.values():
        assert "annot connect to the Docker daemon" in docker(*command), command
    command = plans[0].command
    assert "annot connect to the Docker daemon" not in docker(*command[:2], "--no-such-option", *command[2:])
