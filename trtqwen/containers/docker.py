"""Docker: check the daemon, find images, and replace this process with `docker run`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from typing import NoReturn

from trtqwen.artifact.directory import make_directory
from trtqwen.containers.plan import ContainerPlan
from trtqwen.diagnostics import ContainerError
from trtqwen.system.host import DIGEST_VARIABLE


def run_container(plan: ContainerPlan) -> NoReturn:
    """Replace this process with `docker run`, which passes on signals and the exit code.

    Raises:
        ContainerError, OutputError: as `prepared`.
    """
    plan = prepared(plan)
    sys.stdout.flush()
    os.execvp("docker", plan.command)


def prepared(plan: ContainerPlan) -> ContainerPlan:
    """Return the plan with the image by digest, if docker has it. Creates the plan's directories.

    Raises:
        ContainerError: if docker is not installed or its daemon does not answer.
        OutputError: if a directory to write to cannot be created.
    """
    check_docker()
    for directory in plan.writable:
        make_directory(directory)  # docker's daemon would make it root's
    digest = image_digest(plan.image)
    if digest is None:
        return plan
    # A tag can be pushed again.
    return replace(plan, image=digest, options=(*plan.options, f"--env={DIGEST_VARIABLE}={digest}"))


def check_docker() -> None:
    """Raise a ContainerError if docker is not installed or its daemon does not answer."""
    if shutil.which("docker") is None:
        raise ContainerError("docker is not on PATH", "install it, or run trtqwen in the container yourself")
    answer = subprocess.run(["docker", "version"], capture_output=True, text=True)
    if answer.returncode:
        reason = (answer.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ContainerError(f"docker's daemon does not answer ({reason})", "start it, or join its group")


def image_digest(image: str) -> str | None:
    """The image by digest, `name@sha256:...`, if docker has it from a registry."""
    command = ["docker", "image", "inspect", '--format={{join .RepoDigests " "}}', image]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    names = answer.stdout.split() if answer.returncode == 0 else []
    return next((name for name in names if "@sha256:" in name), None)
