"""Names and shapes of a Qwen2 model's tensors, and checks of other names."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import numpy as np

from trtqwen.diagnostics import Diagnostic, SourceError
from trtqwen.hf.config import HfConfig
from trtqwen.safetensors_io.format import TensorSpec

EMBEDDING, NORM, LM_HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
_FLOATS = ("float64", "float32", "float16", "bfloat16")
_LORA = re.compile(r"\blora_|\.base_layer\.|\.modules_to_save\.|\.original_module\.|\.(ia3|vera|oft|boft|hada)_")
_QUANTIZED = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|weight_scale(_inv|_2)?|weight_packed|weight_shape|weight_zero_point|input_scale"
    r"|absmax|quant_map|nested_absmax|SCB|scales_and_zeros|codes|codebooks|weight\.(absmax|quant_map|quant_state.*))$"
)
_BUFFERS = re.compile(r"\.(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias|self_attn\.bias|embed_positions)$")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_PREFIXES = {
    "_orig_mod.": "torch.compile wrapped the model: save its _orig_mod",
    "base_model.model.": "PEFT wrapped the model: save what merge_and_unload() returns",
    "base_model.": "PEFT wrapped the model: save what merge_and_unload() returns",
    "module.": "DataParallel wrapped the model: save its module",
    "_fsdp_wrapped_module.": "FSDP wrapped the model: save its full state dict",
}
_RENAME = "rename the tensors as Qwen2ForCausalLM has them (model.embed_tokens.weight, ...), and save the model again"
_SEEN = "layers.0.input_layernorm.weight"


def expected_tensors(config: HfConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of the model, `lm_head.weight` included."""
    hidden, inner, size = config.hidden_size, config.intermediate_size, config.head_size
    query, kv = config.num_attention_heads * size, config.num_key_value_heads * size
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.o_proj.weight": (hidden, query),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    for letter, width in (("q", query), ("k", kv), ("v", kv)):
        layer[f"self_attn.{letter}_proj.weight"] = (width, hidden)
        layer[f"self_attn.{letter}_proj.bias"] = (width,)
    table = (config.vocab_size, hidden)
    layers = {
        f"model.layers.{index}.{name}": shape
        for index in range(config.num_hidden_layers)
        for name, shape in layer.items()
    }
    return {EMBEDDING: table, **layers, NORM: (hidden,), LM_HEAD: table}


def check_names(directory: Path, names: Collection[str], config: HfConfig) -> list[Diagnostic]:
    """Check the names of a directory's tensors.

    Returns:
        Findings about tensors that the model does not need.

    Raises:
        SourceError: if tensors are missing, or others would change the model and are not supported.
    """
    expected = expected_tensors(config)
    if lora := _first(names, _LORA):
        raise SourceError(
            f"{directory}: holds tensors of an unmerged adapter such as LoRA ({lora!r}), which would be left out",
            "merge them with PEFT's merge_and_unload() and save the model again",
        )
    if quantized := _first(names, _QUANTIZED):
        raise SourceError(
            f"{directory}: the weights are quantized already (tensor {quantized!r})", "use the 16-bit original"
        )
    _check_prefix(directory, names)
    missing = [name for name in expected if name not in names]
    if missing == [EMBEDDING] and config.tie_word_embeddings:
        missing = []  # saved tied, with the head's name
    if LM_HEAD in missing and config.tie_word_embeddings:
        missing.remove(LM_HEAD)
    if missing:
        raise SourceError(*_missing(directory, missing))
    ignored = []
    for name in sorted(set(names) - expected.keys()):
        layer = _LAYER.match(name)
        if layer is not None and int(layer[1]) >= config.num_hidden_layers:
            raise SourceError(
                f"{directory}: tensor {name!r} is of a layer beyond the {config.num_hidden_layers} of config.json "
                "(num_hidden_layers)",
                "take config.json and weights from one model, or correct num_hidden_layers",
            )
        if name.startswith(("model.", "lm_head.")) and not _BUFFERS.search(name):
            raise SourceError(
                f"{directory}: tensor {name!r} does not belong to Qwen2: transformers ignores it, and what "
                "the model learned in it is lost",
                "remove the tensor if it means nothing, or use a model without it",
            )
        ignored.append(name)
    return list(_ignored(directory, ignored))


