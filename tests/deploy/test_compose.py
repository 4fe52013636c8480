"""compose.yaml: its commands exist, its addresses agree, and only the gateway is reachable."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from tests.commands import check_command
from trtqwen.cli.deploy import command
from trtqwen.deploy.compose import DRAIN_SECONDS, Compose, compose_files, compose_text
from trtqwen.deploy.image import serving_image
from trtqwen.diagnostics import InputError
from trtqwen.gateway.config import GatewayConfig
from trtqwen.recipe import Recipe, load_recipe, recipe_names

ANY_BACKEND = ("serve.device=auto", "serve.batch_scheduler_policy=max_utilization")  # not the embedded engine alone
EXAMPLE = Path(__file__).parents[2] / "examples" / "compose.yaml"


def plan(recipe: str | Recipe) -> Compose:
    loaded = load_recipe(recipe) if isinstance(recipe, str) else recipe
    return Compose(loaded, serving_image(loaded), "/srv/trtqwen")


def content(recipe: str) -> Any:
    return yaml.safe_load(compose_text(plan(recipe)))


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_command_exists_and_the_gateway_finds_every_server(recipe: str) -> None:
    loaded = load_recipe(recipe)
    services = content(recipe)["services"]
    for service in services.values():
        check_command(list(service["command"]))
    addresses = [word for word in services["gateway"]["command"] if word.startswith("--triton=triton:")]
    ports = [8001 + 10 * number for number in range(loaded.serve.replicas)]
    assert addresses == [f"--triton=triton:{port}" for port in ports]
    [probe] = services["triton"]["healthcheck"]["test"][1:]
    assert re.findall(r"127\.0\.0\.1:(\d+)", probe) == [str(port - 1) for port in ports]
    assert "ports" not in services["triton"]  # it has no keys
    assert services["gateway"]["ports"] == ["8080:8080"]
    if loaded.engine.backend == "tensorrt_llm" or loaded.serve.device == "cuda":
        [devices] = services["triton"]["deploy"]["resources"]["reservations"]["devices"]
        assert len(devices["device_ids"]) == loaded.world_size * loaded.serve.replicas
        without_peers = loaded.world_size > 1 and "4090" in recipe
        assert ("NCCL_P2P_DISABLE" in services["triton"].get("environment", {})) == without_peers
    else:
        assert "deploy" not in services["triton"]


def test_stopping_waits_for_running_answers() -> None:
    found = content("qwen2.5-7b-bf16-tp4-4090d")
    settings = yaml.safe_load(found["configs"]["gateway"]["content"])
    assert GatewayConfig(repository=Path("x"), **settings).drain_seconds == DRAIN_SECONDS
    for service in found["services"].values():
        assert int(service["stop_grace_period"].removesuffix("s")) > DRAIN_SECONDS


def test_the_example_is_what_the_command_writes(tmp_path: Path) -> None:
    words = ["compose", "qwen2.5-7b-bf16-tp1x4-4090d", "--output", str(tmp_path / "out")]
    assert CliRunner().invoke(command, words).exit_code == 0
    assert (tmp_path / "out" / "compose.yaml").read_text() == EXAMPLE.read_text()


def test_the_image_holds_the_release_of_the_recipe() -> None:
    recipe = load_recipe("qwen2.5-7b-bf16-tp4-4090d", ["checkpoint.release=1.0.0"])
    dockerfile = compose_files(plan(recipe))["Dockerfile"]
    assert "trtllm-python-py3" in dockerfile
    assert serving_image(recipe).name.endswith("-1.0.0")
    assert "FROM python:" in compose_files(plan("qwen2-tiny-cpu"))["Dockerfile"]
    with pytest.raises(InputError, match=r"0\.17\.0"):
        serving_image(load_recipe("qwen2.5-7b-bf16-tp4-4090d", ["checkpoint.release=0.17.0"]))


@pytest.mark.parametrize(
    ("backend", "image", "gpus"),
    [("vllm", "vllm-python-py3", 4), ("llmapi", "trtllm-python-py3", 4), ("torch", "python:3.12", 4)],
)
def test_every_backend_has_an_image_and_its_gpus(backend: str, image: str, gpus: int) -> None:
    recipe = load_recipe("qwen2.5-7b-bf16-torch-tp4-h100", [f"engine.backend={backend}", *ANY_BACKEND])
    files = compose_files(plan(recipe))
    assert re.search(rf"^FROM \S*{image}", files["Dockerfile"], re.MULTILINE)
    assert ("TRTQWEN_VLLM_PYTHON" in files["Dockerfile"]) == (backend == "vllm")
    triton = yaml.safe_load(files["compose.yaml"])["services"]["triton"]
    [devices] = triton["deploy"]["resources"]["reservations"]["devices"]
    assert len(devices["device_ids"]) == gpus


def test_a_vllm_that_serves_elsewhere_takes_no_gpu_and_one_outside_the_image_is_refused() -> None:
    def changed(setting: str) -> Recipe:
        changes = ["engine.backend=vllm", f"engine.vllm={{{setting}}}", *ANY_BACKEND]
        return load_recipe("qwen2.5-7b-bf16-torch-tp4-h100", changes)

    services = yaml.safe_load(compose_text(plan(changed("address: http://vllm:8000"))))["services"]
    assert "deploy" not in services["triton"]
    for setting in ("python: /opt/vllm/bin/python", "image: 'vllm/vllm-openai:latest'"):
        with pytest.raises(InputError, match=setting.partition(":")[0]):
            plan(changed(setting))
