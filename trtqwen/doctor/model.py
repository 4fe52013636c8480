"""Checks of a Hugging Face model directory, and of its conversion by a recipe."""

from __future__ import annotations

import numpy as np

from trtqwen.checkpoint.checks import check_settings
from trtqwen.checkpoint.mapping import RankMapping
from trtqwen.diagnostics import CheckpointError
from trtqwen.doctor.check import Check, Result
from trtqwen.doctor.subject import Subject
from trtqwen.hf.checks import end_findings, has_tokenizer, template_findings, vocabulary_findings
from trtqwen.hf.generation import generation_defaults, generation_findings
from trtqwen.hf.source import HfModel
from trtqwen.hf.tokenizer import Tokenizer
from trtqwen.quantize.outliers import BIAS_RATIO, bias_norms
from trtqwen.recipe import CheckpointRecipe

_CONVERSATION = ({"role": "user", "content": "2+2?"},)


class Family(Check):
    """The directory has a dense Qwen2 or Qwen2.5 model, and every shard and tensor of it."""

    id = "D10"
    level = "error"
    title = "model architecture and files"

    def run(self, subject: Subject) -> Result:
        source = HfModel(subject.named_model)
        layers = source.config.num_hidden_layers
        evidence = f"{source.num_values / 1e9:.2f} billion parameters, {layers} layers, all shards"
        return self.judge([finding for finding in source.findings if finding.level == "warning"], evidence)


class Divisible(Check):
    """Attention heads, KV heads and layers can be divided by the recipe's tp_size and pp_size.

    Without a recipe the check lists the sizes that are possible.
    """

    id = "D11"
    level = "error"
    title = "tensor-parallel and pipeline-parallel sizes"

    def run(self, subject: Subject) -> Result:
        config = subject.hf_config
        heads = f"{config.num_attention_heads} heads, {config.num_key_value_heads} KV heads"
        if subject.recipe is not None:
            settings = subject.recipe.checkpoint
            check_settings(config, RankMapping(settings.tp_size, settings.pp_size), settings)
            repeats = settings.tp_size // config.num_key_value_heads
            copies = f", each KV head on {repeats} ranks" if repeats > 1 else ""
            return Result("ok", f"{heads}: tp_size {settings.tp_size}, pp_size {settings.pp_size}{copies}")
        legal = []
        for size in (1, 2, 4, 8):
            try:
                check_settings(config, RankMapping(size), CheckpointRecipe(tp_size=size))
            except CheckpointError:
                continue
            legal.append(str(size))
        return Result("ok", f"{heads}: tp_size {', '.join(legal)}")


class StopIds(Check):
    """Qwen's files name different end tokens; an engine that knows one of them talks on after the other."""

    id = "D12"
    level = "error"
    title = "end ids"

    def run(self, subject: Subject) -> Result:
        tokenizer = Tokenizer(subject.named_model)
        named = ", ".join(
            f"{file} {', '.join(map(str, ids)) or 'none'}" for file, ids in tokenizer.end_ids_by_file.items()
        )
        generation_defaults(subject.named_model)
        problems = [*end_findings(tokenizer, subject.source.config), *generation_findings(subject.named_model)]
        return self.judge(problems, f"end ids {', '.join(map(str, tokenizer.stop_ids))}: {named}")


class ChatTemplate(Check):
    """The chat template renders a turn, and the tokenizer knows the special tokens in it."""

    id = "D13"
    level = "error"
    title = "chat template"

    def run(self, subject: Subject) -> Result:
        tokenizer = subject.tokenizer
        problems = [*tokenizer.findings, *template_findings(tokenizer)]
        template = tokenizer.chat_template
        if template is None:
            return self.judge(problems)
        template.check(subject.named_model)
        rendered = template.render(_CONVERSATION[-1:])
        return self.judge(problems, f"a turn of {len(tokenizer.encode(rendered))} tokens, {sorted(template.texts)}")


class KeyBias(Check):
    """One layer with a large k_proj bias sets the step of an 8-bit KV cache.

    The keys of the other layers then fall below one step.
    """

    id = "D14"
    level = "error"
    title = "INT8 KV cache and k_proj bias"

    def run(self, subject: Subject) -> Result:
        norms = np.array(bias_norms(subject.source))
        ratios = norms / max(float(np.median(norms)), float(np.finfo(np.float64).tiny))
        largest = f"k_proj bias norms up to {ratios.max():.1f} times the median (layer {int(ratios.argmax())})"
        quantised = _quantized_kv_cache(subject)
        if ratios.max() <= BIAS_RATIO:
            return Result("ok", f"{largest}; {BIAS_RATIO:g} is the limit for 8 bits")
        if quantised is None:
            return Result("ok", f"{largest}: leave the KV cache in 16 bit, as it is here")
        text = f"{largest}, and {quantised}: the other layers fall below one step"
        return self.found(text, "leave kv_cache auto; if you must, measure with `trtqwen verify`")


def _quantized_kv_cache(subject: Subject) -> str | None:
    """Return the setting that requests an 8-bit KV cache; None if none does."""
    if subject.recipe is not None and subject.recipe.checkpoint.kv_cache != "auto":
        return f"the recipe has kv_cache {subject.recipe.checkpoint.kv_cache}"
    if subject.engine is not None:
        algorithm = subject.engine_config.pretrained_config.quantization.kv_cache_quant_algo
        return f"the engine's KV cache is {algorithm}" if algorithm else None
    return None


class Overflow(Check):
    """A model that was trained in bfloat16 can exceed the range of float16.

    Its logits become NaN, and its answers are `!!!!`.
    """

    id = "D15"
    level = "warning"
    title = "activation range of the dtype"

    def run(self, subject: Subject) -> Result:
        recipe, trained = subject.named_recipe, subject.hf_config.torch_dtype or "unknown dtype"
        dtype = recipe.checkpoint.dtype
        if dtype != "float16" or trained == "float16":
            return Result("ok", f"weights {trained}, recipe {dtype}")
        text = f"weights {trained}, recipe float16: activations over 65504 become NaN, and answers '!!!!'"
        hint = "set checkpoint.dtype bfloat16 (as fast on Ada), or run `trtqwen verify`, which measures the largest"
        if recipe.engine.backend == "tensorrt_llm" and not recipe.serve.enable_context_fmha_fp32_acc:
            hint += ", and set serve.enable_context_fmha_fp32_acc"
        return self.found(text, hint)


class Vocabulary(Check):
    """The embedding, lm_head and the tokenizer agree on the number of tokens."""

    id = "D16"
    level = "error"
    title = "embedding, lm_head and tokenizer sizes"

    def run(self, subject: Subject) -> Result:
        config = subject.source.config
        there = has_tokenizer(subject.source.directory)
        problems = list(vocabulary_findings(subject.tokenizer, config)) if there else []
        padding = -config.vocab_size % (subject.recipe.checkpoint.tp_size if subject.recipe else 1)
        padded = f", padded by {padding} for the ranks" if padding else ""
        tied = "tied" if config.tie_word_embeddings else "untied"
        return self.judge(problems, f"{config.vocab_size} rows, {tied}{padded}")


CHECKS: tuple[Check, ...] = (
    Family(),
    Divisible(),
    StopIds(),
    ChatTemplate(),
    KeyBias(),
    Overflow(),
    Vocabulary(),
)
