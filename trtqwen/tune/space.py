"""The search space: the varied fields of a recipe, their values, and the useful combinations."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

from trtqwen.diagnostics import InputError
from trtqwen.recipe import SECTIONS, Recipe
from trtqwen.yaml_file import parse_value

LAYOUT = "layout"  # stands for checkpoint.tp_size and serve.replicas together
_BATCHES = (8, 16, 32, 64, 128, 256, 512)
_TOKENS = (512, 1024, 2048, 4096, 8192, 16384)
_BLOCKS = (16, 32, 64)
_FRACTIONS = (0.8, 0.9, 0.95)
_AROUND = 2  # values above and below the recipe's own
_FIELDS = (
    *("engine.max_batch_size", "engine.max_num_tokens", "engine.tokens_per_block"),
    *("serve.enable_chunked_context", "serve.batch_scheduler_policy", "serve.kv_cache_free_gpu_mem_fraction"),
    *("serve.enable_kv_cache_reuse", LAYOUT),
)
_MOST_DRAWS = 50  # attempts for each configuration that is wanted, before the space counts as exhausted

Space = Mapping[str, tuple[Any, ...]]


@dataclass(frozen=True)
class Configuration:
    """A recipe with some fields changed.

    Attributes:
        values: of every field of the space, by its dotted name; `layout` as `(tp_size, replicas)`.
    """

    values: tuple[tuple[str, Any], ...]

    @property
    def changes(self) -> dict[str, Any]:
        """The fields of the recipe with their values."""
        found: dict[str, Any] = {}
        for name, value in self.values:
            if name == LAYOUT:
                found["checkpoint.tp_size"], found["serve.replicas"] = value
            else:
                found[name] = value
        return found

    def apply(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """The content of a recipe file with the changes."""
        changed = {name: dict(part) if isinstance(part, dict) else part for name, part in content.items()}
        for name, value in self.changes.items():
            section, _, field = name.rpartition(".")
            changed.setdefault(section, {})[field] = value
        return changed

    def distance(self, base: Configuration) -> int:
        """How many fields differ from `base`."""
        return sum(one != other for one, other in zip(self.values, base.values, strict=True))

    def title(self, base: Configuration) -> str:
        """What differs from `base`, for tables."""
        own = dict(base.values)
        changed = [_word(name, value) for name, value in self.values if value != own[name]]
        return ", ".join(changed) or "the recipe"


def field_value(recipe: Recipe, name: str) -> Any:
    """A field of a recipe by its dotted name."""
    if name == LAYOUT:
        return recipe.checkpoint.tp_size, recipe.serve.replicas
    section, _, field = name.partition(".")
    return getattr(getattr(recipe, section), field)


def default_space(recipe: Recipe) -> dict[str, tuple[Any, ...]]:
    """Return values around the recipe's own, for every field that affects its backend and host."""
    engine, serve = recipe.engine, recipe.serve
    space: dict[str, tuple[Any, ...]] = {
        "engine.max_batch_size": _around(_BATCHES, engine.max_batch_size),
        "engine.max_num_tokens": _around(_TOKENS, engine.max_num_tokens),
        "engine.tokens_per_block": _with(_BLOCKS, engine.tokens_per_block),
        "serve.enable_kv_cache_reuse": (False, True),
    }
    if engine.max_num_tokens >= engine.max_seq_len or not serve.enable_chunked_context:
        space["serve.enable_chunked_context"] = (True, False)
    if engine.backend != "vllm":
        space["serve.batch_scheduler_policy"] = ("guaranteed_no_evict", "max_utilization")
    if recipe.host is not None:
        space["serve.kv_cache_free_gpu_mem_fraction"] = _with(_FRACTIONS, serve.kv_cache_free_gpu_mem_fraction)
        layouts = _layouts(recipe)
        if len(layouts) > 1:
            space[LAYOUT] = layouts
    return space


