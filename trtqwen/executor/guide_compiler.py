"""Compiles guides with xgrammar, each first in a child that the kernel ends at a limit: xgrammar cannot be stopped.

`python -m trtqwen.executor.guide_compiler FD TOKENIZER VOCAB_SIZE` imports xgrammar once, which takes seconds, and
forks a child for every socket that comes over FD. It ends when FD closes, a child when its socket does.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtqwen.diagnostics import RequestError
from trtqwen.executor.request import GuidedDecodingParams
from trtqwen.hf.tokenizer import Tokenizer

if TYPE_CHECKING:
    import xgrammar

# Seconds of CPU time, so that a busy machine refuses nothing else. What people write takes milliseconds; 100 optional
# properties took 0.04 s, 600 took 1 s, 800 took 3 s and 1500 took 32 s.
COMPILE_LIMIT = 2.0
LONGEST = 10.0  # seconds of a clock: on a machine this busy, whoever waits behind comes first
_CACHE_BYTES = 1 << 28
_TRIALS_KEPT = 256
_READY, _COMPILED = b"+", b"."


class GuideCompiler:
    """Compiles guides within the limit. Thread-safe; xgrammar lets other Python threads run meanwhile.

    A guide that its trial has shown to be quick is compiled once more, here: handing a compiled grammar from process
    to process takes longer than compiling it (400 optional properties: 9 s and 80 MB of JSON against 0.4 s).

    Args:
        directory: of the tokenizer.
        vocab_size: of the model.
    """

    def __init__(self, directory: Path, vocab_size: int) -> None:
        self._arguments = [str(directory), str(vocab_size)]
        self._lock = threading.Lock()
        self._start_parent()  # imports while we do
        self._idle: list[socket.socket] = []
        self._compiler = _make_compiler(Tokenizer(directory), vocab_size)
        self.check = lru_cache(_TRIALS_KEPT)(self._check)

    def compile(self, params: GuidedDecodingParams) -> xgrammar.CompiledGrammar:
        """Compile a guide that `check` has let through; xgrammar raises bare RuntimeErrors."""
        grammar: xgrammar.CompiledGrammar = _compile(self._compiler, params)
        return grammar

    def _check(self, params: GuidedDecodingParams) -> None:
        """Raise a RequestError if the guide does not compile, or fail to, within the limit."""
        with self._lock:
            child = self._idle.pop() if self._idle else self._fork()
        child.sendall(params.model_dump_json().encode() + b"\n")
        if child.recv(1) != _COMPILED:
            child.close()
            raise RequestError(
                (
                    f"guided_decoding_guide: this {params.guide_type} is too large or complicated to compile "
                    f"within {COMPILE_LIMIT:g} s"
                ),
                "simplify it",
            )
        with self._lock:
            self._idle.append(child)

    def _fork(self) -> socket.socket:
        if self._parent.poll() is not None:
            self._start_parent()
        ours, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(self._control, [b"fork"], [theirs.fileno()])
        if ours.recv(1) != _READY:
            raise OSError("the process that tries guides has ended; see the engine's log")
        return ours

    def _start_parent(self) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._parent = subprocess.Popen(
                [sys.executable, "-m", "trtqwen.executor.guide_compiler", str(theirs.fileno()), *self._arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # ours may be for events
                pass_fds=[theirs.fileno()],
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
    """What each of the model's ids stands for; nothing, beyond the tokenizer."""
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


def _try_guides(client: socket.socket, compiler: xgrammar.GrammarCompiler) -> None:
    client.sendall(_READY)
    for line in client.makefile("rb"):
        signal.setitimer(signal.ITIMER_PROF, COMPILE_LIMIT)  # its signal kills, in any state of xgrammar
        signal.setitimer(signal.ITIMER_REAL, LONGEST)
        with suppress(Exception):  # quick to fail is as good: compiled in earnest, it says why
            _compile(compiler, GuidedDecodingParams.model_validate_json(line))
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        compiler.clear_cache()
        client.sendall(_COMPILED)


def main() -> None:
    """Fork a child for every socket that comes, until its parent closes the socket."""
    control = socket.socket(fileno=int(sys.argv[1]))
    compiler = _make_compiler(Tokenizer(Path(sys.argv[2])), int(sys.argv[3]))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # so that dead children vanish by themselves
    while True:
        _, sockets, *_ = socket.recv_fds(control, 16, 1)
        if not sockets:
            return
        with socket.socket(fileno=sockets[0]) as client:
            if os.fork() == 0:
                control.close()
                _try_guides(client, compiler)
                os._exit(0)


if __name__ == "__main__":
    main()
