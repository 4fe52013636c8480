"""The client's handle on a running engine: start one process per rank, send requests, and return tokens."""

from __future__ import annotations

import importlib.util
import os
import queue
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

from trtqwen.artifact.manifest import read_manifest
from trtqwen.diagnostics import EngineError, RequestError
from trtqwen.engine.config import read_engine_config
from trtqwen.executor.config import ExecutorConfig, WorkerConfig
from trtqwen.executor.handle import EngineHandle, OnResponse
from trtqwen.executor.request import Command, Event, FinishReason, IterationStats, Request, Response
from trtqwen.executor.wire import EventDecoder, merged
from trtqwen.system.leftovers import workspace
from trtqwen.system.processes import Relay

_READ_BYTES = 1 << 20
# PyTorch and oneDNN keep a compiled kernel for each product and number of tokens, 1024 of them by default. A server
# has many step sizes: a rank of the bundled model went on growing for hours. With 64 it reaches its size, 354 MB,
# with the first hundred requests, where 256 took 542 MB after 1,600; the rates of both were equal.
_CACHES = {"LRU_CACHE_CAPACITY": "64", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}
# Threads that spin without a limit starve other processes on the cores: Triton's text models were 4x slower. Threads
# that sleep at once take 0.1 ms to wake for each product. 20,000 rounds are about 0.2 ms, longer than a step's gaps:
# a 0.5B model in bfloat16 gives 1.4 times the tokens for one stream, and 1.1 times over HTTP for eight.
_SPIN = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "20000"}


