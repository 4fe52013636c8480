"""The rotary embedding that a `config.json` asks for, whichever release of transformers wrote it.

transformers 4 writes `rope_theta` and `rope_scaling`; transformers 5 joins them in `rope_parameters`. Each reads
the other's files with its own defaults for absent fields, so contradictory files are refused here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtqwen.diagnostics import Diagnostic, SourceError
from trtqwen.hf.files import shown

DEFAULT_THETA = 10000.0  # transformers' for Qwen2; NVIDIA's converter takes 100000
KEYS = ("rope_theta", "rope_scaling", "rope_parameters")
_LAYER_TYPE = "full_attention"
_COMMON = {"factor", "original_max_position_embeddings"}
_FIELDS = {  # what each type reads, besides its name
    "default": set[str](),
    "linear": {"factor"},
    "dynamic": {"factor", "original_max_position_embeddings"},
    "yarn": _COMMON | {"beta_fast", "beta_slow", "mscale", "mscale_all_dim"},
    "longrope": _COMMON | {"short_factor", "long_factor", "attention_factor"},
    "llama3": _COMMON | {"low_freq_factor", "high_freq_factor"},
}


@dataclass(frozen=True)
class Rope:
    """A model's rotary embedding.

    Attributes:
        scaling: as a TensorRT-LLM checkpoint has it, with `type` and `rope_type`; None for plain rotations.
        context: tokens that the scaling reaches; None without YaRN.
        findings: defaults that apply.
    """

    theta: float
    scaling: dict[str, Any] | None
    context: int | None
    findings: tuple[Diagnostic, ...] = ()


def read_rope(data: Mapping[str, Any], path: Path) -> Rope:
    """Read the rotary fields of a config.

    Args:
        data: config.json without its nulls.

    Raises:
        SourceError: if two fields contradict each other, or one asks for what is not computed.
    """
    sources = {key: _flat(data[key], key, path) for key in KEYS[1:] if data.get(key)}
    theta, findings = _theta(data, sources, path)
    kinds = {key: _kind(fields, key, path) for key, fields in sources.items()}
    findings += [said for key, kind in kinds.items() for said in _unread(kind, sources[key], key, path)]
    scalings = {
        key: _scaling(kind, sources[key], key, data, path) for key, kind in kinds.items() if kind != "default"
    }
    if (len(kinds) == 2 and len(scalings) < 2 and scalings) or (len(scalings) == 2 and not _alike(scalings)):
        raise SourceError(
            f"{path}: rope_scaling {shown(data['rope_scaling'])} and rope_parameters "
            f"{shown(data['rope_parameters'])} differ; transformers takes rope_scaling",
            "remove the one that the model was not trained with",
        )
    if not scalings:
        return Rope(theta, None, None, tuple(findings))
    key, scaling = next(iter(scalings.items()))
    context = None
    if scaling["type"] == "yarn":
        if "original_max_position_embeddings" not in sources[key]:
            findings.append(
                Diagnostic(
                    f"{path}: {key} has no original_max_position_embeddings: "
                    f"{scaling['original_max_position_embeddings']} is used, as transformers does "
                    "(TensorRT-LLM would take 4096)",
                    "add it to the file, as the model's card has it",
                    "warning",
                    "config",
                )
            )
        context = math.floor(scaling["original_max_position_embeddings"] * scaling["factor"])
    return Rope(theta, scaling, context, tuple(findings))


def _flat(fields: Any, key: str, path: Path) -> dict[str, Any]:
    """The fields without nulls; those of the only layer type where they are given for each."""
    if not isinstance(fields, dict):
        raise SourceError(f"{path}: {key} is {shown(fields)}, not an object", "correct it")
    if _LAYER_TYPE in fields:
        others = sorted(name for name, value in fields.items() if name != _LAYER_TYPE and value is not None)
        if others:
            raise SourceError(
                f"{path}: {key} has rotations of several kinds of layers ({', '.join(others)})",
                "use a model with one rotary embedding for all layers",
            )
        return _flat(fields[_LAYER_TYPE], key, path)
    return {name: value for name, value in fields.items() if value is not None}


def _theta(
    data: Mapping[str, Any], sources: Mapping[str, Mapping[str, Any]], path: Path
) -> tuple[float, list[Diagnostic]]:
    said = {"rope_theta": data.get("rope_theta")}
    said |= {f"{key}.rope_theta": fields.get("rope_theta") for key, fields in sources.items()}
    given = {name: value for name, value in said.items() if value is not None}
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise SourceError(f"{path}: {name} is {shown(value)}, not a positive number", "correct it")
    if len(set(given.values())) > 1:
        words = " and ".join(f"{name} {value:g}" for name, value in given.items())
        raise SourceError(
            f"{path}: {words} contradict each other; transformers 4 takes the first, transformers 5 the last",
            "keep the one that the model was trained with",
        )
    if given:
        return float(next(iter(given.values()))), []
    return DEFAULT_THETA, [
        Diagnostic(
            f"{path}: has no rope_theta: {DEFAULT_THETA:g} is used, as transformers does (NVIDIA's converter would "
            "take 100000)",
            "add the model's own to the file: 1000000 for Qwen2.5, 10000 for Qwen2.5-Math and its descendants",
            "warning",
            "config",
        )
    ]


def _kind(fields: Mapping[str, Any], key: str, path: Path) -> str:
    named = {name: fields[name] for name in ("rope_type", "type") if name in fields}
    if len(set(map(str, named.values()))) > 1:
        raise SourceError(
            f"{path}: {key} has rope_type {shown(named['rope_type'])} and type {shown(named['type'])}; "
            "transformers 4 takes type, transformers 5 rope_type",
            "remove one of the two",
        )
    kind = str(next(iter(named.values()), "default"))
    if kind not in _FIELDS:
        raise SourceError(
            f"{path}: {key} is of type {kind!r}, which dense Qwen2 models do not have",
            f"use a model with one of {', '.join(_FIELDS)}",
        )
    return kind


def _unread(kind: str, fields: Mapping[str, Any], key: str, path: Path) -> Iterator[Diagnostic]:
    """Return the fields that a scaling's type does not read."""
    others = {name: value for name, value in fields.items() if name not in ("type", "rope_type", "rope_theta")}
    if kind != "default" or not others:
        return
    if others.pop("partial_rotary_factor", 1) != 1:
        raise SourceError(*_partial(path, key))
    words = ", ".join(f"{name} {shown(value)}" for name, value in others.items())
    if "factor" in others and not {"type", "rope_type"} & fields.keys():
        raise SourceError(
            f"{path}: {key} has {words} and no rope_type; transformers 4 refuses it, transformers 5 stretches "
            "nothing",
            "add rope_type, as the model's card has it, or remove it",
        )
    if words:
        yield Diagnostic(
            f"{path}: {key} is of type default, which reads no {words}; transformers does not read it either",
            "add the rope_type that the model was trained with, or remove it",
            "warning",
            "config",
        )


