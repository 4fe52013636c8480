"""Recognition of directories that are not Hugging Face models, with hints."""

from __future__ import annotations

import json
from pathlib import Path

from trtqwen.artifact.names import CONFIG
from trtqwen.diagnostics import SourceError

ADAPTER_CONFIG = "adapter_config.json"
_QUANTIZERS = {
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
    "hf_quant_config.json": "NVIDIA ModelOpt",
    "mlc-chat-config.json": "MLC",
}
_OTHER_FORMATS = {
    "*.gguf": ("GGUF files of llama.cpp", "use the original model in safetensors"),
    "*.onnx": ("an ONNX export", "use the original model in safetensors"),
    "openvino_model.xml": ("an OpenVINO export", "use the original model in safetensors"),
    "*.engine": ("a TensorRT engine", "name the Hugging Face model that it was built from"),
    "rank*.safetensors": ("a TensorRT-LLM checkpoint", "name the Hugging Face model that it was made from"),
    "*.distcp": ("a sharded checkpoint of PyTorch FSDP", "merge it with `accelerate merge-weights`"),
    "global_step*": ("a ZeRO checkpoint of DeepSpeed", "merge it with its zero_to_fp32.py and save the model again"),
    "zero_to_fp32.py": ("a ZeRO checkpoint of DeepSpeed", "run zero_to_fp32.py and save the model again"),
    "mp_rank_*": ("a checkpoint of Megatron", "convert it to Hugging Face's format first"),
    "consolidated.*.pth": ("weights in the original PyTorch format", "use the model in safetensors"),
}


def check_directory(directory: Path) -> None:
    """Refuse a directory that is known not to be a model.

    Raises:
        SourceError: naming what it is.
    """
    if directory.is_file():
        raise SourceError(f"{directory}: is a file", "name the directory that holds config.json and the weights")
    if not directory.is_dir():
        raise SourceError(f"{directory}: no such directory", "name a Hugging Face model directory")
    if (directory / ADAPTER_CONFIG).is_file():
        if any(directory.glob("model*.safetensors")):
            raise SourceError(
                f"{directory}: holds a LoRA adapter ({ADAPTER_CONFIG}) next to a model's weights; transformers loads "
                "the adapter where PEFT is installed, and the weights alone elsewhere",
                f"{_MERGE}; or move the adapter's files away to serve the weights alone",
            )
        raise SourceError(f"{directory}: is a LoRA adapter{_base(directory)}, not a whole model", _MERGE)
    for name, method in _QUANTIZERS.items():
        if (directory / name).is_file():
            raise SourceError(
                f"{directory}: the weights are quantized already ({name} of {method})", "use the 16-bit original"
            )
    if not (directory / CONFIG).is_file():
        raise SourceError(*_without_config(directory))


_MERGE = "merge it into its base model with PEFT's merge_and_unload(), save that, and name it"


def _base(directory: Path) -> str:
    try:
        base = json.loads((directory / ADAPTER_CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return f" of {base}" if base else ""


def _without_config(directory: Path) -> tuple[str, str]:
    """Describe a directory without config.json, with a hint."""
    if (snapshots := directory / "snapshots").is_dir():
        found = sorted(path for path in snapshots.iterdir() if (path / CONFIG).is_file())
        return (
            f"{directory}: is the root of a Hugging Face cache entry; the model lies under snapshots",
            f"name {found[0] if len(found) == 1 else snapshots / '<revision>'}",
        )
    if cached := sorted(directory.glob("models--*/snapshots")):
        return (
            f"{directory}: is a Hugging Face cache, not a model; each model lies under its snapshots",
            f"name {cached[0] / '<revision>'}",
        )
    if form := other_format(directory):
        return f"{directory}: has no config.json; it holds {form[0]}", form[1]
    inside = sorted(path for path in _subdirectories(directory) if (path / CONFIG).is_file())
    if len(inside) == 1:
        return f"{directory}: has no config.json, {inside[0].name} in it has", f"name {inside[0]}"
    if inside:
        names = ", ".join(path.name for path in inside[:4])
        return f"{directory}: has no config.json, but holds several models ({names})", "name one of them"
    return f"{directory}: has no config.json", "name the directory of a Hugging Face model"


def other_format(directory: Path) -> tuple[str, str] | None:
    """Describe a directory with a model in another format than safetensors, with a hint."""
    for pattern, form in _OTHER_FORMATS.items():
        if any(directory.glob(pattern)):
            return form
    return None


def _subdirectories(directory: Path) -> list[Path]:
    return [path for path in directory.iterdir() if path.is_dir()]
