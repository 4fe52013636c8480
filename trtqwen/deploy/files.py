"""A set of text files and the directory that they are written to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from trtqwen.artifact.directory import finished_directory
from trtqwen.diagnostics import OutputError

Files = Mapping[str, str]  # text by path below the directory


class _Dumper(yaml.SafeDumper):
    """Writes long strings as blocks and indents lists."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def to_yaml(*documents: Any, heading: str = "") -> str:
    """YAML of one or several documents, in the order of their keys.

    Args:
        heading: a comment at the top, without `#`.
    """
    top = "".join(f"# {line}\n" for line in heading.splitlines())
    dump = [
        yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=118) for document in documents
    ]
    return top + "---\n".join(dump)


def write_files(files: Files, output: Path, *, force: bool = False) -> None:
    """Write the files to a new directory: all of them or none.

    Args:
        force: replace files that exist.

    Raises:
        OutputError: if the directory exists or cannot be written, or holds files that would be lost with it.
    """
    strangers = sorted(set(_names(output)) - files.keys()) if force else []
    if strangers:
        raise OutputError(f"{output}: holds {strangers[0]}, which would be lost", "name another directory")
    with finished_directory(output, force=force) as directory:
        for name, text in files.items():
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")


def _names(directory: Path) -> list[str]:
    return [path.relative_to(directory).as_posix() for path in directory.rglob("*") if not path.is_dir()]
