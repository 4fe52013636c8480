"""Warnings about a recipe: each with its numbers and a hint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from trtqwen.checkpoint.config import Dtype
from trtqwen.diagnostics import Diagnostic, InputError, Level
from trtqwen.engine.gates import advisory_problem
from trtqwen.engine.limits import context_words, longer_context, needed_factor
from trtqwen.facts.releases import newest_image
from trtqwen.hf.config import HfConfig
from trtqwen.hf.known import known_config
from trtqwen.hf.source import HfModel
from trtqwen.plan.layouts import Layout
from trtqwen.plan.memory import GIB, RankMemory, buffer_bytes, concurrency
from trtqwen.quantize.outliers import check_int8_kv_cache
from trtqwen.recipe import Recipe

_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "tie_word_embeddings",
)
_MOST_TOKENS_A_STEP = 16384  # trtllm-build warns above; NVIDIA saw no gain from 8192 on
_MOST_BUFFERS = 0.1  # share of the card
_WORTH_SHARDING = 0.05  # share of the KV cache
_CLEARLY_FASTER = 1.05


def find(
    recipe: Recipe,
    config: HfConfig,
    dtype: Dtype,
    memory: tuple[RankMemory, ...],
    layouts: tuple[Layout, ...],
    model: Path | None,
) -> tuple[Diagnostic, ...]:
    """Find the errors, warnings and notes of a recipe, errors first.

    Args:
        config: as converted, stretched by YaRN if the recipe asks for it.
        layouts: empty without a host.
        model: the directory that `config` is from, if it is from one.
    """
    found = [
        *_capacity(recipe, memory, layouts),
        *_context(recipe, config),
        *_sizes(recipe, config, model),
        *_int8_kv_cache(recipe, model),
    ]
    if recipe.host is not None:
        found += [
            *_float16(recipe, config, dtype),
            *_step(recipe, config, memory),
            *_cards(recipe),
            *_faster_layout(recipe, layouts),
            *_embedding(recipe, memory),
            *_advisories(recipe),
        ]
    return by_level(found)


def _advisories(recipe: Recipe) -> Iterator[Diagnostic]:
    if recipe.engine.backend != "tensorrt_llm":
        return
    with suppress(KeyError):  # a release without images
        if problem := advisory_problem(newest_image(recipe.checkpoint.release)):
            yield problem


def by_level(findings: Iterable[Diagnostic]) -> tuple[Diagnostic, ...]:
    """Errors first, notes last."""
    levels: tuple[Level, ...] = ("error", "warning", "note")
    return tuple(sorted(findings, key=lambda finding: levels.index(finding.level)))


def _capacity(recipe: Recipe, memory: tuple[RankMemory, ...], layouts: tuple[Layout, ...]) -> Iterator[Diagnostic]:
    engine, blocks = recipe.engine, memory[0].kv_blocks
    tokens, limit = blocks * engine.tokens_per_block, recipe.serve.max_tokens_in_paged_kv_cache
    capped = limit is not None and limit // engine.tokens_per_block == blocks
    full = concurrency(recipe, blocks, engine.max_seq_len)
    tightest = min(memory, key=lambda rank: rank.unused)
    if tightest.card is not None and tightest.taken >= tightest.card:
        hint = f"take {' or '.join(layout.name for layout in layouts)}, which fits"
        if not layouts:
            hint = "raise checkpoint.tp_size, take INT8 weights, or lower engine.max_num_tokens and max_batch_size"
        yield Diagnostic(
            f"weights {_gib(tightest.weights.total)}, activations {_gib(tightest.activations)}, buffers "
            f"{_gib(tightest.buffers)} and context {_gib(tightest.context)} need more than the card's "
            f"{_gib(tightest.card)}",
            hint,
            "error",
            "memory",
        )
    elif full.by_blocks == 0:
        more = "serve.max_tokens_in_paged_kv_cache" if capped else "checkpoint.tp_size, or take INT8 weights"
        shorter = f"lower engine.max_seq_len to {tokens}, or " if tokens else ""
        yield Diagnostic(
            f"the KV cache holds {tokens:,} tokens, less than one request of engine.max_seq_len "
            f"{engine.max_seq_len:,}",
            f"{shorter}raise {more}",
            "error",
            "kv-cache",
        )
    elif full.by_blocks == 1:
        waits = "requests that do not limit their answer run one after another"
        if recipe.serve.batch_scheduler_policy == "max_utilization":
            waits = "long requests pause each other"
        yield Diagnostic(
            f"only one request of engine.max_seq_len {engine.max_seq_len:,} tokens fits the KV cache of {tokens:,}: "
            f"{waits}, serving will be sequential",
            f"lower engine.max_seq_len to {tokens // 2} or less, or make room; have clients send max_tokens",
            "warning",
            "sequential",
        )
    elif full.sequences == 1:
        yield Diagnostic(
            f"engine.max_batch_size 1 lets one request run at a time, where the KV cache holds {full.by_blocks}",
            "raise engine.max_batch_size",
            "warning",
            "sequential",
        )


def _context(recipe: Recipe, config: HfConfig) -> Iterator[Diagnostic]:
    length, factor = recipe.engine.max_seq_len, recipe.checkpoint.yarn_factor
    needed = needed_factor(recipe, config)
    if length > config.context:
        yield Diagnostic(
            f"engine.max_seq_len {length:,} exceeds {context_words(config)}; the build refuses it",
            longer_context(recipe, config),
            "error",
            "context",
        )
    elif factor is not None and needed < factor:
        smallest = f"checkpoint.yarn_factor: {needed}.0" if needed > 1 else "no checkpoint.yarn_factor"
        yield Diagnostic(
            f"checkpoint.yarn_factor {factor:g} stretches more than engine.max_seq_len {length:,} needs, and a "
            "stretch costs quality on short prompts",
            f"{smallest} is enough",
            "note",
            "yarn",
        )


def _sizes(recipe: Recipe, config: HfConfig, model: Path | None) -> Iterator[Diagnostic]:
    if model is None or recipe.model is None:
        return
    expected = known_config(recipe.model)
    differ = [
        f"{name} {getattr(config, name)} instead of {getattr(expected, name)}"
        for name in _SIZES
        if getattr(config, name) != getattr(expected, name)
    ]
    if differ:
        yield Diagnostic(
            f"{model} is not the recipe's {recipe.model}: {', '.join(differ)}; the plan is for {model}",
            "name the right directory, or change the recipe's model",
            "warning",
            "model",
        )


def _int8_kv_cache(recipe: Recipe, model: Path | None) -> Iterator[Diagnostic]:
    if recipe.checkpoint.kv_cache != "int8":
        return
    if model is not None:
        try:
            check_int8_kv_cache(HfModel(model))
        except InputError as problem:
            message, hint = problem.what, problem.hint
            yield Diagnostic(message, hint, "warning", "int8-kv")
    elif recipe.model and recipe.model.startswith("qwen2.5-"):
        yield Diagnostic(
            "an INT8 KV cache ruins Qwen2.5: k_proj biases of 7B have norms of 605 and 921 in the first and last "
            "layer, 22 elsewhere, and TensorRT-LLM has one scale a layer for all of it",
            "leave checkpoint.kv_cache auto, or have the files checked with --model",
            "warning",
            "int8-kv",
        )


def _float16(recipe: Recipe, config: HfConfig, dtype: Dtype) -> Iterator[Diagnostic]:
    if dtype != "float16" or config.torch_dtype != "bfloat16":
        return
    guard = ""
    if not recipe.serve.enable_context_fmha_fp32_acc:
        guard = ", especially since attention accumulates in float16 here"
    yield Diagnostic(
        "the model was trained in bfloat16, and some activations exceed float16's 65,504: answers can turn into "
        f"'!!!!'{guard}",
        "checkpoint.dtype: bfloat16 costs nothing on these cards"
        + ("; if float16 must be, set serve.enable_context_fmha_fp32_acc: true" if guard else ""),
        "warning",
        "float16",
    )


def _step(recipe: Recipe, config: HfConfig, memory: tuple[RankMemory, ...]) -> Iterator[Diagnostic]:
    engine, last = recipe.engine, memory[-1]
    assert last.card is not None
    if engine.max_num_tokens > _MOST_TOKENS_A_STEP:
        hint = "lower it to 8192; chunked context spreads longer prompts over steps"
        if not recipe.serve.enable_chunked_context:
            hint = "lower it with engine.max_seq_len: without chunked context a step takes whole prompts"
        yield Diagnostic(
            f"engine.max_num_tokens {engine.max_num_tokens:,} takes {_gib(last.activations)} of activations; "
            f"trtllm-build warns above {_MOST_TOKENS_A_STEP:,}, and NVIDIA measured no gain beyond 8,192",
            hint,
            "warning",
            "max-num-tokens",
        )
    if last.buffers > _MOST_BUFFERS * last.card:
        smaller: dict[str, int] = {"max_batch_size": engine.max_batch_size // 2}
        hint = "half the engine.max_batch_size"
        if engine.gather_context_logits:
            smaller, hint = {"gather_context_logits": False}, "engine.gather_context_logits: false"
        less = buffer_bytes(
            recipe.model_copy(update={"engine": engine.model_copy(update=smaller)}), config, last=True
        )
        yield Diagnostic(
            f"logits and decoder take {_gib(last.buffers)} of each card: engine.max_batch_size "
            f"{engine.max_batch_size:,} times {config.vocab_size:,} words",
            f"{hint} takes {_gib(less)}",
            "warning",
            "logits",
        )


def _cards(recipe: Recipe) -> Iterator[Diagnostic]:
    assert recipe.host is not None
    used, replicas = recipe.world_size * recipe.serve.replicas, recipe.host.gpus // recipe.world_size
    if used < recipe.host.gpus:
        more = replicas > recipe.serve.replicas
        yield Diagnostic(
            f"{used} of the host's {recipe.host.gpus} cards are used",
            _replicate(recipe, replicas) if more else "raise checkpoint.tp_size, or give the rest other work",
            "warning",
            "idle-cards",
        )


def _replicate(recipe: Recipe, replicas: int) -> str:
    """Return the hint for this many replicas; a repository of the embedded engine has one."""
    if recipe.engine.backend == "torch":
        return f"start {replicas} servers, each on cards of its own, and list them at `trtqwen gateway`"
    return f"set serve.replicas: {replicas}"


def _layout_words(recipe: Recipe, sizes: str, replicas: int) -> str:
    if recipe.engine.backend == "torch":
        return f"{sizes}, {_replicate(recipe, replicas)}"
    return f"{sizes} and serve.replicas: {replicas}"


def _faster_layout(recipe: Recipe, layouts: tuple[Layout, ...]) -> Iterator[Diagnostic]:
    assert recipe.host is not None
    own = (recipe.checkpoint.tp_size, recipe.checkpoint.pp_size)
    mine = next((layout for layout in layouts if (layout.tp_size, layout.pp_size) == own), None)
    if mine is None or mine.replicas < recipe.host.gpus // mine.world_size:  # `_cards` has a word on that
        return
    smaller = [layout for layout in layouts if layout.world_size < mine.world_size]
    others = [layout for layout in smaller if layout.full_length >= min(2, mine.full_length)]
    best = max(others, key=lambda layout: min(_ratios(layout, mine)), default=mine)
    low, high = sorted(_ratios(best, mine))
    if low < _CLEARLY_FASTER:
        return
    merits = ["the latency of one stream"] if mine.one_stream.forecast.high > best.one_stream.forecast.high else []
    if mine.replicas * mine.full_length > best.replicas * best.full_length:
        merits.append("many long requests")
    sizes = f"set checkpoint.tp_size: {best.tp_size}{', pp_size: 1' * (mine.pp_size > 1)}"
    keep = f"; {mine.name} is for {' and '.join(merits)}" if merits else ""
    yield Diagnostic(
        f"{best.name} is likely to give {low:.1f} to {high:.1f} times the throughput of {mine.name}, with "
        f"{best.load} requests in flight instead of {mine.load}; one stream alone runs at about "
        f"{best.one_stream.forecast.typical:,.0f} tokens/s there, at {mine.one_stream.forecast.typical:,.0f} here",
        f"{_layout_words(recipe, sizes, best.replicas)}{keep}",
        "warning",
        "layout",
    )


def _embedding(recipe: Recipe, memory: tuple[RankMemory, ...]) -> Iterator[Diagnostic]:
    settings, first = recipe.checkpoint, memory[0]
    if settings.tp_size == 1 or settings.embedding_sharding != "none" or not first.kv_pool:
        return
    saved = first.weights.embedding * (settings.tp_size - 1) // settings.tp_size
    gain = saved * recipe.serve.kv_cache_free_gpu_mem_fraction / first.kv_pool
    if gain >= _WORTH_SHARDING:
        yield Diagnostic(
            f"each rank holds the whole embedding, {_gib(first.weights.embedding)}",
            f"checkpoint.embedding_sharding: vocab makes the KV cache {gain:.0%} larger, for one all-reduce a step",
            "note",
            "embedding",
        )


def _ratios(layout: Layout, by: Layout) -> tuple[float, float]:
    """With the slow link and with the fast one; what measured points reach is the same for both layouts."""
    one, other = layout.throughput.forecast, by.throughput.forecast
    return one.low / other.low, one.high / other.high


def _gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.2f} GiB"
