"""Builder of the embedded engine, which executes the checkpoint's rank files: it only links them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from trtqwen.artifact.names import CONFIG, rank_weights
from trtqwen.engine.config import BuildConfig
from trtqwen.engine.job import BuildJob, Watch


class TorchBuilder:
    """Builds torch engines, on any machine."""

    def check(self, job: BuildJob) -> None:
        """Check nothing: every machine can build it."""

    def build(self, job: BuildJob, directory: Path, watch: Watch) -> None:
        """Link the rank files, or copy them across disks."""
        pretrained = json.loads((job.checkpoint / CONFIG).read_text(encoding="utf-8"))
        layout = job.settings.int8_layout
        content = {
            "backend": "torch",
            "int8_layout": None if layout == "plain" else layout,
            "pretrained_config": pretrained,
            "build_config": BuildConfig.model_validate(job.recipe.model_dump()).model_dump(),
        }
        (directory / CONFIG).write_text(json.dumps(content, indent=4), encoding="utf-8")
        for rank in range(job.ranks):
            name = rank_weights(rank)
            try:
                os.link(job.checkpoint / name, directory / name)
            except OSError:
                shutil.copyfile(job.checkpoint / name, directory / name)
