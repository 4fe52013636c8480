"""Run a batch: call the gateway's own routes in this process, in front of an engine.

The embedded engine and the LLM API run in this process, vLLM and TensorRT engines behind the Triton servers that
`serve` would start. A line gets the answer that the server would give, by the same code.

A journal keeps results as they come. When all are there, they are written in order of the input. A batch that was
killed resumes at the end of its journal.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtqwen.artifact.directory import write_file
from trtqwen.artifact.journal import Journal, journal_digest
from trtqwen.artifact.manifest import MANIFEST, load_manifest
from trtqwen.batch.lines import Line, result
from trtqwen.batch.local import LocalTriton, local_triton
from trtqwen.batch.served import ServedTriton, served_triton
from trtqwen.diagnostics import InputError, OutputError
from trtqwen.engine.config import read_engine_config
from trtqwen.gateway.app import create_app
from trtqwen.gateway.config import GatewayConfig
from trtqwen.gateway.generation.health import Monitor
from trtqwen.recipe import ServeRecipe, load_recipe
from trtqwen.system.leftovers import workspace
from trtqwen.triton.repository import write_repository

OnProgress = Callable[[int, int], None]
_FOREVER = 30 * 86400.0
_MOST_WAITING = 1 << 40
_CHECK_PERIOD = 0.5  # seconds between two looks at the engine
_LOOK_PERIOD = 0.1  # after a request failed
_DEATH_SECONDS = 600.0  # that an engine may take after a failed request until it answers or is seen to have ended
_IN_PROCESS = ("torch", "llmapi")


@dataclass(frozen=True)
class BatchResult:
    """The result of a batch.

    Attributes:
        reused: results that an earlier run had written.
        failed: lines whose result is an error.
    """

    lines: int
    reused: int
    failed: int
    output_tokens: int


def find_engine(engine_or_recipe: str, engines: Path) -> tuple[Path, ServeRecipe]:
    """Return an engine directory and its serving settings, for a directory or the name of a built recipe.

    Raises:
        InputError: if there is none.
    """
    directory = Path(engine_or_recipe)
    if (directory / MANIFEST).is_file():
        return directory, ServeRecipe()
    recipe = load_recipe(engine_or_recipe)
    directory = engines / recipe.name / "engine"
    if not (directory / MANIFEST).is_file():
        raise InputError(f"{directory}: holds no engine", f"run `trtqwen build {engine_or_recipe} --model MODEL`")
    return directory, recipe.serve


def run_batch(
    engine: Path,
    serve: ServeRecipe,
    lines: Sequence[Line],
    output: Path,
    *,
    force: bool = False,
    on_progress: OnProgress = lambda lines, tokens: None,
) -> BatchResult:
    """Answer the lines and write the results, one JSON object per line, in order of the input.

    Args:
        force: replace an output that exists, and forget the journal of another batch.
        on_progress: called with the lines done and the tokens generated since the call before.

    Raises:
        OutputError: if the output exists, or a journal of another batch, and `force` is not set.
        EngineError, ServerError: if the engine does not start or ends; finished results are kept.
    """
    if output.exists() and not force:
        raise OutputError(f"{output}: exists", "pass --force to replace it or choose another file")
    results = _Results(output, _digest(engine, lines), force=force)
    reused = len(results.known)
    on_progress(reused, 0)
    todo = [line for line in lines if line.index not in results.known]
    for line in [line for line in todo if line.error is not None]:
        results.add(line.index, result(line, 0, {}))
        on_progress(1, 0)
    todo = [line for line in todo if line.error is None]
    if todo:
        local = read_engine_config(engine).backend in _IN_PROCESS
        # Engines in this process are one: the other replicas' GPUs would stay idle.
        served = serve.model_copy(update={"max_queue_size": 0, **({"replicas": 1} if local else {})})
        with _repository(engine, served) as repository, _open(repository, local=local) as triton:
            asyncio.run(_answer_all(repository, triton, todo, results, on_progress))
    written = results.finish(len(lines))
    new = sum(_tokens(written[line.index]) for line in todo)
    return BatchResult(len(lines), reused, sum(map(_failed, written)), new)


def _open(repository: Path, *, local: bool) -> AbstractContextManager[LocalTriton | ServedTriton]:
    return local_triton(repository) if local else served_triton(repository)


@contextmanager
def _repository(engine: Path, serve: ServeRecipe) -> Iterator[Path]:
    """Yield a temporary model repository of the engine, from which the gateway reads the model's properties."""
    with workspace("batch") as home:
        repository = home / "repository"
        write_repository(engine, serve, repository)
        yield repository


