"""Run chat templates, which are untrusted programs, in processes with limits on time and memory.

`python -m trtqwen.hf.template_process FD`, see `trtqwen.system.forks`. A question is JSON, `template` and
`variables`; without variables the template is only compiled. The answer is JSON, `text` or `error`.
"""

from __future__ import annotations

import json
import resource
import socket
import sys
from collections.abc import Mapping
from datetime import datetime
from functools import cache
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from trtqwen.system.forks import ForkServer, serve_forks

CPU_SECONDS = 2.0  # a conversation of 131,072 tokens takes 0.05 s
PATIENCE = 10.0  # seconds of a clock, on a busy machine
_MEMORY = 512 << 20  # bytes of address space
_LONGEST = 8 << 20  # characters of a prompt, and twice what it is made of


class TemplateRefusal(Exception):
    """The template is broken, refuses its variables, or exceeds a limit; the text says which."""


class TemplateTimeout(TemplateRefusal):
    """The template exceeded its time limit."""


def run_template(template: str, variables: Mapping[str, Any] | None, patience: float = PATIENCE) -> str:
    """Render a template; thread-safe.

    Args:
        variables: what JSON can carry; None compiles the template and returns an empty text.
        patience: seconds.

    Raises:
        TemplateRefusal, TemplateTimeout: as they say.
    """
    try:
        question = json.dumps({"template": template, "variables": variables}).encode()
        answer = _server().ask(question, patience)
    except (TypeError, ValueError, RecursionError) as problem:
        raise TemplateRefusal(f"{type(problem).__name__}: {problem}") from None
    except OSError as problem:
        raise TemplateRefusal(f"no process runs it: {problem}") from None
    if answer is None:
        raise TemplateTimeout(f"it took more than {CPU_SECONDS:g} s or {_MEMORY >> 20} MiB")
    content = json.loads(answer)
    if "error" in content:
        raise TemplateRefusal(content["error"])
    text: str = content["text"]
    return text


@cache
def environment() -> ImmutableSandboxedEnvironment:
    """jinja2's sandbox as transformers sets it up."""
    sandbox = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    sandbox.globals["raise_exception"] = _refuse
    sandbox.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    sandbox.filters["tojson"] = _to_json
    return sandbox


class _Generation(Extension):
    """`{% generation %}` marks what the assistant said, for training; a prompt shows its content."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller: Any) -> str:
        return str(caller())


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes what HTML needs, which a prompt does not.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@cache
def _server() -> ForkServer:
    return ForkServer(__name__, [], CPU_SECONDS)


@cache
def _compiled(text: str) -> Template:
    return environment().from_string(text)


def _answer(question: bytes) -> bytes:
    try:
        asked = json.loads(question)
        variables = asked["variables"]
        template = _compiled(asked["template"])
        text = "" if variables is None else template.render(**variables)
        if len(text) > _LONGEST + 2 * len(question):
            raise TemplateError(f"it made a prompt of {len(text)} characters")
        return json.dumps({"text": text}).encode()
    except Exception as problem:  # it can fail in any way
        return json.dumps({"error": _words(problem)}).encode()


def _words(problem: Exception) -> str:
    words = " ".join(str(problem).split())[:1000]
    return words if isinstance(problem, TemplateError) and words else f"{type(problem).__name__}: {words}"


def main() -> None:
    """Fork a process for every socket that comes."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    serve_forks(socket.socket(fileno=int(sys.argv[1])), _answer, CPU_SECONDS)


if __name__ == "__main__":
    main()
