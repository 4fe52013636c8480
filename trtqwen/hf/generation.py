"""`generation_config.json`: a model's sampling defaults."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from trtqwen.diagnostics import Diagnostic, SourceError, first_problem
from trtqwen.hf.files import GENERATION_CONFIG, read_json, shown

# What transformers' `generate` applies and no server of trtqwen does, with the values that change nothing.
_NOT_APPLIED: dict[str, tuple[Any, ...]] = {
    "bad_words_ids": ([],),
    "begin_suppress_tokens": ([],),
    "diversity_penalty": (0,),
    "dola_layers": (),
    "encoder_repetition_penalty": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "exponential_decay_length_penalty": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beam_groups": (1,),
    "num_beams": (1,),
    "penalty_alpha": (0,),
    "sequence_bias": ({}, []),
    "stop_strings": ([], ""),
    "suppress_tokens": ([],),
    "top_h": (1,),
    "typical_p": (1,),
    "watermarking_config": (),
}


class GenerationDefaults(BaseModel):
    """The sampling section of a model's generation_config.json; a missing file means sampling at temperature 1."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    do_sample: bool = True
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0

    @field_validator("top_k", mode="before")
    @classmethod
    def _all_tokens(cls, value: Any) -> Any:
        """Read -1, vLLM's value for all tokens."""
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


def generation_findings(directory: Path) -> Iterator[Diagnostic]:
    """Settings of generation_config.json that transformers applies and trtqwen does not."""
    content = read_json(directory / GENERATION_CONFIG)
    acting = {
        key: content[key]
        for key, neutral in _NOT_APPLIED.items()
        if content.get(key) is not None and content[key] not in neutral
    }
    if acting:
        words = ", ".join(f"{key} {shown(value)}" for key, value in acting.items())
        yield Diagnostic(
            f"{directory / GENERATION_CONFIG}: {words}: transformers applies {'it' if len(acting) == 1 else 'them'} "
            "to every answer, trtqwen does not",
            "send what a request can say, such as stop, with each request",
            "warning",
            "generation-config",
        )
