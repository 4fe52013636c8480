"""Checks of a model repository for mistakes in upstream's filled templates that would crash Triton."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from tritonclient.grpc.model_config_pb2 import DataType

from trtqwen.artifact.names import CONFIG, HF_MODEL
from trtqwen.diagnostics import Diagnostic, InputError
from trtqwen.doctor.configs import ModelFile, Placeholder
from trtqwen.engine.config import EngineConfig, read_engine_config

Models = Mapping[str, ModelFile]
_TRITON_TYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16"}
_LOGITS = ("draft_logits", "context_logits", "generation_logits")
_NEEDED = {  # without these parameters a model does not load; the others may stay unset
    "tensorrt_llm": ("gpt_model_type", "gpt_model_path"),
    "preprocessing": ("tokenizer_dir",),
    "postprocessing": ("tokenizer_dir",),
}
_ENGINE_TYPES = ("V1", "v1", "inflight_batching", "inflight_fused_batching")
_POLICIES = ("", "guaranteed_no_evict", "max_utilization")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def lint(models: Models) -> Iterator[Diagnostic]:
    """Return every problem of a repository's models, first those that prevent Triton from starting."""
    for rule in RULES:
        yield from rule(models)


def _placeholders(models: Models) -> Iterator[Diagnostic]:
    for model in models.values():
        unused: list[Placeholder] = []
        for place in model.placeholders:
            where = f"{model.path}:{place.line}: {place.key} is still ${{{place.name}}}"
            if not place.quoted:
                yield Diagnostic(f"{where}, bare: the file does not parse", f"fill {place.name}")
            elif place.key in ("backend", "platform", *_NEEDED.get(model.name, ())):
                yield Diagnostic(f"{where}, quoted: taken literally", f"fill {place.name}")
            else:
                unused.append(place)
        if unused:
            lines = ", ".join(f"{place.key} (line {place.line})" for place in unused[:4])
            more = f" and {len(unused) - 4} more" if len(unused) > 4 else ""
            text = f"{model.path}: {lines}{more} still ${{...}}, quoted: the backend takes them for unset"
            yield Diagnostic(text, "fill them or leave them empty, so that a forgotten one is seen", "warning")


def _syntax(models: Models) -> Iterator[Diagnostic]:
    for model in models.values():
        if model.config is None and all(place.quoted for place in model.placeholders):
            yield Diagnostic(f"{model.path}: {model.error}", "correct the line")


def _names(models: Models) -> Iterator[Diagnostic]:
    if "tensorrt_llm" not in models:
        yield Diagnostic(f"no model tensorrt_llm among {', '.join(models)}", "name the right directory", "warning")
    for model in models.values():
        if model.config is None:
            continue
        if model.config.name and model.config.name != model.name:
            text = f"{model.path}: name is {model.config.name!r}, the directory {model.name!r}"
            yield Diagnostic(text, "give both one name")
        for step in model.config.ensemble_scheduling.step:
            if step.model_name not in models:
                text = f"{model.path}: step {step.model_name!r} is no model of this repository"
                yield Diagnostic(text, f"add {step.model_name} or correct the step")


def _files(models: Models) -> Iterator[Diagnostic]:
    for model in models.values():
        home = model.path.parent
        versions = sorted(path for path in home.iterdir() if path.is_dir() and path.name.isdecimal())
        if not versions:
            yield Diagnostic(f"{home}: has no version directory", f"mkdir {home / '1'}")
        elif (
            model.config is not None
            and model.config.backend == "python"
            and not (versions[-1] / "model.py").is_file()
        ):
            yield Diagnostic(
                f"{versions[-1]}: has no model.py for the python backend", "copy it from the same release"
            )


def _batch_sizes(models: Models) -> Iterator[Diagnostic]:
    sizes = {model.name: model.config.max_batch_size for model in models.values() if model.config is not None}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
        yield Diagnostic(f"max_batch_size differs: {listed}", "give every model the same triton_max_batch_size")
    for model in models.values():
        if model.config is None:
            continue
        for preferred in model.config.dynamic_batching.preferred_batch_size:
            if not 1 <= preferred <= model.config.max_batch_size:
                text = f"{model.path}: preferred_batch_size {preferred} is not in 1 to {model.config.max_batch_size}"
                yield Diagnostic(text, "set it to max_batch_size")


def _streaming(models: Models) -> Iterator[Diagnostic]:
    decoupled = {
        name: bool(model.config.model_transaction_policy.decoupled)
        for name in ("tensorrt_llm", "tensorrt_llm_bls")
        if (model := models.get(name)) is not None and model.config is not None
    }
    if len(set(decoupled.values())) > 1:
        listed = ", ".join(f"{name} {str(value).lower()}" for name, value in decoupled.items())
        yield Diagnostic(f"decoupled differs: {listed}", "set decoupled true in both")
    elif decoupled and not all(decoupled.values()):
        yield Diagnostic(
            "decoupled is false: requests cannot stream", "set decoupled true in tensorrt_llm", "warning"
        )
    post = models.get("postprocessing")
    if post is not None and post.config is not None and any(decoupled.values()):
        several = sum(group.count or 1 for group in post.config.instance_group) > 1
        batching = post.config.HasField("dynamic_batching")
        if (several or batching) and not post.config.dynamic_batching.preserve_ordering:
            text = "postprocessing: no preserve_ordering: the pieces of a stream overtake each other"
            yield Diagnostic(text, "write dynamic_batching { preserve_ordering: true }")


