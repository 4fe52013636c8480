"""Models and tokenizers of transformers, which is imported when the first of them is made.

That import takes four seconds of a core; most test processes never need it.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtqwen.demo import MODEL

if TYPE_CHECKING:
    import torch
    from transformers import Qwen2ForCausalLM

TINY: dict[str, Any] = {
    "vocab_size": 515,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
}


def random_model(seed: int = 0, dtype: torch.dtype | None = None, **changes: Any) -> Qwen2ForCausalLM:
    """A random Qwen2, float32 by default, with biases that matter, unlike transformers' initial zeros."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(**(TINY | changes), architectures=["Qwen2ForCausalLM"])
    model = Qwen2ForCausalLM(config).to(dtype or torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model.eval()


@cache
def bundled_model() -> Any:
    """The bundled model in float32, as transformers computes it. Tests must not change it."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@cache
def their_tokenizer(directory: Path = MODEL) -> Any:
    """The tokenizer of a directory, as transformers reads it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)
