"""Read the YAML files that people write: recipes, gateway settings, API keys."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from trtqwen.diagnostics import InputError, why_unreadable


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
        raise error(f"{path}: cannot be read ({why_unreadable(problem)})", "name a YAML file") from None
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


def with_fields(text: str, changes: Mapping[str, Any]) -> str:
    """The text of a YAML file with other values; comments, order and everything else stay.

    Args:
        changes: values by dotted name, of one or two parts: `engine.max_batch_size`. A field that is missing is added
            at the end of its section, a section that is missing at the end of the file.

    Raises:
        ValueError: if the result does not read back as the old content with the changes.
    """
    expected = yaml.load(text, _Loader)
    for name, value in changes.items():
        section, _, field = name.rpartition(".")
        text = _with_field(text, section, field, _scalar(value))
        if section:
            expected[section] = {**(expected.get(section) or {}), field: value}
        else:
            expected[field] = value
    if yaml.load(text, _Loader) != expected:
        raise ValueError("the changed text has another content")
    return text


def _with_field(text: str, section: str, field: str, value: str) -> str:
    root = yaml.compose(text, yaml.SafeLoader)
    assert isinstance(root, yaml.MappingNode)
    part = _value_of(root, section) if section else root
    if not isinstance(part, yaml.MappingNode):
        if part is not None:  # `serve:` without a value
            begin = text.rindex(section, 0, part.start_mark.index)
            text = text[:begin] + text[begin:].replace(f"{section}:", f"{section}: {{}}", 1)
            return _with_field(text, section, field, value)
        return f"{text.rstrip()}\n\n{section}:\n  {field}: {value}\n"
    node = _value_of(part, field)
    if node is not None:
        return text[: node.start_mark.index] + value + text[node.end_mark.index :]
    if part.flow_style:
        end = part.end_mark.index - 1
        return f"{text[:end].rstrip()}{', ' if part.value else ''}{field}: {value}{text[end:]}"
    column = part.value[0][0].start_mark.column
    last = _end(part)
    end = text.find("\n", last)
    end = len(text) if end < 0 else end
    return f"{text[:end]}\n{' ' * column}{field}: {value}{text[end:]}"


def _end(node: yaml.Node) -> int:
    """Where the last value of a block ends: the mark of the block itself lies behind the comments that follow."""
    while isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        node = last[1] if isinstance(last, tuple) else last
    return int(node.end_mark.index)


def _value_of(node: yaml.MappingNode, name: str) -> yaml.Node | None:
    return next((value for key, value in node.value if key.value == name), None)


def _scalar(value: Any) -> str:
    """A plain value as YAML has it, on one line."""
    return str(yaml.safe_dump(value, default_flow_style=True, width=1 << 20)).removesuffix("...\n").strip()
