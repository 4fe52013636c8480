"""The sections of a recipe, and checks across them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError, model_validator

from trtqwen.diagnostics import RecipeError, SettingError, first_hint, first_problem
from trtqwen.facts.names import CardName, Release
from trtqwen.hf.known import model_names
from trtqwen.recipe.engines import LlmApiSettings, Section, VllmSettings

DtypeChoice = Literal["auto", "float16", "bfloat16", "float32"]
Quant = Literal["none", "int8_wo", "int8_sq"]
KvCache = Literal["auto", "int8"]
Int8LayoutChoice = Literal["plain", "sm80", "sm90"]
EmbeddingSharding = Literal["none", "vocab", "hidden"]
Positive = Annotated[int, Field(gt=0, le=2**31 - 1)]  # TensorRT-LLM counts in 32 bits
TORCH_SERVING = ("device", "cuda_graphs", "overlap")
_TENSORRT_SERVING = ("enable_context_fmha_fp32_acc", "kv_cache_host_memory_bytes")


class CheckpointRecipe(Section):
    """How the weights are converted.

    Attributes:
        dtype: `auto` keeps a 16-bit dtype and makes float32 float16, as NVIDIA's converter does.
        tp_size: ranks that share each layer, the tensor-parallel size.
        pp_size: stages of layers, the pipeline-parallel size.
        quant: `int8_wo` is INT8 weight-only (W8A16), `int8_sq` SmoothQuant (W8A8).
        sq_alpha: SmoothQuant's share of the difficulty that goes to the weights.
        per_channel: SmoothQuant scales each output channel of a weight, instead of the tensor.
        per_token: SmoothQuant scales activations token by token at run time, instead of by calibrated ranges.
        kv_cache: `int8` writes the scales of an INT8 KV cache.
        int8_layout: INT8 layout on disk: for the kernels of one GPU generation (sm80 is also Ada's), or `plain`:
            16-bit weights that TensorRT-LLM quantizes when it builds.
        embedding_sharding: whether and how the embedding is divided over the ranks.
        yarn_factor: extend the model's context with YaRN, as Qwen advises beyond 32,768 tokens: 4 gives 131,072.
            The extension is static: it slightly reduces the quality of short prompts too.
        calib: text or JSONL file for calibration; a small one in four languages is bundled.
        chat_template: render each calibration text as a user's message.
        act_ranges: file of activation ranges to use instead of calibrating.
        release: TensorRT-LLM release that reads the checkpoint.
    """

    dtype: DtypeChoice = "auto"
    tp_size: Annotated[int, Field(ge=1, le=8)] = 1
    pp_size: Annotated[int, Field(ge=1, le=4)] = 1
    quant: Quant = "none"
    sq_alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    per_channel: bool = False
    per_token: bool = False
    kv_cache: KvCache = "auto"
    int8_layout: Int8LayoutChoice = "plain"
    embedding_sharding: EmbeddingSharding = "none"
    yarn_factor: Annotated[float, Field(gt=1, le=32)] | None = None
    calib: str | None = None
    chat_template: bool = False
    act_ranges: str | None = None
    release: Release = "1.2.1"

    @property
    def calibrated(self) -> bool:
        """Whether conversion needs activation ranges."""
        return self.quant == "int8_sq" or self.kv_cache == "int8"

    @model_validator(mode="after")
    def _settings_agree(self) -> CheckpointRecipe:
        if (self.per_channel or self.per_token) and self.quant != "int8_sq":
            raise SettingError(
                "per_channel and per_token are settings of quant: int8_sq", "remove them, or set quant"
            )
        if self.int8_layout != "plain" and self.quant != "int8_wo":
            raise SettingError("int8_layout is a setting of quant: int8_wo", "remove it, or set quant")
        if self.quant != "none" and self.dtype == "float32":
            raise SettingError("INT8 weights need dtype float16 or bfloat16", "set dtype to one of them")
        if (self.calib or self.act_ranges or self.chat_template) and not self.calibrated:
            raise SettingError("calibration is for quant: int8_sq and kv_cache: int8 only", "remove its settings")
        if self.calib and self.act_ranges:
            raise SettingError("calib and act_ranges exclude each other", "remove one of them")
        return self


class HostRecipe(Section):
    """The machine that the engine is built on and served from; `plan` uses it.

    Attributes:
        card: its GPUs; see `cards.json`.
        gpus: how many of them.
    """

    card: CardName = "rtx-4090d"
    gpus: Annotated[int, Field(ge=1, le=8)] = 1


class EngineRecipe(Section):
    """Settings of the build. The names are those of TensorRT-LLM's BuildConfig and its plugins.

    Attributes:
        backend: `tensorrt_llm` runs trtllm-build, `torch` makes the embedded engine, `vllm` serves with vLLM in a
            process of its own, `llmapi` with TensorRT-LLM's LLM API.
        vllm: where vLLM runs; only for backend: vllm.
        llmapi: how the LLM API runs; only for backend: llmapi.
        max_batch_size: requests scheduled in one step.
        max_num_tokens: packed tokens in one step, context and generation together.
        max_seq_len: tokens of one request, prompt and answer together.
        opt_num_tokens: packed tokens of the step that TensorRT tunes its kernels for; its own choice where not given.
        multiple_profiles: tune for several step sizes; a longer build, a faster engine.
        tokens_per_block: tokens of one KV cache block.
        gemm_plugin: `auto` takes the checkpoint's dtype.
        use_paged_context_fmha: needed by chunked context and KV cache reuse; TensorRT-LLM has no such kernel for INT8
            KV caches.
        logits_dtype: float32 as the checkpoint says, or float16.
        gather_context_logits: let clients ask for the logits of the prompt; costs memory for all of them.
        workers: ranks built in parallel, each on its own GPU.
    """

    backend: Literal["tensorrt_llm", "torch", "vllm", "llmapi"]
    vllm: VllmSettings | None = None
    llmapi: LlmApiSettings | None = None
    max_batch_size: Positive = 64
    max_num_tokens: Positive = 8192
    max_seq_len: Positive = 8192
    opt_num_tokens: Positive | None = None
    multiple_profiles: bool = False
    tokens_per_block: Literal[8, 16, 32, 64, 128] = 32
    gemm_plugin: Literal["auto", "float16", "bfloat16", "disable"] = "auto"
    use_paged_context_fmha: bool = True
    logits_dtype: Literal["float32", "float16"] = "float32"
    gather_context_logits: bool = False
    workers: Positive = 1

    @model_validator(mode="before")
    @classmethod
    def _older_name(cls, values: Any) -> Any:
        """Recipes of trtqwen 0.1 call the backend `builder`."""
        if isinstance(values, dict) and "builder" in values and "backend" not in values:
            values = dict(values)
            values["backend"] = values.pop("builder")
        return values

    @model_validator(mode="after")
    def _steps_hold_a_batch(self) -> EngineRecipe:
        least = max(self.max_batch_size, self.tokens_per_block)
        if self.max_num_tokens < least:
            raise SettingError(
                f"max_num_tokens {self.max_num_tokens} is less than {least}, "
                "the larger of max_batch_size and tokens_per_block",
                f"set max_num_tokens to {least} or more",
            )
        if self.opt_num_tokens is not None and self.opt_num_tokens > self.max_num_tokens:
            raise SettingError(
                f"opt_num_tokens {self.opt_num_tokens} exceeds max_num_tokens {self.max_num_tokens}",
                "lower opt_num_tokens",
            )
        if self.opt_num_tokens is not None and self.multiple_profiles:
            raise SettingError(
                "opt_num_tokens and multiple_profiles exclude each other: trtllm-build refuses both",
                "remove one of them",
            )
        return self

    @model_validator(mode="after")
    def _only_tensorrt_tunes(self) -> EngineRecipe:
        if self.vllm is not None and self.backend != "vllm":
            raise SettingError("vllm is a section of backend: vllm", "remove the section, or change the backend")
        if self.llmapi is not None and self.backend != "llmapi":
            raise SettingError("llmapi is a section of backend: llmapi", "remove the section, or change the backend")
        if self.backend == "vllm" and self.tokens_per_block == 8:
            raise SettingError("tokens_per_block 8 is not a block size of vLLM", "use 16 or more")
        if self.backend != "tensorrt_llm":
            for name in ("opt_num_tokens", "multiple_profiles", "logits_dtype", "gather_context_logits"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise SettingError(f"{name} is a setting of backend: tensorrt_llm", "remove it")
        return self


class ServeRecipe(Section):
    """Settings of serving. The names are the keys of the Triton model `tensorrt_llm`.

    Attributes:
        replicas: Triton servers, each with an engine on GPUs of its own.
        replica_mode: `servers` runs a tritonserver for each replica behind the gateway, which sends a request to the
            replica with the fewest outstanding tokens. `orchestrator` lets one tritonserver spawn all replicas
            through MPI: one gRPC address, but Triton spreads requests without regard to the load, and the replicas
            share one set of gauges.
        batch_scheduler_policy: `guaranteed_no_evict` admits a request when its whole answer fits into the KV cache;
            `max_utilization` admits more and pauses the youngest when blocks run out.
        enable_chunked_context: spread long prompts over several steps.
        enable_kv_cache_reuse: keep the blocks of prompts for requests that begin alike.
        enable_context_fmha_fp32_acc: sum in float32 while reading prompts; without it, a float16 Qwen overflows.
        kv_cache_free_gpu_mem_fraction: share of the GPU memory left after the weights that the KV cache takes.
        kv_cache_host_memory_bytes: host memory that blocks of the KV cache move to, in bytes.
        max_tokens_in_paged_kv_cache: cap on the KV cache, in tokens.
        device: where the torch engine computes; `auto` takes a CUDA card where there is one.
        cuda_graphs: replay small steps of the torch engine, and those that only generate, as CUDA graphs.
        overlap: schedule a step of the torch engine while the one before runs on the card.
        max_queue_size: requests that wait before further ones are refused; 0 is no limit.
        triton_max_batch_size: rows of one client request.
        exclude_input_in_output: leave the prompt out of unstreamed answers.
        preprocessing_instance_count, postprocessing_instance_count: processes of the two text models.
        skip_special_tokens: leave special tokens out of the text.
    """

    replicas: Annotated[int, Field(ge=1, le=8)] = 1
    replica_mode: Literal["servers", "orchestrator"] = "servers"
    batch_scheduler_policy: Literal["guaranteed_no_evict", "max_utilization"] = "guaranteed_no_evict"
    enable_chunked_context: bool = True
    enable_kv_cache_reuse: bool = False
    enable_context_fmha_fp32_acc: bool = False
    kv_cache_free_gpu_mem_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.9
    kv_cache_host_memory_bytes: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0
    max_tokens_in_paged_kv_cache: Positive | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    cuda_graphs: bool = True
    overlap: bool = True
    max_queue_size: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    triton_max_batch_size: Positive = 64
    exclude_input_in_output: bool = True
    preprocessing_instance_count: Positive = 1
    postprocessing_instance_count: Positive = 1
    skip_special_tokens: bool = True


class Recipe(Section):
    """A whole recipe; `name` is the file's name without `.yaml`.

    Attributes:
        description: what the recipe is for; `trtqwen recipe list` shows it.
        model: the model whose sizes `plan` uses when no directory is given; see `hf/models.json`.
        host: the GPUs that serve it; without a host, the torch engine uses the available devices.
    """

    name: str
    description: str
    model: str | None = None
    host: HostRecipe | None = None
    checkpoint: CheckpointRecipe = CheckpointRecipe()
    engine: EngineRecipe
    serve: ServeRecipe = ServeRecipe()

    @property
    def world_size(self) -> int:
        """Ranks, that is GPUs, of one replica."""
        return self.checkpoint.tp_size * self.checkpoint.pp_size

    @model_validator(mode="after")
    def _known_model(self) -> Recipe:
        if self.model is not None and self.model not in model_names():
            raise SettingError(f"model {self.model!r} is unknown", f"use one of {', '.join(model_names())}")
        return self

    @model_validator(mode="after")
    def _sections_agree(self) -> Recipe:
        engine, serve = self.engine, self.serve
        for name in ("enable_chunked_context", "enable_kv_cache_reuse"):
            if getattr(serve, name) and not engine.use_paged_context_fmha:
                raise SettingError(
                    f"serve.{name} needs engine.use_paged_context_fmha: true",
                    f"set it, or set serve.{name} to false",
                )
        if not serve.enable_chunked_context and engine.max_num_tokens < engine.max_seq_len:
            raise SettingError(
                f"engine.max_num_tokens {engine.max_num_tokens} cannot take a prompt of engine.max_seq_len "
                f"{engine.max_seq_len} in one step",
                "set serve.enable_chunked_context or raise it",
            )
        pool = serve.max_tokens_in_paged_kv_cache
        if pool is not None and pool < engine.tokens_per_block:
            raise SettingError(
                f"serve.max_tokens_in_paged_kv_cache {pool} is less than one block",
                f"set it to {engine.tokens_per_block} or more",
            )
        return self

    @model_validator(mode="after")
    def _torch_alone_has_devices(self) -> Recipe:
        plain = ServeRecipe()
        for name in TORCH_SERVING:
            if self.engine.backend != "torch" and getattr(self.serve, name) != getattr(plain, name):
                raise SettingError(f"serve.{name} is a setting of backend: torch", "remove it")
        if self.host is not None and self.engine.backend == "torch" and self.serve.device == "cpu":
            raise SettingError("serve.device cpu: the section host describes GPUs", "leave one of them out")
        return self

    @model_validator(mode="after")
    def _host_has_gpus(self) -> Recipe:
        needed = self.world_size * self.serve.replicas
        if self.host is not None and needed > self.host.gpus:
            raise SettingError(
                f"{self.serve.replicas} replicas of {self.world_size} ranks need {needed} GPUs, but host.gpus is "
                f"{self.host.gpus}",
                "lower serve.replicas or checkpoint.tp_size",
            )
        return self

    @model_validator(mode="after")
    def _backend_can(self) -> Recipe:
        if self.engine.backend != "tensorrt_llm":
            if self.engine.backend == "vllm":
                self._vllm_can()
            if self.engine.backend == "llmapi":
                self._llmapi_can()
            if self.serve.replica_mode == "orchestrator" and self.serve.replicas > 1:
                raise SettingError(
                    "serve.replica_mode orchestrator is a setting of backend: tensorrt_llm", "use servers"
                )
            plain = ServeRecipe()
            for name in _TENSORRT_SERVING:
                if getattr(self.serve, name) != getattr(plain, name):
                    raise SettingError(f"serve.{name} is a setting of backend: tensorrt_llm", "remove it")
            return self
        if self.host is None:
            raise SettingError("backend: tensorrt_llm needs a section host with card and gpus", "add the section")
        if self.checkpoint.kv_cache == "int8" and self.engine.use_paged_context_fmha:
            raise SettingError(
                "engine.use_paged_context_fmha has no kernel for an INT8 KV cache, and chunked context and KV cache "
                "reuse need it",
                "set it and serve.enable_chunked_context false, or leave checkpoint.kv_cache auto",
            )
        if self.checkpoint.release == "0.17.0":
            raise SettingError(
                "checkpoint.release 0.17.0: trtllm-build is known from 0.18.2 on", "name a newer release"
            )
        return self

    def _llmapi_can(self) -> None:
        """Refuse settings without a counterpart in the LLM API."""
        checkpoint = self.checkpoint
        if checkpoint.quant == "int8_sq":
            raise SettingError(
                "checkpoint.quant int8_sq: the LLM API has no SmoothQuant", "use int8_wo or none, or backend: vllm"
            )
        if checkpoint.kv_cache == "int8":
            raise SettingError("checkpoint.kv_cache int8: the LLM API has no INT8 KV cache", "use auto")
        if checkpoint.quant == "int8_wo" and checkpoint.int8_layout != "plain":
            raise SettingError(
                "checkpoint.int8_layout: the LLM API quantizes 16-bit weights when it loads", "use plain"
            )

    def _vllm_can(self) -> None:
        """Refuse settings without a counterpart in vLLM."""
        if self.checkpoint.kv_cache == "int8":
            raise SettingError(
                "checkpoint.kv_cache int8: vLLM does not read TensorRT-LLM's INT8 KV scales", "use auto"
            )
        serve = self.serve
        if "batch_scheduler_policy" in serve.model_fields_set and serve.batch_scheduler_policy != "max_utilization":
            raise SettingError(
                "serve.batch_scheduler_policy guaranteed_no_evict: vLLM always admits as max_utilization does",
                "set that or leave the field out",
            )
        if serve.replicas > 1 and self.engine.vllm is not None and self.engine.vllm.address is not None:
            raise SettingError(
                "serve.replicas: an address is one vLLM", "list several addresses at `trtqwen gateway`"
            )


SECTIONS: dict[str, type[BaseModel]] = {
    "host": HostRecipe,
    "checkpoint": CheckpointRecipe,
    "engine": EngineRecipe,
    "serve": ServeRecipe,
}


def override(settings: CheckpointRecipe, changes: dict[str, object]) -> CheckpointRecipe:
    """The settings with those changes that are not None.

    Raises:
        RecipeError: if the result is not valid.
    """
    given = {name: value for name, value in changes.items() if value is not None}
    try:
        return CheckpointRecipe.model_validate({**settings.model_dump(), **given})
    except ValidationError as problem:
        raise RecipeError(f"options: {first_problem(problem)}", first_hint(problem) or "change the options") from None
