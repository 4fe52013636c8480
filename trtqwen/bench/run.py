"""One load test: warm-up, at least three repeats, figures, and the versions and hardware that they belong to."""

from __future__ import annotations

import json
import os
import platform
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from trtqwen import __version__
from trtqwen.bench.endpoint import Target, api_of
from trtqwen.bench.figures import Figures, Goodput, figures
from trtqwen.bench.load import Clients, RunResult, open_clients
from trtqwen.bench.records import RequestRecord
from trtqwen.bench.roofline import Bound, check_rate
from trtqwen.bench.workload import Workload
from trtqwen.diagnostics import InputError, ServerError
from trtqwen.system.host import read_host
from trtqwen.triton.client import server_error

LEAST_REPEATS = 3
_ASK_SECONDS = 10
OnPhase = Callable[[str, int], Callable[[int, int], None]]


@dataclass(frozen=True)
class LoadSettings:
    """Settings of a load test.

    Attributes:
        concurrency: requests open at a time (closed loop); None for an open loop.
        rate: requests per second of an open loop's Poisson arrivals; None if closed, or if the workload has times.
        repeats: measured runs.
        warmup: requests sent before the first of them, which are not measured.
        processes: of the load generator.
        seed: of prompts and arrivals.
    """

    concurrency: int | None = 16
    rate: float | None = None
    repeats: int = LEAST_REPEATS
    warmup: int = 16
    processes: int = 1
    seed: int = 0

    @property
    def mode(self) -> str:
        return "open loop" if self.concurrency is None else "closed loop"


@dataclass(frozen=True)
class BenchReport:
    """A load test and everything that it depends on.

    Attributes:
        digests: of each repeat's workload.
        repeats: the records of each repeat.
        about: versions, host, recipe, by name.
        bound: of the hardware; None where it is not known.
    """

    target: Target
    settings: LoadSettings
    workload: str
    digests: tuple[str, ...]
    figures: Figures
    repeats: tuple[tuple[RequestRecord, ...], ...]
    about: dict[str, Any]
    bound: Bound | None
    started: str

    def as_json(self) -> dict[str, Any]:
        target = {key: value for key, value in asdict(self.target).items() if key not in ("api_key", "stop_ids")}
        return {
            "schema_version": "1.0",
            "tool": f"trtqwen bench {__version__}",
            "start_time": self.started,
            "input_config": {
                "endpoint": target,
                "loadgen": {**asdict(self.settings), "mode": self.settings.mode},
                "workload": {"name": self.workload, "sha256": list(self.digests)},
            },
            "about": self.about,
            "roofline": None if self.bound is None else {**asdict(self.bound), "rate": self.bound.rate},
            **self.figures.as_json(),
        }


def check_settings(settings: LoadSettings, workload: Workload) -> None:
    """Refuse settings that would make the figures meaningless.

    Raises:
        InputError: with the hint.
    """
    if settings.repeats < LEAST_REPEATS:
        raise InputError(
            f"{settings.repeats} repeats give no confidence interval", f"ask for at least {LEAST_REPEATS}"
        )
    if settings.concurrency is None and settings.rate is None and not workload.timed:
        raise InputError(
            f"workload {workload.name} has no arrival times", "pass --rate, or --concurrency for a closed loop"
        )


