"""Guides of answers. The engine enforces a guide token by token, and the gateway checks the complete answer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal

from trtqwen.gateway.generation.value_check import keeps_to

GuideKind = Literal["json_schema", "regex", "ebnf_grammar", "structural_tag"]


@dataclass(frozen=True)
class Guide:
    """A guide, with TensorRT-LLM's names for the kinds of guides.

    Attributes:
        text: the schema, expression, grammar or structural tag.
        schema: JSON text of the schema that an answer must match; None is `text` for a JSON schema, and no schema
            for other kinds.
    """

    text: str
    kind: GuideKind = "json_schema"
    schema: str | None = None

    def allows(self, answer: str) -> bool:
        """Return whether a complete answer matches the guide's JSON schema, if it has one."""
        schema = self.text if self.kind == "json_schema" else self.schema
        if schema is None:
            return True
        try:
            value = json.loads(answer)
        except (ValueError, RecursionError):
            return False
        return keeps_to(json.loads(schema), value)


ANY_OBJECT = Guide('{"type": "object"}')
