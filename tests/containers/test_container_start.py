"""The start script in images of several kinds."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from tests.containers.test_commands import NEWEST, TP4, build_plan, parsed
from trtqwen.containers.installed import PACKAGE, START, requirements
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


OURS = " ".join(requirements())


SQ_RECIPE = """\
description: SmoothQuant in an image.
checkpoint: {dtype: float16, quant: int8_sq, per_channel: true, per_token: true, calib: texts.txt}
engine: {backend: torch, max_batch_size: 4, max_num_tokens: 256, max_seq_len: 256}
"""


def test_smoothquant_builds_in_the_virtual_environment_of_an_image(tmp_path: Path) -> None:
    """This test's own virtual environment stands for the image's: torch is in it, and not in the base Python."""
    image = Path(sys.prefix)
    if image == Path(sys.base_prefix):
        pytest.skip("not in a virtual environment")
    (tmp_path / "sq.yaml").write_text(SQ_RECIPE)
    (tmp_path / "texts.txt").write_text("The cat sat on the mat.\n")
    build = ("build", "sq.yaml", f"--model={MODEL}", "--json")
    offline = {"PIP_NO_INDEX": "1"}  # nothing is missing, so nothing may be installed
    result = start(tmp_path, image, *build, requires=OURS, **offline)
    assert result.returncode == 0, result.stderr
    assert "preparing trtqwen's environment" in result.stderr
    assert [stage["stage"] for stage in json.loads(result.stdout)["stages"]] == ["checkpoint", "engine", "repository"]
    quality = json.loads((tmp_path / "engines" / "sq" / "checkpoint" / "quality.json").read_text())
    assert quality["not_measured"] is None
    assert not [path for path in (tmp_path / "venv").rglob("METADATA") if "typer" in path.parent.name]
    again = start(tmp_path, image, "--version", requires=OURS, **offline)
    assert (again.returncode, again.stderr) == (0, "")


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
    shutil.rmtree(wheels)
    again = start(tmp_path, image, requires="lacking>=1", **where)
    assert (again.returncode, again.stderr) == (0, "")
    other = start(tmp_path, image, requires="absent", **where)
    assert other.returncode == 1
    assert "absent" in other.stderr
    assert not (tmp_path / "ready").exists()  # a start that fails leaves nothing that a later one takes


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
