"""Checks of checkpoints and engines against this host, each other, and the recipe."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from trtqwen.artifact.names import CONFIG, rank_weights
from trtqwen.checkpoint.config import CheckpointConfig, read_checkpoint_config
from trtqwen.diagnostics import Diagnostic
from trtqwen.doctor.check import Check, Result
from trtqwen.doctor.subject import Skip, Subject
from trtqwen.engine.config import read_engine_config
from trtqwen.engine.provenance import check_provenance
from trtqwen.facts.names import Release
from trtqwen.facts.releases import known_release, last_engine_release, release_facts
from trtqwen.hf.config import stretched

_CONVERT = "convert the model again with `trtqwen convert`"
_REBUILD = "build the engine again with `trtqwen build`"


class EngineProvenance(Check):
    """An engine runs on the TensorRT-LLM release and the kind of card that built it."""

    id = "D01"
    level = "error"
    title = "engine and host"

    def run(self, subject: Subject) -> Result:
        engine = subject.named_engine
        config = read_engine_config(engine)
        if config.backend == "torch":
            return Result("ok", "a torch engine: runs wherever PyTorch does")
        if config.backend in ("vllm", "llmapi"):
            return Result("ok", f"a model directory for {config.backend}: runs wherever that does")
        if subject.host.tensorrt_llm is None and not subject.host.gpus:
            raise Skip(f"no TensorRT-LLM and no GPU here; the engine is of {config.version}")
        problems = check_provenance(engine, subject.host)
        return self.judge(problems, f"TensorRT-LLM {config.version}, built on the like of this host")


class CheckpointRelease(Check):
    """A release stops at keys of newer ones, and takes a rotary scaling that it does not know for none."""

    id = "D04"
    level = "error"
    title = "checkpoint and release"

    def run(self, subject: Subject) -> Result:
        if subject.checkpoint is None:
            raise Skip("give --checkpoint")
        config = read_checkpoint_config(subject.checkpoint)
        release = _release(subject)
        facts = release_facts(release)
        content: dict[str, Any] = json.loads((subject.checkpoint / CONFIG).read_text(encoding="utf-8"))
        problems = []
        for section, keys in facts.unknown_checkpoint_keys.items():
            holder = content.get(section, {}) if section else content
            if refused := [key for key in keys if key in holder]:
                text = f"config.json: {release} refuses {', '.join(refused)} in {section or 'its top level'}"
                problems.append(Diagnostic(text, f"{_CONVERT}, with checkpoint.release {release}"))
        scaling = (config.rotary_scaling or {}).get("rope_type") or (config.rotary_scaling or {}).get("type")
        if scaling is not None and scaling not in facts.rope_scalings:
            text = f"rotary_scaling {scaling}: {release} computes {', '.join(facts.rope_scalings)}"
            problems.append(Diagnostic(text, "use a newer release"))
        ranks = range(config.mapping.world_size)
        missing = [rank for rank in ranks if not (subject.checkpoint / rank_weights(rank)).is_file()]
        if missing:
            text = f"{subject.checkpoint}: {rank_weights(missing[0])} is missing, its mapping has {len(ranks)} ranks"
            problems.append(Diagnostic(text, _CONVERT))
        return self.judge(
            problems, f"{config.dtype}, {len(ranks)} {'rank' if len(ranks) == 1 else 'ranks'}, {release}"
        )


def _release(subject: Subject) -> Release:
    """Return the release that reads the checkpoint: the installed one, the recipe's, or the last with engines."""
    if installed := known_release(subject.host.tensorrt_llm):
        return installed
    return subject.recipe.checkpoint.release if subject.recipe else last_engine_release()


@dataclass(frozen=True)
class _Context:
    """The context lengths that the parts of a deployment promise.

    Attributes:
        tokens: promised length.
        reach: longest context of the rotary embedding.
        native: its longest context without YaRN.
    """

    name: str
    tokens: int
    reach: int
    native: int


