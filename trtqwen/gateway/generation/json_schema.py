"""JSON schemas as the engine's grammar reads them: keywords, types, references and constants."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import unquote

Schema = Any  # an object or a boolean, of JSON
TYPES: dict[str, Callable[[Any], bool]] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "number": lambda value: isinstance(value, (int, float)) and not isinstance(value, bool),
    "integer": lambda value: (
        (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, float) and value.is_integer())
    ),
}
WITH_SCHEMA = ("items", "additionalProperties", "unevaluatedItems", "unevaluatedProperties")
WITH_SCHEMAS = ("anyOf", "oneOf", "allOf", "prefixItems")
WITH_NAMED_SCHEMAS = ("properties", "$defs", "definitions")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value) and len(set(value)) == len(value)


def _is_type(value: Any) -> bool:
    return (isinstance(value, str) and value in TYPES) or (
        _is_names(value) and bool(value) and set(value) <= set(TYPES)
    )


KEYWORDS: dict[str, Callable[[Any], bool]] = {
    "type": _is_type,
    "required": _is_names,
    "const": lambda value: True,
    "enum": lambda value: isinstance(value, list) and bool(value),
    **dict.fromkeys(("$ref", "pattern", "format"), TYPES["string"]),
    **dict.fromkeys(WITH_SCHEMA, lambda value: isinstance(value, (dict, bool))),
    **dict.fromkeys(WITH_SCHEMAS, lambda value: isinstance(value, list) and bool(value)),
    **dict.fromkeys(WITH_NAMED_SCHEMAS, TYPES["object"]),
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), TYPES["number"]),
    **dict.fromkeys(("minLength", "maxLength", "minItems", "maxItems"), _is_count),
    **dict.fromkeys(("minProperties", "maxProperties"), _is_count),
}


class Unenforceable(Exception):
    """A part of a schema that the engine would not enforce.

    Attributes:
        keyword: which, without which the rest may be enforced; none if it is not a single one.
    """

    def __init__(self, text: str, keyword: str = "") -> None:
        super().__init__(text)
        self.keyword = keyword


def target_of(root: Schema, reference: str) -> Schema:
    """Return the target of a reference. The grammar has no anchors, escapes or indices of list members.

    Raises:
        Unenforceable: if the grammar does not find it.
    """
    steps = reference.split("/")
    if steps[0] != "#":
        raise Unenforceable(
            f"the JSON schema refers to {reference!r}; only references within it work, as #/$defs/name"
        )
    target = root
    for step in steps[1:]:
        if not isinstance(target, dict) or step not in target or "~" in step or unquote(step) != step:
            raise Unenforceable(
                f"the JSON schema refers to {reference!r}, which the engine does not find; use #/$defs"
            )
        target = target[step]
    return target


def is_local(reference: str) -> bool:
    """Whether the grammar can follow a reference."""
    return reference.startswith("#") and "~" not in reference and unquote(reference) == reference


def constants_of(part: Mapping[str, Any]) -> list[Any]:
    """The values that a schema with `const` or `enum` allows."""
    return [part["const"]] if "const" in part else list(part["enum"])


def types_of(part: Mapping[str, Any]) -> list[str]:
    """The types that a schema names; the grammar takes one with properties for an object."""
    types = part.get("type", ["object"] if "properties" in part else [])
    return [types] if isinstance(types, str) else list(types)


def frozen(value: Any, step: Callable[[], None] = lambda: None) -> Any:
    """A value for sets: equal where JSON is, so that 1 is 1.0, but not true."""
    step()
    if isinstance(value, dict):
        return frozenset((key, frozen(inner, step)) for key, inner in value.items())
    if isinstance(value, list):
        return tuple(frozen(inner, step) for inner in value)
    return value, isinstance(value, bool)
