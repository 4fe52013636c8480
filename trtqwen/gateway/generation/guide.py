"""What holds an answer to JSON: the engine token by token, and the gateway by looking at the whole afterwards."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from trtqwen.gateway.api.schemas import ResponseFormat
from trtqwen.gateway.errors import bad_request, unsupported
from trtqwen.gateway.generation.json_schema import Unenforceable, check_schema, keeps_to
from trtqwen.gateway.model import ServedModel

_LONGEST_SCHEMA = 64 << 10  # characters


@dataclass(frozen=True)
class Guide:
    """A JSON schema, as text: TensorRT-LLM's guide of type `json_schema`."""

    text: str

    def allows(self, answer: str) -> bool:
        """Whether a complete answer is what the guide asked for."""
        try:
            value = json.loads(answer)
        except (ValueError, RecursionError):
            return False
        return keeps_to(json.loads(self.text), value)


ANY_OBJECT = Guide('{"type": "object"}')


def plan_guide(model: ServedModel, response_format: ResponseFormat | None) -> Guide | None:
    """The guide that a response format asks for; None for plain text.

    Raises:
        ApiError: if the engine has no guided decoding or the schema cannot be used.
    """
    if response_format is None or response_format.type == "text":
        return None
    require_guides(model, "response_format")
    if response_format.type == "json_object":
        return ANY_OBJECT
    if response_format.json_schema is None or response_format.json_schema.schema_ is None:
        raise bad_request("response_format.json_schema has no schema; add it", param="response_format")
    return schema_guide(response_format.json_schema.schema_, "response_format")


def schema_guide(schema: dict[str, Any], param: str) -> Guide:
    """A guide to a JSON schema, which is checked.

    Raises:
        ApiError: naming `param`, if it is no JSON schema or asks for what the engine does not enforce.
    """
    try:
        text = json.dumps(schema, ensure_ascii=False)
        text.encode()
        if len(text) > _LONGEST_SCHEMA:
            message = f"the JSON schema has {len(text)} characters; {_LONGEST_SCHEMA} are allowed"
            raise bad_request(message, param=param)
        check_schema(schema)
    except Unenforceable as problem:
        raise unsupported(param, str(problem)) from None
    except UnicodeEncodeError:
        raise bad_request("the JSON schema holds half a surrogate pair; send whole characters", param=param) from None
    except ValueError as problem:
        raise bad_request(str(problem), param=param) from None
    return Guide(text)


def require_guides(model: ServedModel, param: str) -> None:
    """Raise an ApiError unless the engine can be held to JSON."""
    if not model.guided_decoding:
        raise unsupported(
            param,
            f"{param} needs guided decoding, which the engine was started without; leave it out, or build with a "
            "checkpoint.release of 0.19.0 or newer",
        )
