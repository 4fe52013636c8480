"""From `response_format` and vLLM's guiding fields to a guide."""

from __future__ import annotations

import json
from typing import Any

from trtqwen.gateway.api.schemas import ChatRequest, CompletionRequest, ResponseFormat
from trtqwen.gateway.errors import bad_request, unsupported
from trtqwen.gateway.generation.guide import ANY_OBJECT, Guide, GuideKind
from trtqwen.gateway.generation.json_schema import Unenforceable
from trtqwen.gateway.generation.schema_check import check_schema, loosened
from trtqwen.gateway.model import ServedModel

_LONGEST_GUIDE = 64 << 10  # characters


def plan_guide(model: ServedModel, request: ChatRequest | CompletionRequest) -> Guide | None:
    """The guide that a request asks for; None for plain text.

    Raises:
        ApiError: if there are several, the engine has no guided decoding, or the form cannot be used.
    """
    guides = {name: guide for name, guide in _guides(request).items() if guide is not None}
    if not guides:
        return None
    if len(guides) > 1:
        raise bad_request(f"{' and '.join(guides)} each ask for a form of the answer; send one", param=[*guides][1])
    [(name, guide)] = guides.items()
    require_guides(model, name)
    return guide if guide.kind != "structural_tag" else require_structural_tags(model, guide, name)


def _guides(request: ChatRequest | CompletionRequest) -> dict[str, Guide | None]:
    outputs = request.structured_outputs
    guides: dict[str, Guide | None] = {
        "response_format": format_guide(request.response_format),
        "guided_json": _json_guide(request.guided_json, "guided_json"),
        "guided_regex": _text_guide("regex", request.guided_regex, "guided_regex"),
        "guided_choice": _choice_guide(request.guided_choice),
        "guided_grammar": _text_guide("ebnf_grammar", request.guided_grammar, "guided_grammar"),
        "structural_tag": _tag_guide(request.structural_tag, "structural_tag"),
        "regex": _text_guide("regex", request.regex, "regex"),
        "ebnf": _text_guide("ebnf_grammar", request.ebnf, "ebnf"),
    }
    if outputs is not None:
        name = "structured_outputs"
        guides |= {
            f"{name}.json": _json_guide(outputs.json_, name),
            f"{name}.json_object": ANY_OBJECT if outputs.json_object else None,
            f"{name}.regex": _text_guide("regex", outputs.regex, name),
            f"{name}.choice": _choice_guide(outputs.choice),
            f"{name}.grammar": _text_guide("ebnf_grammar", outputs.grammar, name),
            f"{name}.structural_tag": _tag_guide(outputs.structural_tag, name),
        }
    return guides


def format_guide(form: ResponseFormat | None) -> Guide | None:
    """The guide of a `response_format`.

    Raises:
        ApiError: if its schema cannot be used.
    """
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return ANY_OBJECT
    if form.type == "structural_tag":
        return _tag_guide(form.model_dump(exclude_none=True), "response_format")
    if form.json_schema is None or form.json_schema.schema_ is None:
        raise bad_request("response_format.json_schema has no schema; add it", param="response_format")
    schema = form.json_schema.schema_
    return schema_guide(schema if form.json_schema.strict is not False else loosened(schema), "response_format")


def schema_guide(schema: dict[str, Any], param: str) -> Guide:
    """A guide to a JSON schema, which is checked.

    Raises:
        ApiError: naming `param`, if it is not JSON schema or asks for what the engine does not enforce.
    """
    text = _encoded(json.dumps(schema, ensure_ascii=False), param)
    try:
        check_schema(schema)
    except Unenforceable as problem:
        raise unsupported(param, str(problem)) from None
    except ValueError as problem:
        raise bad_request(str(problem), param=param) from None
    except RecursionError:  # a chain of a thousand references
        message = f"{param}: the schema's parts or references are nested too deeply; flatten it"
        raise bad_request(message, param=param) from None
    return Guide(text)


def require_guides(model: ServedModel, param: str) -> None:
    """Raise an ApiError unless the engine has guided decoding."""
    if not model.guided_decoding:
        raise unsupported(
            param,
            f"{param} needs guided decoding, which this server runs without; leave it out, or serve the model with a "
            "newer checkpoint.release, for which `trtqwen repo` turns it on",
        )


def require_structural_tags(model: ServedModel, guide: Guide, param: str) -> Guide:
    """The guide, a structural tag.

    Raises:
        ApiError: if the engine does not take any.
    """
    if "structural_tags" not in model.extensions:
        raise unsupported(param, f"{param} needs structural tags, which the engine behind this server does not take")
    return guide


def _json_guide(given: dict[str, Any] | str | None, param: str) -> Guide | None:
    if given is None:
        return None
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError):
            raise bad_request(
                f"{param} is a text that is not JSON; send the schema as an object", param=param
            ) from None
        if not isinstance(given, dict):
            raise bad_request(f"{param} is not an object; send a JSON schema", param=param)
    return schema_guide(given, param)


def _choice_guide(choices: list[str] | None) -> Guide | None:
    if not choices:
        return None
    return _text_guide("ebnf_grammar", f"root ::= {' | '.join(map(_literal, choices))}", "guided_choice")


def _literal(text: str) -> str:
    """Return a text as a string literal of the grammar."""
    if not text:
        raise bad_request("a choice is empty; leave it out", param="guided_choice")
    escapes = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
    return '"' + "".join(escapes.get(character, character) for character in text) + '"'


def _text_guide(kind: GuideKind, text: str | None, param: str) -> Guide | None:
    return Guide(_encoded(text, param), kind) if text else None


def _tag_guide(given: dict[str, Any] | str | None, param: str) -> Guide | None:
    if not given:
        return None
    text = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
    return Guide(_encoded(text, param), "structural_tag")


def _encoded(text: str, param: str) -> str:
    """A guide's text, if it can be sent to the engine."""
    if len(text) > _LONGEST_GUIDE:
        message = f"{param} has {len(text)} characters; {_LONGEST_GUIDE} are allowed"
        raise bad_request(message, param=param)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise bad_request(f"{param} holds half a surrogate pair; send whole characters", param=param) from None
    return text
