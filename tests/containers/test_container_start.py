"""The start script in images of several kinds."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from tests.command_line import trtqwen
from tests.containers.test_commands import NEWEST, TP4, build_plan, parsed
from trtqwen.containers.installed import PACKAGE, START
from trtqwen.demo import MODEL


def start(
    home: Path, image: Path, *arguments: str, requires: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the start script as in a container whose python3 is `image`'s."""
    path = f"{image / 'bin'}:/usr/bin:/bin"
    settings = {"PATH": path, "TRTQWEN_REQUIRES": requires, "TRTQWEN_CACHE": str(home), "HOME": str(home)}
    package = PACKAGE.parent
    return subprocess.run(
        ["bash", str(START), *arguments],
        env={**settings, "PYTHONPATH": str(package), "PIP_CONSTRAINT": "", **environment},
        capture_output=True,
        text=True,
        cwd=home,
        timeout=110,
    )


SQ_RECIPE = """\
description: SmoothQuant in an image.
checkpoint: {dtype: float16, quant: int8_sq, per_channel: true, per_token: true, calib: texts.txt}
engine: {backend: torch, max_batch_size: 4, max_num_tokens: 256, max_seq_len: 256}
"""

# A container: the environment that the options set, the mounts in place of its directories, and the image's python3
# first on PATH. Nothing else is kept from one to the next.
DOCKER = f"""#!{sys.executable}
import os, sys
words = sys.argv[1:]
if words[0] != "run":
    sys.exit(0)
place = next(number for number, word in enumerate(words) if word.endswith("container_start.sh"))
environment = dict(word[6:].split("=", 1) for word in words[:place] if word.startswith("--env="))
mounts = {{}}
for word in words[:place]:
    if word.startswith("--mount="):
        fields = dict(field.partition("=")[::2] for field in word[8:].split(","))
        mounts[fields["target"]] = fields["source"]
package = mounts["/opt/trtqwen/trtqwen"]
environment["PYTHONPATH"] = os.path.dirname(package)
environment["TRTQWEN_CACHE"] = mounts["/var/cache/trtqwen"]
environment |= {{"PATH": os.environ["IMAGE"] + ":/usr/bin:/bin", "PIP_NO_INDEX": "1"}}
script = words[place].replace("/opt/trtqwen/trtqwen", package)
os.execve("/bin/bash", ["bash", script, *words[place + 1:]], environment)
"""


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """The directory of an image's python3, which notes its arguments in the file `calls` of its parent.

    This test's own virtual environment stands for the image's: torch is in it, and not in the base Python.
    """
    if sys.prefix == sys.base_prefix:
        pytest.skip("not in a virtual environment")
    directory = tmp_path / "image" / "bin"
    directory.mkdir(parents=True)
    python = directory / "python3"
    python.write_text(f'#!/bin/sh\necho "$@" >> {directory.parent}/calls\nexec {sys.prefix}/bin/python3 "$@"\n')
    python.chmod(0o755)
    return directory


