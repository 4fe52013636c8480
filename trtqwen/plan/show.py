"""Output of a plan: the card's memory as a bar, tables, warnings and the command."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from itertools import accumulate, pairwise

from rich.console import Console
from rich.table import Table
from rich.text import Text

from trtqwen.diagnostics import Level
from trtqwen.facts.cards import card_facts
from trtqwen.plan.assumptions import Share, assumptions
from trtqwen.plan.measured import measured, shares
from trtqwen.plan.memory import GIB, RankMemory
from trtqwen.plan.plan import Plan, Speed
from trtqwen.plan.speed import Forecast, Rate
from trtqwen.recipe import Recipe

# Name, color, and what replaces the color in plain output.
_PARTS = (
    ("context", "bright_black", "▞"),
    ("weights", "blue", "█"),
    ("activations", "magenta", "▓"),
    ("logits", "yellow", "▒"),
    ("KV cache", "green", "░"),
    ("free", "", "·"),
)
_STYLES: dict[Level, str] = {"error": "bold red", "warning": "yellow", "note": "cyan"}
_WIDEST = 100


def print_plan(plan: Plan, console: Console) -> None:
    """The whole plan of one recipe."""
    verdict = ("fits", "bold green") if plan.fits else ("does not fit", "bold red")
    console.print(Text.assemble((plan.recipe.name, "bold"), "  ", verdict))
    console.print(Text(_subject(plan), style="dim"))
    for part in _parts(plan, console):
        console.print()
        console.print(part)
    console.print()
    _findings(plan, console)
    console.print(Text(_assumed(plan), style="dim"), soft_wrap=not console.is_terminal)
    if plan.command:
        console.print()
        console.print(Text(shell(plan.command)), soft_wrap=True)


def print_comparison(plans: tuple[Plan, Plan], console: Console) -> None:
    """Print two recipes side by side, then the warnings of each."""
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for plan in plans:
        table.add_column(plan.recipe.name, justify="right", overflow="fold")
    columns = [_figures(plan) for plan in plans]
    for name in columns[0] | columns[1]:
        table.add_row(name, *(column.get(name, "-") for column in columns))
    console.print(table)
    console.print()
    for plan in plans:
        _findings(plan, console, name=f"{plan.recipe.name}: ")


def shell(command: tuple[str, ...]) -> str:
    """Format a command with one option per line."""
    return " \\\n    ".join(map(shlex.quote, command))


def layout_name(recipe: Recipe) -> str:
    """`TP4 x 1`: ranks of an engine, and replicas of it."""
    stages = f" PP{recipe.checkpoint.pp_size}" if recipe.checkpoint.pp_size > 1 else ""
    return f"TP{recipe.checkpoint.tp_size}{stages} x {recipe.serve.replicas}"


def precision_name(recipe: Recipe) -> str:
    """Such as `bfloat16`, or `int8_sq (bfloat16)`."""
    settings = recipe.checkpoint
    name = settings.dtype if settings.quant == "none" else f"{settings.quant} ({settings.dtype})"
    return name if settings.kv_cache == "auto" else f"{name}, int8 KV"


def _subject(plan: Plan) -> str:
    recipe, host = plan.recipe, plan.recipe.host
    where = {"vllm": "vLLM, on the host", "llmapi": "the LLM API, on a card that is not named"}.get(
        recipe.engine.backend, "the embedded torch engine, on the host"
    )
    if host is not None:
        where = f"{recipe.world_size * recipe.serve.replicas} of {host.gpus} {card_facts(host.card).title}"
    return f"{plan.model}, {precision_name(recipe)}, {layout_name(recipe)} on {where}"


def _parts(plan: Plan, console: Console) -> Iterator[Text | Table]:
    for stage, rank in enumerate(plan.memory):
        which = f" of stage {stage}" if len(plan.memory) > 1 else ""
        if rank.card is None:
            weights, pool = rank.weights.total, rank.kv_pool
            yield Text(f"host memory of each rank{which}: weights {_size(weights)}, KV cache {_size(pool)}")
        else:
            yield Text(f"memory of each card{which}, {_size(rank.card)}\n") + _bar(rank, console)
    yield _requests(plan)
    if plan.speed is not None:
        yield _speed(plan.speed)
    if any(layout.name != layout_name(plan.recipe) for layout in plan.layouts):
        yield _layouts(plan)


def _bar(rank: RankMemory, console: Console) -> Text:
    """The bar and its legend, in one row where it is wide."""
    assert rank.card is not None
    plain = console.color_system is None
    sizes = [rank.context, rank.weights.total, rank.activations, rank.buffers, rank.kv_pool, max(0, rank.unused)]
    width = min(console.width, _WIDEST)
    edges = [0, *(round(width * part / sum(sizes)) for part in accumulate(sizes))]
    bar, legend = Text(), Text()
    in_row = len(_PARTS) if width == _WIDEST else len(_PARTS) // 2
    for index, ((name, colour, glyph), nbytes, ends) in enumerate(zip(_PARTS, sizes, pairwise(edges), strict=True)):
        cell = glyph if plain or not colour else "█"
        bar.append(cell * (ends[1] - ends[0]), style=colour)
        legend.append("  " if index % in_row else "\n").append(cell, style=colour)
        legend.append(f" {name} {nbytes / GIB:.2f}" if in_row == len(_PARTS) else f" {name:<11} {nbytes / GIB:5.2f}")
    if rank.unused < 0:
        legend.append(f"\nlacks {-rank.unused / GIB:.2f} GiB", style="bold red")
    return bar + legend


def _requests(plan: Plan) -> Table:
    replicas = plan.recipe.serve.replicas
    pool = f"KV cache of {plan.kv_tokens:,} tokens"
    table = _table("requests at once", "one replica", *([f"all {replicas}"] if replicas > 1 else []), "limit")
    for at_once in plan.concurrency:
        limit = pool if at_once.sequences == at_once.by_blocks else "max_batch_size"
        total = [f"{replicas * at_once.sequences:,}"] if replicas > 1 else []
        whole = " (max_seq_len)" if at_once is plan.concurrency[-1] else ""
        table.add_row(f"of {at_once.tokens:,} tokens{whole}", f"{at_once.sequences:,}", *total, limit)
    return table


def _speed(speed: Speed) -> Table:
    table = _table("one replica, tokens/s", "at most", "forecast", "time", "limit")
    for title, work in (("context, step", speed.step), ("context, prompt", speed.prompt)):
        name = f"{title} of {work.tokens:,}"
        table.add_row(name, *_both(work.rate), _seconds(work.seconds.forecast), work.step.bound)
    for point in speed.generation:
        name = f"generation, {point.sequences:,} x {point.length:,}"
        table.add_row(name, *_both(point.rate), _seconds(point.seconds.forecast), point.step.bound)
    return table


def _layouts(plan: Plan) -> Table:
    full = f"of {plan.concurrency[-1].tokens:,}"
    table = _table("layouts, tokens/s", "one stream", "at most", "forecast", "in flight", full)
    for layout in plan.layouts:
        own = layout.name == layout_name(plan.recipe)
        long = f"{layout.replicas * layout.full_length:,}"
        name = f"{layout.name} (this recipe)" if own else layout.name
        one_stream, throughput = _span(layout.one_stream.forecast), _both(layout.throughput)
        table.add_row(name, one_stream, *throughput, f"{layout.load:,}", long)
    return table


def _findings(plan: Plan, console: Console, name: str = "") -> None:
    """Print each finding, with its hint on a second line on a terminal, and on the same line elsewhere."""
    for finding in plan.findings:
        label = Text(finding.level, style=_STYLES[finding.level])
        if console.is_terminal:
            table = Table.grid(padding=(0, 2))
            table.add_row(label, Text.assemble(f"{name}{finding.what}\n", (finding.hint, "italic dim")))
            console.print(table)
        else:
            console.print(label + Text(f": {name}{finding.what}; {finding.hint}"), soft_wrap=True)
    if plan.findings:
        console.print()


def _assumed(plan: Plan) -> str:
    facts, host = assumptions(), plan.recipe.host
    if host is None:
        return (
            "The torch engine computes in float32. Without a known card, its speed and activations are not estimated."
        )
    card, request = card_facts(host.card), facts.request
    links = facts.links_of(peer_to_peer=card.peer_to_peer)
    context, generation, mix = (vars(shares())[kind] for kind in ("context", "generation", "throughput"))
    return (
        f"At most: the slowest resource alone decides, at {card.float16_tflops:g} TFLOPS (INT8 {card.int8_tops:g}, "
        f"float16 sums twice that), {card.bandwidth_gb_per_s:g} GB/s and the peak of the link. Forecast: compute and "
        f"memory overlap. An all-reduce follows at {links.slow.bus_gb_per_s:g} to {links.fast.bus_gb_per_s:g} GB/s "
        f"after {links.fast.latency_us:g} to {links.slow.latency_us:g} us (assumed). The result is multiplied by the "
        f"share that {_similar()} public measurements reach: {_percent(context)} for prompts, {_percent(generation)} "
        f"for one stream, {_percent(mix)} for mixed load. None of the measurements is of a 4090D with TensorRT-LLM. "
        f"Mixed load: prompts of {request.prompt_tokens:,} tokens with answers of {request.answer_tokens}, with as "
        f"many requests in flight as fit."
    )


def _similar() -> int:
    return sum(point.similar for point in measured().points)


def _percent(share: Share) -> str:
    return f"{share.low:.0%} to {share.high:.0%}"


def _figures(plan: Plan) -> dict[str, str]:
    """The rows of a comparison."""
    rank, recipe = plan.tightest, plan.recipe
    rows = {
        "": "fits" if plan.fits else "does not fit",
        "model": plan.model,
        "precision": precision_name(recipe),
        "layout": layout_name(recipe),
        "weights, per rank": _size(rank.weights.total),
        "activations, logits": _size(rank.activations + rank.buffers),
        "KV cache, per rank": _size(rank.kv_pool),
        "KV tokens, a replica": f"{plan.kv_tokens:,}",
    }
    for at_once in plan.concurrency:
        rows[f"requests of {at_once.tokens:,}"] = f"{recipe.serve.replicas * at_once.sequences:,}"
    if plan.speed is not None:
        rows[f"context step of {plan.speed.step.tokens:,}"] = _seconds(plan.speed.step.seconds.forecast)
        rows["one stream, at most"], rows["one stream, forecast"] = _both(plan.speed.generation[0].rate)
    own = next((layout for layout in plan.layouts if layout.name == layout_name(recipe)), None)
    if own is not None:
        rows["throughput, at most"], rows["throughput, forecast"] = _both(own.throughput)
    return rows


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="left" if name in ("limit", "bound") else "right", no_wrap=True)
    return table


def _size(nbytes: int) -> str:
    return f"{nbytes / GIB:.2f} GiB" if nbytes >= GIB / 10 else f"{nbytes / 2**20:.1f} MiB"


def _both(rate: Rate) -> tuple[str, str]:
    return f"{rate.bound:,.0f}", _span(rate.forecast)


def _span(forecast: Forecast) -> str:
    low, high = f"{forecast.low:,.0f}", f"{forecast.high:,.0f}"
    return low if low == high else f"{low}-{high}"


def _seconds(forecast: Forecast) -> str:
    scale, unit = (1000, "ms") if forecast.high < 1 else (1, "s")
    low, high = (f"{scale * seconds:.3g}" for seconds in (forecast.low, forecast.high))
    return f"{low} {unit}" if low == high else f"{low}-{high} {unit}"
