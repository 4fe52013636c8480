"""transformers as a second reference: its reading of the same directory, compared with trtqwen's."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtqwen.diagnostics import EngineError, InputError
from trtqwen.hf.tokenizer import Tokenizer

_TOLERANCE = 1e-3  # of the logarithm of perplexity: both compute in float32
_CONVERSATIONS = (
    [{"role": "user", "content": "Hello"}],
    [
        {"role": "system", "content": "Be terse."},
        {"role": "user", "content": "你好"},
        {"role": "assistant", "content": "你好！"},
        {"role": "user", "content": "2+2?"},
    ],
)


@dataclass(frozen=True)
class TransformersReference:
    """The results of transformers for a model.

    Attributes:
        version: of transformers.
        perplexity: of the samples, in float32.
        problems: differences from trtqwen's reading, one sentence each.
    """

    version: str
    perplexity: float
    problems: tuple[str, ...]


def require_transformers() -> None:
    """Refuse where transformers is not installed.

    Raises:
        EngineError: with what to install.
    """
    if importlib.util.find_spec("transformers") is None:
        raise EngineError(
            "--reference transformers needs transformers, which is not installed", "`pip install transformers`"
        )


def transformers_reference(
    model: Path, samples: Sequence[list[int]], texts: Sequence[str], perplexity: float
) -> TransformersReference:
    """Load a model with transformers, whole and in float32, and compare.

    Args:
        samples: token ids, at least two each.
        texts: whose ids are compared.
        perplexity: of the samples, by trtqwen's own reading of the directory.

    Raises:
        InputError: if transformers cannot load the directory.
    """
    import transformers

    try:
        theirs = transformers.AutoTokenizer.from_pretrained(str(model))
        measured = _perplexity(model, samples)
    except Exception as problem:  # it passes on errors of any library
        words = " ".join(str(problem).split())
        raise InputError(
            f"{model}: transformers {transformers.__version__} cannot load it ({type(problem).__name__}: {words})",
            "verify without --reference",
        ) from None
    problems = list(_tokenizer_problems(Tokenizer(model), theirs, texts))
    if not abs(math.log(measured / perplexity)) < _TOLERANCE:
        problems.insert(
            0,
            f"transformers {transformers.__version__} computes a perplexity of {measured:.4f} from {model}, trtqwen "
            f"{perplexity:.4f}",
        )
    return TransformersReference(transformers.__version__, measured, tuple(problems))


def _perplexity(model: Path, samples: Sequence[list[int]]) -> float:
    import torch
    import transformers

    network = transformers.AutoModelForCausalLM.from_pretrained(str(model), torch_dtype=torch.float32).eval()
    total, count = 0.0, 0
    with torch.inference_mode():
        for sample in samples:
            ids = torch.tensor([sample])
            predicted = network(ids).logits[0, :-1].double().log_softmax(-1)
            total -= float(predicted.gather(1, ids[0, 1:, None]).sum())
            count += len(sample) - 1
    return math.exp(total / count)


def _tokenizer_problems(ours: Tokenizer, theirs: Any, texts: Sequence[str]) -> Iterator[str]:
    for text in texts:
        if ours.encode_prompt(text) != theirs(text)["input_ids"]:
            yield f"transformers gives other token ids for {text[:40]!r}"
            break
    if ours.chat_template is None:
        return
    for messages in _CONVERSATIONS:
        try:
            wanted = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception:  # a template may refuse a system's message
            continue
        if ours.chat_template.render(messages) != wanted:
            yield f"transformers renders the chat {messages[0]['content']!r} otherwise"
