"""Check whether the engine's grammar enforces a JSON schema in full.

xgrammar reads one keyword of a schema: the first one present of $ref, const, enum, anyOf or oneOf, allOf, and then
type. It silently ignores other keywords next to it and unknown keywords, so that an answer could violate them. The
accepted schemas were found by experiment with xgrammar 0.2.8, and tests/gateway/test_guides.py repeats the
experiment. Refused although partly enforced: `multipleOf` (not for fractions, nor with a range), `propertyNames` and
`patternProperties` (not with properties), several members of `allOf`.

Known gap: a key that `additionalProperties` lets in may spell a property's name with escapes, as
{"\\u0061": 1} for "a". Such an answer is found out when it is complete.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

from trtqwen.gateway.generation.json_schema import (
    KEYWORDS,
    TYPES,
    WITH_NAMED_SCHEMAS,
    WITH_SCHEMA,
    WITH_SCHEMAS,
    Schema,
    Unenforceable,
    constants_of,
    frozen,
    is_local,
    target_of,
    types_of,
)

# Keywords of JSON Schema that restrict values and are not enforced. Any other one that is not known is an annotation:
# JSON Schema 2020-12, core, 4.3.1.
_RESTRICTIONS = {
    *("uniqueItems", "multipleOf", "additionalItems", "contains", "minContains", "maxContains"),
    *("patternProperties", "propertyNames", "dependencies", "dependentRequired", "dependentSchemas"),
    *("not", "if", "then", "else", "$dynamicRef", "$recursiveRef", "disallow", "divisibleBy", "extends"),
}
_DECIDERS = ("$ref", "const", "enum", "anyOf", "oneOf", "allOf")
# Without a type, these tell the grammar that an object or an array is meant.
_TELLING = {
    "object": {"properties", "additionalProperties", "unevaluatedProperties"},
    "array": {"items", "prefixItems", "unevaluatedItems"},
}
_BESIDE = {
    "object": _TELLING["object"] | {"required", "minProperties", "maxProperties"},
    "array": _TELLING["array"] | {"minItems", "maxItems"},
}
# Formats that the grammar follows, instead of a pattern or a length with them.
_FORMATS = {
    *("date-time", "date", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid"),
    *("uri", "uri-reference", "uri-template", "json-pointer", "relative-json-pointer"),
}
# An escape or a class of characters. One that nothing closes reaches to the end: no position is looked at twice.
_ATOM = re.compile(r"\\.|\[(?:\\.|[^\]\\])*(?:\]|\\?\Z)", re.DOTALL)
# Lookaround counts as matched; a quotation mark, backslash or control character would end up bare in the answer.
_LOOSE = re.compile(r'\(\?(?!:)|\\(?!u(?!00[0-7])[0-9a-fA-F]{4}|[dDwWsS.^$*+?()\[\]{}|/-])|["\x00-\x1f]')
_LONGEST_PLACE = 100  # characters; a long name must not be copied for each of many parts below it
_WIDEST = 1000


def check_schema(schema: Schema) -> None:
    """Check that every answer which the grammar allows matches a schema.

    The time is about linear in the schema's text: every part is looked at once, and every reference followed once.

    Raises:
        ValueError: if it is not JSON schema.
        Unenforceable: if the grammar would allow other answers.
    """
    parts = [(place, part) for place, part in _parts(schema, "#") if isinstance(part, dict)]
    for place, part in parts:
        _check_part(part, place, is_root=part is schema)
    known = {id(part) for _, part in parts}
    targets: dict[str, Schema] = {}
    for place, part in parts:
        if "$ref" in part:
            target = targets[part["$ref"]] = target_of(schema, part["$ref"])
            if not isinstance(target, bool) and id(target) not in known:
                raise ValueError(f"$ref at {place} refers to {part['$ref']!r}, which is no schema; correct it")
    widths: dict[int, int] = {}
    for place, part in parts:
        if _width(part, targets, widths) > _WIDEST:
            raise Unenforceable(
                f"{place} of the JSON schema stands for more than {_WIDEST} schemas at once, or for itself; use "
                "fewer references"
            )
    for place, part in parts:
        if "oneOf" in part and not _told_apart(part["oneOf"], targets):
            raise Unenforceable(
                f"oneOf at {place} cannot be enforced: the engine takes it for anyOf, and its members are "
                "distinguished neither by type nor by the constant of a required property; use anyOf"
            )


def loosened(schema: Schema) -> Schema:
    """Return the schema without keywords that the grammar cannot enforce or that are not JSON schema."""
    loose = _loosened(schema, "#", is_root=True)
    try:
        check_schema(loose)
    except (Unenforceable, ValueError, RecursionError):
        return {"type": "object"}
    return loose


def _loosened(schema: Schema, place: str, *, is_root: bool = False) -> Schema:
    if not isinstance(schema, dict):
        return schema if isinstance(schema, bool) else {}
    part: dict[str, Any] = {}
    for name, value in schema.items():
        keyword = "prefixItems" if name == "items" and isinstance(value, list) else name
        if keyword not in KEYWORDS or not KEYWORDS[keyword](value):
            continue
        if keyword in WITH_SCHEMA:
            part[keyword] = _loosened(value, place)
        elif keyword in WITH_SCHEMAS:
            part["anyOf" if keyword == "oneOf" else keyword] = [_loosened(inner, place) for inner in value]
        elif keyword in WITH_NAMED_SCHEMAS:
            part[keyword] = {key: _loosened(inner, place) for key, inner in value.items()}
        else:
            part[keyword] = value
    if not is_local(part.get("$ref", "#")):
        del part["$ref"]
    further = part.get("additionalProperties", part.get("unevaluatedProperties", True))
    if "required" in part and further is not False and ("type" in part or "properties" in part):
        named = part.get("properties", {})
        part["properties"] = {**{name: {} for name in part["required"]}, **named}
    while True:
        try:
            _check_part(part, place, is_root=is_root)
        except Unenforceable as problem:
            if problem.keyword not in part:
                return {}
            del part[problem.keyword]
        else:
            return part


def _parts(schema: Schema, place: str) -> Iterator[tuple[str, Schema]]:
    place = place if len(place) < _LONGEST_PLACE else f"...{place[-_LONGEST_PLACE:]}"
    yield place, schema
    if not isinstance(schema, dict):
        if not isinstance(schema, bool):
            raise ValueError(f"the JSON schema is not valid: {place} is neither object nor boolean; correct it")
        return
    for keyword, value in schema.items():
        if keyword in KEYWORDS and not KEYWORDS[keyword](value):
            raise ValueError(f"the JSON schema is not valid: {keyword} at {place} has a wrong value; correct it")
        if keyword in WITH_SCHEMA:
            yield from _parts(value, f"{place}/{keyword}")
        elif keyword in WITH_SCHEMAS:
            for number, inner in enumerate(value):
                yield from _parts(inner, f"{place}/{keyword}/{number}")
        elif keyword in WITH_NAMED_SCHEMAS:
            for name, inner in value.items():
                yield from _parts(inner, f"{place}/{keyword}/{name}")


def _check_part(part: Mapping[str, Any], place: str, *, is_root: bool) -> None:
    keywords = {keyword for keyword in part if keyword in KEYWORDS and not _says_nothing(keyword, part)}
    keywords -= {"$defs", "definitions"}
    for keyword in part:
        if similar := _misspelt(keyword):
            text = f"{keyword!r} at {place} of the JSON schema is no keyword; did you mean {similar!r}?"
            raise Unenforceable(text, keyword)
        if (keyword in _RESTRICTIONS and not _says_nothing(keyword, part)) or (keyword == "$id" and not is_root):
            text = f"the engine cannot enforce {keyword!r} at {place} of the JSON schema; leave it out"
            raise Unenforceable(text, keyword)
    decider = next((keyword for keyword in _DECIDERS if keyword in part), None)
    if decider is None:
        _check_typed(part, keywords, place)
        return
    beside = keywords - {decider}
    if decider in ("const", "enum"):
        beside -= {"type", "enum"}
        _check_constants(part, place)
    if beside:
        text = f"the engine cannot enforce {min(beside)!r} with {decider!r} at {place}; leave one of them out"
        typed = decider in ("anyOf", "oneOf", "allOf") and beside & {"type", "properties"}
        raise Unenforceable(text, decider if typed else min(beside))
    if decider == "allOf" and len(part["allOf"]) > 1:
        text = f"the engine cannot enforce 'allOf' of several schemas at {place}; merge them into one"
        raise Unenforceable(text, decider)


@lru_cache(1024)
def _misspelt(keyword: str) -> str:
    """Return the keyword that a misspelled one means, if any."""
    known = {*KEYWORDS, *_RESTRICTIONS}
    similar = [] if keyword in known or keyword.startswith("x-") else get_close_matches(keyword, known, 1, 0.88)
    return similar[0] if similar else ""


def _says_nothing(keyword: str, part: Mapping[str, Any]) -> bool:
    """Return whether a keyword's value restricts nothing."""
    value = part[keyword]
    if keyword == "multipleOf":
        return value == 1 and part.get("type") == "integer"
    if keyword == "additionalItems":
        return not isinstance(part.get("items"), list)
    if keyword in ("minLength", "minItems", "minProperties"):
        return value == 0 and not isinstance(value, bool)
    return keyword == "uniqueItems" and value is False


