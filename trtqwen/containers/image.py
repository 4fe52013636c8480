"""Choice of the image: the newest one with the recipe's release, checked against the driver."""

from __future__ import annotations

from dataclasses import replace

from trtqwen.containers.work import ContainerOptions, Work
from trtqwen.diagnostics import Diagnostic, InputError
from trtqwen.engine.gates import advisory_problem, driver_problem
from trtqwen.facts.releases import known_image, newest_image, version
from trtqwen.facts.vllm import known_vllm_image, vllm_image


def choose_image(work: Work, options: ContainerOptions) -> tuple[str, tuple[Diagnostic, ...]]:
    """Choose the image to run, and return warnings about it.

    Raises:
        InputError: if its release or the driver does not match, and gates are not skipped.
    """
    if work.vllm is not None:
        return _choose_vllm_image(work.vllm, options)
    try:
        known = known_image(options.image) if options.image else newest_image(work.release)
    except KeyError:
        raise InputError(f"no known image holds checkpoint.release {work.release}", "name one with --image") from None
    if known is None:
        return str(options.image), ()
    problems = []
    if known.tensorrt_llm != work.release:
        problems.append(
            Diagnostic(
                f"{known.image}: holds TensorRT-LLM {known.tensorrt_llm}, but checkpoint.release is {work.release}",
                "name another image or release",
            )
        )
    if work.gpus != 0 and options.driver:
        problem = driver_problem(options.driver, known, options.gpus)
        problems += [problem] if problem else []
    problems += [advisory] if (advisory := advisory_problem(known)) else []
    for problem in problems:
        if problem.level == "error" and not options.skip_gates:
            raise InputError(problem.what, f"{problem.hint}; or start anyway with --skip-gates")
    warnings = [
        replace(problem, what=f"--skip-gates: {problem.what}", level="warning")
        if problem.level == "error"
        else problem
        for problem in problems
    ]
    return options.image or known.image, tuple(warnings)


def _choose_vllm_image(release: str, options: ContainerOptions) -> tuple[str, tuple[Diagnostic, ...]]:
    known = known_vllm_image(options.image) if options.image else vllm_image(release)
    if known is None:
        return str(options.image), ()
    warnings = []
    if known.vllm != release:
        what = f"{known.image}: holds vLLM {known.vllm}, but engine.vllm.release is {release}"
        warnings.append(Diagnostic(what, f"set engine.vllm.release to {known.vllm}", level="warning"))
    if options.driver and version(options.driver) < version(known.driver):
        what = f"{known.image}: needs driver {known.driver} or newer, and this host has {options.driver}"
        if not options.skip_gates:
            raise InputError(what, "update the driver, or start anyway with --skip-gates")
        warnings.append(Diagnostic(f"--skip-gates: {what}", "update the driver", level="warning"))
    return known.image, tuple(warnings)
