"""The state of a service as text for a terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from trtqwen.deploy.top import Glance

_BAR = 12  # characters
_UUID = 12  # characters of a GPU's UUID
_BUSY, _FULL = 0.8, 0.95  # shares from which a bar is yellow, red


def show_glance(glance: Glance) -> RenderableType:
    """Tables of the service, its replicas, engines and GPUs."""
    state = Text("ready", "bold green") if glance.ready else Text("not ready", "bold red")
    head = Text.assemble(
        state,
        f"   in flight {glance.in_flight:.0f}   waiting {glance.queued:.0f}",
        f" (oldest {glance.queue_age:.1f} s)" if glance.queued else "",
        f"   over {glance.seconds:.0f} s",
    )
    rates = Text.assemble(
        f"requests/s {_number(glance.requests)}   prompt tokens/s {_number(glance.prompt_tokens)}   output tokens/s ",
        (_number(glance.output_tokens), "bold"),
        "   refused/s ",
        (_number(glance.refusals), "yellow" if glance.refusals else ""),
        "   errors/s ",
        (_number(glance.errors), "bold red" if glance.errors else ""),
    )
    parts: list[RenderableType] = [head, rates, "", _latencies(glance)]
    if glance.replicas:
        parts += ["", _replicas(glance)]
    if glance.engines:
        parts += ["", _engines(glance)]
    if glance.gpus:
        parts += ["", _gpus(glance)]
    parts += [Text(f"no answer from {url}", "red") for url in glance.silent]
    return Group(*parts)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
    return table


def _latencies(glance: Glance) -> Table:
    table = _table("latency", "P50", "P95", "P99")
    for name, values in glance.latencies.items():
        table.add_row(name, *(_seconds(value) for value in values.values()))
    return table


def _replicas(glance: Glance) -> Table:
    table = _table("replica", "state", "in flight", "tokens")
    for row in glance.replicas:
        state = Text("up", "green") if row.up else Text("down", "bold red")
        table.add_row(row.name, state, f"{row.in_flight:.0f}", f"{row.tokens:.0f}")
    return table


def _engines(glance: Glance) -> Table:
    table = _table("engine", "batch", "waiting", "steps/s", "KV cache", "host memory")
    for row in glance.engines:
        memory = Text("-") if row.host_memory is None else _bar(row.host_memory)
        batch = f"{row.scheduled:.0f} / {row.batch:.0f}"
        table.add_row(row.name, batch, f"{row.waiting:.0f}", _number(row.steps), _bar(row.kv_cache), memory)
    return table


def _gpus(glance: Glance) -> Table:
    table = _table("GPU", "utilization", "memory", "watts")
    for row in glance.gpus:
        table.add_row(row.name[:_UUID], _bar(row.utilization), _bar(row.memory), _number(row.watts))
    return table


def _bar(share: float) -> Text:
    filled = round(max(0.0, min(1.0, share)) * _BAR)
    color = "red" if share >= _FULL else "yellow" if share >= _BUSY else "green"
    return Text.assemble(("━" * filled, color), ("━" * (_BAR - filled), "dim"), f" {share:4.0%}")


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value * 1000:.1f} ms" if value < 1 else f"{value:.2f} s"