class LongContext(Check):
    """No part of a deployment promises more tokens than the rotary embedding reaches.

    YaRN is on only where it is needed.
    """

    id = "D17"
    level = "error"
    title = "context length and YaRN"

    def run(self, subject: Subject) -> Result:
        problems, seen = [], []
        for context in _contexts(subject):
            scaled = context.native < context.reach
            seen.append(
                f"{context.name} {context.tokens:,} tokens of {context.reach:,}{' with YaRN' if scaled else ''}"
            )
            if context.tokens > context.reach:
                text = f"{context.name}: {context.tokens:,} tokens, but the model reads {context.reach:,}"
                factor = -(-context.tokens // context.native)
                hint = f"set max_seq_len {context.reach}, or checkpoint.yarn_factor {factor} and build again"
                problems.append(Diagnostic(text, hint))
            if scaled and context.tokens <= context.native:
                text = (
                    f"{context.name}: YaRN is on for {context.tokens:,} tokens; it is static and costs short prompts"
                )
                problems.append(Diagnostic(text, f"leave it out up to {context.native:,} tokens", "warning"))
        return self.judge(problems, ", ".join(seen))


def _contexts(subject: Subject) -> Iterator[_Context]:
    recipe = subject.recipe
    if recipe is None and subject.engine is None:
        raise Skip("give a RECIPE or --engine")
    if recipe is not None and (subject.model is not None or recipe.model is not None):
        config, factor = subject.hf_config, recipe.checkpoint.yarn_factor
        config = stretched(config, factor) if factor is not None else config
        yield _Context("recipe", recipe.engine.max_seq_len, config.context, config.native_context)
    if recipe is not None and subject.checkpoint is not None:
        yield _context("checkpoint", recipe.engine.max_seq_len, read_checkpoint_config(subject.checkpoint))
    if subject.engine is not None:
        engine = subject.engine_config
        yield _context("engine", engine.build_config.max_seq_len, engine.pretrained_config)


def _context(name: str, tokens: int, config: CheckpointConfig) -> _Context:
    scaling, reach = config.rotary_scaling or {}, config.max_position_embeddings
    return _Context(name, tokens, reach, int(scaling.get("original_max_position_embeddings") or reach))


class Conflicts(Check):
    """What the repository switches on and the engine was built without: TensorRT-LLM logs it and goes on."""

    id = "D18"
    level = "error"
    title = "serving settings and engine"

    def run(self, subject: Subject) -> Result:
        config, build = subject.engine_config, subject.engine_config.build_config
        kv_algorithm = config.pretrained_config.quantization.kv_cache_quant_algo
        torch = config.backend != "tensorrt_llm"
        paged = torch or bool(subject.plugin_config.get("use_paged_context_fmha"))
        problems = []
        if subject.recipe is not None and subject.recipe.engine.use_paged_context_fmha and not paged:
            because = f": it has no kernel for a KV cache in {kv_algorithm}" if kv_algorithm else ""
            text = f"the engine came out without use_paged_context_fmha, which the recipe asks for{because}"
            problems.append(Diagnostic(text, _REBUILD))
        chunked, reuse = _serving(subject, unset_reuses=not torch)
        if not paged:
            on = [
                name
                for name, given in (("enable_chunked_context", chunked), ("enable_kv_cache_reuse", reuse))
                if given
            ]
            if on:
                text = f"{' and '.join(on)}: the engine has no use_paged_context_fmha, they are silently off"
                problems.append(Diagnostic(text, f"{_REBUILD} with engine.use_paged_context_fmha, or set them False"))
        if chunked is False and build.max_num_tokens < build.max_seq_len:
            text = (
                f"prompts over {build.max_num_tokens:,} tokens will be refused, although max_seq_len is "
                f"{build.max_seq_len:,}: enable_chunked_context is off"
            )
            problems.append(
                Diagnostic(text, "set enable_chunked_context True, or build with a larger max_num_tokens")
            )
        evidence = f"use_paged_context_fmha {'on' if paged else 'off'}, KV cache {kv_algorithm or '16 or 32 bit'}"
        return self.judge(problems, evidence)


def _serving(subject: Subject, *, unset_reuses: bool) -> tuple[bool | None, bool | None]:
    """Whether chunked context and KV cache reuse are switched on, by the repository or the recipe; None: not known.

    The C++ backend takes an unset enable_kv_cache_reuse for true, an unset enable_chunked_context for false.
    """
    if subject.repository is not None and (model := subject.model_files.get("tensorrt_llm")) is not None:
        reuse = model.flag("enable_kv_cache_reuse")
        return model.flag("enable_chunked_context") or False, unset_reuses if reuse is None else reuse
    if subject.recipe is not None:
        return subject.recipe.serve.enable_chunked_context, subject.recipe.serve.enable_kv_cache_reuse
    return None, None


CHECKS: tuple[Check, ...] = (EngineProvenance(), CheckpointRelease(), LongContext(), Conflicts())
