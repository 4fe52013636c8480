"""The files for Kubernetes pass kubectl, Helm and the schemas, and what they start behaves as the probes expect."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from tests.commands import check_command
from tests.deploy.conftest import free_port
from tests.deploy.programs import kubernetes_program, program
from tests.waiting import wait_for
from trtqwen.cli.deploy import command
from trtqwen.deploy.image import serving_image
from trtqwen.deploy.kubernetes import kubernetes_files
from trtqwen.deploy.objects import Kubernetes
from trtqwen.deploy.scaling import adapter_values, signals
from trtqwen.diagnostics import InputError
from trtqwen.recipe import load_recipe

RECIPES = ("qwen2.5-7b-bf16-tp1x4-4090d", "qwen2.5-7b-int8-wo-tp4-4090d", "qwen2-tiny-cpu")
COMPONENTS = ("keda", "prometheus-adapter", "prometheus-operator", "inference-extension")
SWITCHES = {
    "keda": "autoscaler=keda",
    "prometheus-adapter": "autoscaler=prometheus-adapter",
    "prometheus-operator": "prometheusOperator=true",
    "inference-extension": "inferenceExtension=true",
}
RELEASES = ("1.33", "1.35", "1.37")
KEY = "0123456789abcdef"
Objects = dict[tuple[str, str], dict[str, Any]]


@pytest.fixture(scope="module")
def kubectl(tmp_path_factory: pytest.TempPathFactory) -> str:
    return kubernetes_program("kubectl", tmp_path_factory.mktemp("kubectl"))


@pytest.fixture(scope="module")
def helm(tmp_path_factory: pytest.TempPathFactory) -> str:
    return kubernetes_program("helm", tmp_path_factory.mktemp("helm"))


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes the files of a recipe once for each set of options."""
    home = tmp_path_factory.mktemp("kubernetes")

    def deploy(recipe: str, *options: str) -> Path:
        output = home / "-".join([recipe, *(option.strip("-").replace("=", "-") for option in options)])
        if not output.exists():
            result = CliRunner().invoke(command, ["kubernetes", recipe, "--output", str(output), *options])
            assert result.exit_code == 0, result.output
        return output

    return deploy


def run(*words: str) -> str:
    result = subprocess.run(words, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr + result.stdout
    return result.stdout


def objects(text: str) -> Objects:
    """By kind and name, without the namespace, which kustomize writes and Helm does not, and without empty fields."""
    found: Objects = {}
    for item in yaml.safe_load_all(text):
        if item:
            item["metadata"].pop("namespace", None)
            found[item["kind"], item["metadata"]["name"]] = pruned(item)
    return found


def pruned(item: Any) -> Any:
    if isinstance(item, dict):
        kept = {key: pruned(value) for key, value in item.items()}
        return {key: value for key, value in kept.items() if value not in ([], {}) or key == "emptyDir"}
    return [pruned(value) for value in item] if isinstance(item, list) else item


def kustomized(kubectl: str, directory: Path, *components: str) -> Objects:
    """What the base and some components come to."""
    content = yaml.safe_load((directory / "kustomize" / "kustomization.yaml").read_text())
    content["components"] = [f"components/{name}" for name in components]
    copy = directory.with_name(f"{directory.name}+{'+'.join(components)}")
    shutil.copytree(directory / "kustomize", copy, dirs_exist_ok=True)
    (copy / "kustomization.yaml").write_text(yaml.safe_dump(content))
    return objects(run(kubectl, "kustomize", str(copy)))


@pytest.mark.parametrize("recipe", RECIPES)
def test_kustomize_and_helm_make_the_same_valid_objects(
    recipe: str, kubectl: str, helm: str, deployed: Callable[..., Path]
) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="install the package kubernetes-validate")
    directory = deployed(recipe)
    chart = str(directory / "helm" / "trtqwen")
    run(helm, "lint", "--strict", chart)
    expected = {"ConfigMap", "Deployment", "Service", "NetworkPolicy", "PodDisruptionBudget"}
    plain = kustomized(kubectl, directory)
    assert {kind for kind, _ in plain} == expected
    assert objects(run(helm, "template", "trtqwen", chart, "--namespace", "trtqwen")) == plain
    for component, kinds in zip(
        COMPONENTS,
        (
            {"ScaledObject"},
            {"HorizontalPodAutoscaler"},
            {"PodMonitor", "PrometheusRule"},
            {"InferencePool", "HTTPRoute"},
        ),
        strict=True,
    ):
        full = kustomized(kubectl, directory, component)
        assert {kind for kind, _ in full} == expected | kinds
        switch = ("--set", SWITCHES[component])
        assert objects(run(helm, "template", "trtqwen", chart, "--namespace", "trtqwen", *switch)) == full
        for release in RELEASES:
            for (kind, _), item in full.items():
                if kind not in kinds or kind == "HorizontalPodAutoscaler":  # the others are no kinds of Kubernetes
                    validate.validate(item, release, strict=True)