@pytest.mark.slow
def test_smoothquant_builds_in_the_virtual_environment_of_an_image(image: Path, tmp_path: Path) -> None:
    """The first container makes its environment and keeps it; the second calls neither pip nor the image's Python."""
    (tmp_path / "sq.yaml").write_text(SQ_RECIPE)
    (tmp_path / "texts.txt").write_text("The cat sat on the mat.\n")
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "docker").write_text(DOCKER)
    (programs / "docker").chmod(0o755)
    environment = {**os.environ, "PATH": f"{programs}:/usr/bin:/bin", "IMAGE": str(image), "HOME": str(tmp_path)}
    environment |= {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    build = ("build", "sq.yaml", f"--model={MODEL}", "--in-container", "--json")
    result = trtqwen(*build, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr
    assert "preparing trtqwen's environment" in result.stderr
    assert "installed what the image lacks: nothing\n" in result.stderr
    assert [stage["stage"] for stage in json.loads(result.stdout)["stages"]] == ["checkpoint", "engine", "repository"]
    quality = json.loads((tmp_path / "engines" / "sq" / "checkpoint" / "quality.json").read_text())
    assert quality["not_measured"] is None
    [home] = (tmp_path / "cache" / "trtqwen" / "containers").iterdir()
    assert not [path for path in (home / "venv").rglob("METADATA") if "typer" in path.parent.name]
    calls = image.parent / "calls"
    assert "-m pip " in calls.read_text()
    calls.unlink()
    again = trtqwen(*build, cwd=tmp_path, env=environment)
    assert again.returncode == 0, again.stderr
    assert "preparing" not in again.stderr
    assert not calls.exists()


def test_only_what_an_image_lacks_is_installed_and_kept(tmp_path: Path) -> None:
    image = tmp_path / "image"
    venv.create(image, with_pip=True)
    site = next(image.glob("lib/python3*/site-packages"))
    (site / "inside.py").write_text("")
    (site / "nested.pth").write_text("import sys; sys.nested = True\n")
    wheels, package = tmp_path / "wheels", tmp_path / "package" / "trtqwen"
    wheels.mkdir()
    wheel(wheels, "lacking")
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    program = "import sys, inside, lacking; print(*sys.argv[1:], sys.nested)"
    (package / "__main__.py").write_text(program)
    where = {"PYTHONPATH": str(package.parent), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": wheels.as_uri()}
    result = start(tmp_path, image, "a b", "--c", requires="lacking>=1", **where)
    assert (result.returncode, result.stdout) == (0, "a b --c True\n"), result.stderr
    assert "installed what the image lacks: lacking 1.0\n" in result.stderr
    pushed = start(tmp_path, image, requires="lacking>=1", TRTQWEN_IMAGE_DIGEST="image@sha256:1", **where)
    assert "installed what the image lacks: lacking 1.0\n" in pushed.stderr  # another image by the same tag
    again = start(tmp_path, image, requires="lacking>=1", TRTQWEN_IMAGE_DIGEST="image@sha256:1", **where)
    assert (again.returncode, again.stderr) == (0, "")
    shutil.rmtree(wheels)
    other = start(tmp_path, image, requires="absent", **where)
    assert other.returncode == 1
    assert "absent" in other.stderr
    assert not (tmp_path / "ready").exists()  # a start that fails leaves nothing that a later one takes


def test_a_built_image_is_taken_as_it_is(image: Path, tmp_path: Path) -> None:
    """`trtqwen image build` makes the environment at the path that the script looks at first."""
    baked, cache, script = tmp_path / "baked", tmp_path / "cache", tmp_path / "start.sh"
    script.write_text(START.read_text().replace("/opt/trtqwen-venv", str(baked)))
    package = tmp_path / "package" / "trtqwen"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text("import sys; print(sys.prefix)")

    def run(**environment: str) -> subprocess.CompletedProcess[str]:
        settings = {"PATH": f"{image}:/usr/bin:/bin", "TRTQWEN_REQUIRES": "torch", "PYTHONPATH": str(package.parent)}
        settings |= {"PIP_NO_INDEX": "1", **environment}
        return subprocess.run(
            ["bash", str(script)], env=settings, capture_output=True, text=True, cwd=tmp_path, timeout=110
        )

    made = run(TRTQWEN_CACHE=str(baked))  # as its Dockerfile does
    assert made.returncode == 0, made.stderr
    calls = image.parent / "calls"
    calls.unlink()
    # Pushed to a registry, it has a digest of its own.
    started = run(TRTQWEN_CACHE=str(cache), TRTQWEN_IMAGE_DIGEST="mine@sha256:1")
    assert (started.returncode, started.stdout, started.stderr) == (0, f"{baked / 'venv'}\n", "")
    assert not calls.exists()
    assert not cache.exists()
    newer = run(TRTQWEN_CACHE=str(cache), TRTQWEN_REQUIRES="numpy")  # a newer trtqwen is mounted over it
    assert newer.stdout == f"{cache / 'venv'}\n", newer.stderr


def wheel(directory: Path, name: str) -> None:
    """Write a wheel with an empty module."""
    info = f"{name}-1.0.dist-info"
    files = {
        f"{name}.py": "",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{file},,\n" for file in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(directory / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        for file, text in {**files, f"{info}/RECORD": record}.items():
            archive.writestr(file, text)


def test_the_start_script_is_mounted_with_the_package(tmp_path: Path) -> None:
    command = build_plan(TP4, tmp_path).command
    script = command[command.index(NEWEST) + 1]
    package = next(
        source
        for target, (source, _) in parsed(build_plan(TP4, tmp_path)).mount.items()
        if target == "/opt/trtqwen/trtqwen"
    )
    assert Path(package, Path(script).relative_to("/opt/trtqwen/trtqwen")) == START
    assert subprocess.run(["bash", "-n", str(START)]).returncode == 0
