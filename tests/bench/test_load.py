"""The load generator against a server that knows when it sent what, and against a virtual clock."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.bench.conftest import Scripted
from tests.slow import slow
from trtqwen.bench import load
from trtqwen.bench.endpoint import Outcome
from trtqwen.bench.figures import Goodput, client_health, figures
from trtqwen.bench.load import Job, send_all
from trtqwen.bench.records import ClientLoad
from trtqwen.bench.run import BenchReport, LoadSettings, probe, run_bench
from trtqwen.bench.workload import Ask, Workload, with_arrivals
from trtqwen.diagnostics import InputError, ServerError


def workload(count: int, max_tokens: int, at: float | None = None, first: int = 0) -> Workload:
    asks = (Ask((first + index, *range(7)), max_tokens, None if at is None else index * at) for index in range(count))
    return Workload("scripted", tuple(asks))


class VirtualTime:
    """A clock that moves only when everybody sleeps."""

    def __init__(self) -> None:
        self.now = 100.0
        self._sleepers: list[tuple[float, int, asyncio.Event]] = []

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        woken = asyncio.Event()
        heapq.heappush(self._sleepers, (self.now + seconds, id(woken), woken))
        await woken.wait()

    async def drive(self, work: asyncio.Task[Any]) -> None:
        while not work.done():
            for _ in range(50):
                await asyncio.sleep(0)
            if self._sleepers and not work.done():
                self.now, _, woken = heapq.heappop(self._sleepers)
                woken.set()


class VirtualEndpoint:
    """Answers with `first` seconds to the first token and `gap` between the others, times the request's place."""

    def __init__(self, time: VirtualTime, first: Callable[[int], float], gap: Callable[[int], float]) -> None:
        self.time, self.first, self.gap = time, first, gap

    async def generate(self, ask: Ask, on_piece: Callable[[int], None], bias: object = None) -> Outcome:
        place = ask.token_ids[0]
        if place == 13:
            raise ServerError("refused")
        for index in range(ask.max_tokens):
            await self.time.sleep(self.gap(place) if index else self.first(place))
            on_piece(1)
        return Outcome(len(ask.token_ids), ask.max_tokens)

    async def close(self) -> None: ...


def simulate(job: Job, first: Callable[[int], float], gap: Callable[[int], float]) -> list[Any]:
    async def run() -> list[Any]:
        time = VirtualTime()
        endpoint = VirtualEndpoint(time, first, gap)
        work = asyncio.ensure_future(send_all(endpoint, job, clock=time.clock, sleep=time.sleep))
        await time.drive(work)
        return work.result()

    return asyncio.run(run())


def test_open_loop_figures_are_exact_on_a_virtual_clock() -> None:
    asks = tuple(enumerate(workload(100, 11, at=0.05).asks))
    records = simulate(Job(asks, None, 100.0), lambda place: 0.1 + place / 1000, lambda place: 0.02)
    found = figures([records], [], Goodput(time_to_first_token=150.1, inter_token_latency=20.1))
    good = [place for place in range(100) if place != 13]
    truth = np.array([100 + place for place in good])
    first, total = found.distributions["time_to_first_token"], found.distributions["request_latency"]
    for rank in (50, 95, 99):
        assert first.percentiles[rank] == pytest.approx(np.percentile(truth, rank), rel=1e-6)
        assert total.percentiles[rank] == pytest.approx(np.percentile(truth + 200, rank), rel=1e-6)
    assert found.distributions["inter_token_latency"].avg == pytest.approx(20)
    assert found.distributions["inter_chunk_latency"].max == pytest.approx(20)
    length = 99 * 0.05 + 0.199 + 0.2
    assert found.rates["benchmark_duration"].avg == pytest.approx(length)
    assert found.rates["output_token_throughput"].avg == pytest.approx(99 * 11 / length)
    assert found.rates["goodput"].avg == pytest.approx(50 / length)
    assert found.rates["success_rate"].avg == pytest.approx(0.99)
    assert found.errors == {"refused": 1}


def test_closed_loop_keeps_its_requests_open_on_a_virtual_clock() -> None:
    asks = tuple(enumerate(workload(12, 5).asks))
    records = simulate(Job(asks, 4, 100.0), lambda place: 0.2, lambda place: 0.1)
    assert [round(record.sent - 100, 6) for record in records] == [0.0] * 4 + [0.6] * 4 + [1.2] * 4
    assert figures([records], []).rates["output_token_throughput"].avg == pytest.approx(12 * 5 / 1.8)


def test_late_clients_do_not_make_the_server_fast() -> None:
    """A request that is sent late counts from the time it was due."""
    asks = tuple(enumerate(workload(3, 2, at=0.0).asks))
    [first, *_] = simulate(Job(asks, None, 99.0), lambda place: 0.1, lambda place: 0.1)
    assert first.time_to_first_token == pytest.approx(1.1)
    assert figures([[first]], []).distributions["send_lag"].avg == pytest.approx(1000)


