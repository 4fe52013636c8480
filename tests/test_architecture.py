"""The order of packages, and what a process of the server imports."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import trtqwen
from tests.conftest import PLACE_OF, SERVER_OF

PACKAGE = Path(trtqwen.__file__).parent

# From the lowest floor up. A package imports from packages before it, never from one behind it.
ORDER = (
    "diagnostics",
    "yaml_file",
    "safetensors_io",
    "system",
    "facts",
    "artifact",
    "nn",
    "hf",
    "recipe",
    "migrate",
    "quantize",
    "checkpoint",
    "export",
    "engine",
    "executor",
    "relay",
    "vllm",
    "llmapi",
    "triton",
    "plan",
    "verify",
    "containers",
    "doctor",
    "gateway",
    "batch",
    "build",
    "demo",
    "selftest",
    "report",
    "bench",
    "simulate",
    "tune",
    "deploy",
    "cli",
    "__main__",
)

ROOMS = ("admission", "generation", "fleet", "api")  # of the gateway


def imports(path: Path) -> Iterator[tuple[str, ...]]:
    """The dotted names that a module imports from trtqwen, imports inside functions included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            if name.startswith("trtqwen."):
                yield tuple(name.split(".")[1:])


def place(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_packages_import_downwards_only() -> None:
    modules = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]
    unknown = {place(path) for path in modules} - set(ORDER)
    assert not unknown, f"give {sorted(unknown)} a place in ORDER"
    upwards = [
        f"{path.relative_to(PACKAGE)} imports trtqwen.{'.'.join(name)}"
        for path in modules
        for name in imports(path)
        if name[0] != place(path) and ORDER.index(name[0]) >= ORDER.index(place(path))
    ]
    assert not upwards


def test_the_documented_table_has_every_package_in_this_order() -> None:
    page = PACKAGE.parent / "docs" / "architecture.md"
    cells = re.findall(r"^\| (`.*?`) \|", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert tuple(re.findall(r"`(\w+)`", " ".join(cells))) == ORDER[: ORDER.index("__main__")]


def test_the_gateway_imports_from_api_to_admission() -> None:
    upwards = [
        f"{path.relative_to(PACKAGE)} imports trtqwen.{'.'.join(name)}"
        for room in ROOMS
        for path in (PACKAGE / "gateway" / room).glob("*.py")
        for name in imports(path)
        if name[0] == "gateway" and name[1] in ROOMS and ROOMS.index(name[1]) > ROOMS.index(room)
    ]
    assert not upwards


def loaded(*modules: str, before: str = "") -> set[str]:
    """The modules in memory after a fresh interpreter runs `before` and imports some."""
    code = f"{before}\nimport sys, {', '.join(modules)}; print(*sys.modules)"
    return set(subprocess.check_output([sys.executable, "-c", code], text=True).split())


def test_the_gateway_process_loads_no_converter_no_scheduler_and_no_torch() -> None:
    modules = loaded("trtqwen.gateway.server")
    assert not modules & {"torch", "transformers", "xgrammar", "matplotlib", "triton"}
    assert not modules & {"trtqwen.checkpoint.convert", "trtqwen.executor.scheduler", "trtqwen.build"}
    outside = {name for name in modules if name.startswith("trtqwen.") and not name.startswith("trtqwen.gateway")}
    assert len(outside) <= 52, sorted(outside)


def test_a_rank_loads_no_converter() -> None:
    assert not loaded("trtqwen.executor.worker") & {"trtqwen.checkpoint.convert", "trtqwen.quantize.calibrate"}


def test_the_models_of_text_start_without_recipes_and_engines() -> None:
    utils = "import sys, types; sys.modules['triton_python_backend_utils'] = types.ModuleType('utils')"
    models = (f"trtqwen.triton.models.{name}" for name in ("preprocessing", "postprocessing"))
    assert not loaded(*models, before=utils) & {
        "pydantic",
        "trtqwen.recipe",
        "trtqwen.engine",
        "trtqwen.executor",
        "grpc",
        "torch",
    }


def test_help_loads_no_command() -> None:
    modules = loaded("trtqwen.cli")
    assert not modules & {"torch", "numpy", "trtqwen.build", "trtqwen.gateway.server"}


def test_the_order_of_the_tests_names_files_that_exist() -> None:
    missing = [file for file in (*PLACE_OF, *SERVER_OF) if not (Path(__file__).parents[1] / file).is_file()]
    assert not missing
    assert not PLACE_OF.keys() & SERVER_OF.keys()
