"""Log probabilities before penalties and masks, of chosen tokens and of the most likely ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Likeliest:
    """The most likely tokens at some positions, in falling order.

    Attributes:
        ids: int32 [places, count].
        log_probs: float32 [places, count].
    """

    ids: Tensor
    log_probs: Tensor


def likeliest(logits: Tensor, count: int) -> Likeliest:
    """Find them on the logits' device.

    Args:
        logits: float [places, vocab_size].

    Returns:
        On the host.
    """
    values, ids = torch.topk(logits, min(count, logits.shape[-1]), dim=-1)
    values = values.float() - logits.float().logsumexp(dim=-1, keepdim=True)
    return Likeliest(ids.to("cpu", torch.int32), values.to("cpu"))


def log_probs_of(logits: Tensor, token_ids: Tensor) -> Tensor:
    """Log probability of a token at each place, float32 [places], on the host.

    Args:
        logits: float [places, vocab_size].
        token_ids: int64 [places].
    """
    chosen = logits.gather(1, token_ids[:, None])[:, 0].float()
    return (chosen - logits.float().logsumexp(dim=-1)).cpu()
