"""The recipe: one YAML file that says what to build and how to serve it. All validation lives here."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from trtqwen.diagnostics import RecipeError, first_problem
from trtqwen.facts.llmapi import llm_arguments
from trtqwen.facts.names import CardName, LlmApiRelease, Release, VllmRelease
from trtqwen.facts.vllm import vllm_facts
from trtqwen.hf.known import model_names
from trtqwen.yaml_file import parse_value, read_mapping

BUNDLED = Path(__file__).parent / "recipes"
CHECKOUT = Path(__file__).parent.parent / "recipes"
DtypeChoice = Literal["auto", "float16", "bfloat16", "float32"]
Quant = Literal["none", "int8_wo", "int8_sq"]
KvCache = Literal["auto", "int8"]
Int8LayoutChoice = Literal["plain", "sm80", "sm90"]
EmbeddingSharding = Literal["none", "vocab", "hidden"]
Positive = Annotated[int, Field(gt=0, le=2**31 - 1)]  # TensorRT-LLM counts in 32 bits
TORCH_SERVING = ("device", "cuda_graphs", "overlap")
_TENSORRT_SERVING = ("enable_context_fmha_fp32_acc", "kv_cache_host_memory_bytes")


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


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class CheckpointRecipe(_Section):
    """How the weights are converted.

    Attributes:
        dtype: `auto` keeps a 16-bit dtype and makes float32 float16, as NVIDIA's converter does.
        quant: `int8_wo` is INT8 weight-only (W8A16), `int8_sq` SmoothQuant (W8A8).
        sq_alpha: SmoothQuant's share of the difficulty that goes to the weights.
        per_channel: SmoothQuant scales each output channel of a weight, instead of the tensor.
        per_token: SmoothQuant scales activations token by token at run time, instead of by calibrated ranges.
        kv_cache: `int8` writes the scales of an INT8 KV cache.
        int8_layout: how INT8 weight-only weights lie on disk: for the kernels of one GPU generation (sm80 is Ada's
            too), or `plain`: 16-bit weights that TensorRT-LLM quantizes when it builds.
        embedding_sharding: whether and how the embedding is divided over the ranks.
        yarn_factor: stretch the model's context by YaRN, as Qwen advises beyond 32,768 tokens: 4 makes 131,072.
            The stretch is static: it costs a little on short prompts too.
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
            raise ValueError("per_channel and per_token are settings of quant: int8_sq")
        if self.int8_layout != "plain" and self.quant != "int8_wo":
            raise ValueError("int8_layout is a setting of quant: int8_wo")
        if self.quant != "none" and self.dtype == "float32":
            raise ValueError("INT8 weights need dtype float16 or bfloat16")
        if (self.calib or self.act_ranges or self.chat_template) and not self.calibrated:
            raise ValueError("calibration is for quant: int8_sq and kv_cache: int8 only")
        if self.calib and self.act_ranges:
            raise ValueError("calib and act_ranges exclude each other")
        return self


class HostRecipe(_Section):
    """The machine that the engine is built on and served from; `plan` uses it.

    Attributes:
        card: its GPUs; see `cards.json`.
        gpus: how many of them.
    """

    card: CardName = "rtx-4090d"
    gpus: Annotated[int, Field(ge=1, le=8)] = 1


class VllmSettings(_Section):
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
            raise ValueError(f"{' and '.join(given)} exclude each other")
        if self.address is not None and self.arguments:
            raise ValueError("arguments have no effect on a vLLM that already serves at an address")
        return self

    @model_validator(mode="after")
    def _known_arguments(self) -> VllmSettings:
        facts = vllm_facts(self.release)
        for name in self.arguments:
            if name in _VLLM_OWN:
                raise ValueError(f"arguments: trtqwen sets {name} from other fields of the recipe")
            if name not in facts.flags:
                near = facts.near(name)
                guess = f", did you mean {near!r}?" if near else ""
                raise ValueError(f"arguments: vLLM {self.release} has no option {name!r}{guess}")
        return self