def test_ranks_over_nodes_are_a_group_of_pods(
    kubectl: str, helm: str, deployed: Callable[..., Path], tmp_path: Path
) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="install the package kubernetes-validate")
    directory = deployed("qwen2.5-7b-bf16-tp4-4090d", "--nodes=2")
    chart = str(directory / "helm" / "trtqwen")
    run(helm, "lint", "--strict", chart)
    found = kustomized(kubectl, directory, "keda", "inference-extension")
    switches = ["--set", SWITCHES["keda"], "--set", SWITCHES["inference-extension"]]
    assert objects(run(helm, "template", "trtqwen", chart, "--namespace", "trtqwen", *switches)) == found
    known = {"ConfigMap", "Service", "NetworkPolicy", "PodDisruptionBudget", "ServiceAccount", "Role", "RoleBinding"}
    assert {kind for kind, _ in found} == known | {"LeaderWorkerSet", "ScaledObject", "InferencePool", "HTTPRoute"}
    for (kind, _), item in found.items():
        if kind in known:
            validate.validate(item, RELEASES[-1], strict=True)
    group = found["LeaderWorkerSet", "trtqwen"]["spec"]["leaderWorkerTemplate"]
    pods = [group["leaderTemplate"]["spec"], group["workerTemplate"]["spec"]]
    assert group["size"] == 2
    for pod in pods:  # each is a pod that Kubernetes takes, with half of the GPUs
        head = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}}
        validate.validate({**head, "spec": pod}, RELEASES[-1], strict=True)
        assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 2
    arguments = pods[0]["containers"][0]["args"]
    check_command(arguments)
    assert [word for word in arguments if word.startswith("--rank-host")] == [
        "--rank-host=$(POD_NAME):2",
        "--rank-host=$(POD_NAME)-1:2",
    ]
    leader = {"leaderworkerset.sigs.k8s.io/worker-index": "0"}
    assert found["Service", "trtqwen"]["spec"]["selector"].items() >= leader.items()
    assert found["InferencePool", "trtqwen"]["spec"]["selector"]["matchLabels"].items() >= leader.items()
    assert found["ScaledObject", "trtqwen"]["spec"]["scaleTargetRef"]["kind"] == "LeaderWorkerSet"
    shell, fake = tmp_path / "shell", tmp_path / "bin" / "kubectl"
    shell.write_text(found["ConfigMap", "trtqwen"]["data"]["rank-shell"])
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\nfor word in "$@"; do echo "<$word>"; done\n')
    fake.chmod(0o755)
    environment = {"PATH": f"{fake.parent}:/usr/bin:/bin"}
    command = ["/bin/sh", str(shell), "trtqwen-0-1", "PATH=/x ; orted", "-mca", "a"]
    said = subprocess.run(command, capture_output=True, text=True, env=environment).stdout.splitlines()
    begin = ["<exec>", "<trtqwen-0-1>", "<--container=trtqwen>", "<-->", "</bin/sh>", "<-c>"]
    assert said == [*begin, "<PATH=/x ; orted -mca a>"]


@pytest.mark.parametrize(("recipe", "nodes"), [("qwen2.5-7b-bf16-tp4-4090d", 3), ("qwen2-tiny-cpu", 2)])
def test_ranks_that_do_not_divide_are_refused(recipe: str, nodes: int) -> None:
    with pytest.raises(InputError, match=recipe):
        plan_files(recipe, nodes=nodes)


def test_the_schemas_refuse_what_is_wrong() -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="install the package kubernetes-validate")
    files = plan_files("qwen2-tiny-cpu")
    [deployment] = [
        item for item in yaml.safe_load_all(files["kustomize/base/trtqwen.yaml"]) if item["kind"] == "Deployment"
    ]
    deployment["spec"]["template"]["spec"]["containers"][0]["args"] = "serve"
    with pytest.raises(validate.ValidationError):
        validate.validate(deployment, RELEASES[0], strict=True)


def plan_files(recipe: str, **settings: Any) -> Any:
    loaded = load_recipe(recipe)
    return kubernetes_files(Kubernetes(loaded, serving_image(loaded), **settings))


def base(files: Any) -> Objects:
    return objects(files["kustomize/base/trtqwen.yaml"])


