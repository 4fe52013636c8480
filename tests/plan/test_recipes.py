"""The figures in the comments of the bundled recipes: each is worked out again, and no other may stand there."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from trtqwen.plan.plan import Plan, plan_recipe
from trtqwen.plan.speed import Rate
from trtqwen.recipe import CHECKOUT, load_recipe, recipe_names

# What a comment may name beside figures that are worked out: names of things, and published losses.
NAMES = (
    r"\b(Qwen2(\.5)?|R1|\d+(\.\d+)?[bB]|TP\d|PP\d|RTX|4090D?|INT8|W8A8|W8A16|float\d\d|bfloat16|sm80"
    r"|FP16|bf16|fp16)\b"
)
RECIPE_NAMES = r"\bqwen2[\w.]*(-[\w.]+)+"
FIELDS = r"\w+\.\w+: \d+(\.\d+)?"
FACTS = (
    "131,072 tokens",  # what the recipe is for
    "24 GB cards",
    "0.4 points of the OpenLLM average, MMLU up to 1.4",  # published, Qwen2-7B
    "99.4 % of Hellaswag",  # published, Qwen2.5-7B-Instruct
    "65 GB of weights",  # checked below
    "in 16 bit",
    "16-bit",
    "2 KV heads",
    "4 KV heads",
)

# Recipes of the embedded engine on GPUs quote measurements instead, and no 4090D is in their names.
ESTIMATED = [name for name in recipe_names() if "-torch-" not in name]


def comment(name: str) -> str:
    """All comments of a recipe, joined."""
    text = (CHECKOUT / f"{name}.yaml").read_text(encoding="utf-8")
    return " ".join(match.group(1) for match in re.finditer(r"(?:^|\s)#\s*(.*)", text))


def sentences(plan: Plan) -> Iterator[str]:
    """What a recipe has to say about itself."""
    each = " in each replica" if plan.recipe.serve.replicas > 1 else ""
    full = plan.concurrency[-1]
    weights = plan.tightest.weights.total
    size = f"{weights / 2**30:.2f} GiB" if plan.speed else f"{weights / 2**20:.1f} MiB"
    yield f"Costs {size} of weights per {'card' if plan.speed else 'rank'}."
    typical = f", {plan.concurrency[0].sequences} of {plan.concurrency[0].tokens:,}" if plan.speed else ""
    room = f"{full.sequences} requests of {full.tokens:,} tokens at once{typical}."
    yield f"The KV cache holds {plan.kv_tokens:,} tokens{each}: {room}"
    if plan.speed is not None:
        one, *others = plan.layouts
        total = one.replicas * one.world_size
        cards = f"{total} {'card' if total == 1 else 'cards'}"
        bounds = f"{one.one_stream.bound:,.0f} tokens/s for one stream and {one.throughput.bound:,.0f} from {cards}"
        likely = f"{likely_rate(one.one_stream)} and {likely_rate(one.throughput)}"
        yield f"At most {bounds} with {one.load} requests in flight; likely {likely}."
        if full.tokens > 32768:
            low, _, high = plan.speed.prompt.seconds.forecast
            yield f"Reading a prompt of {full.tokens:,} tokens is likely to take {low:,.0f} to {high:,.0f} s."
        if any(finding.code == "layout" for finding in plan.findings):
            best = max(others, key=lambda layout: layout.throughput.forecast.low)
            rates = f"{likely_rate(best.one_stream)}, and {likely_rate(best.throughput)} with {best.load}"
            yield f"{best.name} is likely to give {rates}."


def likely_rate(rate: Rate) -> str:
    return f"{rate.forecast.low:,.0f} to {rate.forecast.high:,.0f}"


@pytest.mark.parametrize("name", ESTIMATED)
def test_the_comment_quotes_the_plan_and_nothing_else(name: str) -> None:
    text = comment(name)
    assert (CHECKOUT / f"{name}.yaml").read_text(encoding="utf-8").startswith("# ")
    for sentence in sentences(plan_recipe(load_recipe(name))):
        assert sentence in text, f"{name}: the comment lacks: {sentence}"
        text = text.replace(sentence, "")
    for fact in FACTS:
        text = text.replace(fact, "")
    for known in (RECIPE_NAMES, FIELDS, NAMES):
        text = re.sub(known, "", text)
    assert not re.search(r"\d", text), f"figures that nobody works out: {text}"


@pytest.mark.parametrize("name", ESTIMATED)
def test_the_name_says_what_the_recipe_is(name: str) -> None:
    recipe = load_recipe(name)
    settings = recipe.checkpoint
    if recipe.host is None:
        assert name.startswith("qwen2-tiny-")
        return
    precision = {
        "none": {"bfloat16": "bf16", "float16": "fp16"}.get(settings.dtype),
        "int8_wo": "int8-wo",
        "int8_sq": "int8-sq",
    }
    copies = f"x{recipe.serve.replicas}" if recipe.serve.replicas > 1 else ""
    context = f"-{recipe.engine.max_seq_len // 1000}k" if recipe.engine.max_seq_len != 32768 else ""
    assert name == f"{recipe.model}-{precision[settings.quant]}-tp{settings.tp_size}{copies}{context}-4090d"
    assert (recipe.host.card, recipe.host.gpus) == ("rtx-4090d", recipe.world_size * recipe.serve.replicas)
    assert recipe.engine.workers == settings.tp_size
    assert recipe.serve.enable_context_fmha_fp32_acc == (settings.dtype == "float16")
    assert settings.int8_layout == ("sm80" if settings.quant == "int8_wo" else "plain")


def test_every_precision_comes_as_tp4_and_as_replicas() -> None:
    for precision in ("fp16", "bf16", "int8-wo", "int8-sq"):
        for layout in ("tp4", "tp1x4"):
            assert f"qwen2.5-7b-{precision}-{layout}-4090d" in recipe_names()


def test_what_the_32b_recipe_says_of_bfloat16() -> None:
    """Less than half the KV tokens, three fifths of the speed of one stream, 65 GB of weights."""
    recipe = load_recipe("qwen2.5-32b-int8-wo-tp4-4090d")
    changes = {"quant": "none", "int8_layout": "plain"}
    plain = recipe.model_copy(update={"checkpoint": recipe.checkpoint.model_copy(update=changes)})
    int8, bf16 = plan_recipe(recipe), plan_recipe(plain)
    assert bf16.kv_tokens < int8.kv_tokens / 2
    for wide, narrow in zip(bf16.layouts[0].one_stream.forecast, int8.layouts[0].one_stream.forecast, strict=True):
        ratio = wide / narrow
        assert ratio == pytest.approx(3 / 5, abs=0.1)
    assert 4 * bf16.memory[0].weights.total / 1e9 == pytest.approx(65, rel=0.02)
