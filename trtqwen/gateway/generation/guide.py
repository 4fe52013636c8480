"""What holds an answer to a form: the engine token by token, and the gateway by looking at the whole afterwards."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal

from trtqwen.gateway.generation.value_check import keeps_to

GuideKind = Literal["json_schema", "regex", "ebnf_grammar", "structural_tag"]


@dataclass(frozen=True)
class Guide:
    """A form, by TensorRT-LLM's names for the kinds of them.

    Attributes:
        text: the schema, expression, grammar or structural tag.
        schema: JSON text of the schema that an answer must keep to; None is `text` for a JSON schema, and no schema
            for other kinds.
    """

    text: str
    kind: GuideKind = "json_schema"
    schema: str | None = None

    def allows(self, answer: str) -> bool:
        """Whether a complete answer is what the guide asked for, as far as a JSON schema tells."""
        schema = self.text if self.kind == "json_schema" else self.schema
        if schema is None:
            return True
        try:
            value = json.loads(answer)
        except (ValueError, RecursionError):
            return False
        return keeps_to(json.loads(schema), value)


ANY_OBJECT = Guide('{"type": "object"}')