async def _answer_all(
    repository: Path,
    triton: LocalTriton | ServedTriton,
    lines: Sequence[Line],
    results: _Results,
    on_progress: OnProgress,
) -> None:
    config = GatewayConfig(
        repository=repository,
        triton=triton.addresses,
        model_name="batch",
        queue_seconds=_FOREVER,
        request_seconds=_FOREVER,
        stall_seconds=_FOREVER,
        probe_seconds=60,
        max_queued_requests=_MOST_WAITING,
        max_queued_tokens=_MOST_WAITING,
        unknown_fields="refuse",
        max_body_bytes=1 << 40,
    )
    app = create_app(config, triton.connect)
    waiting = iter(lines)

    async def worker() -> None:
        for line in waiting:
            body = {"model": "batch", **line.body}
            if body.pop("stream", False):
                body["stream"] = False
            if line.custom_id is not None:
                body["model"] = "batch"
            status, answer = await _post(app, line.url, body)
            if status >= 500:
                await _survive(triton, app.state.fleet.default.stable.runtime.monitor)
            content = result(line, status, answer)
            results.add(line.index, content)
            on_progress(1, _tokens(content))

    async with app.router.lifespan_context(app):
        runtime = app.state.fleet.default.stable.runtime
        while not runtime.monitor.ready:
            triton.check()
            await asyncio.sleep(0.01)
        # A window twice the batch keeps the engine full.
        window = 2 * runtime.model.limits.max_batch_size * len(triton.addresses)
        work = asyncio.gather(*(worker() for _ in range(min(len(lines), window))))
        watch = asyncio.create_task(_check_for(triton, _FOREVER))
        try:
            running: set[asyncio.Future[Any]] = {work, watch}
            await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            if watch.done():
                watch.result()
            await work
        finally:
            work.cancel()
            watch.cancel()
            await asyncio.gather(work, watch, return_exceptions=True)


async def _survive(triton: LocalTriton | ServedTriton, monitor: Monitor) -> None:
    """Wait after a failed request until the engine answers; raise its error if it has ended.

    The line of a request that died with its engine has no result: the next run answers it.
    """
    failed = time.monotonic()
    while not monitor.answered_since(failed) and time.monotonic() < failed + _DEATH_SECONDS:
        await asyncio.to_thread(triton.check)
        monitor.look()
        await asyncio.sleep(_LOOK_PERIOD)


async def _check_for(triton: LocalTriton | ServedTriton, seconds: float) -> None:
    """Check the engine repeatedly for this time; raise its error if it has ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        await asyncio.to_thread(triton.check)
        await asyncio.sleep(_CHECK_PERIOD)


async def _post(app: Any, path: str, body: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
    """Call a route of an ASGI application and return its status and JSON."""
    content = json.dumps(body).encode()
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())],
        "client": ("127.0.0.1", 0),
        "server": ("127.0.0.1", 0),
        "state": {},
    }
    status, parts, sent = 500, [], False

    async def receive() -> dict[str, Any]:
        nonlocal sent
        if sent:
            await asyncio.Event().wait()  # a client that stays
        sent = True
        return {"type": "http.request", "body": content, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        elif message["type"] == "http.response.body":
            parts.append(message.get("body", b""))

    await app(scope, receive, send)
    answer = json.loads(b"".join(parts))
    return status, answer if isinstance(answer, dict) else {}


class _Results:
    """A journal of results next to the output, so that a resumed batch computes nothing twice."""

    def __init__(self, output: Path, digest: str, *, force: bool) -> None:
        self._output = output
        self._journal = Journal(
            output.with_name(f".{output.name}.part"),
            digest,
            other="is the journal of a batch with another input or engine",
            hint="pass --force to drop it, or finish that batch first",
            force=force,
            sync=False,
        )
        self.known: dict[int, dict[str, Any]] = {
            int(entry["line"]): entry["result"] for entry in self._journal.entries
        }

    def add(self, index: int, content: dict[str, Any]) -> None:
        self.known[index] = content
        self._journal.add({"line": index, "result": content})

    def finish(self, count: int) -> list[dict[str, Any]]:
        """Write the output and drop the journal; returns the results."""
        results = [self.known[index] for index in range(count)]
        text = "".join(json.dumps(content, ensure_ascii=False) + "\n" for content in results)
        write_file(self._output, text)
        self._journal.remove()
        return results


def _tokens(content: Mapping[str, Any]) -> int:
    """Answer tokens of a result."""
    response = content.get("response") or {}
    usage = content.get("usage") or response.get("body", {}).get("usage") or {}
    return int(usage.get("completion_tokens", 0))


def _failed(content: Mapping[str, Any]) -> bool:
    response = content.get("response")
    return bool(content.get("error")) or (response is not None and response["status_code"] != 200)


def _digest(engine: Path, lines: Sequence[Line]) -> str:
    rows = [[line.url, line.body, line.custom_id, line.error] for line in lines]
    key = load_manifest(engine, "engine").key
    return journal_digest([key, rows])
