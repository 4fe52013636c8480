"""Checks of a Hugging Face model directory, and of what a recipe would make of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from trtqwen.checkpoint.checks import check_settings
from trtqwen.checkpoint.mapping import RankMapping
from trtqwen.diagnostics import CheckpointError, Diagnostic
from trtqwen.doctor.check import Check, Result
from trtqwen.doctor.subject import Skip, Subject
from trtqwen.hf.source import HfModel
from trtqwen.hf.tokenizer import Tokenizer, render_chat
from trtqwen.layout import CONFIG
from trtqwen.quantize.outliers import BIAS_RATIO, bias_norms
from trtqwen.recipe import CheckpointRecipe

_TURN_START, _TURN_END = "<|im_start|>", "<|im_end|>"
_CONVERSATION = (
    {"role": "system", "content": "You are terse."},
    {"role": "user", "content": "你好"},
    {"role": "assistant", "content": "你好！"},
    {"role": "user", "content": "2+2?"},
)
_SAMPLED_ROWS = 64


class Family(Check):
    id = "D10"
    level = "error"
    title = "the model is a dense Qwen2 or Qwen2.5, complete"

    def run(self, subject: Subject) -> Result:
        model = subject.named_model
        source = HfModel(model)
        config = source.config
        if config.model_type != "qwen2":
            text = f"{model / 'config.json'}: model_type is {config.model_type}, not qwen2"
            return self.found(text, "use a dense Qwen2 or Qwen2.5; MoE, VL and Qwen1 are built otherwise")
        return Result(
            "ok", f"{source.num_values / 1e9:.2f} billion parameters, {config.num_hidden_layers} layers, all shards"
        )


class Divisible(Check):
    id = "D11"
    level = "error"
    title = "the model divides over the ranks"

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
    title = "answers end"

    def run(self, subject: Subject) -> Result:
        model = subject.named_model
        tokenizer = Tokenizer(model)
        named = {
            "tokenizer_config.json": [tokenizer.end_id],
            "generation_config.json": _ids(model / "generation_config.json"),
            "config.json": _ids(model / CONFIG),
        }
        union = sorted({token for ids in named.values() for token in ids})
        problems = []
        if beyond := [token for token in union if token >= len(tokenizer)]:
            text = f"end ids {beyond} are no tokens: the tokenizer has {len(tokenizer)}"
            problems.append(Diagnostic(text, "take tokenizer and config files from one model"))
        turn_end = tokenizer.encode(_TURN_END)
        if len(turn_end) == 1 and turn_end[0] not in union:
            text = f"{_TURN_END} ({turn_end[0]}) ends no answer: {_named(named)}"
            if _is_instruct(model):
                remedy = "take generation_config.json and tokenizer_config.json from the Instruct model"
                problems.append(Diagnostic(text, remedy))
            else:
                remedy = "a base model completes text: do not serve it as chat, or take the Instruct model"
                problems.append(Diagnostic(text, remedy, "warning"))
        return self.judge(problems, f"end ids {', '.join(map(str, union))}: {_named(named)}")


def _ids(path: Path) -> list[int]:
    content = _json(path).get("eos_token_id")
    listed = content if isinstance(content, list) else [content]
    return [token for token in listed if isinstance(token, int)]


def _named(named: dict[str, list[int]]) -> str:
    return ", ".join(f"{file} {', '.join(map(str, ids)) or 'none'}" for file, ids in named.items())


def _is_instruct(directory: Path) -> bool:
    """Qwen's Instruct models sample by default, its base models do not."""
    return "instruct" in directory.resolve().name.lower() or bool(
        _json(directory / "generation_config.json").get("do_sample")
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


class ChatTemplate(Check):
    id = "D13"
    level = "warning"
    title = "the chat template renders ChatML"

    def run(self, subject: Subject) -> Result:
        tokenizer = subject.tokenizer
        template = tokenizer.chat_template
        if template is None:
            text = "tokenizer_config.json has no chat_template, nor is there a chat_template.jinja"
            return self.found(text, "copy them from the Instruct model; clients must render prompts else")
        rendered = render_chat(template, _CONVERSATION)
        turns = [f"{_TURN_START}{turn['role']}\n{turn['content']}{_TURN_END}\n" for turn in _CONVERSATION]
        expected = "".join(turns) + f"{_TURN_START}assistant\n"
        remedy = "take tokenizer.json and tokenizer_config.json from the model as published"
        if rendered != expected:
            at = next(
                (index for index, pair in enumerate(zip(rendered, expected, strict=False)) if pair[0] != pair[1]),
                min(len(rendered), len(expected)),
            )
            here = slice(max(0, at - 8), at + 24)
            text = f"the template is not ChatML: {rendered[here]!r} where {expected[here]!r} belongs"
            return self.found(text, remedy)
        ids = tokenizer.encode(rendered)
        marks = [tokenizer.encode(mark) for mark in (_TURN_START, _TURN_END)]
        counts = [ids.count(mark[0]) if len(mark) == 1 else 0 for mark in marks]
        if counts != [len(turns) + 1, len(turns)]:
            text = f"{_TURN_START} and {_TURN_END} are not single tokens"
            return self.found(text, remedy)
        return Result("ok", f"{len(turns)} turns, {len(ids)} tokens, as ChatML has them")


class KeyBias(Check):
    id = "D14"
    level = "error"
    title = "the KV cache keeps what k_proj's bias makes"

    def run(self, subject: Subject) -> Result:
        norms = np.array(bias_norms(subject.source))
        ratios = norms / max(float(np.median(norms)), float(np.finfo(np.float64).tiny))
        largest = f"k_proj bias norms up to {ratios.max():.1f} times the median (layer {int(ratios.argmax())})"
        quantised = _quantised_kv_cache(subject)
        if ratios.max() <= BIAS_RATIO:
            return Result("ok", f"{largest}; {BIAS_RATIO:g} is the most that 8 bits bear")
        if quantised is None:
            return Result("ok", f"{largest}: leave the KV cache in 16 bit, as it is here")
        text = f"{largest}, and {quantised}: the other layers fall below one step"
        return self.found(text, "leave kv_cache auto; if you must, measure with `trtqwen verify`")


def _quantised_kv_cache(subject: Subject) -> str | None:
    """Who asks for an 8-bit KV cache, if anybody does."""
    if subject.recipe is not None and subject.recipe.checkpoint.kv_cache != "auto":
        return f"the recipe has kv_cache {subject.recipe.checkpoint.kv_cache}"
    if subject.engine is not None:
        algorithm = subject.engine_config.pretrained_config.quantization.kv_cache_quant_algo
        return f"the engine's KV cache is {algorithm}" if algorithm else None
    return None


class Overflow(Check):
    id = "D15"
    level = "warning"
    title = "activations fit the dtype"

    def run(self, subject: Subject) -> Result:
        recipe, trained = subject.named_recipe, subject.hf_config.torch_dtype or "unknown dtype"
        dtype = recipe.checkpoint.dtype
        if dtype != "float16" or trained == "float16":
            return Result("ok", f"weights {trained}, recipe {dtype}")
        text = f"weights {trained}, recipe float16: activations over 65504 become NaN, and answers '!!!!'"
        remedy = "set checkpoint.dtype bfloat16 (as fast on Ada), or run `trtqwen verify`, which measures the largest"
        if recipe.engine.backend == "tensorrt_llm" and not recipe.serve.enable_context_fmha_fp32_acc:
            remedy += ", and set serve.enable_context_fmha_fp32_acc"
        return self.found(text, remedy)


class Vocabulary(Check):
    id = "D16"
    level = "error"
    title = "embedding, lm_head and tokenizer agree"

    def run(self, subject: Subject) -> Result:
        source = subject.source
        config = source.config
        embedding, head = "model.embed_tokens.weight", "lm_head.weight"
        if embedding not in source:
            raise Skip("the model has no embedding, see D10")
        problems = []
        if (rows := source.spec(embedding).shape[0]) != config.vocab_size:
            text = f"the embedding has {rows} rows, config.json says vocab_size {config.vocab_size}"
            problems.append(Diagnostic(text, "take config.json and weights from one model"))
        if not config.tie_word_embeddings and head not in source:
            text = "tie_word_embeddings is false, but there is no lm_head.weight"
            problems.append(
                Diagnostic(text, "set tie_word_embeddings true if the model ties them, or download again")
            )
        if config.tie_word_embeddings and head in source and not _same_rows(source, embedding, head):
            text = "tie_word_embeddings is true, but lm_head.weight differs from the embedding: a stale one?"
            problems.append(Diagnostic(text, "remove lm_head.weight or set tie_word_embeddings false"))
        if (source.directory / "tokenizer.json").is_file() and len(subject.tokenizer) > config.vocab_size:
            text = f"the tokenizer has {len(subject.tokenizer)} tokens, the model {config.vocab_size} rows"
            problems.append(Diagnostic(text, "take the tokenizer of this model"))
        padding = -config.vocab_size % (subject.recipe.checkpoint.tp_size if subject.recipe else 1)
        padded = f", padded by {padding} for the ranks" if padding else ""
        tied = "tied" if config.tie_word_embeddings else "untied"
        return self.judge(problems, f"{config.vocab_size} rows, {tied}{padded}")


def _same_rows(source: HfModel, first: str, second: str) -> bool:
    """Whether the beginnings of two matrices are equal; a stale one differs everywhere."""
    if source.spec(first).shape != source.spec(second).shape:
        return False
    return bool(np.array_equal(source.tensor(first)[:_SAMPLED_ROWS], source.tensor(second)[:_SAMPLED_ROWS]))


CHECKS: tuple[Check, ...] = (
    Family(),
    Divisible(),
    StopIds(),
    ChatTemplate(),
    KeyBias(),
    Overflow(),
    Vocabulary(),
)
