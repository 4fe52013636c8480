"""Check of values against a checked JSON schema, to detect an engine that ignores its guide."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trtqwen.gateway.generation.json_schema import TYPES, Schema, constants_of, frozen, target_of, types_of

_MOST_STEPS = 50_000  # a tenth of a second or so; an answer of 8000 tokens takes less


def keeps_to(schema: Schema, value: Any) -> bool:
    """Return whether a value matches a checked schema, within `_MOST_STEPS` steps.

    A step compares one value with one schema in constant time; nested values take further steps. So the work is
    bounded for every schema and value. Beyond the bound, the value counts as valid: the grammar has already enforced
    the schema, and an engine that does not enforce it is detected by other answers.
    """
    try:
        return _Check(schema).fits(schema, value)
    except (_OutOfSteps, RecursionError):
        return True


class _OutOfSteps(Exception):
    pass


class _Check:
    def __init__(self, root: Schema) -> None:
        self._root = root
        self._steps = 0
        self._targets: dict[str, Schema] = {}
        self._constants: dict[int, set[Any]] = {}

    def fits(self, schema: Schema, value: Any) -> bool:
        self._step()
        if isinstance(schema, bool):
            return schema
        if "$ref" in schema:
            reference = schema["$ref"]
            if reference not in self._targets:
                self._targets[reference] = target_of(self._root, reference)
            return self.fits(self._targets[reference], value)
        if "const" in schema or "enum" in schema:
            if id(schema) not in self._constants:
                self._constants[id(schema)] = {frozen(constant) for constant in constants_of(schema)}
            return frozen(value, self._step) in self._constants[id(schema)]
        for keyword in ("anyOf", "oneOf", "allOf"):
            if keyword in schema:
                return any(self.fits(member, value) for member in schema[keyword])
        if "type" in schema and not any(TYPES[name](value) for name in types_of(schema)):
            return False
        if isinstance(value, dict):
            return self._object_fits(schema, value)
        if isinstance(value, list):
            return self._array_fits(schema, value)
        if isinstance(value, str):
            return _within(len(value), schema, "Length")
        return not TYPES["number"](value) or (
            schema.get("minimum", value) <= value <= schema.get("maximum", value)
            and ("exclusiveMinimum" not in schema or value > schema["exclusiveMinimum"])
            and ("exclusiveMaximum" not in schema or value < schema["exclusiveMaximum"])
        )

    def _object_fits(self, schema: Mapping[str, Any], value: dict[str, Any]) -> bool:
        named = schema.get("properties", {})
        further = schema.get("additionalProperties", schema.get("unevaluatedProperties", True))
        return (
            _within(len(value), schema, "Properties")
            and all(name in value for name in schema.get("required", ()))
            and all(self.fits(named.get(name, further), inner) for name, inner in value.items())
        )

    def _array_fits(self, schema: Mapping[str, Any], value: list[Any]) -> bool:
        first = schema.get("prefixItems", ())
        further = schema.get("items", schema.get("unevaluatedItems", True))
        return _within(len(value), schema, "Items") and all(
            self.fits(first[index] if index < len(first) else further, inner) for index, inner in enumerate(value)
        )

    def _step(self) -> None:
        self._steps += 1
        if self._steps > _MOST_STEPS:
            raise _OutOfSteps


def _within(size: int, schema: Mapping[str, Any], what: str) -> bool:
    return bool(schema.get(f"min{what}", size) <= size <= schema.get(f"max{what}", size))