def _check_constants(part: Mapping[str, Any], place: str) -> None:
    for value in constants_of(part):
        typed = "type" not in part or any(TYPES[name](value) for name in types_of(part))
        listed = "enum" not in part or "const" not in part or frozen(value) in map(frozen, part["enum"])
        if not typed or not listed:
            text = f"a constant at {place} of the JSON schema contradicts type or enum; leave it out"
            raise Unenforceable(text, "type" if "type" in part else "const")


def _check_typed(part: Mapping[str, Any], keywords: set[str], place: str) -> None:
    if "type" not in part:
        told = next((kind for kind, telling in _TELLING.items() if telling & keywords), None)
        untold = keywords - (_BESIDE[told] if told else set())
        if untold:
            text = f"the engine cannot enforce {min(untold)!r} at {place} without a type; add it"
            raise Unenforceable(text, min(untold))
    undescribed = [name for name in part.get("required", ()) if name not in part.get("properties", {})]
    if undescribed:
        raise Unenforceable(
            f"the engine cannot enforce 'required' at {place} for {undescribed[0]!r}, which is not among the "
            "properties; add it there",
            "required",
        )
    further = part.get("additionalProperties", part.get("unevaluatedProperties", False))
    if "minProperties" in keywords and further is not False:  # a key may come twice, and counts once
        raise Unenforceable(
            f"the engine cannot enforce 'minProperties' at {place} with additional properties; leave out one",
            "minProperties",
        )
    rival = "format" if part.get("format") in _FORMATS else "pattern"
    for keyword in ("pattern", "minLength", "maxLength"):
        if rival in part and keyword in keywords and keyword != rival:
            text = f"the engine cannot enforce {keyword!r} with {rival!r} at {place}; leave out one"
            raise Unenforceable(text, keyword)
    if "pattern" in part and not _is_followed(part["pattern"]):
        raise Unenforceable(
            f"the engine cannot enforce 'pattern' at {place}: lookaround, anchors inside, quotation marks, "
            "backslashes and escapes beyond \\d, \\w, \\s and \\uXXXX are not followed; write it without",
            "pattern",
        )


