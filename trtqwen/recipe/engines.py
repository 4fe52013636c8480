"""Settings of engines that have arguments of their own: vLLM, and TensorRT-LLM's LLM API."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from trtqwen.diagnostics import SettingError
from trtqwen.facts.llmapi import llm_arguments
from trtqwen.facts.names import LlmApiRelease, VllmRelease
from trtqwen.facts.vllm import vllm_facts

# Options of vLLM that other fields of the recipe decide.
_VLLM_OWN = (
    *("model", "tokenizer", "served-model-name", "dtype", "host", "port", "uds", "generation-config"),
    *("max-model-len", "max-num-seqs", "max-num-batched-tokens", "block-size", "num-gpu-blocks-override"),
    *("tensor-parallel-size", "pipeline-parallel-size", "gpu-memory-utilization", "logprobs-mode"),
    *("enable-prompt-tokens-details", "structured-outputs-config"),
    *("enable-prefix-caching", "no-enable-prefix-caching", "enable-chunked-prefill", "no-enable-chunked-prefill"),
)

# Arguments of the LLM API that other fields of the recipe decide.
_LLMAPI_OWN = (
    *("model", "tokenizer", "dtype", "tensor_parallel_size", "pipeline_parallel_size", "kv_cache_config"),
    *("max_batch_size", "max_num_tokens", "max_seq_len", "enable_chunked_prefill", "scheduler_config"),
)


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class VllmSettings(Section):
    """Where vLLM runs, for backend: vllm. At most one of `python`, `image` and `address` is given.

    Attributes:
        release: the vLLM that serves; its options are checked against the table of this release.
        python: interpreter of the environment that vLLM is installed in. Without it, `serve` takes the environment
            variable TRTQWEN_VLLM_PYTHON, or the `python3` on PATH.
        image: container image to start vLLM in, with docker.
        address: `http://host:port` of a vLLM that already serves the model.
        served_name: what the vLLM at the address calls the model.
        arguments: further options of vLLM's API server, without dashes: `{enforce-eager: true}`.
    """

    release: VllmRelease = "0.32.0"
    python: str | None = None
    image: str | None = None
    address: Annotated[str, Field(pattern=r"^https?://[^/]+$")] | None = None
    served_name: str = "trtqwen"
    arguments: dict[str, bool | int | float | str] = {}

    @model_validator(mode="after")
    def _one_place(self) -> VllmSettings:
        given = [name for name in ("python", "image", "address") if getattr(self, name) is not None]
        if len(given) > 1:
            raise SettingError(f"{' and '.join(given)} exclude each other", "remove all but one")
        if self.address is not None and self.arguments:
            raise SettingError("arguments have no effect on a vLLM that already serves at an address", "remove them")
        return self

    @model_validator(mode="after")
    def _known_arguments(self) -> VllmSettings:
        facts = vllm_facts(self.release)
        for name in self.arguments:
            if name in _VLLM_OWN:
                raise SettingError(f"arguments: trtqwen sets {name} from other fields of the recipe", "remove it")
            if name not in facts.flags:
                near = facts.near(name)
                hint = f"did you mean {near!r}?" if near else "remove it, or set a newer release"
                raise SettingError(f"arguments: vLLM {self.release} has no option {name!r}", hint)
        return self


class LlmApiSettings(Section):
    """How TensorRT-LLM's LLM API runs, for backend: llmapi.

    Attributes:
        release: the TensorRT-LLM that serves; 1.3.0 also stands for later releases.
        arguments: further arguments of `tensorrt_llm.LLM`, by its names.
    """

    release: LlmApiRelease = "1.2.1"
    arguments: dict[str, Any] = {}

    @model_validator(mode="after")
    def _known_arguments(self) -> LlmApiSettings:
        known = llm_arguments(self.release)
        for name in self.arguments:
            if name in _LLMAPI_OWN:
                raise SettingError(f"arguments: trtqwen sets {name} from other fields of the recipe", "remove it")
            if name not in known:
                near = get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else "remove it, or set a newer release"
                raise SettingError(f"arguments: LLM of TensorRT-LLM {self.release} has no argument {name!r}", hint)
        return self
