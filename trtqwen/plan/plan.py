"""The plan of a recipe: memory, concurrency, speed, build command and warnings. Arithmetic only."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trtqwen.checkpoint.checks import check_settings
from trtqwen.checkpoint.config import Dtype, resolved_dtype
from trtqwen.checkpoint.mapping import RankMapping
from trtqwen.diagnostics import Diagnostic, InputError
from trtqwen.engine.flags import build_command
from trtqwen.engine.limits import check_computed
from trtqwen.hf.checks import read_model
from trtqwen.hf.config import HfConfig, stretched
from trtqwen.hf.known import known_config
from trtqwen.plan.assumptions import assumptions
from trtqwen.plan.findings import by_level, find
from trtqwen.plan.layouts import Layout, plan_layouts, recipe_roofline, typical_request
from trtqwen.plan.measured import shares
from trtqwen.plan.memory import Concurrency, RankMemory, concurrency, plan_memory
from trtqwen.plan.other_engines import serving_command
from trtqwen.plan.speed import Generation, Rate, Roofline, Work
from trtqwen.recipe import Recipe


@dataclass(frozen=True)
class Speed:
    """Bounds and forecasts of one replica.

    Attributes:
        step: the largest step of the context phase.
        prompt: a prompt of max_seq_len tokens.
        generation: one stream, then as many as run at once, of the shortest and the longest length of the plan.
    """

    step: Work
    prompt: Work
    generation: tuple[Generation, ...]


@dataclass(frozen=True)
class Plan:
    """The plan of a recipe.

    Attributes:
        model: name or directory that the sizes are from.
        memory: of a rank of each pipeline stage.
        concurrency: requests at once on one replica, by length; the last is max_seq_len.
        speed: None without a host, and where nothing fits.
        layouts: the recipe's own among them; empty without a host.
        command: the trtllm-build call, vLLM's command line or the LLM API's arguments; empty for the torch backend.
    """

    recipe: Recipe
    model: str
    dtype: Dtype
    memory: tuple[RankMemory, ...]
    concurrency: tuple[Concurrency, ...]
    speed: Speed | None
    layouts: tuple[Layout, ...]
    command: tuple[str, ...]
    findings: tuple[Diagnostic, ...]

    @property
    def fits(self) -> bool:
        """Whether the engine fits and serves a request of max_seq_len."""
        return all(finding.level != "error" for finding in self.findings)

    @property
    def kv_tokens(self) -> int:
        """Tokens in the KV cache of one replica."""
        return self.memory[0].kv_blocks * self.recipe.engine.tokens_per_block

    @property
    def tightest(self) -> RankMemory:
        """The memory of the ranks that have least left."""
        return min(self.memory, key=lambda rank: rank.unused)

    def as_json(self) -> dict[str, Any]:
        """Bytes, seconds and tokens per second; rates and times are a bound and a forecast."""
        recipe = self.recipe
        return {
            "recipe": recipe.name,
            "model": self.model,
            "backend": recipe.engine.backend,
            "fits": self.fits,
            "dtype": self.dtype,
            "quant": recipe.checkpoint.quant,
            "tp_size": recipe.checkpoint.tp_size,
            "pp_size": recipe.checkpoint.pp_size,
            "replicas": recipe.serve.replicas,
            "card": recipe.host.card if recipe.host else None,
            "memory": [{**asdict(rank), "kv_pool": rank.kv_pool, "unused": rank.unused} for rank in self.memory],
            "kv_tokens": self.kv_tokens,
            "concurrency": [asdict(at_once) for at_once in self.concurrency],
            "speed": None if self.speed is None else _speed_json(self.speed),
            "layouts": [
                {**asdict(layout), "one_stream": _rate(layout.one_stream), "throughput": _rate(layout.throughput)}
                for layout in self.layouts
            ],
            "command": list(self.command),
            "findings": [finding.as_json() for finding in self.findings],
            "assumptions": assumptions().model_dump(),
            "shares": {kind: share.model_dump() for kind, share in vars(shares()).items()},
        }


def plan_recipe(recipe: Recipe, model: Path | None = None) -> Plan:
    """Plan a recipe.

    Args:
        model: Hugging Face directory whose sizes count instead of those of the recipe's `model`; it may have no
            weights yet. What is there is checked as `build` checks it.

    Raises:
        InputError: if neither names a model, or it cannot be converted as asked.
    """
    config, said = _read(recipe, model)
    dtype = resolved_dtype(recipe.checkpoint.dtype, config)
    memory = plan_memory(recipe, config, dtype)
    lengths = [length for length in assumptions().typical_lengths if length < recipe.engine.max_seq_len]
    lengths.append(recipe.engine.max_seq_len)
    at_once = tuple(concurrency(recipe, memory[0].kv_blocks, length) for length in lengths)
    layouts: tuple[Layout, ...] = ()
    command: tuple[str, ...] = ()
    speed = None
    if recipe.host is not None:
        layouts = plan_layouts(recipe, config, dtype)
        home = Path("engines") / recipe.name
        if recipe.engine.backend == "tensorrt_llm":
            command = tuple(build_command(recipe, home / "checkpoint", home / "engine"))
        if at_once[-1].sequences:
            speed = _speed(recipe, recipe_roofline(recipe, config, dtype, memory), at_once)
    command = command or serving_command(recipe, config, dtype, memory)
    findings = by_level((*find(recipe, config, dtype, memory, layouts, model), *said))
    name = str(model) if model else str(recipe.model)
    return Plan(recipe, name, dtype, memory, at_once, speed, layouts, command, findings)


def model_config(recipe: Recipe, model: Path | None = None) -> HfConfig:
    """The config that the recipe's checkpoint will be made with, checked against the recipe.

    Raises:
        InputError: if no model is named, or it cannot be converted as asked.
    """
    return _read(recipe, model)[0]


def _read(recipe: Recipe, model: Path | None) -> tuple[HfConfig, tuple[Diagnostic, ...]]:
    """Read the config, and return findings about its directory.

    Raises:
        InputError: if no model is named, or it cannot be converted as asked.
    """
    if model is None and recipe.model is None:
        raise InputError(
            f"{recipe.name}: names no model, whose sizes a plan needs", "add the field model, or pass --model"
        )
    config, said = (known_config(str(recipe.model)), ()) if model is None else read_model(model)
    settings = recipe.checkpoint
    if settings.yarn_factor is not None:
        config = stretched(config, settings.yarn_factor)
    check_settings(config, RankMapping(settings.tp_size, settings.pp_size), settings)
    check_computed(recipe.engine.backend, config)
    return config, said


def _speed(recipe: Recipe, roofline: Roofline, at_once: tuple[Concurrency, ...]) -> Speed:
    prompt, answer = typical_request(recipe)
    loads = [(1, prompt + answer), *((load.sequences, load.tokens) for load in (at_once[0], at_once[-1]))]
    return Speed(
        step=roofline.largest_step(prompt),
        prompt=roofline.prompt(recipe.engine.max_seq_len),
        generation=tuple(roofline.generation(sequences, tokens) for sequences, tokens in dict.fromkeys(loads)),
    )


def _speed_json(speed: Speed) -> dict[str, Any]:
    return {
        "context": [_work_json(work, tokens=int(work.tokens)) for work in (speed.step, speed.prompt)],
        "generation": [
            _work_json(point, sequences=point.sequences, tokens=point.length) for point in speed.generation
        ],
    }


def _work_json(work: Work, **load: int) -> dict[str, Any]:
    return {
        **load,
        **asdict(work.step),
        "limit": work.step.bound,
        "tokens_per_second": _rate(work.rate),
        "seconds": _rate(work.seconds),
    }


def _rate(rate: Rate) -> dict[str, Any]:
    return {"bound": rate.bound, "forecast": rate.forecast._asdict()}
