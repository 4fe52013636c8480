"""Every alert fires when it should and only then, as Prometheus' own promtool evaluates it."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import yaml

from tests.deploy.programs import program
from trtqwen.deploy.monitoring import Monitoring, monitoring_files
from trtqwen.deploy.rules import Thresholds, alerts, recordings
from trtqwen.diagnostics import InputError

GATEWAY = 'job="trtqwen-gateway",instance="a:8080"'
TRITON = 'job="trtqwen-triton",instance="a:8002",model="tensorrt_llm",version="1"'
STEPS = 600  # samples of each series, one every 15 seconds


@dataclass(frozen=True)
class Case:
    """What is scraped, and what an alert makes of it.

    Attributes:
        series: Prometheus' notation of values by series; `N` is the number of samples.
        labels: of the alert, besides name and severity; None if it never fires.
        before, at: times at which it does not fire yet, and fires.
    """

    alert: str
    series: dict[str, str]
    labels: dict[str, str] | None
    before: str = "30s"
    at: str = "3m"


def histogram(name: str, buckets: dict[str, int], total: float = 0) -> dict[str, str]:
    """A histogram of the gateway that grows by these counts every 15 seconds."""
    series = {
        f'trtqwen_gateway_{name}_bucket{{{GATEWAY},le="{le}"}}': f"0+{count}xN" for le, count in buckets.items()
    }
    count = max(buckets.values())
    return {
        **series,
        f"trtqwen_gateway_{name}_sum{{{GATEWAY}}}": f"0+{total}xN",
        f"trtqwen_gateway_{name}_count{{{GATEWAY}}}": f"0+{count}xN",
    }


def gauge(name: str, value: float | str) -> dict[str, str]:
    return {f"trtqwen_gateway_{name}{{{GATEWAY}}}": str(value) if isinstance(value, str) else f"{value}+0xN"}


def model_up(values: str) -> dict[str, str]:
    return {f'trtqwen_gateway_model_up{{{GATEWAY},model="qwen"}}': values}


def requests(finished: int, **refused: int) -> dict[str, str]:
    """Answers and refusals every 15 seconds; refusals by `sSTATUS`."""
    series = {f'trtqwen_gateway_finished_total{{{GATEWAY},reason="stop"}}': f"0+{finished}xN"}
    for status, count in refused.items():
        series[f'trtqwen_gateway_refused_total{{{GATEWAY},status="{status[1:]}",code="x"}}'] = f"0+{count}xN"
    return series


def engine(active: int = 1, steps: int = 10, free_blocks: int = 50) -> dict[str, str]:
    return {
        f'nv_trt_llm_request_metrics{{{TRITON},request_type="active"}}': f"{active}+0xN",
        f'nv_trt_llm_general_metrics{{{TRITON},general_type="iteration_counter"}}': f"0+{steps}xN",
        f'nv_trt_llm_kv_cache_block_metrics{{{TRITON},kv_cache_block_type="free"}}': f"{free_blocks}+0xN",
        f'nv_trt_llm_kv_cache_block_metrics{{{TRITON},kv_cache_block_type="max"}}': "100+0xN",
    }


def triton_gpu(utilization: float = 0.5, used: float = 12) -> dict[str, str]:
    labels = 'job="trtqwen-triton",instance="a:8002",gpu_uuid="GPU-1"'
    return {
        f"nv_gpu_utilization{{{labels}}}": f"{utilization}+0xN",
        f"nv_gpu_memory_used_bytes{{{labels}}}": f"{used}+0xN",
        f"nv_gpu_memory_total_bytes{{{labels}}}": "24+0xN",
    }


def dcgm_gpu(utilization: float = 50, used: float = 12) -> dict[str, str]:
    labels = 'job="trtqwen-dcgm",instance="a:9400",gpu="0",UUID="GPU-1"'
    return {
        f"DCGM_FI_DEV_GPU_UTIL{{{labels}}}": f"{utilization}+0xN",
        f"DCGM_FI_DEV_FB_USED{{{labels}}}": f"{used}+0xN",
        f"DCGM_FI_DEV_FB_FREE{{{labels}}}": f"{24 - used}+0xN",
    }


def memory(values: str) -> dict[str, str]:
    return gauge("resident_memory_bytes", values)


HERE, ENGINE, GPU = {"instance": "a:8080"}, {"instance": "a:8002"}, {"gpu": "GPU-1"}
JOB = {"job": "trtqwen-gateway"}
SLOW = {"1": 0, "2": 0, "5": 10, "+Inf": 10}
QUICK = {"1": 990, "2": 999, "5": 1000, "+Inf": 1000}
CASES = [
    Case("TrtqwenTargetDown", {f"up{{{GATEWAY}}}": "1+0x4 0+0xN"}, HERE | JOB, "1m45s"),
    Case("TrtqwenTargetDown", {f"up{{{GATEWAY}}}": "1+0xN", 'up{job="node",instance="b"}': "0+0xN"}, None),
    Case("TrtqwenEngineNotReady", gauge("ready", "1+0x4 0+0xN"), HERE | JOB, "1m45s"),
    Case("TrtqwenEngineNotReady", gauge("ready", "1 0 0 1 0 0 1+0xN"), None),
    Case("TrtqwenModelDown", model_up("0+0xN") | gauge("ready", 1), HERE | JOB | {"model": "qwen"}),
    Case("TrtqwenModelDown", model_up("0+0xN") | gauge("ready", 0), None),  # the whole gateway is down
    Case("TrtqwenModelDown", model_up("1+0xN") | gauge("ready", 1), None),
    Case(
        "TrtqwenReplicaDown",
        {f'trtqwen_gateway_replica_up{{{GATEWAY},replica="a:8001"}}': "0+0xN"},
        {"replica": "a:8001"},
    ),
    Case(  # two gateways, and one of them reaches it
        "TrtqwenReplicaDown",
        {
            f'trtqwen_gateway_replica_up{{{GATEWAY},replica="a:8001"}}': "0+0xN",
            'trtqwen_gateway_replica_up{job="trtqwen-gateway",instance="b:8080",replica="a:8001"}': "1+0xN",
        },
        None,
    ),
    Case("TrtqwenEngineStalled", engine(active=3, steps=0), ENGINE),
    Case("TrtqwenEngineStalled", engine(active=3, steps=1), None),
    Case("TrtqwenEngineStalled", engine(active=0, steps=0), None),
    Case("TrtqwenLatencyP99High", histogram("request_seconds", SLOW), {}, "5m", "6m"),
    Case("TrtqwenLatencyP99High", histogram("request_seconds", QUICK), None),
    Case("TrtqwenLatencyP99High", histogram("request_seconds", {"2": 980, "5": 1000, "+Inf": 1000}), {}, "5m", "6m"),
    Case("TrtqwenFirstTokenP99High", histogram("time_to_first_token_seconds", SLOW), {}, "5m", "6m"),
    Case("TrtqwenFirstTokenP99High", histogram("time_to_first_token_seconds", QUICK), None),
    Case("TrtqwenLatencyMeanHigh", histogram("request_seconds", {"5": 10, "+Inf": 10}, total=31), {}),
    Case("TrtqwenLatencyMeanHigh", histogram("request_seconds", {"5": 10, "+Inf": 10}, total=29), None),
    Case("TrtqwenLatencyMeanHigh", histogram("request_seconds", {"5": 0, "+Inf": 0}), None),  # no requests
    Case("TrtqwenGpuUtilizationHigh", triton_gpu(utilization=0.81), GPU),
    Case("TrtqwenGpuUtilizationHigh", dcgm_gpu(utilization=81), GPU),
    Case("TrtqwenGpuUtilizationHigh", {**triton_gpu(utilization=0.79), **dcgm_gpu(utilization=79)}, None),
    Case("TrtqwenKvCacheReserveLow", engine(free_blocks=9), ENGINE),
    Case("TrtqwenKvCacheReserveLow", engine(free_blocks=11), None),
    Case("TrtqwenGpuMemoryReserveLow", triton_gpu(used=22), GPU),
    Case("TrtqwenGpuMemoryReserveLow", dcgm_gpu(used=22), GPU),
    Case("TrtqwenGpuMemoryReserveLow", triton_gpu(used=22) | engine(free_blocks=9), GPU),
    Case("TrtqwenGpuMemoryReserveLow", triton_gpu(used=22) | engine(free_blocks=11), None),  # its memory is the cache
    Case("TrtqwenGpuMemoryReserveLow", triton_gpu(used=21) | engine(free_blocks=9), None),
    Case(
        "TrtqwenHostMemoryReserveLow",
        {f"nv_cpu_memory_used_bytes{{{TRITON}}}": "95+0xN", f"nv_cpu_memory_total_bytes{{{TRITON}}}": "100+0xN"},
        ENGINE,
    ),
    Case(
        "TrtqwenHostMemoryReserveLow",
        {f"nv_cpu_memory_used_bytes{{{TRITON}}}": "85+0xN", f"nv_cpu_memory_total_bytes{{{TRITON}}}": "100+0xN"},
        None,
    ),
    Case("TrtqwenQueueAgeHigh", gauge("queue_since_timestamp_seconds", 1), {}, "30s"),
    Case("TrtqwenQueueAgeHigh", gauge("queue_since_timestamp_seconds", "6+15xN"), None),
    Case("TrtqwenQueueAgeHigh", gauge("queue_since_timestamp_seconds", 0), None),  # nobody waits
    Case("TrtqwenErrorRateHigh", requests(90, s500=4, s503=6), {}),
    Case("TrtqwenErrorRateHigh", requests(90, s400=50, s429=50, s500=1), None),
    Case("TrtqwenErrorRateHigh", requests(0), None),
    Case("TrtqwenRefusalRateHigh", requests(85, s429=15), {}, "5m", "7m"),
    Case("TrtqwenRefusalRateHigh", requests(95, s429=5, s400=100), None),
    Case("TrtqwenNanGuard", gauge("nan_guard_total", "0+0x4 1+0xN"), HERE | JOB, "1m"),
    Case("TrtqwenNanGuard", gauge("nan_guard_total", "1+0xN"), None),
    Case(
        "TrtqwenMemoryLeak",
        memory("200000000+500000xN"),  # 120 MB an hour
        HERE | {"part": "gateway"},
        "55m",
        "65m",
    ),
    Case(
        "TrtqwenMemoryLeak",
        {f'nv_trt_llm_runtime_memory_metrics{{{TRITON},memory_type="cpu"}}': "2000000000+500000xN"},
        ENGINE | {"part": "engine"},
        "55m",
        "65m",
    ),
    Case("TrtqwenMemoryLeak", memory("200000000+300000xN"), None, at="65m"),
    Case("TrtqwenMemoryLeak", memory("200000000+50000000x40 2200000000+0xN"), None, at="75m"),  # it only starts
]


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("monitoring")
    for name, text in monitoring_files(Monitoring()).items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return directory


def expectation(case: Case, time: str, severity: str) -> dict[str, object]:
    query = f'ALERTS{{alertname="{case.alert}",alertstate="firing"}}'
    expected: dict[str, object] = {"expr": query, "eval_time": time}
    if case.labels is not None and time == case.at:
        labels = {"alertname": case.alert, "alertstate": "firing", "severity": severity, **case.labels}
        text = ",".join(f'{name}="{value}"' for name, value in labels.items())
        expected["exp_samples"] = [{"labels": f"ALERTS{{{text}}}", "value": 1}]
    return expected


def promtool_test(cases: list[Case]) -> dict[str, object]:
    severities = {alert.name: alert.severity for alert in alerts(Thresholds())}
    return {
        "rule_files": ["rules/trtqwen-recordings.yml", "rules/trtqwen-alerts.yml"],
        "evaluation_interval": "15s",
        "tests": [
            {
                "interval": "15s",
                "input_series": [
                    {"series": name, "values": values.replace("N", str(STEPS))}
                    for name, values in case.series.items()
                ],
                "promql_expr_test": [
                    expectation(case, time, severities[case.alert]) for time in (case.before, case.at)
                ],
            }
            for case in cases
        ],
    }


def run_promtool(rules: Path, cases: list[Case]) -> subprocess.CompletedProcess[str]:
    path = rules / "test.yml"
    path.write_text(yaml.safe_dump(promtool_test(cases)))
    command = [program("promtool", "prometheus"), "test", "rules", str(path)]
    return subprocess.run(command, capture_output=True, text=True)


def test_every_alert_fires_when_it_should_and_only_then(rules: Path) -> None:
    names = {alert.name for alert in alerts(Thresholds())}
    assert {case.alert for case in CASES if case.labels is not None} == names
    assert {case.alert for case in CASES if case.labels is None} == names
    result = run_promtool(rules, CASES)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_test_of_an_alert_can_fail(rules: Path) -> None:
    late = replace(CASES[0], at=CASES[0].before)
    result = run_promtool(rules, [late])
    assert result.returncode == 1
    assert "TrtqwenTargetDown" in result.stdout + result.stderr


def test_promtool_accepts_the_configuration(rules: Path) -> None:
    command = [program("promtool", "prometheus"), "check", "config", "--lint=all", "--lint-fatal"]
    result = subprocess.run([*command, str(rules / "prometheus.yml")], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_recording_uses_only_those_before_it() -> None:
    known: set[str] = set()
    for rule in recordings():
        used = {
            word for word in rule.query.replace("(", " ").replace("[", " ").split() if word.startswith("trtqwen:")
        }
        assert {word.rstrip("),") for word in used} <= known, rule.name
        assert rule.name not in known
        known.add(rule.name)


def test_thresholds_change_by_name() -> None:
    changed = Thresholds().changed(["latency_p99_seconds=5", "memory_reserve=0.05"])
    assert (changed.latency_p99_seconds, changed.memory_reserve) == (5, 0.05)
    assert "> 5" in next(alert.query for alert in alerts(changed) if alert.name == "TrtqwenLatencyP99High")
    for wrong in ("latency=5", "error_ratio=many", "error_ratio=-1", "error_ratio", "error_ratio=inf"):
        with pytest.raises(InputError, match="--threshold"):
            Thresholds().changed([wrong])


def test_the_documentation_explains_every_alert_and_threshold() -> None:
    text = (Path(__file__).parents[2] / "docs" / "monitoring.md").read_text(encoding="utf-8")
    for alert in alerts(Thresholds()):
        assert f"\n### {alert.name}\n" in text
    for name, value in vars(Thresholds()).items():
        assert f"| `{name}` | {value:.15g} |" in text
