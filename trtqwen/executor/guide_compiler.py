"""Compile guides with xgrammar. A process with a CPU limit tries each one first, because xgrammar cannot be stopped.

`python -m trtqwen.executor.guide_compiler FD TOKENIZER VOCAB_SIZE` imports xgrammar once, which takes seconds; see
`trtqwen.system.forks`.
"""

from __future__ import annotations

import socket
import sys
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtqwen.diagnostics import RequestError
from trtqwen.executor.request import GuidedDecodingParams
from trtqwen.hf.tokenizer import Tokenizer
from trtqwen.system.forks import ForkServer, serve_forks

if TYPE_CHECKING:
    import xgrammar

# Seconds of CPU time, so that a busy machine refuses nothing else. What people write takes milliseconds; 100 optional
# properties took 0.04 s, 600 took 1 s, 800 took 3 s and 1500 took 32 s.
COMPILE_LIMIT = 2.0
LONGEST = 10.0  # seconds of a clock: on a machine this busy, waiting requests come first
_CACHE_BYTES = 1 << 28
_TRIALS_KEPT = 256
_NICENESS = 5  # below the engine's step loop


class GuideCompiler:
    """Compiles guides within the limit. Thread-safe; xgrammar lets other Python threads run meanwhile.

    If the trial is quick, the guide is compiled again in this process: to transfer a compiled grammar takes longer
    than to compile it (400 optional properties: 9 s and 80 MB of JSON, compared with 0.4 s).

    Args:
        directory: of the tokenizer.
        vocab_size: of the model.
    """

    def __init__(self, directory: Path, vocab_size: int) -> None:
        # It imports while we do.
        self._trials = ForkServer(__name__, [str(directory.absolute()), str(vocab_size)], COMPILE_LIMIT)
        self._compiler = _make_compiler(Tokenizer(directory), vocab_size)
        self.check = lru_cache(_TRIALS_KEPT)(self._check)

    def compile(self, params: GuidedDecodingParams) -> xgrammar.CompiledGrammar:
        """Compile a guide that `check` has accepted; xgrammar raises bare RuntimeErrors."""
        grammar: xgrammar.CompiledGrammar = _compile(self._compiler, params)
        return grammar

    def _check(self, params: GuidedDecodingParams) -> None:
        """Raise a RequestError if the guide does not compile, or fail to, within the limit."""
        if self._trials.ask(params.model_dump_json().encode(), LONGEST) is None:
            raise RequestError(
                (
                    f"guided_decoding_guide: this {params.guide_type} is too large or complicated to compile "
                    f"within {COMPILE_LIMIT:g} s"
                ),
                "simplify it",
            )


def _make_compiler(tokenizer: Tokenizer, vocab_size: int) -> xgrammar.GrammarCompiler:
    import xgrammar

    info = xgrammar.TokenizerInfo(
        pad_vocabulary(tokenizer, vocab_size),
        vocab_type=xgrammar.VocabType.RAW,
        vocab_size=vocab_size,
        stop_token_ids=list(tokenizer.stop_ids),
    )
    return xgrammar.GrammarCompiler(info, max_threads=1, cache_limit_bytes=_CACHE_BYTES)


def pad_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> list[bytes]:
    """Return the bytes of each of the model's ids; empty for ids beyond the tokenizer."""
    return list(tokenizer.token_bytes) + [b""] * (vocab_size - len(tokenizer))


def _compile(compiler: Any, params: GuidedDecodingParams) -> Any:
    if params.guide_type == "json":
        return compiler.compile_builtin_json_grammar()
    if params.guide_type == "json_schema":
        # Free whitespace lets a small model fill its answer with it.
        return compiler.compile_json_schema(params.guide, any_whitespace=False)
    if params.guide_type == "regex":
        return compiler.compile_regex(params.guide)
    if params.guide_type == "structural_tag":
        return compiler.compile_structural_tag(params.guide)
    return compiler.compile_grammar(params.guide)


def main() -> None:
    """Fork a process for every socket that comes, until its parent closes the socket."""
    control = socket.socket(fileno=int(sys.argv[1]))
    compiler = _make_compiler(Tokenizer(Path(sys.argv[2])), int(sys.argv[3]))

    def attempt(question: bytes) -> bytes:
        with suppress(Exception):  # quick to fail is as good: compiled in earnest, it says why
            _compile(compiler, GuidedDecodingParams.model_validate_json(question))
        compiler.clear_cache()
        return b""

    serve_forks(control, attempt, COMPILE_LIMIT, _NICENESS)


if __name__ == "__main__":
    main()
