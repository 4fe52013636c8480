"""Comparison of two models' final logits by blocks of the vocabulary, without whole heads or logits in memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ROWS = 4096  # vocabulary entries at a time


@dataclass(frozen=True)
class HeadComparison:
    """The model against the checkpoint, over all predicted tokens.

    Attributes:
        kl_mean, kl_max: KL(model || checkpoint) of the next-token distributions, nats.
        top1_agreement: share of tokens for which both rate the same token highest.
        model_perplexity, checkpoint_perplexity: of the text.
        tokens: predicted tokens.
    """

    kl_mean: float
    kl_max: float
    top1_agreement: float
    model_perplexity: float
    checkpoint_perplexity: float
    tokens: int

    @property
    def perplexity_increase(self) -> float:
        """Relative: 0.01 is one percent."""
        return self.checkpoint_perplexity / self.model_perplexity - 1


class LogitsComparer:
    """Takes both models' logits block by block of the vocabulary.

    Args:
        targets: the tokens to predict, int64 [tokens].
    """

    def __init__(self, targets: Tensor) -> None:
        self._targets = targets
        self._model = _Softmax(targets)
        self._checkpoint = _Softmax(targets)
        self._gap = torch.zeros(len(targets), dtype=torch.float64, device=targets.device)

    def add(self, start: int, model: Tensor, checkpoint: Tensor) -> None:
        """Logits of vocabulary entries from `start` on, float32 [tokens, entries] each."""
        weights, rescale = self._model.add(start, model)
        self._checkpoint.add(start, checkpoint)
        # The sum over the vocabulary of p * (a - b), relative to the largest logit so far, as the softmax sums are.
        self._gap = self._gap * rescale + (weights * (model - checkpoint)).sum(dim=-1, dtype=torch.float64)

    def result(self) -> HeadComparison:
        ours, theirs = self._checkpoint, self._model
        kl = (self._gap / theirs.total - theirs.log_sum + ours.log_sum).clamp(min=0)  # below 0 by rounding only
        return HeadComparison(
            kl_mean=float(kl.mean()),
            kl_max=float(kl.max()),
            top1_agreement=float((ours.best == theirs.best).double().mean()),
            model_perplexity=theirs.perplexity,
            checkpoint_perplexity=ours.perplexity,
            tokens=len(self._targets),
        )


class _Softmax:
    """Running softmax statistics of each token's logits."""

    def __init__(self, targets: Tensor) -> None:
        count, device = len(targets), targets.device
        self.largest = torch.full((count,), float("-inf"), dtype=torch.float64, device=device)
        self.total = torch.zeros(count, dtype=torch.float64, device=device)
        self.best = torch.zeros(count, dtype=torch.int64, device=device)
        self._targets = targets
        self._target_logits = torch.zeros(count, dtype=torch.float64, device=device)

    def add(self, start: int, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Returns exp(logits - largest so far) and the factor that brings earlier sums to the same base."""
        values, indices = logits.max(dim=-1)
        self.best = torch.where(values > self.largest, indices + start, self.best)
        largest = torch.maximum(self.largest, values.double())
        rescale = (self.largest - largest).exp()
        weights = (logits - largest[:, None].float()).exp()
        self.total = self.total * rescale + weights.sum(dim=-1, dtype=torch.float64)
        self.largest = largest
        here = (self._targets >= start) & (self._targets < start + logits.shape[1])
        self._target_logits[here] = logits[here, self._targets[here] - start].double()
        return weights, rescale

    @property
    def log_sum(self) -> Tensor:
        return self.largest + self.total.log()

    @property
    def perplexity(self) -> float:
        return float((self.log_sum - self._target_logits).mean().exp())