def _is_followed(pattern: str) -> bool:
    """Whether the grammar follows a regular expression: it takes it to be anchored, and ignores anchors inside."""
    if _LOOSE.search(_ATOM.sub(lambda atom: "" if atom[0].startswith("[^") else atom[0], pattern)):
        return False
    rest = _ATOM.sub("", pattern)
    alternatives = [rest] if "(" in rest else rest.split("|")
    return not any("^" in part.removeprefix("^") or "$" in part.removesuffix("$") for part in alternatives)


def _width(part: Schema, targets: Mapping[str, Schema], known: dict[int, int]) -> int:
    """How many schemas one value is held to at once by `part`, alternatives included; endless for what contains
    itself without going deeper into the value."""
    if not isinstance(part, dict):
        return 1
    if id(part) not in known:
        known[id(part)] = _WIDEST + 1  # while it is being counted
        inside = [targets[part["$ref"]]] if "$ref" in part else []
        inside += [member for keyword in ("anyOf", "oneOf", "allOf") for member in part.get(keyword, ())]
        known[id(part)] = min(_WIDEST + 1, 1 + sum(_width(member, targets, known) for member in inside))
    return known[id(part)]


def _told_apart(members: Sequence[Schema], targets: Mapping[str, Schema]) -> bool:
    """Return whether no value can match two of the schemas."""
    parts = [_followed(member, targets) for member in members]
    if len({id(part) for part in parts}) < len(parts):
        return False
    kinds = [{"number" if name == "integer" else name for name in types_of(part)} for part in parts]
    if _disjoint(kinds):
        return True
    shared = set.intersection(*({*part.get("required", ())} for part in parts))
    return all(kind == {"object"} for kind in kinds) and any(
        _disjoint(_texts(part["properties"][name]) for part in parts) for name in shared
    )


def _texts(schema: Schema) -> set[str]:
    """The constants that a schema allows; none unless all are texts."""
    constants = constants_of(schema) if isinstance(schema, dict) and ("const" in schema or "enum" in schema) else []
    return set(constants) if all(isinstance(constant, str) for constant in constants) else set()


def _disjoint(sets: Iterable[set[str]]) -> bool:
    """Whether none is empty and no two have anything in common."""
    seen: set[str] = set()
    for texts in sets:
        if not texts or texts & seen:
            return False
        seen |= texts
    return True


def _followed(schema: Schema, targets: Mapping[str, Schema]) -> Mapping[str, Any]:
    while isinstance(schema, dict) and "$ref" in schema:
        schema = targets[schema["$ref"]]
    return schema if isinstance(schema, dict) else {}
