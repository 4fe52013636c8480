"""The engine of the backends vllm and llmapi: a Hugging Face directory, exported from the checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trtqwen.artifact.names import CONFIG, HF_MODEL, TOKENIZER_DIRECTORY
from trtqwen.engine.config import BuildConfig
from trtqwen.engine.job import BuildJob, Watch
from trtqwen.export.export import copy_tokenizer, plan_export, write_model
from trtqwen.recipe import LlmApiSettings, VllmSettings


class ModelBuilder:
    """Exports models, on any machine."""

    def check(self, job: BuildJob) -> None:
        """Check nothing: `serve` checks whether the backend is installed."""

    def build(self, job: BuildJob, directory: Path, watch: Watch) -> None:
        """Write the model directory next to the engine's config.json."""
        recipe, model = job.recipe, directory / HF_MODEL
        model.mkdir()
        write_model(plan_export(job.checkpoint, plain=recipe.backend == "llmapi"), model)
        copy_tokenizer(job.checkpoint / TOKENIZER_DIRECTORY, model)
        content: dict[str, Any] = {"backend": recipe.backend}
        if recipe.backend == "vllm":
            content["vllm"] = (recipe.vllm or VllmSettings()).model_dump()
        else:
            content["llmapi"] = (recipe.llmapi or LlmApiSettings()).model_dump()
        content["pretrained_config"] = json.loads((job.checkpoint / CONFIG).read_text(encoding="utf-8"))
        content["build_config"] = BuildConfig.model_validate(recipe.model_dump()).model_dump()
        (directory / CONFIG).write_text(json.dumps(content, indent=4), encoding="utf-8")
