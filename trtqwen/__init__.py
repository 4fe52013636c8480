"""trtqwen converts Qwen2.5 to TensorRT-LLM, builds it, and serves it behind Triton.

The names below are the public Python API. Each is imported at first use, so that `import trtqwen` stays cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trtqwen.build import BuildPlan, plan_build, run_build
    from trtqwen.diagnostics import Diagnostic, TrtQwenError
    from trtqwen.plan.plan import Plan, plan_recipe
    from trtqwen.recipe import Recipe, load_recipe
    from trtqwen.triton.client import stream
    from trtqwen.triton.server import TritonServer

__version__ = "0.1.0"
__all__ = [
    "BuildPlan",
    "Diagnostic",
    "Plan",
    "Recipe",
    "TritonServer",
    "TrtQwenError",
    "load_recipe",
    "plan_build",
    "plan_recipe",
    "run_build",
    "stream",
]

_HOMES = {
    "BuildPlan": "build",
    "Diagnostic": "diagnostics",
    "Plan": "plan.plan",
    "Recipe": "recipe",
    "TritonServer": "triton.server",
    "TrtQwenError": "diagnostics",
    "load_recipe": "recipe",
    "plan_build": "build",
    "plan_recipe": "plan.plan",
    "run_build": "build",
    "stream": "triton.client",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'trtqwen' has no attribute {name!r}")
    return getattr(import_module(f"trtqwen.{_HOMES[name]}"), name)