def test_a_pod_is_one_replica_with_its_gpus() -> None:
    for recipe, replicas, gpus in (
        ("qwen2.5-7b-bf16-tp1x4-4090d", 4, 1),
        ("qwen2.5-7b-bf16-tp2x2-131k-4090d", 2, 2),
        ("qwen2.5-7b-bf16-tp4-4090d", 1, 4),
        ("qwen2-tiny-cpu", 1, None),
    ):
        found = base(plan_files(recipe))
        spec = found["Deployment", "trtqwen"]["spec"]
        [container] = spec["template"]["spec"]["containers"]
        assert (spec["replicas"], container["resources"]["limits"].get("nvidia.com/gpu")) == (replicas, gpus)
        written = yaml.safe_load(found["ConfigMap", "trtqwen"]["data"][f"{recipe}.yaml"])
        assert written["serve"]["replicas"] == 1
        variables = {variable["name"]: variable["value"] for variable in container["env"]}
        assert ("NCCL_P2P_DISABLE" in variables) == ((gpus or 1) > 1)  # GeForce cards have no peer access


def test_the_engine_lies_on_a_claim_or_in_an_image() -> None:
    def volume(**settings: Any) -> Any:
        pod = base(plan_files("qwen2-tiny-cpu", **settings))["Deployment", "trtqwen"]["spec"]["template"]["spec"]
        return pod["volumes"][0], pod["initContainers"][0]["args"][1]

    claimed, directory = volume(claim="weights")
    assert claimed["persistentVolumeClaim"]["claimName"] == "weights"
    assert directory == "/models/engines/qwen2-tiny-cpu/engine"
    image, directory = volume(model_image="registry.example.com/qwen:1", engine="engine")
    assert image["image"]["reference"] == "registry.example.com/qwen:1"
    assert directory == "/models/engine"
    both = ["kubernetes", "qwen2-tiny-cpu", "--output=x", "--claim=a", "--model-image=b"]
    assert "--model-image" in str(CliRunner().invoke(command, both).exception)


def test_the_queries_of_autoscalers_tell_the_load(tmp_path: Path) -> None:
    """By promtool: with load, without, and beside another service."""
    pod = 'namespace="n",pod="trtqwen-1",service="trtqwen"'
    other = 'namespace="n",pod="other-1",service="other"'
    latency = "trtqwen_gateway_request_seconds"
    loaded = {
        f"trtqwen_gateway_queued{{{pod}}}": "12+0x40",
        f"trtqwen_gateway_queued{{{other}}}": "500+0x40",
        f"nv_gpu_utilization{{{pod}}}": "0.9+0x8 0.5+0x3 0.95+0x40",
        f"{latency}_sum{{{pod}}}": "0+20x40",
        f"{latency}_count{{{pod}}}": "0+5x40",
    }
    quiet = {f"{latency}_sum{{{pod}}}": "7+0x40", f"{latency}_count{{{pod}}}": "5+0x40"}
    rules = adapter_values()["rules"]["external"]
    adapter = {rule["name"]["as"]: rule["metricsQuery"] for rule in rules}
    mine = '{namespace="n",service="trtqwen"}'
    queries = signals("trtqwen", "n")

    def value(query: str, time: str, number: float, labels: str = "{}") -> dict[str, Any]:
        return {"expr": query, "eval_time": time, "exp_samples": [{"labels": labels, "value": number}]}

    tests = [
        {
            "interval": "5s",
            "input_series": [{"series": name, "values": values} for name, values in loaded.items()],
            "promql_expr_test": [
                value(queries["queue"], "2m", 12),
                value(queries["gpu"], "1m", 50),  # a minute in which it was not busy throughout
                value(queries["gpu"], "2m10s", 95),
                value(queries["latency"], "2m", 4),
                value(adapter["trtqwen_gpu_percent"], "2m10s", 95, mine),
                value(adapter["trtqwen_mean_latency_seconds"].partition(" or ")[0], "2m", 4, mine),
            ],
        },
        {
            "interval": "5s",
            "input_series": [{"series": name, "values": values} for name, values in quiet.items()],
            "promql_expr_test": [value(query, "2m", 0) for query in queries.values()],
        },
    ]
    path = tmp_path / "test.yml"
    path.write_text(yaml.safe_dump({"rule_files": [], "tests": tests}))
    run(program("promtool", "prometheus"), "test", "rules", str(path))


