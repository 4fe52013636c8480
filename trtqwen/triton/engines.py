"""The engines of trtqwen's own Triton model `tensorrt_llm`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from trtqwen.diagnostics import EngineError
from trtqwen.engine.config import EngineConfig, read_engine_config
from trtqwen.executor.config import ExecutorConfig
from trtqwen.executor.request import IterationStats, Request, Response
from trtqwen.vllm.server import VllmPlace


class Engine(Protocol):
    """A running engine. Thread-safe."""

    @property
    def engine_config(self) -> EngineConfig: ...

    @property
    def alive(self) -> bool:
        """Return whether the engine serves requests."""

    @property
    def resident_bytes(self) -> int:
        """Memory of its processes."""

    def submit(self, request: Request, on_response: Callable[[Response], None], /) -> None:
        """Queue a request; its responses come to `on_response`, the last with a finish reason.

        Raises:
            RequestError: if the engine cannot do what it asks for.
            EngineError: if the engine has stopped.
        """

    def cancel(self, request_id: str, /) -> None:
        """End a request; it answers with finish reason `CANCELLED` unless it has ended already."""

    def stats(self) -> IterationStats:
        """Return the engine's statistics.

        Raises:
            EngineError: if it has died.
        """

    def shutdown(self) -> None:
        """Stop it; requests in flight end with an error. May be called again."""


def open_engine(
    engine: Path, config: ExecutorConfig, *, vllm: VllmPlace | None = None, verify: bool = True
) -> Engine:
    """Start the engine of a directory, by its backend; for vLLM, connect to one that runs.

    Args:
        vllm: where the engine's vLLM listens; None is the address in its settings.
        verify: read every file of the engine and compare its digest; otherwise only sizes are compared.

    Raises:
        InputError: if the directory is not a finished engine.
        EngineError: if it does not start, or is of a backend that trtqwen does not run.
    """
    backend = read_engine_config(engine).backend
    if backend == "torch":
        from trtqwen.executor.executor import Executor

        return Executor(engine, config, verify=verify)
    if backend == "vllm":
        from trtqwen.vllm.executor import VllmExecutor

        return VllmExecutor(engine, config, place=vllm, verify=verify)
    if backend == "llmapi":
        from trtqwen.llmapi.executor import LlmApiExecutor

        return LlmApiExecutor(engine, config, verify=verify)
    raise EngineError(f"{engine}: is of backend {backend}", "serve it with TensorRT-LLM's own Triton backend")