def parse_space(recipe: Recipe, sweeps: Sequence[str]) -> dict[str, tuple[Any, ...]]:
    """The space of `FIELD=VALUE,VALUE` texts; the recipe's own value is part of it.

    Args:
        sweeps: `engine.max_batch_size=16,32`, or `layout=TP4x1,TP1x4`.

    Raises:
        InputError: naming the text that is not one.
    """
    space: dict[str, tuple[Any, ...]] = {}
    for text in sweeps:
        name, separator, values = text.partition("=")
        name = name.strip()
        if not separator or not values.strip():
            raise InputError(
                f"--sweep {text!r} is not FIELD=VALUE,VALUE", "write it like engine.max_batch_size=16,32"
            )
        section, _, field = name.partition(".")
        known = name == LAYOUT or (section in ("engine", "serve") and field in SECTIONS[section].model_fields)
        if not known:
            raise InputError(
                f"--sweep {name}: is not a field that can be swept",
                f"name one of {', '.join(_FIELDS)}, or a field of the sections engine and serve",
            )
        parsed = tuple(_layout(part) if name == LAYOUT else parse_value(part) for part in values.split(","))
        space[name] = _with(parsed, field_value(recipe, name))
    return space


def own_configuration(recipe: Recipe, space: Space) -> Configuration:
    """Return the configuration of the unchanged recipe."""
    return Configuration(tuple((name, field_value(recipe, name)) for name in space))


def size(space: Space) -> int:
    """Combinations in the space."""
    return prod(len(values) for values in space.values())


def configurations(recipe: Recipe, space: Space, seed: int) -> Iterator[Configuration]:
    """Every combination once, the recipe's own first, the others in an order that the seed decides.

    They are drawn one at a time, so that a large space is cheap.
    """
    own = own_configuration(recipe, space)
    yield own
    total, drawn, dice = size(space), {own}, random.Random(seed)
    if total <= _MOST_DRAWS**2:
        others = [Configuration(tuple(zip(space, values, strict=True))) for values in product(*space.values())]
        dice.shuffle(others)
        yield from (one for one in others if one != own)
        return
    while len(drawn) < total:
        one = Configuration(tuple((name, dice.choice(values)) for name, values in space.items()))
        if one not in drawn:
            drawn.add(one)
            yield one


def _around(values: Sequence[int], own: int) -> tuple[int, ...]:
    """The recipe's value with the nearest ones below and above."""
    below = [value for value in values if value < own][-_AROUND:]
    return (*below, own, *[value for value in values if value > own][:_AROUND])


def _with(values: Sequence[Any], own: Any) -> tuple[Any, ...]:
    return tuple(values) if own in values else tuple(sorted((*values, own)))


def _layouts(recipe: Recipe) -> tuple[tuple[int, int], ...]:
    """Every way to fill the host's cards; the embedded engine has no replicas."""
    assert recipe.host is not None
    own = (recipe.checkpoint.tp_size, recipe.serve.replicas)
    gpus, several = recipe.host.gpus, recipe.engine.backend != "torch"
    found = [(tp, gpus // tp if several else 1) for tp in (1, 2, 4, 8) if tp <= gpus]
    return tuple(dict.fromkeys((own, *found))) if recipe.checkpoint.pp_size == 1 else (own,)


def _layout(text: str) -> tuple[int, int]:
    tp_size, separator, replicas = text.strip().upper().removeprefix("TP").partition("X")
    if not (separator and tp_size.strip().isdecimal() and replicas.strip().isdecimal()):
        raise InputError(f"--sweep layout: {text!r} is not a layout", "write it like TP4x1 or TP1x4")
    return int(tp_size), int(replicas)


def _word(name: str, value: Any) -> str:
    if name == LAYOUT:
        return f"TP{value[0]} x {value[1]}"
    return f"{name.partition('.')[2]} {str(value).lower() if isinstance(value, bool) else value}"
