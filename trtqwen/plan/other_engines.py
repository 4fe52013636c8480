"""Commands of engines that need no build: vLLM's command line and the LLM API's arguments."""

from __future__ import annotations

import json
from pathlib import Path

from trtqwen.artifact.names import HF_MODEL
from trtqwen.checkpoint.config import CheckpointConfig, Dtype, checkpoint_config
from trtqwen.checkpoint.mapping import RankMapping
from trtqwen.engine.config import BuildConfig, EngineConfig
from trtqwen.executor.config import ExecutorConfig
from trtqwen.facts.cards import card_facts
from trtqwen.hf.config import HfConfig
from trtqwen.llmapi.settings import arguments
from trtqwen.plan.memory import GIB, RankMemory
from trtqwen.recipe import LlmApiSettings, Recipe, VllmSettings
from trtqwen.vllm.settings import command_line, server_options

_SERVING = (
    *("enable_chunked_context", "enable_kv_cache_reuse", "max_tokens_in_paged_kv_cache", "max_queue_size"),
    *("kv_cache_free_gpu_mem_fraction", "batch_scheduler_policy"),
)


def engine_config(recipe: Recipe, config: HfConfig, dtype: Dtype) -> EngineConfig:
    """The config.json that `build` would write."""
    settings = recipe.checkpoint
    algo = {"int8_wo": {"quant_algo": "W8A16"}}.get(settings.quant, {})
    content = checkpoint_config(
        config,
        dtype,
        RankMapping(settings.tp_size, settings.pp_size),
        quantization=algo,
        embedding_sharding=settings.embedding_sharding,
        calibrated=settings.calibrated,
        release="1.2.1",
    )
    return EngineConfig(
        backend=recipe.engine.backend,
        vllm=recipe.engine.vllm or VllmSettings(),
        llmapi=recipe.engine.llmapi or LlmApiSettings(),
        pretrained_config=CheckpointConfig.model_validate(content),
        build_config=BuildConfig.model_validate(recipe.engine.model_dump()),
    )


def serving_command(
    recipe: Recipe, config: HfConfig, dtype: Dtype, memory: tuple[RankMemory, ...]
) -> tuple[str, ...]:
    """The command that `serve` runs for vLLM, or the call it makes of the LLM API; empty for other backends.

    Raises:
        EngineError: if the backend does not know a setting.
    """
    backend = recipe.engine.backend
    if backend not in ("vllm", "llmapi"):
        return ()
    engine = engine_config(recipe, config, dtype)
    executor = ExecutorConfig.model_validate({name: getattr(recipe.serve, name) for name in _SERVING})
    model = Path("engines") / recipe.name / "engine" / HF_MODEL
    if backend == "vllm":
        card = None if recipe.host is None else int(card_facts(recipe.host.card).usable_gib * GIB)
        weights = max(rank.weights.total for rank in memory)
        peers = recipe.host is None or card_facts(recipe.host.card).peer_to_peer
        options = server_options(engine, executor, gpu_bytes=card, weights_bytes=weights, peer_to_peer=peers)
        python = (recipe.engine.vllm or VllmSettings()).python or "python3"
        words = command_line({"model": str(model), **options})
        return python, "-m", "vllm.entrypoints.openai.api_server", *words
    # GeForce's driver has no access between cards, and its name is all that counts.
    peers = recipe.host is None or card_facts(recipe.host.card).peer_to_peer
    names = [] if peers else ["GeForce"]
    release = (recipe.engine.llmapi or LlmApiSettings()).release
    made = arguments(engine, executor, model, release, names)
    return "tensorrt_llm.LLM", *(f"{name}={json.dumps(value)}" for name, value in made.items())
