"""From other APIs' requests to a chat: what all of them share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from trtqwen.gateway.api.schemas import ChatRequest, SamplingFields
from trtqwen.gateway.errors import bad_request


def as_chat(request: BaseModel, fields: Mapping[str, Any]) -> ChatRequest:
    """A chat with the sampling fields of a request, and others.

    Args:
        fields: None is not given.

    Raises:
        ApiError: naming the field, if one is wrong.
    """
    shared = {name: getattr(request, name) for name in request.model_fields_set & SamplingFields.model_fields.keys()}
    given = {name: value for name, value in fields.items() if value is not None}
    try:
        return ChatRequest.model_validate({**shared, **given})
    except ValidationError as problem:
        errors = problem.errors()
        first = next((error for error in errors if not error["type"].endswith("_type")), errors[0])
        place = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise bad_request(f"{place}: {message}", param=str(first["loc"][0])) from None
