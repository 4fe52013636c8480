"""Tiles of large matrix products: their order, and what the card offers to compute them."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl


@triton.jit
def place_of(tile, row_tiles, column_tiles, GROUP: tl.constexpr):
    """Row and column of a tile, in tiles. Tiles that share either follow each other: GROUP rows to each column."""
    in_group = GROUP * column_tiles
    first = (tile // in_group) * GROUP
    height = min(row_tiles - first, GROUP)
    return first + (tile % in_group) % height, (tile % in_group) // height


@cache
def has_accelerator() -> bool:
    """Whether the card copies tiles by itself."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


@cache
def processors(device: torch.device) -> int:
    """How many streaming multiprocessors the card has."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