class Executor(EngineHandle):
    """A running torch engine. Thread-safe; use as a context manager or call `shutdown`.

    Callbacks run on the executor's reader thread: they must be quick and must not raise. Tokens that arrive while a
    callback runs are joined to one response per request.

    Args:
        verify: read every file of the engine and compare its digest; otherwise only sizes are compared.

    Raises:
        InputError: if the directory is not a finished engine, or a file is not as it was written.
        EngineError: if the engine is for another builder, or a rank does not start.
    """

    def __init__(self, engine: Path, config: ExecutorConfig | None = None, *, verify: bool = True) -> None:
        read_manifest(engine, "engine", digests=verify)
        self.engine_config = read_engine_config(engine)
        if self.engine_config.backend != "torch":
            raise EngineError(f"{engine}: was built by {self.engine_config.backend}", "serve it with TensorRT-LLM")
        if importlib.util.find_spec("torch") is None:
            raise EngineError(f"{engine}: needs PyTorch, which is not installed", "`pip install 'trtqwen[torch]'`")
        self._callbacks: dict[str, OnResponse] = {}
        self._lock = threading.Lock()
        self._stats: queue.Queue[IterationStats | None] = queue.Queue()
        self._ready = threading.Event()
        self._cleanup = ExitStack()
        self._home = self._cleanup.enter_context(workspace("ranks"))
        ranks = self.engine_config.pretrained_config.mapping.world_size
        self._processes = [self._start(engine, config or ExecutorConfig(), rank, ranks) for rank in range(ranks)]
        self._relays = [Relay(process.stderr) for process in self._processes if process.stderr is not None]
        self._readers = [threading.Thread(target=self._read, args=(rank,), daemon=True) for rank in range(ranks)]
        for thread in self._readers:
            thread.start()
        self._ready.wait()
        if self._death is not None:
            self.shutdown()
            raise EngineError(f"{engine}: did not start: {self._death}")

    def submit(self, request: Request, on_response: OnResponse) -> None:
        """Queue a request; its responses come to `on_response`, the last with a finish reason.

        Raises:
            RequestError: if it has a priority: requests are served in the order of their arrival.
            EngineError: if the engine has stopped or the id is in flight already.
        """
        if request.priority:
            raise RequestError("priority: this engine serves requests in the order of their arrival", "leave it out")
        with self._lock:
            if self._death is not None:
                raise EngineError(f"the engine has stopped ({self._death})", "start the server again")
            if request.id in self._callbacks:
                raise EngineError(f"request id {request.id!r} is in flight already", "use a new one")
            self._callbacks[request.id] = on_response
            self._send(Command(request=request))

    def cancel(self, request_id: str) -> None:
        """End a request; it answers with finish reason `CANCELLED` unless it has ended already."""
        with self._lock:
            if self._death is None:
                self._send(Command(cancel=request_id))

    @property
    def resident_bytes(self) -> int:
        """Memory of the ranks' processes."""
        return sum(map(_resident_bytes, self._processes))

    def stats(self) -> IterationStats:
        """Return the statistics of the step loop, taken between two steps."""
        with self._lock:
            if self._death is not None:
                raise EngineError(f"the engine has stopped ({self._death})", "start the server again")
            self._send(Command(stats=True))
        stats = self._stats.get()
        if stats is None:
            raise EngineError(f"the engine has stopped ({self._death})", "start the server again")
        return stats

    def shutdown(self) -> None:
        """Stop every rank; requests in flight end with an error. May be called again."""
        self._die("it was shut down")
        for process in self._processes:
            process.wait()
        for reader in self._readers:
            if reader is not threading.current_thread():
                reader.join()
        self._cleanup.close()

    def _start(self, engine: Path, config: ExecutorConfig, rank: int, ranks: int) -> subprocess.Popen[str]:
        threads = max(1, len(os.sched_getaffinity(0)) // ranks)
        worker = WorkerConfig(
            engine=engine.resolve(),
            executor=config,
            rank=rank,
            rendezvous=self._home / "ranks",
            threads=threads,
        )
        return subprocess.Popen(
            [sys.executable, "-m", "trtqwen.executor.worker", worker.model_dump_json()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            env={**_CACHES, **_SPIN, **os.environ, "OMP_NUM_THREADS": str(threads)},
        )

    def _send(self, command: Command) -> None:
        pipe = self._processes[0].stdin
        assert pipe is not None
        try:
            pipe.write(command.model_dump_json(exclude_defaults=True) + "\n")
            pipe.flush()
        except OSError:
            pass  # the rank is gone; its reader tells everyone

    def _read(self, rank: int) -> None:
        pipe = self._processes[rank].stdout
        assert pipe is not None
        decoder = EventDecoder()
        with pipe:
            while data := os.read(pipe.fileno(), _READ_BYTES):
                responses = []
                for item in decoder.decode(data):
                    if isinstance(item, Response):
                        responses.append(item)
                    else:
                        self._handle(item)
                self._deliver(merged(responses))
        reason = f"rank {rank} ended with code {self._processes[rank].wait()}"
        self._relays[rank].join()  # a child of the rank may hold the pipe a little longer
        lines = " | ".join(self._relays[rank].last_lines)
        self._die(f"{reason}; its last lines: {lines}" if lines else reason)

    def _deliver(self, responses: list[Response]) -> None:
        callbacks = self._callbacks
        with self._lock:
            ready = [
                ((callbacks.pop if response.finish_reason else callbacks.get)(response.request_id, None), response)
                for response in responses
            ]
        for callback, response in ready:
            if callback is not None:
                callback(response)

    def _handle(self, event: Event) -> None:
        if event.stats is not None:
            self._stats.put(event.stats)
        elif event.ready:
            self._ready.set()
        elif event.fatal is not None:
            self._die(event.fatal)

    def _die(self, reason: str) -> None:
        """Stop all ranks after the end of one, and end all requests with an error. The first reason counts."""
        with self._lock:
            if self._death is not None:
                return
            self._death = reason
            orphans, self._callbacks = self._callbacks, {}
        for process in self._processes:
            process.kill()
        error = f"the engine has stopped ({reason})"
        for request_id, callback in orphans.items():
            callback(Response(request_id=request_id, finish_reason=FinishReason.ERROR, error=error))
        self._stats.put(None)
        self._ready.set()


def _resident_bytes(process: subprocess.Popen[str]) -> int:
    try:
        pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0  # it has just ended
    return pages * os.sysconf("SC_PAGE_SIZE")
