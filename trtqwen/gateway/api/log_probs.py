"""Log probabilities in the shapes that chats, completions and vLLM's `prompt_logprobs` have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trtqwen.gateway.generation.plan import TokenLogProb

TokenBytes = Sequence[bytes]


def chat_log_probs(entries: Sequence[TokenLogProb], token_bytes: TokenBytes) -> dict[str, Any]:
    """`logprobs` of a chat's choice."""
    content = [
        {
            **_token(entry.text, entry.log_prob),
            "top_logprobs": [_token(_bytes(token_id, token_bytes), value) for token_id, value in entry.top],
        }
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def completion_log_probs(
    entries: Sequence[TokenLogProb], token_bytes: TokenBytes, offset: int, count: int
) -> dict[str, Any]:
    """`logprobs` of a completion's choice.

    Args:
        offset: characters of the text in front of the entries' own.
        count: how many of the most likely tokens were asked for; of 0, there is no list of them.
    """
    return {
        "tokens": [_shown(entry.text) for entry in entries],
        "token_logprobs": [entry.log_prob for entry in entries],
        "top_logprobs": [_top(entry, token_bytes) for entry in entries] if count else None,
        "text_offset": [entry.start + offset for entry in entries],
    }


def prompt_log_probs(entries: Sequence[TokenLogProb], token_bytes: TokenBytes) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: for each prompt token an object by token id, null for the first."""
    return [None if entry.log_prob is None else _ranked(entry, token_bytes) for entry in entries]


def _ranked(entry: TokenLogProb, token_bytes: TokenBytes) -> dict[str, Any]:
    ranked = {
        str(token_id): {"logprob": value, "rank": rank, "decoded_token": _shown(_bytes(token_id, token_bytes))}
        for rank, (token_id, value) in enumerate(entry.top, 1)
    }
    own = {"logprob": entry.log_prob, "rank": None, "decoded_token": _shown(entry.text)}
    return {str(entry.token_id): own} | ranked


def _top(entry: TokenLogProb, token_bytes: TokenBytes) -> dict[str, float] | None:
    """The most likely tokens' texts and log probabilities, the chosen one's too; None where nothing is known.

    Several tokens may have one text, as halves of characters do: the most likely counts.
    """
    if entry.log_prob is None:
        return None
    top: dict[str, float] = {}
    for token_id, value in entry.top:
        top.setdefault(_shown(_bytes(token_id, token_bytes)), value)
    top.setdefault(_shown(entry.text), entry.log_prob)
    return top


def _token(text: bytes, log_prob: float | None) -> dict[str, Any]:
    return {"token": _shown(text), "bytes": list(text), "logprob": log_prob}


def _bytes(token_id: int, token_bytes: TokenBytes) -> bytes:
    return token_bytes[token_id] if token_id < len(token_bytes) else b""


def _shown(text: bytes) -> str:
    return text.decode(errors="replace")
