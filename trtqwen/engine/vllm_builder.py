"""The engine of the backend vllm: a model directory that vLLM loads, exported from the checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

from trtqwen.engine.config import BuildConfig
from trtqwen.engine.job import BuildJob, Watch
from trtqwen.export.export import copy_tokenizer, plan_export, write_model
from trtqwen.layout import CONFIG, TOKENIZER_DIRECTORY, VLLM_MODEL
from trtqwen.recipe import VllmSettings


class VllmBuilder:
    """Exports engines for vLLM, on any machine."""

    def check(self, job: BuildJob) -> None:
        """Nothing is in the way: whether vLLM is there, `serve` tells."""

    def build(self, job: BuildJob, directory: Path, watch: Watch) -> None:
        """Write the model directory beside the engine's config.json."""
        model = directory / VLLM_MODEL
        model.mkdir()
        write_model(plan_export(job.checkpoint), model)
        copy_tokenizer(job.checkpoint / TOKENIZER_DIRECTORY, model)
        content = {
            "backend": "vllm",
            "vllm": (job.recipe.vllm or VllmSettings()).model_dump(),
            "pretrained_config": json.loads((job.checkpoint / CONFIG).read_text(encoding="utf-8")),
            "build_config": BuildConfig.model_validate(job.recipe.model_dump()).model_dump(),
        }
        (directory / CONFIG).write_text(json.dumps(content, indent=4), encoding="utf-8")