def _logits(models: Models) -> Iterator[Diagnostic]:
    kinds: dict[str, list[str]] = {}
    for model in models.values():
        if model.config is None:
            continue
        for tensor in [*model.config.input, *model.config.output]:
            if tensor.name in _LOGITS:
                kinds.setdefault(DataType.Name(tensor.data_type), []).append(f"{model.name}/{tensor.name}")
    engine = _engine_config(models)
    if engine is not None:
        kinds.setdefault(_TRITON_TYPES[engine.pretrained_config.logits_dtype], []).append("the engine")
    if len(kinds) > 1:
        listed = ", ".join(f"{kind} in {', '.join(names[:3])}" for kind, names in kinds.items())
        yield Diagnostic(f"logits have different types: {listed}", "give all of them the engine's logits_datatype")


def _engine(models: Models) -> Iterator[Diagnostic]:
    model = models.get("tensorrt_llm")
    if model is None or model.config is None or "gpt_model_path" not in model.config.parameters:
        return
    kind, path = model.parameter("gpt_model_type"), model.parameter("gpt_model_path")
    if model.config.backend == "tensorrtllm" and kind not in _ENGINE_TYPES and not _unfilled(model, "gpt_model_type"):
        yield Diagnostic(f"{model.path}: gpt_model_type is {kind!r}", "set it to inflight_fused_batching")
    if not path:
        if not _unfilled(model, "gpt_model_path"):
            yield Diagnostic(f"{model.path}: gpt_model_path is empty", "set it to the engine directory")
        return
    engine = Path(path)
    if not engine.is_dir():
        yield Diagnostic(f"{model.path}: gpt_model_path {path} is not a directory here", "name the engine directory")
        return
    try:
        config = read_engine_config(engine)
    except InputError as problem:
        yield problem.diagnostic
        return
    if config.backend in ("vllm", "llmapi"):
        if not (engine / HF_MODEL / CONFIG).is_file():
            yield Diagnostic(f"{engine / HF_MODEL}: holds no model", "build the engine again, or copy all of it")
        return
    ranks = config.pretrained_config.rank_mapping.world_size
    suffix = "safetensors" if config.backend == "torch" else "engine"
    missing = [f"rank{rank}.{suffix}" for rank in range(ranks) if not (engine / f"rank{rank}.{suffix}").is_file()]
    if missing:
        text = f"{engine}: {', '.join(missing)} missing, the engine has {ranks} ranks"
        yield Diagnostic(text, "build the engine again, or copy all of it")
    if len(list(engine.glob(f"rank*.{suffix}"))) > ranks:
        text = f"{engine}: holds more rank files than its {ranks} ranks: an older build's"
        yield Diagnostic(text, "build into an empty directory", "warning")
    for group in filter(None, model.parameter("gpu_device_ids").split(";")):
        if len(group.split(",")) != ranks:
            text = f"{model.path}: gpu_device_ids {group!r} names {len(group.split(','))} GPUs for {ranks} ranks"
            yield Diagnostic(text, "name one GPU for each rank")


def _unfilled(model: ModelFile, key: str) -> bool:
    return any(place.key == key for place in model.placeholders)


def _engine_config(models: Models) -> EngineConfig | None:
    if (model := models.get("tensorrt_llm")) is None:
        return None
    try:
        return read_engine_config(Path(model.parameter("gpt_model_path")))
    except InputError:  # `_engine` tells
        return None


def _tokenizers(models: Models) -> Iterator[Diagnostic]:
    for name in ("preprocessing", "postprocessing"):
        model = models.get(name)
        if model is None or model.config is None or _unfilled(model, "tokenizer_dir"):
            continue
        given = model.parameter("tokenizer_dir")
        if not given:
            yield Diagnostic(f"{model.path}: tokenizer_dir is empty", "set it to the model's directory")
        elif (model.path.parent / given).is_dir():  # an absolute path stays what it is
            if not (model.path.parent / given / "tokenizer_config.json").is_file():
                text = f"{model.path}: tokenizer_dir {given} has no tokenizer_config.json"
                yield Diagnostic(text, "copy the tokenizer's files there")
        elif _HUB_NAME.fullmatch(given):
            text = (
                f"{model.path}: tokenizer_dir {given} is not a directory here: it will be downloaded at every start"
            )
            yield Diagnostic(text, "name a local directory", "warning")
        else:
            yield Diagnostic(
                f"{model.path}: tokenizer_dir {given} is not a directory here", "name the model's directory"
            )


def _answers(models: Models) -> Iterator[Diagnostic]:
    model = models.get("tensorrt_llm")
    if model is None or model.config is None or "gpt_model_path" not in model.config.parameters:
        return
    if not model.flag("exclude_input_in_output"):
        text = f"{model.path}: exclude_input_in_output is not True: unstreamed answers begin with the prompt"
        yield Diagnostic(text, "set it to True", "warning")
    policy = model.parameter("batch_scheduler_policy")
    if policy not in _POLICIES:
        text = f"{model.path}: batch_scheduler_policy {policy!r} is not known, guaranteed_no_evict is taken"
        yield Diagnostic(text, f"use one of {', '.join(_POLICIES[1:])}", "warning")


RULES: tuple[Callable[[Models], Iterator[Diagnostic]], ...] = (
    _placeholders,
    _syntax,
    _names,
    _files,
    _batch_sizes,
    _streaming,
    _logits,
    _engine,
    _tokenizers,
    _answers,
)
