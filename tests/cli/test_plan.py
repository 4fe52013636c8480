"""`trtqwen plan` and `trtqwen recipe` as a user meets them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from tests.cli.test_cli import refused
from tests.command_line import trtqwen
from trtqwen.cli import app
from trtqwen.demo import MODEL
from trtqwen.recipe import Recipe, load_recipe, recipe_names

TP4, ONE = "qwen2.5-7b-bf16-tp4-4090d", "qwen2.5-7b-bf16-tp1x4-4090d"
HEAVY = """
description: d
model: qwen2.5-32b
host: {}
engine: {backend: tensorrt_llm}
"""


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_plan_prints_one_object() -> None:
    result = run("plan", TP4, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    plan = json.loads(result.stdout)
    assert (plan["kv_tokens"], plan["fits"]) == (1192608, True)
    assert plan["command"][0] == "trtllm-build"
    both = json.loads(run("plan", TP4, ONE, "--json").stdout)["plans"]
    assert both[0] == plan
    assert both[1]["recipe"] == ONE


def test_plan_of_a_directory() -> None:
    plan = json.loads(run("plan", "qwen2-tiny-cpu", "--model", MODEL, "--json").stdout)
    assert (plan["model"], plan["speed"], plan["command"]) == (str(MODEL), None, [])


def test_the_command_can_be_pasted_into_a_shell() -> None:
    printed = run("plan", TP4)
    assert printed.exit_code == 0
    script = "printf '%s\\n' " + printed.stdout[printed.stdout.index("trtllm-build") :]
    words = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout.splitlines()
    assert words == json.loads(run("plan", TP4, "--json").stdout)["command"]


def test_without_a_terminal_each_finding_is_a_line() -> None:
    lines = run("plan", "qwen2.5-7b-fp16-tp4-4090d").stdout.splitlines()
    assert sum(line.startswith("warning: ") for line in lines) == 2


def test_what_does_not_fit_ends_with_exit_code_1(tmp_path: Path) -> None:
    (tmp_path / "heavy.yaml").write_text(HEAVY)
    for arguments in ((), (TP4,)):
        result = run("plan", tmp_path / "heavy.yaml", *arguments)
        assert result.exit_code == 1
        assert "does not fit" in result.stdout
        assert "error: " in result.stdout


def test_bad_input_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "heavy.yaml").write_text(HEAVY.replace("host: {}", "host: {gpus: 8}\ncheckpoint: {tp_size: 3}"))
    refused(trtqwen("plan", tmp_path / "heavy.yaml"), "tp_size 3: does not divide", "use tp_size 1, 2, 4, 8")
    refused(trtqwen("recipe", "show", "qwen2-tiny-gpu"), "did you mean 'qwen2-tiny-cpu'")


def test_recipe_list() -> None:
    lines = run("recipe", "list").stdout.splitlines()
    assert [line.split()[0] for line in lines] == recipe_names()
    for line, name in zip(lines, recipe_names(), strict=True):
        assert line.endswith(load_recipe(name).description)
    summary = next(row for row in json.loads(run("recipe", "list", "--json").stdout)["recipes"] if row["name"] == TP4)
    assert (summary["model"], summary["precision"], summary["layout"]) == ("qwen2.5-7b", "bfloat16", "TP4 x 1")


@pytest.mark.parametrize("name", ["qwen2-tiny-cpu", ONE])
def test_recipe_show_is_the_same_recipe_with_every_field(name: str, tmp_path: Path) -> None:
    shown = run("recipe", "show", name).stdout
    path = tmp_path / f"{name}.yaml"
    path.write_text(shown, encoding="utf-8")
    assert load_recipe(str(path)) == load_recipe(name)
    fields = set(Recipe.model_fields) - {"name"}
    assert set(yaml.safe_load(shown)) == fields
    printed = json.loads(run("recipe", "show", name, "--json").stdout)
    assert printed == {"name": name, **yaml.safe_load(shown)}


def test_recipe_check(tmp_path: Path) -> None:
    assert run("recipe", "check", *recipe_names()).exit_code == 0
    (tmp_path / "typo.yaml").write_text(HEAVY.replace("host: {}", "hosts: {}"))
    (tmp_path / "tp3.yaml").write_text(HEAVY.replace("host: {}", "host: {gpus: 8}\ncheckpoint: {tp_size: 3}"))
    result = run("recipe", "check", TP4, tmp_path / "typo.yaml", tmp_path / "tp3.yaml")
    assert result.exit_code == 2
    ok, typo, typo_hint, divides, divides_hint = result.stdout.splitlines()
    assert ok == f"{TP4}: ok"
    assert typo.startswith("error: ")
    assert typo.endswith("typo.yaml: field 'hosts' is unknown")
    assert typo_hint == "hint: did you mean 'host'?"
    assert "tp_size 3" in divides
    assert "tp3.yaml" in divides
    assert divides_hint.startswith("hint: use tp_size")
    results = json.loads(run("recipe", "check", TP4, tmp_path / "typo.yaml", "--json").stdout)["recipes"]
    assert [row["ok"] for row in results] == [True, False]
    assert [row["hint"] for row in results] == [None, "did you mean 'host'?"]
