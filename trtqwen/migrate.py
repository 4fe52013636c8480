"""Migration of a recipe to another engine: settings that stay, change or are lost."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from trtqwen.artifact.directory import destination, write_file
from trtqwen.diagnostics import InputError, OutputError
from trtqwen.recipe import TORCH_SERVING, Recipe, ServeRecipe, find_recipe, load_recipe
from trtqwen.yaml_file import read_mapping

Backend = Literal["vllm", "llmapi", "torch"]
_BUILD_ONLY = (
    "opt_num_tokens",
    "multiple_profiles",
    "gemm_plugin",
    "logits_dtype",
    "workers",
    "use_paged_context_fmha",
)
_KEPT = {
    "engine": ("max_batch_size", "max_num_tokens", "max_seq_len", "tokens_per_block"),
    "serve": (
        *("replicas", "enable_chunked_context", "enable_kv_cache_reuse", "kv_cache_free_gpu_mem_fraction"),
        *("max_tokens_in_paged_kv_cache", "max_queue_size"),
    ),
}
_CALIBRATION = ("calib", "act_ranges", "chat_template")
_NAMES = {"vllm": "vLLM", "llmapi": "the LLM API", "torch": "the embedded engine"}
# What TensorRT-LLM's names become.
_TRANSLATED: dict[str, dict[str, str]] = {
    "vllm": {
        "engine.max_batch_size": "--max-num-seqs",
        "engine.max_num_tokens": "--max-num-batched-tokens",
        "engine.max_seq_len": "--max-model-len",
        "engine.tokens_per_block": "--block-size",
        "serve.enable_chunked_context": "--enable-chunked-prefill",
        "serve.enable_kv_cache_reuse": "--enable-prefix-caching",
        "serve.kv_cache_free_gpu_mem_fraction": "--gpu-memory-utilization, which counts the weights too",
        "serve.max_tokens_in_paged_kv_cache": "--num-gpu-blocks-override",
        "checkpoint.tp_size": "--tensor-parallel-size",
        "checkpoint.pp_size": "--pipeline-parallel-size",
    },
    "llmapi": {
        "serve.enable_chunked_context": "enable_chunked_prefill",
        "serve.enable_kv_cache_reuse": "kv_cache_config.enable_block_reuse",
        "serve.kv_cache_free_gpu_mem_fraction": "kv_cache_config.free_gpu_memory_fraction",
        "serve.max_tokens_in_paged_kv_cache": "kv_cache_config.max_tokens",
        "serve.batch_scheduler_policy": "scheduler_config.capacity_scheduler_policy",
        "engine.tokens_per_block": "kv_cache_config.tokens_per_block",
        "checkpoint.tp_size": "tensor_parallel_size",
        "checkpoint.pp_size": "pipeline_parallel_size",
    },
    "torch": {},
}


@dataclass(frozen=True)
class Note:
    """A setting of the old recipe and its change."""

    setting: str
    text: str


@dataclass
class Migration:
    """A recipe for another engine.

    Attributes:
        content: of the new recipe file.
        same: settings with the same meaning.
        changed: settings with another meaning, and added settings.
        lost: features that the new engine does not have.
        commands: each step, with what it is for.
    """

    source: Recipe
    to: Backend
    content: dict[str, Any]
    same: list[Note] = field(default_factory=list)
    changed: list[Note] = field(default_factory=list)
    lost: list[Note] = field(default_factory=list)
    commands: list[tuple[str, str]] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        def told(notes: list[Note]) -> list[dict[str, str]]:
            return [{"setting": note.setting, "what": note.text} for note in notes]

        return {
            "recipe": self.source.name,
            "to": self.to,
            "content": self.content,
            "same": told(self.same),
            "changes": told(self.changed),
            "lost": told(self.lost),
            "steps": [{"what": what, "command": command} for what, command in self.commands],
        }


def plan_migration(recipe: str, to: Backend, output: Path | None = None) -> Migration:
    """Make the recipe for another engine.

    Args:
        recipe: name or file.
        output: where the new one will be written; named in the commands.

    Raises:
        RecipeError: if the recipe is not valid.
        InputError: if it is for that engine already.
    """
    source = load_recipe(recipe)
    if source.engine.backend == to:
        raise InputError(f"{source.name}: is for {_NAMES[to]} already", "choose another --to")
    raw = read_mapping(find_recipe(recipe))
    sections = {name: dict(raw.get(name) or {}) for name in ("checkpoint", "engine", "serve")}
    engine = sections["engine"]
    engine.pop("builder", None)
    for name in ("vllm", "llmapi"):
        engine.pop(name, None)
    engine["backend"] = to
    migration = Migration(source, to, {})
    _translate(migration)
    _engine(migration, engine)
    _checkpoint(migration, sections["checkpoint"])
    _serve(migration, sections["serve"])
    if to != "torch":
        for name in TORCH_SERVING:
            if name in sections["serve"]:
                value = sections["serve"].pop(name)
                migration.lost.append(Note(f"serve.{name}: {value}", "is a setting of the embedded engine"))
    _rest(migration, sections)
    content = {name: value for name, value in raw.items() if name not in sections}
    if to == "torch" and content.pop("host", None) is not None:
        migration.changed.append(Note("host", "is left out: the embedded engine runs where it is started"))
    content["description"] = f"{source.description} (migrated to {_NAMES[to]})"
    ordered = ("description", "model", "host", "checkpoint", "engine", "serve")
    content |= {name: section for name, section in sections.items() if section}
    migration.content = {name: content[name] for name in ordered if name in content}
    Recipe.model_validate({**migration.content, "name": "migrated"})
    _commands(migration, recipe, output or default_output(source.name, to))
    return migration


def default_output(name: str, to: Backend) -> Path:
    """Where a migrated recipe goes: the working directory, named after the engine."""
    return Path(f"{name}-{to}.yaml")


def write_migration(migration: Migration, output: Path, *, force: bool = False) -> None:
    """Write the new recipe.

    Raises:
        OutputError: if the file exists and `force` is not set.
    """
    if destination(output).exists() and not force:
        raise OutputError(f"{output}: exists", "pass --force to replace it or choose another --output")
    text = yaml.safe_dump(migration.content, sort_keys=False, allow_unicode=True, width=110)
    head = f"# Migrated from {migration.source.name} by `trtqwen migrate`.\n"
    write_file(output, head + text)


def _translate(migration: Migration) -> None:
    source, names = migration.source, _TRANSLATED[migration.to]
    for section, fields in _KEPT.items():
        for name in fields:
            value = getattr(getattr(source, section), name)
            if value is not None:
                told = names.get(f"{section}.{name}")
                migration.same.append(
                    Note(f"{section}.{name}: {_word(value)}", f"becomes {told}" if told else "stays")
                )
    for name in ("tp_size", "pp_size"):
        value = getattr(source.checkpoint, name)
        told = names.get(f"checkpoint.{name}")
        migration.same.append(Note(f"checkpoint.{name}: {value}", f"becomes {told}" if told else "stays"))
    tensors = "tensor names and types, gateway, metric names: clients and dashboards stay as they are"
    migration.same.append(Note("model repository", tensors))


def _engine(migration: Migration, engine: dict[str, Any]) -> None:
    for name in _BUILD_ONLY:
        if name in engine:
            value = engine.pop(name)
            migration.lost.append(Note(f"engine.{name}: {_word(value)}", "is a setting of trtllm-build alone"))
    if engine.pop("gather_context_logits", False):
        migration.lost.append(
            Note("engine.gather_context_logits", "logits are not returned: requests for them are refused")
        )
    if migration.to == "vllm" and migration.source.engine.tokens_per_block == 8:
        engine["tokens_per_block"] = 16
        migration.changed.append(Note("engine.tokens_per_block", "8 becomes 16: vLLM has no smaller block"))
    if migration.source.engine.backend == "tensorrt_llm":
        migration.changed.append(
            Note("engine build", f"{_NAMES[migration.to]} compiles nothing: `build` exports the model")
        )


def _checkpoint(migration: Migration, checkpoint: dict[str, Any]) -> None:
    settings, to = migration.source.checkpoint, migration.to
    if settings.kv_cache == "int8" and to != "torch":
        checkpoint.pop("kv_cache", None)
        migration.lost.append(
            Note("checkpoint.kv_cache: int8", "the KV cache is 16 bits wide and holds half the tokens")
        )
    if settings.quant == "int8_sq" and to == "llmapi":
        checkpoint.pop("quant", None)
        _lose(migration, checkpoint, "belongs to SmoothQuant", "sq_alpha", "per_channel", "per_token", *_CALIBRATION)
        what = "the LLM API has no SmoothQuant: weights are 16 bits; int8_wo or an FP8 model are the alternatives"
        migration.lost.append(Note("checkpoint.quant: int8_sq", what))
    elif to != "torch" and settings.kv_cache == "int8" and settings.quant != "int8_sq":
        _lose(migration, checkpoint, "belongs to the INT8 KV cache", *_CALIBRATION)
    if settings.quant == "int8_sq" and to == "vllm":
        what = "stays INT8 as compressed-tensors W8A8; o_proj is 16 bits wide where query heads share a KV head"
        migration.changed.append(Note("checkpoint.quant: int8_sq", what))
    if settings.quant == "int8_wo":
        what = {
            "vllm": "stays INT8 as compressed-tensors W8A16; vLLM runs it on GPUs (Marlin), not on CPUs",
            "llmapi": "stays INT8: the LLM API quantizes 16-bit weights when it loads",
            "torch": "stays",
        }[to]
        migration.changed.append(Note("checkpoint.quant: int8_wo", what))
        if to == "llmapi" and settings.int8_layout != "plain":
            checkpoint.pop("int8_layout", None)
            migration.changed.append(Note("checkpoint.int8_layout", "becomes plain"))


def _lose(migration: Migration, checkpoint: dict[str, Any], why: str, *names: str) -> None:
    for name in names:
        if name in checkpoint:
            migration.lost.append(Note(f"checkpoint.{name}: {_word(checkpoint.pop(name))}", why))


def _serve(migration: Migration, serve: dict[str, Any]) -> None:
    to, plain = migration.to, ServeRecipe()
    if serve.pop("enable_context_fmha_fp32_acc", False):
        what = f"{_NAMES[to]} sums attention in float32 anyway"
        migration.changed.append(Note("serve.enable_context_fmha_fp32_acc", what))
    if serve.pop("kv_cache_host_memory_bytes", 0):
        what = "KV cache blocks are not moved to host memory"
        migration.lost.append(Note("serve.kv_cache_host_memory_bytes", what))
    if serve.pop("replica_mode", plain.replica_mode) != plain.replica_mode:
        what = "orchestrator becomes servers: one Triton for each replica behind the gateway"
        migration.changed.append(Note("serve.replica_mode", what))
    if to == "torch" and serve.pop("replicas", 1) > 1:
        migration.same = [note for note in migration.same if not note.setting.startswith("serve.replicas")]
        what = "the embedded engine is one; start several and list them at `trtqwen gateway`"
        migration.lost.append(Note("serve.replicas", what))
    policy = migration.source.serve.batch_scheduler_policy
    if to == "vllm":
        serve.pop("batch_scheduler_policy", None)
        if policy == "guaranteed_no_evict":
            what = "vLLM always works as max_utilization does: the youngest requests may be computed again"
            migration.lost.append(Note("serve.batch_scheduler_policy: guaranteed_no_evict", what))
    else:
        told = _TRANSLATED[to].get("serve.batch_scheduler_policy")
        migration.same.append(Note(f"serve.batch_scheduler_policy: {policy}", f"becomes {told}" if told else "stays"))
    if to in ("vllm", "llmapi"):
        for tensor in ("return_context_logits", "return_generation_logits"):
            migration.lost.append(Note(tensor, "a request for it is refused by name"))
    if to == "vllm":
        migration.changed.append(Note("temperature, penalties", "vLLM takes 0 to 2, and -2 to 2; others are refused"))


def _rest(migration: Migration, sections: Mapping[str, Mapping[str, Any]]) -> None:
    """Every other field of the new recipe means what it meant."""
    noted = {note.setting.partition(":")[0] for notes in notes_of(migration).values() for note in notes}
    for section, fields in sections.items():
        for name, value in fields.items():
            if f"{section}.{name}" not in noted and name != "backend":
                migration.same.append(Note(f"{section}.{name}: {_word(value)}", "stays"))


def _commands(migration: Migration, recipe: str, output: Path) -> None:
    new, old = shlex.quote(str(output)), shlex.quote(recipe)
    steps = []
    if migration.to == "vllm":
        steps += [
            (
                "install vLLM in an environment of its own",
                "python3 -m venv .venv-vllm && .venv-vllm/bin/pip install vllm",
            ),
            ("say where it is", "export TRTQWEN_VLLM_PYTHON=$PWD/.venv-vllm/bin/python"),
        ]
    steps += [
        ("look at memory and settings", f"trtqwen plan {new}"),
        ("build it from the model", f"trtqwen build {new} --model MODEL"),
        (
            "or, where only the checkpoint is left, bring the model back first",
            "trtqwen export CHECKPOINT --output MODEL",
        ),
        ("check the host", f"trtqwen doctor {new}"),
        ("see which engine is better, and whether the answers agree", f"trtqwen compare {old} {new}"),
        ("serve it", f"trtqwen serve {new}"),
    ]
    migration.commands = steps


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def notes_of(migration: Migration) -> Mapping[str, list[Note]]:
    """The three lists, by title."""
    return {"Stays": migration.same, "Changes": migration.changed, "Lost": migration.lost}