class LlmApiSettings(_Section):
    """How TensorRT-LLM's LLM API runs, for backend: llmapi.

    Attributes:
        release: the TensorRT-LLM that serves; 1.3.0 stands for what follows as well.
        arguments: further arguments of `tensorrt_llm.LLM`, by its names.
    """

    release: LlmApiRelease = "1.2.1"
    arguments: dict[str, Any] = {}

    @model_validator(mode="after")
    def _known_arguments(self) -> LlmApiSettings:
        known = llm_arguments(self.release)
        for name in self.arguments:
            if name in _LLMAPI_OWN:
                raise ValueError(f"arguments: trtqwen sets {name} from other fields of the recipe")
            if name not in known:
                near = get_close_matches(name, known, n=1)
                guess = f", did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"arguments: LLM of TensorRT-LLM {self.release} has no argument {name!r}{guess}")
        return self


class EngineRecipe(_Section):
    """What is built. The names are those of TensorRT-LLM's BuildConfig and its plugins.

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
            raise ValueError(
                f"max_num_tokens {self.max_num_tokens} is less than {least}, "
                "the larger of max_batch_size and tokens_per_block"
            )
        if self.opt_num_tokens is not None and self.opt_num_tokens > self.max_num_tokens:
            raise ValueError(f"opt_num_tokens {self.opt_num_tokens} exceeds max_num_tokens {self.max_num_tokens}")
        if self.opt_num_tokens is not None and self.multiple_profiles:
            raise ValueError("opt_num_tokens and multiple_profiles exclude each other: trtllm-build refuses both")
        return self

    @model_validator(mode="after")
    def _only_tensorrt_tunes(self) -> EngineRecipe:
        if self.vllm is not None and self.backend != "vllm":
            raise ValueError("vllm is a section of backend: vllm")
        if self.llmapi is not None and self.backend != "llmapi":
            raise ValueError("llmapi is a section of backend: llmapi")
        if self.backend == "vllm" and self.tokens_per_block == 8:
            raise ValueError("tokens_per_block 8 is not a block size of vLLM; take 16 or more")
        if self.backend != "tensorrt_llm":
            for name in ("opt_num_tokens", "multiple_profiles", "logits_dtype", "gather_context_logits"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} is a setting of backend: tensorrt_llm")
        return self


class ServeRecipe(_Section):
    """How the engine is run. The names are the keys of the Triton model `tensorrt_llm`.

    Attributes:
        replicas: copies of the engine, each on GPUs of its own.
        replica_mode: `servers` runs a tritonserver for each replica behind the gateway, which sends a request to the
            replica with the fewest tokens to do. `orchestrator` lets one tritonserver spawn all replicas through MPI:
            one gRPC address, but Triton spreads requests blindly and the replicas share one set of gauges.
        batch_scheduler_policy: `guaranteed_no_evict` admits a request when its whole answer fits into the KV cache;
            `max_utilization` admits more and pauses the youngest when blocks run out.
        enable_chunked_context: spread long prompts over several steps.
        enable_kv_cache_reuse: keep the blocks of prompts for requests that begin alike.
        enable_context_fmha_fp32_acc: sum in float32 while reading prompts; a float16 Qwen overflows without.
        kv_cache_free_gpu_mem_fraction: share of the GPU memory left after the weights that the KV cache takes.
        kv_cache_host_memory_bytes: host memory that blocks of the KV cache move to, in bytes.
        max_tokens_in_paged_kv_cache: cap on the KV cache, in tokens.
        device: where the torch engine computes; `auto` takes a CUDA card where there is one.
        cuda_graphs: replay generation steps of the torch engine as CUDA graphs.
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


