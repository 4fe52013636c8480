"""`generation_config.json`: a model's sampling defaults and the ids that end its answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from trtqwen.diagnostics import SourceError, first_problem
from trtqwen.hf.config import token_ids
from trtqwen.hf.files import read_json
from trtqwen.layout import CONFIG

GENERATION_CONFIG = "generation_config.json"


class GenerationDefaults(BaseModel):
    """The sampling section of a model's generation_config.json; a missing file means sampling at temperature 1."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    do_sample: bool = True
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    repetition_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0

    @field_validator("top_k", mode="before")
    @classmethod
    def _all_tokens(cls, value: Any) -> Any:
        """-1 is vLLM's word for all tokens."""
        return 0 if value == -1 else value


def generation_defaults(directory: Path) -> GenerationDefaults:
    """Read the defaults of a directory; a null counts as absent.

    Raises:
        SourceError: if a value is out of range.
    """
    path = directory / GENERATION_CONFIG
    content = {key: value for key, value in read_json(path).items() if value is not None}
    try:
        return GenerationDefaults.model_validate(content)
    except ValidationError as problem:
        raise SourceError(f"{path}: {first_problem(problem)}", "correct it") from None


def named_end_ids(directory: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The end ids that generation_config.json and config.json name, by file.

    Raises:
        SourceError: if one is not a token id.
    """
    for name in (GENERATION_CONFIG, CONFIG):
        path = directory / name
        yield name, token_ids(read_json(path).get("eos_token_id"), "eos_token_id", path)
