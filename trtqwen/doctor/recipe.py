"""Checks of a recipe's sizes and of its build command."""

from __future__ import annotations

from pathlib import Path

from trtqwen.diagnostics import TrtQwenError
from trtqwen.doctor.check import Check, Result
from trtqwen.doctor.subject import Skip, Subject
from trtqwen.engine.flags import build_command, check_against_help, check_command
from trtqwen.facts.llmapi import llm_arguments, llmapi_release
from trtqwen.facts.vllm import vllm_facts
from trtqwen.plan.plan import Plan, plan_recipe
from trtqwen.recipe import LlmApiSettings, Recipe, VllmSettings
from trtqwen.vllm.server import find_python, installed_version

_GIB = 2**30
_CAPACITY = ("memory", "kv-cache")  # the findings of `trtqwen plan` that speak of it


class MemoryPlan(Check):
    """Weights, activations and the KV cache of one full request fit on each card, by `trtqwen plan`."""

    id = "D19"
    level = "error"
    title = "GPU memory"

    def run(self, subject: Subject) -> Result:
        plan = _plan(subject)
        found = [finding for finding in plan.findings if finding.code in _CAPACITY and finding.level == "error"]
        rank = plan.tightest
        evidence = f"KV cache {rank.kv_pool / _GIB:.1f} GiB, {plan.kv_tokens:,} tokens"
        if rank.card is not None:
            evidence = f"{rank.taken / _GIB:.1f} of {rank.card / _GIB:.1f} GiB before the KV cache, {evidence}"
        return self.judge(found, evidence)


class Concurrent(Check):
    """The KV cache holds at least two requests of full length, by `trtqwen plan`."""

    id = "D20"
    level = "warning"
    title = "concurrency at full length"

    def run(self, subject: Subject) -> Result:
        full = _plan(subject).concurrency[-1]
        if full.sequences < 2:
            text = f"{full.sequences} request of {full.tokens:,} tokens runs at a time: serving will be sequential"
            hint = "lower engine.max_seq_len, take more cards or INT8 weights, and have clients send max_tokens"
            return self.found(text, hint)
        return Result("ok", f"{full.sequences} requests of {full.tokens:,} tokens")


def _plan(subject: Subject) -> Plan:
    recipe = subject.named_recipe
    if subject.model is None and recipe.model is None:
        raise Skip("give --model: the recipe names none")
    try:
        return plan_recipe(recipe, subject.model)
    except TrtQwenError:
        raise Skip("there is no plan, see D10 and D11") from None


class BuildFlags(Check):
    """Every option of the recipe's engine exists in the program that takes it.

    The installed program decides where there is one, otherwise the table of the recipe's release.
    """

    id = "D21"
    level = "error"
    title = "options of the engine's program"

    def run(self, subject: Subject) -> Result:
        recipe = subject.named_recipe
        if recipe.engine.backend == "torch":
            raise Skip("the torch backend has no flags")
        if recipe.engine.backend == "vllm":
            return self._vllm(recipe)
        if recipe.engine.backend == "llmapi":
            return self._llmapi(subject, recipe)
        command = build_command(recipe, Path("checkpoint"), Path("engine"))
        release = recipe.checkpoint.release
        check_command(command, release)
        if subject.host.trtllm_build is None:
            return Result("ok", f"{len(command) - 1} flags, by the table of {release}")
        text = subject.system.output(str(subject.host.trtllm_build), "--help")
        if text is None:
            return self.found("trtllm-build --help fails here", "run it by hand and look", "warning")
        check_against_help(command, text)
        return Result("ok", f"{len(command) - 1} flags, by the installed --help")

    def _vllm(self, recipe: Recipe) -> Result:
        """The recipe's options against the vLLM that is installed; the recipe itself holds to its release's table."""
        settings = recipe.engine.vllm or VllmSettings()
        if settings.address is not None or settings.image is not None:
            return Result("ok", f"{len(settings.arguments)} options, by the table of {settings.release}")
        try:
            version = installed_version(find_python(settings))
        except TrtQwenError as problem:
            return self.found(problem.what, problem.hint)
        unknown = sorted(settings.arguments.keys() - vllm_facts(version).flags)
        if unknown:
            return self.found(f"vLLM {version} has no option --{unknown[0]}", "correct engine.vllm.arguments")
        if vllm_facts(version).release != settings.release:
            text = f"vLLM {version} is installed, the recipe is for {settings.release}"
            return self.found(text, f"set engine.vllm.release to {vllm_facts(version).release}", "warning")
        return Result("ok", f"vLLM {version}, {len(settings.arguments)} options of the recipe")

    def _llmapi(self, subject: Subject, recipe: Recipe) -> Result:
        settings = recipe.engine.llmapi or LlmApiSettings()
        version = subject.host.tensorrt_llm
        if version is None:
            return Result("ok", f"{len(settings.arguments)} arguments, by the table of {settings.release}")
        unknown = sorted(settings.arguments.keys() - llm_arguments(llmapi_release(version)))
        if unknown:
            text = f"LLM of TensorRT-LLM {version} has no argument {unknown[0]!r}"
            return self.found(text, "correct engine.llmapi.arguments")
        return Result("ok", f"TensorRT-LLM {version}, {len(settings.arguments)} arguments of the recipe")


CHECKS: tuple[Check, ...] = (MemoryPlan(), Concurrent(), BuildFlags())