class Recipe(_Section):
    """A whole recipe; `name` is the file's name without `.yaml`.

    Attributes:
        model: the model whose sizes `plan` uses when no directory is given; see `hf/models.json`.
        host: the GPUs that it is served from; without one the torch engine takes what is there.
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
            raise ValueError(f"model {self.model!r} is not one of {', '.join(model_names())}")
        return self

    @model_validator(mode="after")
    def _sections_agree(self) -> Recipe:
        engine, serve = self.engine, self.serve
        for name in ("enable_chunked_context", "enable_kv_cache_reuse"):
            if getattr(serve, name) and not engine.use_paged_context_fmha:
                raise ValueError(f"serve.{name} needs engine.use_paged_context_fmha: true")
        if not serve.enable_chunked_context and engine.max_num_tokens < engine.max_seq_len:
            raise ValueError(
                f"engine.max_num_tokens {engine.max_num_tokens} cannot take a prompt of engine.max_seq_len "
                f"{engine.max_seq_len} in one step; set serve.enable_chunked_context or raise it"
            )
        pool = serve.max_tokens_in_paged_kv_cache
        if pool is not None and pool < engine.tokens_per_block:
            raise ValueError(f"serve.max_tokens_in_paged_kv_cache {pool} is less than one block")
        return self

    @model_validator(mode="after")
    def _torch_alone_has_devices(self) -> Recipe:
        plain = ServeRecipe()
        for name in TORCH_SERVING:
            if self.engine.backend != "torch" and getattr(self.serve, name) != getattr(plain, name):
                raise ValueError(f"serve.{name} is a setting of backend: torch")
        if self.host is not None and self.engine.backend == "torch" and self.serve.device == "cpu":
            raise ValueError("serve.device cpu: the section host describes GPUs; leave one of them out")
        return self

    @model_validator(mode="after")
    def _host_has_gpus(self) -> Recipe:
        needed = self.world_size * self.serve.replicas
        if self.host is not None and needed > self.host.gpus:
            raise ValueError(
                f"{self.serve.replicas} replicas of {self.world_size} ranks need {needed} GPUs, but host.gpus is "
                f"{self.host.gpus}"
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
                raise ValueError("serve.replica_mode orchestrator is a setting of backend: tensorrt_llm; use servers")
            plain = ServeRecipe()
            for name in _TENSORRT_SERVING:
                if getattr(self.serve, name) != getattr(plain, name):
                    raise ValueError(f"serve.{name} is a setting of backend: tensorrt_llm")
            return self
        if self.host is None:
            raise ValueError("backend: tensorrt_llm needs a section host with card and gpus")
        if self.checkpoint.kv_cache == "int8" and self.engine.use_paged_context_fmha:
            raise ValueError(
                "engine.use_paged_context_fmha has no kernel for an INT8 KV cache; with it go chunked context and "
                "KV cache reuse; set it and serve.enable_chunked_context false, or leave checkpoint.kv_cache auto"
            )
        if self.checkpoint.release == "0.17.0":
            raise ValueError("checkpoint.release 0.17.0: trtllm-build is known from 0.18.2 on; name a newer release")
        return self

    def _llmapi_can(self) -> None:
        """Refuse what the LLM API has no counterpart for."""
        checkpoint = self.checkpoint
        if checkpoint.quant == "int8_sq":
            raise ValueError(
                "checkpoint.quant int8_sq: the LLM API has no SmoothQuant; use int8_wo or none, or backend: vllm"
            )
        if checkpoint.kv_cache == "int8":
            raise ValueError("checkpoint.kv_cache int8: the LLM API has no INT8 KV cache; use auto")
        if checkpoint.quant == "int8_wo" and checkpoint.int8_layout != "plain":
            raise ValueError("checkpoint.int8_layout: the LLM API quantizes 16-bit weights when it loads; use plain")

    def _vllm_can(self) -> None:
        """Refuse what vLLM has no counterpart for."""
        if self.checkpoint.kv_cache == "int8":
            raise ValueError("checkpoint.kv_cache int8: vLLM does not read TensorRT-LLM's INT8 KV scales; use auto")
        serve = self.serve
        if "batch_scheduler_policy" in serve.model_fields_set and serve.batch_scheduler_policy != "max_utilization":
            raise ValueError(
                "serve.batch_scheduler_policy guaranteed_no_evict: vLLM always admits as max_utilization does; "
                "set that or leave the field out"
            )
        if serve.replicas > 1 and self.engine.vllm is not None and self.engine.vllm.address is not None:
            raise ValueError("serve.replicas: an address is one vLLM; list several addresses at `trtqwen gateway`")


SECTIONS: dict[str, type[BaseModel]] = {
    "host": HostRecipe,
    "checkpoint": CheckpointRecipe,
    "engine": EngineRecipe,
    "serve": ServeRecipe,
}


def override(settings: CheckpointRecipe, changes: dict[str, object]) -> CheckpointRecipe:
    """The settings with those changes that are not None.

    Raises:
        RecipeError: if the result does not hold together.
    """
    given = {name: value for name, value in changes.items() if value is not None}
    try:
        return CheckpointRecipe.model_validate({**settings.model_dump(), **given})
    except ValidationError as problem:
        raise RecipeError(f"options: {first_problem(problem)}", "change the options") from None


def load_recipe(recipe: str, changes: Sequence[str] = ()) -> Recipe:
    """Load a recipe by path, or by the name of one that ships with trtqwen.

    Args:
        changes: fields to replace, each as `section.field=value` with the value in YAML: `engine.max_batch_size=32`.

    Raises:
        RecipeError: naming file and field, if the recipe is missing or not valid.
    """
    path, content = find_recipe(recipe), recipe_content(recipe, changes)
    if "name" in content:
        raise RecipeError(f"{path}: field 'name': the file's name is the recipe's name", "remove the field")
    where = f"{path} with {', '.join(changes)}" if changes else str(path)
    try:
        return Recipe.model_validate({**content, "name": path.stem})
    except ValidationError as problem:
        raise RecipeError(f"{where}: {first_problem(problem)}", _advice(problem, Recipe)) from None


def recipe_content(recipe: str, changes: Sequence[str] = ()) -> dict[str, Any]:
    """What the file of a recipe says, with changes, before it is checked; see `load_recipe`."""
    content = read_mapping(find_recipe(recipe), RecipeError)
    for change in changes:
        _change(content, change)
    return content


def _change(content: dict[str, Any], change: str) -> None:
    field, separator, text = change.partition("=")
    sections, _, name = field.strip().rpartition(".")
    if not separator or not name:
        raise RecipeError(f"{change!r} is not field=value", "write it like engine.max_batch_size=32")
    section = content.setdefault(sections, {}) if sections else content
    if not isinstance(section, dict):
        raise RecipeError(f"{change!r}: {sections} is not a section of the recipe", "name section and field")
    section[name] = parse_value(text, RecipeError)


def find_recipe(recipe: str) -> Path:
    """The file of a recipe, by path or by name.

    Raises:
        RecipeError: if there is none.
    """
    path = Path(recipe)
    if path.suffix in (".yaml", ".yml") or path.exists():
        if not path.is_file():
            raise RecipeError(f"{path}: no such recipe file", "check the path, or name one of `trtqwen recipe list`")
        return path
    for directory in (CHECKOUT, BUNDLED):
        if (directory / f"{recipe}.yaml").is_file():
            return directory / f"{recipe}.yaml"
    near = get_close_matches(recipe, recipe_names(), n=1)
    hint = f"did you mean {near[0]!r}?" if near else "name one that `trtqwen recipe list` prints, or a .yaml file"
    raise RecipeError(f"{recipe}: no such recipe", hint)


def recipe_names() -> list[str]:
    """Names of the recipes that ship with trtqwen."""
    directory = CHECKOUT if CHECKOUT.is_dir() else BUNDLED
    return sorted(path.stem for path in directory.glob("*.yaml"))


def _advice(problem: ValidationError, model: type[BaseModel]) -> str:
    first = problem.errors()[0]
    near = _near_field(".".join(map(str, first["loc"])), model) if first["type"] == "extra_forbidden" else None
    return f"did you mean {near!r}?" if near else "change the recipe"


def _near_field(field: str, model: type[BaseModel]) -> str | None:
    """The known field that an unknown one may stand for: of a like name in its section, or else in another."""
    section, _, key = field.rpartition(".")
    inside = {last: name for name, last in _fields(model) if name.removesuffix(last).rstrip(".") == section}
    elsewhere = {last: name for name, last in _fields(model)}
    for names in (inside, elsewhere):
        if match := get_close_matches(key, names, n=1, cutoff=0.75):
            return names[match[0]]
    return None


def _fields(model: type[BaseModel]) -> list[tuple[str, str]]:
    """Every field that a file may have: its dotted name and the last part of it."""
    fields = [(name, name) for name in model.model_fields if name != "name"]
    if model is Recipe:
        fields += [(f"{name}.{last}", last) for name, section in SECTIONS.items() for last in section.model_fields]
    return fields
