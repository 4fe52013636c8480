"""File names inside a checkpoint, an engine and a model repository.

Every package that reads or writes an artifact takes its names from here, so that a serving process does not import
the converter.
"""

from __future__ import annotations

from pathlib import Path

CONFIG = "config.json"  # of a Hugging Face directory, a checkpoint and an engine
TOKENIZER_DIRECTORY = "tokenizer"  # in a checkpoint and an engine
HF_MODEL = "model"  # Hugging Face directory in an engine of the backends vllm and llmapi
MODEL_CONFIG = "config.pbtxt"  # of each model in a Triton model repository


def rank_weights(rank: int) -> str:
    """The weights of one rank in a checkpoint and in an engine of the embedded executor."""
    return f"rank{rank}.safetensors"


def rank_engine(rank: int) -> str:
    """The TensorRT engine of one rank."""
    return f"rank{rank}.engine"


def tokenizer_directory(repository: Path) -> Path:
    """Where a model repository keeps the tokenizer."""
    return repository / "preprocessing" / "1" / TOKENIZER_DIRECTORY
