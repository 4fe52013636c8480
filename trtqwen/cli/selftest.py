"""`trtqwen selftest`: compare this machine's engine with the embedded engine on its CPU."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table

from trtqwen.cli.output import (
    DryRun,
    ImageName,
    Json,
    SkipGates,
    Wheels,
    print_json,
    print_warnings,
    stderr,
    stdout,
)
from trtqwen.containers.commands import plan_selftest_container
from trtqwen.containers.docker import run_container
from trtqwen.containers.work import container_options
from trtqwen.diagnostics import EngineError, InputError
from trtqwen.facts.releases import known_image, known_release, last_engine_release
from trtqwen.selftest import RESULT
from trtqwen.system.host import read_host

if TYPE_CHECKING:
    from trtqwen.selftest.run import DtypeResult


def command(
    engines: Annotated[Path, typer.Option(help="Write engines and logs below this directory, in `selftest`.")] = Path(
        "engines"
    ),
    backend: Annotated[
        Literal["tensorrt_llm", "torch"],
        typer.Option(help="Test TensorRT-LLM's engine, or the embedded engine on a CUDA device."),
    ] = "tensorrt_llm",
    dry_run: DryRun = False,
    in_container: Annotated[bool, typer.Option("--in-container", help="Run in NVIDIA's image, with docker.")] = False,
    image: ImageName = None,
    wheels: Wheels = None,
    skip_gates: SkipGates = False,
    json: Json = False,
) -> None:
    """Build the bundled model, run it on the GPU, and compare greedy tokens with the embedded engine on the CPU.

    Run this command first on a GPU host. Add --in-container if TensorRT-LLM is only in the image. A different token
    counts as a tie if the CPU rates it as high as its own, up to rounding. The command also writes the result to
    ENGINES/selftest/result.json, and `trtqwen report` includes that file.
    """
    host = read_host()
    if in_container and backend == "torch":
        raise InputError("--in-container runs TensorRT-LLM's image", "leave out --in-container or --backend")
    if in_container:
        known = known_image(image)
        release = (known_release(known.tensorrt_llm) if known else None) or last_engine_release()
        options = container_options(host, image, wheels, skip_gates=skip_gates)
        plan = plan_selftest_container(release, engines, json, options)
        print_warnings(plan.warnings)
        if not dry_run:
            run_container(plan)
        if json:
            print_json({"container": plan.command})
        else:
            stdout.print(plan.shell(), markup=False, highlight=False, soft_wrap=True)
        return
    if importlib.util.find_spec("torch") is None:
        raise EngineError("selftest needs PyTorch, which is not installed", "`pip install 'trtqwen[torch]'`")
    from trtqwen.selftest.run import check_machine, run_selftest  # the other commands start without PyTorch

    directory = engines / "selftest"
    tested = f"TensorRT-LLM {host.tensorrt_llm}" if backend == "tensorrt_llm" else "the embedded engine on CUDA"
    if dry_run:
        check_machine(host, backend)
        if json:
            print_json({"directory": str(directory), "backend": backend, "tensorrt_llm": host.tensorrt_llm})
        else:
            steps = f"would convert, build and run the bundled model in {directory} with {tested}"
            stdout.print(steps, highlight=False, soft_wrap=True)
        return
    with stderr.status("building") as status:
        results = run_selftest(
            host,
            directory,
            backend=backend,
            watch=lambda progress: status.update(f"building: {progress.line[:80]}"),
        )
    ok = all(result.ok for result in results)
    content = {"ok": ok, "backend": backend, "dtypes": [{"ok": result.ok, **asdict(result)} for result in results]}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / RESULT).write_text(dumps(content, indent=2) + "\n", encoding="utf-8")
    if json:
        print_json(content)
    else:
        stdout.print(_table(results))
    if not ok:
        stderr.print(
            f"error: the answers of {tested} differ from those of the CPU; do not serve with it here",
            style="bold red",
            highlight=False,
            soft_wrap=True,
        )
        raise typer.Exit(1)


def _table(results: list[DtypeResult]) -> Table:
    table = Table("dtype", "prompt", "same tokens", "verdict")
    for result in results:
        for prompt in result.prompts:
            margin = "" if prompt.margin is None else f" ({prompt.margin:.3g} below the best logit)"
            table.add_row(result.dtype, prompt.prompt, str(prompt.same_tokens), prompt.verdict + margin)
    return table