@pytest.mark.parametrize("processes", [slow(1), 2])
def test_figures_agree_with_what_the_server_did(scripted: Callable[..., Scripted], processes: int) -> None:
    """Against a real server, whose own times are the truth.

    The way between the processes is in the client's times, not in the server's. A busy machine makes it longer.
    Then the comparison is made again, up to five times. Only wrong figures are wrong each time.
    """
    server = scripted(first=1.0, gap=0.1)
    target, about = probe(server.url, None)
    assert about["server"] == "vllm scripted"
    settings = LoadSettings(concurrency=4, processes=processes)
    for attempt in range(5):
        runs = [workload(4, 8, first=1000 * attempt + 100 * number) for number in range(3)]
        report = run_bench(target, runs, Workload("none", ()), settings)
        found, pairs = report.figures, _measured_and_true(report, runs, server)
        assert found.rates["success_rate"].avg == 1
        assert found.distributions["input_sequence_length"].avg == 8
        if all(measured == pytest.approx(true, rel=0.02) for measured, true in pairs.values()):
            return
    # A client that was late says so.
    assert found.client.bottleneck, pairs


def _measured_and_true(report: BenchReport, runs: list[Workload], server: Scripted) -> dict[str, tuple[float, float]]:
    """What the generator says, and what the server wrote down."""
    log = {entry["key"]: entry for entry in server.log}
    entries = [[log[ask.token_ids[0]] for ask in run.asks] for run in runs]
    together = [entry for run in entries for entry in run]
    first = np.array([entry["tokens"][0] - entry["arrived"] for entry in together])
    total = np.array([entry["tokens"][-1] - entry["arrived"] for entry in together])
    rates = [
        sum(len(entry["tokens"]) for entry in run)
        / (max(entry["tokens"][-1] for entry in run) - min(entry["arrived"] for entry in run))
        for run in entries
    ]
    values, found = report.figures.distributions, report.figures.rates
    return {
        "first": (values["time_to_first_token"].avg, 1000 * float(first.mean())),
        "first p50": (values["time_to_first_token"].percentiles[50], 1000 * float(np.median(first))),
        "latency": (values["request_latency"].avg, 1000 * float(total.mean())),
        "between": (values["inter_token_latency"].avg, 1000 * float((total - first).mean()) / 7),
        "rate": (found["output_token_throughput"].avg, float(np.mean(rates))),
    }


def test_errors_and_early_stops_are_counted(scripted: Callable[..., Scripted]) -> None:
    server = scripted(first=0.01, gap=0.001, fail=4, stop_at=3)
    target, _ = probe(server.url, None)
    runs = [workload(8, 12, first=100 * number) for number in range(4)]
    report = run_bench(target, runs[1:], Workload("none", ()), LoadSettings(concurrency=2))
    assert report.figures.rates["success_rate"].avg == 0.75
    assert report.figures.rates["early_stop_count"].avg == 6
    assert list(report.figures.errors.values()) == [6]
    assert "no room" in next(iter(report.figures.errors))


def test_a_client_that_cannot_keep_up_says_so(scripted: Callable[..., Scripted]) -> None:
    """A server that sends as fast as it can: one process of the generator cannot follow."""
    server = scripted(first=0.0, gap=0.0)
    target, _ = probe(server.url, None)
    runs = [workload(16, 2000, first=100 * number) for number in range(3)]
    report = run_bench(target, runs, Workload("none", ()), LoadSettings(concurrency=16))
    log = {entry["key"]: entry for entry in server.log}
    rates = []
    for run in runs:
        entries = [log[ask.token_ids[0]] for ask in run.asks]
        rates.append(
            16 * 2000 / (max(entry["tokens"][-1] for entry in entries) - min(entry["arrived"] for entry in entries))
        )
    measured = report.figures.rates["output_token_throughput"].avg
    assert report.figures.client.bottleneck or measured == pytest.approx(np.mean(rates), rel=0.02)


def test_a_clients_cpu_share_is_its_cpu_time_by_the_time_that_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = {"process_time": iter([10.0, 11.8]), "monotonic": iter([5.0, 7.0])}
    monkeypatch.setattr(
        load, "time", SimpleNamespace(**{name: partial(next, ticks) for name, ticks in clocks.items()})
    )

    async def measure() -> ClientLoad:
        return load._LagMeter().stop()

    measured = asyncio.run(measure())
    assert measured.cpu_share == pytest.approx(0.9)
    assert "90% of a processor" in str(client_health([measured], {}).bottleneck)


def test_what_makes_a_client_the_bottleneck() -> None:
    asks = tuple(enumerate(workload(10, 3, at=0.0).asks))
    records = simulate(Job(asks, None, 100.0), lambda place: 0.1, lambda place: 0.01)
    assert figures([records], [ClientLoad(0.4, [0.001] * 100)]).client.bottleneck is None
    assert "processor" in str(figures([records], [ClientLoad(0.97, [0.001] * 100)]).client.bottleneck)
    assert "late" in str(figures([records], [ClientLoad(0.4, [0.02] * 100)]).client.bottleneck)


def test_poisson_arrivals_are_drawn_beforehand() -> None:
    first, again, other = (with_arrivals(workload(4000, 1), 50, seed) for seed in (1, 1, 2))
    assert first.digest == again.digest != other.digest
    times = np.array([ask.at for ask in first.asks])
    gaps = np.diff(times)
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.05)
    assert gaps.std() == pytest.approx(1 / 50, rel=0.08)


def test_a_server_that_is_not_there_is_one_sentence() -> None:
    with pytest.raises(ServerError, match="does not answer"):
        probe("http://127.0.0.1:9", None)
    with pytest.raises(ServerError, match="no Triton server answers"):
        probe("127.0.0.1:9", None)


def test_an_address_that_serves_another_model(scripted: Callable[..., Scripted]) -> None:
    server = scripted(first=0, gap=0)
    with pytest.raises(InputError, match="serves scripted, not qwen"):
        probe(server.url, "qwen")
