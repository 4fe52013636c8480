"""Agreement of the answers of servers: greedy tokens, their first difference, and the perplexity of a text.

Perplexity uses the same interface as answers: a logit bias forces each next token of the text, and the server returns
its log probability, which it computes before the bias.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass

from trtqwen.bench.endpoint import Target, connect
from trtqwen.bench.workload import Ask
from trtqwen.diagnostics import ServerError
from trtqwen.hf.tokenizer import Tokenizer

FORCE = 100.0  # what OpenAI and vLLM allow
_AT_ONCE = 8
PROMPTS = (
    "The capital of France is",
    "2 + 2 =",
    "Write a short poem about the sea.",
    "你好，请介绍一下你自己。",
    "def fibonacci(n):",
    "Translate to German: good morning",
    "Once upon a time",
    "List three colors:",
)
TEXT = (
    "The quick brown fox jumps over the lazy dog. A language model gives each next word a probability, and the "
    "product of these probabilities says how well it expects a text. 一个语言模型为每个下一个词给出概率。"
)


@dataclass(frozen=True)
class Answers:
    """The answers of one server.

    Attributes:
        token_ids: of each prompt's greedy answer.
        log_probs: of its tokens.
        perplexity: of the text; None if the server returns no log probabilities.
    """

    token_ids: tuple[tuple[int, ...], ...]
    log_probs: tuple[tuple[float, ...], ...]
    perplexity: float | None


@dataclass(frozen=True)
class Agreement:
    """How one server's answers compare with another's.

    Attributes:
        same_answers: answers that are equal in every token.
        same_tokens: share of tokens before the first difference.
        first_difference: index of the first token that differs in each answer; None if all are equal.
        log_prob_difference: mean difference of the log probabilities of the equal tokens.
    """

    answers: int
    same_answers: int
    same_tokens: float
    first_difference: tuple[int | None, ...]
    log_prob_difference: float | None


def ask_for_answers(target: Target, tokenizer: Tokenizer, max_tokens: int, text_tokens: int) -> Answers:
    """Collect a server's greedy answers and its perplexity.

    Args:
        target: one that keeps answers.
        text_tokens: of the text whose perplexity is taken; 0 leaves it out.

    Raises:
        ServerError: if the server fails.
    """
    return asyncio.run(_ask(target, tokenizer, max_tokens, text_tokens))


async def _ask(target: Target, tokenizer: Tokenizer, max_tokens: int, text_tokens: int) -> Answers:
    endpoint, places = await connect(target), asyncio.Semaphore(_AT_ONCE)

    async def answer(prompt: str) -> tuple[tuple[int, ...], tuple[float, ...]]:
        async with places:
            outcome = await endpoint.generate(Ask(tuple(tokenizer.encode(prompt)), max_tokens), lambda tokens: None)
        ids = outcome.token_ids or tokenizer.encode(outcome.text)
        ids = ids[: next((place for place, token in enumerate(ids) if token in target.stop_ids), len(ids))]
        return tuple(ids), tuple(outcome.log_probs[: len(ids)])

    async def forced(ids: Sequence[int]) -> float:
        *prompt, token = ids
        async with places:
            outcome = await endpoint.generate(Ask(tuple(prompt), 1), lambda tokens: None, {token: FORCE})
        if not outcome.log_probs or (outcome.token_ids and outcome.token_ids != [token]):
            raise ServerError(f"{target.url}: returns no log probability of a forced token")
        return outcome.log_probs[0]

    try:
        answers = await asyncio.gather(*(answer(prompt) for prompt in PROMPTS))
        perplexity = None
        if text_tokens and (target.vocab_size or target.api != "grpc"):
            ids = tokenizer.encode(TEXT)[: text_tokens + 1]
            try:
                values = await asyncio.gather(*(forced(ids[:end]) for end in range(2, len(ids) + 1)))
                perplexity = math.exp(-sum(values) / len(values))
            except ServerError:
                perplexity = None
    finally:
        await endpoint.close()
    return Answers(tuple(ids for ids, _ in answers), tuple(log_probs for _, log_probs in answers), perplexity)


def compare_answers(one: Answers, other: Answers) -> Agreement:
    """Compare the second server's answers with the first's."""
    parts: list[int | None] = []
    equal = total = 0
    differences: list[float] = []
    pairs = zip(one.token_ids, other.token_ids, one.log_probs, other.log_probs, strict=True)
    for ids, theirs, log_probs, their_log_probs in pairs:
        length = max(len(ids), len(theirs))
        same = next((place for place, (a, b) in enumerate(zip(ids, theirs, strict=False)) if a != b), None)
        if same is None and len(ids) != len(theirs):
            same = min(len(ids), len(theirs))
        parts.append(same)
        kept = length if same is None else same
        equal += kept
        total += length
        differences += [abs(a - b) for a, b in zip(log_probs[:kept], their_log_probs[:kept], strict=False)]
    return Agreement(
        answers=len(parts),
        same_answers=parts.count(None),
        same_tokens=equal / total if total else 1.0,
        first_difference=tuple(parts),
        log_prob_difference=sum(differences) / len(differences) if differences else None,
    )