class Pod:
    """The containers of a Deployment as processes of this machine."""

    def __init__(self, found: Objects, engine: Path, home: Path) -> None:
        spec = found["Deployment", "trtqwen"]["spec"]["template"]["spec"]
        self.spec, self.container = spec, spec["containers"][0]
        self.port = free_port()
        places = {"/models": home / "models", "/repository": home / "repository", "/etc/trtqwen-keys": home / "keys"}
        places |= {"/etc/trtqwen": home / "settings"}
        for place in places.values():
            place.mkdir()
        shutil.copytree(engine, places["/models"] / "engine")
        for name, text in found["ConfigMap", "trtqwen"]["data"].items():
            (places["/etc/trtqwen"] / name).write_text(text)
        (places["/etc/trtqwen-keys"] / "keys.yaml").write_text(f"keys: [{{name: a, key: {KEY}}}]\n")

        def here(words: list[str]) -> list[str]:
            for there, place in places.items():
                words = [word.replace(f"{there}/", f"{place}/") for word in words]
            return [sys.executable, "-m", "trtqwen", *words]

        for init in spec["initContainers"]:
            for _ in range(2):  # a restarted container finds what it left
                run(*here(init["args"]))
        taken = [f"--gateway-port={self.port}", "--http-port=0", "--grpc-port=0", "--metrics-port=0"]
        self.process = subprocess.Popen([*here(self.container["args"]), *taken], stdout=subprocess.DEVNULL)

    def probe(self, name: str) -> int:
        path = self.container[name]["httpGet"]["path"]
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as problem:
            return problem.code
        except OSError:
            return 0

    def metric(self, name: str) -> float:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))

    def ask(self, tokens: int) -> Iterator[str]:
        body = {"model": "qwen2-tiny-cpu", "prompt": "Once upon a time", "max_tokens": tokens, "stream": True}
        body |= {"ignore_eos": True, "stream_options": {"include_usage": True}}
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
        url = f"http://127.0.0.1:{self.port}/v1/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                for line in answer:
                    yield line.decode()
        except urllib.error.HTTPError as refusal:
            yield refusal.read().decode()


@pytest.fixture
def pod(bundled_engine: Callable[..., Path], tmp_path: Path) -> Iterator[Pod]:
    running = Pod(base(plan_files("qwen2-tiny-cpu", engine="engine")), bundled_engine(), tmp_path)
    try:
        yield running
    finally:
        running.process.send_signal(signal.SIGTERM)
        running.process.wait(120)


def error_code(lines: list[str]) -> str | None:
    """The code of the error that an answer is, or that a stream ends with; None for a complete one."""
    last = [line for line in lines if line.strip()][-1].removeprefix("data: ")
    return None if last.strip() == "[DONE]" else json.loads(last)["error"]["code"]


@pytest.mark.slow
@pytest.mark.triton
def test_probes_signals_and_drain_of_a_real_server(pod: Pod) -> None:
    grace = pod.spec["terminationGracePeriodSeconds"]
    assert pod.probe("startupProbe") != 200
    assert wait_for(lambda: pod.probe("startupProbe") == 200, 120)
    assert pod.probe("readinessProbe") == pod.probe("livenessProbe") == 200
    count, tokens = 24, 200  # more than the batch of 16 holds: some wait
    answers: list[list[str]] = [[] for _ in range(count)]
    threads = [threading.Thread(target=lambda lines=lines: lines.extend(pod.ask(tokens))) for lines in answers]
    for thread in threads:
        thread.start()
    try:
        assert wait_for(lambda: pod.metric("trtqwen_gateway_queued") > 0)  # what the autoscalers look at
        assert pod.metric("vllm:num_requests_waiting") > 0
        assert 0 < pod.metric("vllm:kv_cache_usage_perc") <= 1.2
        assert wait_for(
            lambda: pod.metric("trtqwen_gateway_in_flight") + pod.metric("trtqwen_gateway_queued") == count
        )
        pod.process.send_signal(signal.SIGTERM)
        begun = time.monotonic()
        assert wait_for(lambda: pod.probe("readinessProbe") == 503)
        assert pod.probe("livenessProbe") == 200  # it is not killed while it drains
    finally:
        for thread in threads:
            thread.join()
    assert pod.process.wait(grace) == 0
    assert time.monotonic() - begun < grace
    # What runs is finished. What waits is told that the server stops, so that its client asks another replica.
    stopped = [lines for lines in answers if error_code(lines) == "stopping"]
    finished = [lines for lines in answers if lines not in stopped]
    assert len(finished) >= 16
    for lines in finished:
        assert lines[-2].strip() == "data: [DONE]", lines[-3:]
        usage = json.loads([line for line in lines if '"usage":{' in line][-1].removeprefix("data: "))["usage"]
        assert usage["completion_tokens"] == tokens
