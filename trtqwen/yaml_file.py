"""Reads the YAML files that people write: recipes, gateway settings, API keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from trtqwen.diagnostics import InputError


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML's own loader keeps the last and drops the first unseen."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if (key.tag, key.value) in seen and key.value != "<<":
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands twice", key.start_mark)
            seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


def read_mapping(path: Path, error: type[InputError] = InputError) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Raises:
        InputError: of the class `error`, naming the file and, where there is one, the line, if it cannot be read, is
            not YAML, names a key twice or is anything but a mapping. Values are not repeated.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as problem:
        raise error(f"{path}: cannot be read ({problem}); check the path") from None
    except yaml.constructor.ConstructorError as problem:
        line = problem.problem_mark.line + 1 if problem.problem_mark else 1
        raise error(f"{path}: line {line}: {problem.problem}; correct it") from None
    except yaml.YAMLError as problem:
        mark = getattr(problem, "problem_mark", None)
        raise error(f"{path}: is not YAML{f' at line {mark.line + 1}' if mark else ''}; correct it") from None
    except RecursionError:
        raise error(f"{path}: is nested too deeply; correct it") from None
    except ValueError as problem:  # a date or number that cannot be
        raise error(f"{path}: has a value that cannot be ({problem}); correct it") from None
    if not isinstance(content, dict):
        raise error(f"{path}: is not a mapping; write `name: value` lines")
    return content