def _partial(path: Path, key: str) -> tuple[str, str]:
    return f"{path}: {key}.partial_rotary_factor turns a part of each head only", "trtqwen turns whole heads"


def _scaling(kind: str, fields: Mapping[str, Any], key: str, data: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Check and return the effective fields of a scaling."""
    plain = {
        name: value for name, value in fields.items() if name not in ("type", "rope_type", "rope_theta", "finetuned")
    }
    if plain.pop("partial_rotary_factor", 1) != 1:
        raise SourceError(*_partial(path, key))
    if kind == "yarn":
        plain["original_max_position_embeddings"] = _original(plain, key, data, path)
    if "factor" not in plain:
        raise SourceError(f"{path}: {key} of type {kind} lacks 'factor'", "add it, as the model's card has it")
    for name in (_COMMON | {"beta_fast", "beta_slow"}) & plain.keys():
        value = plain[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise SourceError(f"{path}: {key}.{name} is {shown(value)}, not a positive number", "correct it")
    if kind == "yarn":
        plain = _with_attention(plain, path, key)
    if unknown := sorted(plain.keys() - _FIELDS[kind]):
        words = ", ".join(f"{name} {shown(plain[name])}" for name in unknown)
        raise SourceError(
            f"{path}: {key} of type {kind} has {words}, which trtqwen does not compute",
            "remove it if the model was not trained with it",
        )
    return {"rope_type": kind, **plain, "type": kind}


def _original(plain: Mapping[str, Any], key: str, data: Mapping[str, Any], path: Path) -> Any:
    outer, inner = data.get("original_max_position_embeddings"), plain.get("original_max_position_embeddings")
    if outer is not None and outer != (inner or data.get("max_position_embeddings")):
        raise SourceError(
            f"{path}: original_max_position_embeddings {shown(outer)} contradicts "
            f"{f'{key}.original_max_position_embeddings' if inner else 'max_position_embeddings'} "
            f"{shown(inner or data.get('max_position_embeddings'))}",
            f"give it once, inside {key}",
        )
    return inner or data.get("max_position_embeddings")


def _with_attention(plain: Mapping[str, Any], path: Path, key: str) -> dict[str, Any]:
    """The fields of YaRN with its factor on attention as TensorRT-LLM reads it.

    transformers takes `attention_factor`, else the ratio of `mscale` and `mscale_all_dim` if neither is zero, else
    what follows from the factor. TensorRT-LLM takes the ratio alone, with defaults of 1 and 0.
    """
    fields = dict(plain)
    factor, given = fields["factor"], fields.pop("attention_factor", None)
    mscale, all_dim = fields.pop("mscale", None), fields.pop("mscale_all_dim", None)
    for name, value in (("attention_factor", given), ("mscale", mscale), ("mscale_all_dim", all_dim)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or value < 0):
            raise SourceError(f"{path}: {key}.{name} is {shown(value)}, not a positive number", "correct it")
    if fields.pop("truncate", True) is not True:
        raise SourceError(
            f"{path}: {key}.truncate is {shown(plain['truncate'])}, and TensorRT-LLM's YaRN truncates",
            "remove it if the model was not trained with it",
        )
    usual = attention_factor(factor)
    if given is None:
        given = attention_ratio(factor, mscale, all_dim) if mscale and all_dim else usual
        words = f"mscale {shown(mscale)}, mscale_all_dim {shown(all_dim)}"
    else:
        words = f"attention_factor {shown(given)}"
        mscale, all_dim = (given - 1) / (usual - 1) if factor > 1 else 1.0, 0.0
    if math.isclose(given, usual, rel_tol=1e-6):
        return fields
    if factor <= 1:
        raise SourceError(
            f"{path}: {key} scales attention by {given:g} ({words}) at factor {factor:g}, where TensorRT-LLM's YaRN "
            "does not scale it",
            "remove it if the model was not trained with it",
        )
    return fields | {"mscale": mscale, "mscale_all_dim": all_dim}


def attention_factor(factor: float, mscale: float = 1.0) -> float:
    """YaRN's factor on sines and cosines (Peng et al. 2023), as transformers computes it."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def attention_ratio(factor: float, mscale: float, mscale_all_dim: float) -> float:
    """The factor of a model that names both scales, as DeepSeek's do."""
    return attention_factor(factor, mscale) / attention_factor(factor, mscale_all_dim)


def _alike(scalings: Mapping[str, Any]) -> bool:
    first, second = scalings.values()
    return bool(first == second)
