"""Checks of a conversion before anything is written."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from trtqwen.checkpoint.mapping import RankMapping
from trtqwen.checkpoint.shapes import TILE
from trtqwen.checkpoint.sharding import check_parallel
from trtqwen.diagnostics import CheckpointError, OutputError
from trtqwen.facts.releases import release_facts
from trtqwen.hf.config import HfConfig
from trtqwen.recipe import CheckpointRecipe


def check_settings(config: HfConfig, mapping: RankMapping, settings: CheckpointRecipe) -> None:
    """Check sizes against parallelism, precision and release.

    Raises:
        CheckpointError: naming the size that does not fit.
    """
    check_parallel(config, mapping)
    _check_pipeline(config, mapping, settings)
    _check_release(config, settings)
    if settings.quant == "int8_wo":
        _check_weight_only(config, mapping, settings)
    if settings.quant == "int8_sq" and mapping.tp_size > config.num_key_value_heads:
        raise CheckpointError(
            (f"tp_size {mapping.tp_size}: SmoothQuant cannot repeat the {config.num_key_value_heads} KV heads"),
            f"use at most tp_size {config.num_key_value_heads}, or quant int8_wo",
        )


def check_disk(output: Path, nbytes: int) -> None:
    """Refuse to write more than the disk can hold.

    Raises:
        OutputError: with the sizes.
    """
    parent = next(parent for parent in output.absolute().parents if parent.exists())
    free = shutil.disk_usage(parent).free
    if free < nbytes:
        unit, name = (1e9, "GB") if nbytes >= 1e9 else (1e6, "MB")
        what = f"{output}: needs {nbytes / unit:.1f} {name}, but {parent} has {free / unit:.1f} {name} free"
        raise OutputError(what, "free some space, or choose a directory on another disk")


def write_hint(problem: OSError) -> str:
    """Return the hint for a failed write."""
    if problem.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free some space, or choose a directory on another disk"
    return "check the disk and the file system that holds the directory"


def _check_pipeline(config: HfConfig, mapping: RankMapping, settings: CheckpointRecipe) -> None:
    layers, stages = config.num_hidden_layers, mapping.pp_size
    if stages > layers:
        raise CheckpointError(f"pp_size {stages}: the model has only {layers} layers", "use a smaller pp_size")
    if layers % stages and not release_facts(settings.release).uneven_pipeline:
        raise CheckpointError(
            (
                f"pp_size {stages}: does not divide {layers} layers, and release {settings.release} would "
                "drop the rest"
            ),
            "use a divisor or a newer release",
        )


def _check_release(config: HfConfig, settings: CheckpointRecipe) -> None:
    if config.rope_scaling is None:
        return
    kind = config.rope_scaling.get("rope_type")
    known = release_facts(settings.release).rope_scalings
    if kind not in known:
        raise CheckpointError(
            f"rope_scaling type {kind}: release {settings.release} computes {', '.join(known)} only",
            "use a newer release or remove it from config.json",
        )


def _check_weight_only(config: HfConfig, mapping: RankMapping, settings: CheckpointRecipe) -> None:
    unit = TILE * mapping.tp_size
    attention = config.num_attention_heads * config.head_size
    kv = max(config.num_key_value_heads, mapping.tp_size) * config.head_size
    sizes = {"hidden size": config.hidden_size, "attention width": attention, "qkv width": attention + 2 * kv}
    if settings.int8_layout == "plain":
        sizes["intermediate size"] = config.intermediate_size
    for name, size in sizes.items():
        if size % unit:
            hint = "use int8_layout sm80 or sm90, which pad it" if name == "intermediate size" else "lower tp_size"
            raise CheckpointError(
                f"INT8 weight-only at tp_size {mapping.tp_size}: {name} {size} is not a multiple of {unit}",
                hint,
            )
