"""The base of request schemas: marks of fields, bounded types, and unknown fields."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import chain, islice
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from trtqwen.gateway.errors import ApiError, bad_request, unsupported

_MOST_FIELDS = 1024  # of an object, known or not
_LARGEST_WHOLE = 2**53  # up to which a float carries whole numbers exactly
_DEEPEST = 128  # levels of an object inside another; what walks through them is recursive
_EMPTY: tuple[Any, ...] = (None, False, 0, "", [], {})


@dataclass(frozen=True)
class NoEffect:
    """Marks a field that is accepted and changes nothing, and says why."""

    why: str


@dataclass(frozen=True)
class Refused:
    """Marks a field that would change the answer and cannot be served.

    Attributes:
        why: as the end of a sentence.
        neutral: values without effect, besides null, false, zero and empty ones.
    """

    why: str
    neutral: tuple[Any, ...] = ()

    def allows(self, value: Any) -> bool:
        return any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in self._allowed)

    @property
    def _allowed(self) -> tuple[Any, ...]:
        return (*_EMPTY, 0.0, *self.neutral)


def check_count(value: Any) -> Any:
    """Return the value, unless it is an object with too many fields."""
    if isinstance(value, dict) and len(value) > _MOST_FIELDS:
        raise ValueError(f"there are {len(value)} fields; {_MOST_FIELDS} are allowed")
    return value


def is_deep(value: Any) -> bool:
    """Return whether a JSON value is nested too deeply."""
    level = [value]
    for _ in range(_DEEPEST):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return bool(level)


def _shallow(value: dict[str, Any]) -> dict[str, Any]:
    if is_deep(value):
        raise ValueError(f"is nested more than {_DEEPEST} levels deep; flatten it")
    return value


# The first mistake of a list is enough: a body of a megabyte may hold a million, each with a message of its own.
T = TypeVar("T")
Many = Annotated[list[T], Field(fail_fast=True)]
Few = BeforeValidator(check_count)
AnyObject = Annotated[dict[str, Any], AfterValidator(_shallow)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
StopString = Annotated[str, Field(min_length=1, max_length=1024)]
Count = Annotated[int, Field(ge=1)]


def _as_whole(value: Any) -> Any:
    """A number such as 16.0, which languages without integers write for 16, as a whole one."""
    whole = type(value) is float and value.is_integer() and abs(value) < _LARGEST_WHOLE
    return int(value) if whole else value


class Schema(BaseModel):
    """An object of a request. Fields that it does not know are kept, for `unknown_fields` to find."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        check_count(value)
        if isinstance(value, dict) and any(type(number) is float for number in value.values()):
            return {name: _as_whole(inner) for name, inner in value.items()}
        return value

    def ignored(self) -> list[str]:
        """Return the paths of known fields that are ignored."""
        return []


class Kept(Schema):
    """Part of a conversation. Clients send earlier turns back, with further fields."""

    model_config = ConfigDict(extra="ignore")


def refuse_unsupported(request: Schema) -> None:
    """Raise an ApiError if a field would change the answer and is not supported."""
    for name, mark in marked(type(request), Refused).items():
        value = getattr(request, name)
        if not mark.allows(value) and not (name == "best_of" and value == getattr(request, "n", None)):
            raise unsupported(name, f"{name} is not supported: {mark.why}; leave it out")


M = TypeVar("M", NoEffect, Refused)


def marked(schema: type[BaseModel], kind: type[M]) -> Mapping[str, M]:
    """The fields of a schema with a mark of some kind."""
    return {
        name: mark for name, field in schema.model_fields.items() for mark in field.metadata if isinstance(mark, kind)
    }


def unknown_fields(request: BaseModel) -> list[str]:
    """Return the paths of ignored fields, mostly unknown ones; at most a hundred."""
    left_out = request.ignored() if isinstance(request, Schema) else []
    return list(islice(chain(left_out, _unknown(request, "")), 100))


def refuse_unknown(request: BaseModel, names: list[str]) -> None:
    """Raise an ApiError if there are unknown fields.

    Args:
        names: as `unknown_fields` lists them.
    """
    if names:
        known = [field.alias or name for name, field in type(request).model_fields.items()]
        similar = get_close_matches(names[0], known, 1)
        hint = f"; did you mean {similar[0]!r}?" if similar else ""
        message = f"Unrecognized request argument supplied: {names[0]}{hint}"
        raise bad_request(message, param=names[0], code="unknown_field")


def _unknown(value: Any, place: str) -> Iterator[str]:
    if isinstance(value, BaseModel):
        for name in value.__pydantic_extra__ or ():
            yield place + name[:64]
        for name in value.model_fields_set:
            yield from _unknown(getattr(value, name, None), f"{place}{name}.")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            if not isinstance(inner, (BaseModel, list)):
                break  # lists hold one kind of value
            yield from _unknown(inner, f"{place}{index}.")


def missing_model(name: str, served: Sequence[str]) -> ApiError:
    """Return the error for a model that is not served here."""
    message = f"the model {name!r} does not exist; this server has {', '.join(map(repr, served))}"
    return ApiError(404, message, "model_not_found", param="model")