def run_bench(
    target: Target,
    workloads: Sequence[Workload],
    warmup: Workload,
    settings: LoadSettings,
    *,
    goodput: Goodput | None = None,
    bound: Bound | None = None,
    about: dict[str, Any] | None = None,
    on_phase: OnPhase = lambda title, total: lambda requests, tokens: None,
) -> BenchReport:
    """Run a load test.

    Args:
        workloads: one for each repeat.
        on_phase: called when a phase begins, with its title and its number of requests; what it returns is called
            with the requests done and the tokens received since the call before.

    Raises:
        ServerError: if every request of the warm-up or of a repeat fails.
        ImpossibleRate: if the hardware cannot be as fast as was measured.
    """
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    results: list[RunResult] = []
    with open_clients(target, settings.processes) as clients:
        if warmup.asks:
            places = settings.concurrency or min(len(warmup.asks), 16)
            run_phase(clients, warmup, places, on_phase("warm-up", len(warmup.asks)))
        for number, workload in enumerate(workloads, 1):
            title = f"repeat {number} of {len(workloads)}"
            results.append(run_phase(clients, workload, settings.concurrency, on_phase(title, len(workload.asks))))
    found = figures([result.records for result in results], [c for r in results for c in r.clients], goodput)
    if bound is not None:
        fastest = max(found.rates["output_token_throughput"].repeats)
        check_rate(fastest, bound, "this card with these weights")
    return BenchReport(
        target=target,
        settings=settings,
        workload=workloads[0].name,
        digests=tuple(workload.digest for workload in workloads),
        figures=found,
        repeats=tuple(result.records for result in results),
        about={**about_host(), **(about or {})},
        bound=bound,
        started=started,
    )


def run_phase(
    clients: Clients, workload: Workload, concurrency: int | None, on_progress: Callable[[int, int], None]
) -> RunResult:
    """Send one workload.

    Raises:
        ServerError: if every request fails, with the first one's reason.
    """
    result = clients.run(workload.asks, concurrency, on_progress)
    if not any(record.ok for record in result.records):
        raise ServerError(f"every request failed, the first with: {result.records[0].error}", "see the server's log")
    return result


def probe(url: str, model: str | None, api_key: str | None = None) -> tuple[Target, dict[str, Any]]:
    """Ask a server for its model and properties.

    Args:
        model: what it calls the model; None asks it.

    Returns:
        The target, and what the server says of itself.

    Raises:
        ServerError: if it does not answer.
        InputError: if it does not serve the model.
    """
    if api_of(url) == "grpc":
        return _probe_grpc(url, model or "tensorrt_llm")
    url = url.rstrip("/").removesuffix("/v1")
    listed = _get(f"{url}/v1/models", api_key)
    names = [str(entry["id"]) for entry in listed.get("data", ())]
    if model is not None and model not in names:
        raise InputError(f"{url}: serves {', '.join(names) or 'no model'}, not {model}", "correct --model-name")
    if not names:
        raise InputError(f"{url}: serves no model", "start a model there")
    owner = str(listed["data"][0].get("owned_by", ""))
    about: dict[str, Any] = {"server": owner or "unknown", "model": model or names[0]}
    if owner == "vllm":
        about["server"] = f"vllm {_get(f'{url}/version', api_key).get('version', '')}".strip()
    target = Target(url, "completions", model or names[0], api_key, token_ids=owner == "vllm")
    return target, about


def _probe_grpc(url: str, model: str) -> tuple[Target, dict[str, Any]]:
    with grpc.insecure_channel(url) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        try:
            server = stub.ServerMetadata(service_pb2.ServerMetadataRequest(), timeout=_ASK_SECONDS)
            config = stub.ModelConfig(service_pb2.ModelConfigRequest(name=model), timeout=_ASK_SECONDS).config
        except grpc.RpcError as problem:
            raise server_error(url, problem) from None
    about = {"server": f"{server.name} {server.version}", "model": model}
    about["engine"] = config.parameters["gpt_model_path"].string_value
    return Target(url, "grpc", model), about


def _get(url: str, api_key: str | None) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_ASK_SECONDS) as answer:
            content = json.loads(answer.read())
    except urllib.error.HTTPError as problem:
        raise ServerError(f"{url}: answers with status {problem.code}", "correct the address or the key") from None
    except (OSError, ValueError) as problem:
        reason = getattr(problem, "reason", problem)
        raise ServerError(f"{url}: does not answer ({reason})", "start the server or correct the address") from None
    if not isinstance(content, dict):
        raise ServerError(f"{url}: does not answer in the format of OpenAI's API", "correct the address")
    return content


def about_host() -> dict[str, Any]:
    """Versions and hardware of the machine that the load generator runs on."""
    host = read_host()
    return {
        "trtqwen": __version__,
        "python": platform.python_version(),
        "kernel": platform.release(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "gpus": [gpu.name for gpu in host.gpus],
        "driver": host.driver,
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
