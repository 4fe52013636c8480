"""The subject of the checks: the host, and the named recipe, model, checkpoint, engine, repository and server."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from trtqwen.artifact.names import CONFIG
from trtqwen.diagnostics import InputError, TrtQwenError
from trtqwen.doctor.configs import ModelFile, read_model_files
from trtqwen.engine.config import EngineConfig, read_engine_config
from trtqwen.hf.config import HfConfig
from trtqwen.hf.known import known_config
from trtqwen.hf.source import HfModel
from trtqwen.hf.tokenizer import Tokenizer
from trtqwen.recipe import Recipe
from trtqwen.system.host import Host

_ADDRESS = re.compile(r"[\w.-]+:\d+|\[[0-9a-fA-F:]+\]:\d+")
T = TypeVar("T")


class Skip(Exception):
    """A check does not apply; the message says why."""


@dataclass(frozen=True)
class System:
    """Reads facts of this machine.

    Attributes:
        root: above proc, sys, dev and opt.
        work: the directory that builds go to.
        disk_usage: total, used and free bytes of the disk that holds a path.
    """

    root: Path = Path("/")
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    work: Path = Path()
    disk_usage: Callable[[Path], tuple[int, int, int]] = shutil.disk_usage

    def read(self, path: str) -> str | None:
        """Read a file below the root; None if it cannot be read."""
        try:
            return (self.root / path).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None

    def output(self, *command: str) -> str | None:
        """Return the output of a program; None if it does not exist or fails."""
        program = shutil.which(command[0], path=self.environ.get("PATH"))
        if program is None:
            return None
        try:
            return subprocess.run(
                [program, *command[1:]], capture_output=True, text=True, timeout=60, check=True
            ).stdout
        except (OSError, subprocess.SubprocessError):
            return None


@dataclass(frozen=True)
class Subject:
    """The subject of the checks. Checks of an artifact that is None are skipped.

    Attributes:
        url, metrics: host:port of Triton's gRPC and metrics endpoints.
        gpu: whether checks may start processes on the GPUs.
    """

    host: Host
    system: System = field(default_factory=System)
    recipe: Recipe | None = None
    model: Path | None = None
    checkpoint: Path | None = None
    engine: Path | None = None
    repository: Path | None = None
    url: str | None = None
    metrics: str | None = None
    gpu: bool = False

    @property
    def local_ranks(self) -> int:
        """Return the ranks that run on this machine according to recipe and host; at least 1."""
        if self.recipe is not None and (self.recipe.engine.backend == "torch" or self.host.gpus):
            return self.recipe.world_size * self.recipe.serve.replicas
        return max(1, len(self.host.gpus))

    @property
    def engine_ranks(self) -> int:
        """Return the ranks of one engine: the recipe's, or one for each GPU. A single rank has no collectives."""
        if self.recipe is not None:
            return 1 if self.recipe.engine.backend == "torch" and not self.host.gpus else self.recipe.world_size
        return max(1, len(self.host.gpus))

    @property
    def starts_containers(self) -> bool:
        """Return whether TensorRT-LLM is only in the image, which --in-container starts with its own limits."""
        return self.host.tensorrt_llm is None and self.host.image is None

    @property
    def named_recipe(self) -> Recipe:
        return _given(self.recipe, "give a RECIPE")

    @property
    def named_model(self) -> Path:
        return _given(self.model, "give --model")

    @property
    def named_engine(self) -> Path:
        return _given(self.engine, "give --engine or --repo")

    @cached_property
    def source(self) -> HfModel:
        """The opened model."""
        directory = self.named_model
        try:
            return HfModel(directory)
        except TrtQwenError:
            raise Skip("the model cannot be read, see D10") from None

    @cached_property
    def hf_config(self) -> HfConfig:
        """The model's config; without a model that of the recipe's published one."""
        if self.model is None and self.recipe is not None and self.recipe.model is not None:
            return known_config(self.recipe.model)
        return self.source.config

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        directory = self.named_model
        try:
            return Tokenizer(directory)
        except TrtQwenError:
            raise Skip("the tokenizer cannot be read, see D12") from None

    @cached_property
    def engine_config(self) -> EngineConfig:
        directory = self.named_engine
        try:
            return read_engine_config(directory)
        except TrtQwenError:
            raise Skip("the engine's config.json cannot be read, see D01") from None

    @cached_property
    def plugin_config(self) -> Mapping[str, Any]:
        """Return trtllm-build's settings, with its own changes; empty for a torch engine."""
        if self.engine_config.backend != "tensorrt_llm" or self.engine is None:
            return {}
        content = json.loads((self.engine / CONFIG).read_text(encoding="utf-8"))
        plugins = content["build_config"].get("plugin_config")
        return plugins if isinstance(plugins, dict) else {}

    @cached_property
    def model_files(self) -> Mapping[str, ModelFile]:
        """The repository's models by name."""
        return read_model_files(_given(self.repository, "give --repo"))


def completed(subject: Subject) -> Subject:
    """Add the artifacts that `trtqwen build` made of the recipe, unless they are named, and the repository's engine.

    Raises:
        InputError: if a named directory does not exist, or an address is not host:port.
    """
    for name in ("model", "checkpoint", "engine", "repository"):
        directory = getattr(subject, name)
        if directory is not None and not directory.is_dir():
            raise InputError(f"{directory}: no such directory", f"correct --{name.removesuffix('sitory')}")
    for name in ("url", "metrics"):
        address = getattr(subject, name)
        if address is not None and not _ADDRESS.fullmatch(address):
            raise InputError(f"--{name} {address}: is not host:port", "give such as 127.0.0.1:8001")
    if subject.recipe is not None:
        home = subject.system.work / "engines" / subject.recipe.name
        subject = replace(
            subject,
            checkpoint=subject.checkpoint or _existing(home / "checkpoint"),
            engine=subject.engine or _existing(home / "engine"),
            repository=subject.repository or _existing(subject.system.work / "triton_repo" / subject.recipe.name),
        )
    if subject.repository is not None and subject.engine is None:
        with suppress(TrtQwenError):
            model = subject.model_files.get("tensorrt_llm")
            path = model.parameter("gpt_model_path") if model is not None else ""
            subject = replace(subject, engine=_existing(Path(path)) if path else None)
    return subject


def _existing(directory: Path) -> Path | None:
    return directory if directory.is_dir() else None


def _given(value: T | None, hint: str) -> T:
    if value is None:
        raise Skip(hint)
    return value
