"""Read the YAML files that people write: recipes, gateway settings, API keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from trtqwen.diagnostics import InputError


class _Loader(yaml.SafeLoader):
    """Refuse duplicate keys. YAML's own loader keeps the last one and drops the others without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if (key.tag, key.value) in seen and key.value != "<<":
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key.value!r}", key.start_mark)
            seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


def read_mapping(path: Path, error: type[InputError] = InputError) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Raises:
        InputError: of the class `error`, with the file and line, if the file cannot be read, is not YAML, has a
            duplicate key or holds anything but a mapping. The message repeats no values.
    """
    hint = "correct the file"
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as problem:
        raise error(f"{path}: cannot be read ({problem})", "check the path") from None
    except yaml.constructor.ConstructorError as problem:
        line = problem.problem_mark.line + 1 if problem.problem_mark else 1
        raise error(f"{path}: line {line}: {problem.problem}", hint) from None
    except yaml.YAMLError as problem:
        mark = getattr(problem, "problem_mark", None)
        raise error(f"{path}: is not YAML{f' at line {mark.line + 1}' if mark else ''}", hint) from None
    except RecursionError:
        raise error(f"{path}: is nested too deeply", hint) from None
    except ValueError as problem:  # an impossible date or number
        raise error(f"{path}: has an invalid value ({problem})", hint) from None
    if not isinstance(content, dict):
        raise error(f"{path}: is not a mapping", "write `name: value` lines")
    return content


def parse_value(text: str, error: type[InputError] = InputError) -> Any:
    """Parse one YAML value: `32`, `true`, `[1, 2]`.

    Raises:
        InputError: of the class `error`, if the text is not a YAML value.
    """
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise error(f"{text!r} is not a YAML value", "quote text that has special characters") from None