def check_specs(directory: Path, specs: Mapping[str, TensorSpec], config: HfConfig) -> None:
    """Check shapes and dtypes of the model's tensors.

    Raises:
        SourceError: naming the first that does not fit config.json.
    """
    for name, shape in expected_tensors(config).items():
        if name not in specs:
            continue
        spec = specs[name]
        if 0 in spec.shape:
            raise SourceError(
                f"{directory}: tensor {name!r} is empty, as ZeRO-3 leaves it where parameters are not gathered",
                "save the model with stage3_gather_16bit_weights_on_model_save, or merge it with zero_to_fp32.py",
            )
        if spec.shape != shape:
            raise SourceError(
                f"{directory}: tensor {name!r} has shape {list(spec.shape)}, but config.json makes it {list(shape)}",
                "take config.json and weights from one model",
            )
        if spec.dtype.name not in _FLOATS:
            raise SourceError(
                f"{directory}: tensor {name!r} is {spec.dtype}", "save the weights as 16-, 32- or 64-bit floats"
            )


def stored_dtype(specs: Mapping[str, TensorSpec]) -> np.dtype[np.generic] | None:
    """The dtype of the embedding, else of the first floating-point tensor."""
    floats = [spec.dtype for spec in specs.values() if spec.dtype.name in _FLOATS]
    for name in (EMBEDDING, LM_HEAD):
        if name in specs and specs[name].dtype.name in _FLOATS:
            return specs[name].dtype
    return floats[0] if floats else None


def _first(names: Collection[str], pattern: re.Pattern[str]) -> str | None:
    return next((name for name in sorted(names) if pattern.search(name)), None)


def _check_prefix(directory: Path, names: Collection[str]) -> None:
    seen = next((name for name in sorted(names) if name.endswith(_SEEN)), None)
    if seen is None or seen == f"model.{_SEEN}":
        return
    prefix = seen.removesuffix(_SEEN).removesuffix("model.")
    if not seen.removesuffix(_SEEN):
        raise SourceError(
            f"{directory}: tensor names lack the prefix 'model.' ({seen!r}): the model was saved without its head",
            f"save the whole Qwen2ForCausalLM; or {_RENAME}",
        )
    if seen.startswith("model.model."):
        prefix = "model.model."
    hint = next((advice for known, advice in _PREFIXES.items() if prefix.startswith(known)), "")
    raise SourceError(
        f"{directory}: tensor names begin with {prefix or seen.removesuffix(_SEEN)!r} ({seen!r})",
        f"{hint}; or {_RENAME}" if hint else _RENAME,
    )


def _missing(directory: Path, missing: list[str]) -> tuple[str, str]:
    if missing == [LM_HEAD]:
        return (
            f"{directory}: tensor {LM_HEAD!r} is missing, and config.json does not tie it to the embedding "
            "(tie_word_embeddings is false); transformers would draw it at random",
            "use a model that generates text, not an embedding model, or set tie_word_embeddings to true if it ties",
        )
    more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
    if all(name.endswith("_proj.bias") for name in missing):
        return (
            f"{directory}: tensor {missing[0]!r} is missing{more}: Qwen2's q, k and v have biases",
            "use a model of this architecture; a Llama or Mistral has none",
        )
    return f"{directory}: tensor {missing[0]!r} is missing{more}", "the model is incomplete, download it again"


def _ignored(directory: Path, names: list[str]) -> Iterator[Diagnostic]:
    said = [name for name in names if not _BUFFERS.search(name)]
    if said:
        words = ", ".join(said[:4]) + (f" and {len(said) - 4} more" if len(said) > 4 else "")
        yield Diagnostic(
            f"{directory}: {len(said)} tensor{'s' if len(said) > 1 else ''} of the files "
            f"{'do' if len(said) > 1 else 'does'} not belong to Qwen2 and will not be converted: {words}",
            "check that the model does without",
            "warning",
            "tensors",
        )
