"""A vLLM that obeys: the routes and stream format of vLLM 0.32's API server, without a model.

`python` scripts written by `write_python` run it in place of `vllm.entrypoints.openai.api_server`. The environment
variable STAND_IN_VLLM is a JSON script: `ids` to answer with, `gap` seconds between them, `version`, `told` (the
version that it tells, null for none), `name`,
`exit` (code at the start), `unknown` (an option it refuses), `silent_after` and `die_after` (tokens), `keep_alive`
(seconds, until it closes a connection that idles).
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

from aiohttp import web

SCRIPT: dict[str, Any] = json.loads(os.environ.get("STAND_IN_VLLM", "{}"))
BODIES: list[dict[str, Any]] = []
OPEN: set[int] = set()


def write_python(path: Path) -> Path:
    """A `python` whose vLLM is this program."""
    path.write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        f"  *metadata*) echo {SCRIPT.get('version', '${STAND_IN_VERSION:-0.32.0}')} ;;\n"
        f'  *) shift 2; exec {sys.executable} {Path(__file__)} "$@" ;;\n'
        "esac\n"
    )
    path.chmod(0o755)
    return path


async def completions(request: web.Request) -> web.StreamResponse:
    body = await request.json()
    BODIES.append(body)
    if body["prompt"][0] == 13:
        return web.json_response({"error": {"message": "unlucky prompt", "code": 400}}, status=400)
    answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await answer.prepare(request)
    OPEN.add(id(body))
    try:
        ids = [SCRIPT.get("ids", [5, 6, 7, 8])[index % len(SCRIPT.get("ids", [5, 6, 7, 8]))] for index in range(1000)]
        for index, token_id in enumerate(ids[: body["max_tokens"]]):
            if index == SCRIPT.get("die_after"):
                os._exit(3)
            if index == SCRIPT.get("silent_after"):
                await asyncio.sleep(3600)
            await asyncio.sleep(SCRIPT.get("gap", 0))
            stops = token_id in body.get("stop_token_ids", ())
            last = stops or index + 1 == body["max_tokens"]
            choice: dict[str, Any] = {"index": 0, "text": "", "token_ids": [token_id]}
            choice["finish_reason"] = ("stop" if stops else "length") if last else None
            if "logprobs" in body:
                choice["logprobs"] = {"token_logprobs": [-float(index)]}
                if body["logprobs"]:  # the chosen token comes first, and once
                    likeliest = {
                        token_id: -float(index),
                        **{100 + rank: -rank / 2 for rank in range(body["logprobs"])},
                    }
                    top = {f"token_id:{candidate}": value for candidate, value in likeliest.items()}
                    choice["logprobs"]["top_logprobs"] = [top]
            await answer.write(f"data: {json.dumps({'choices': [choice]})}\n\n".encode())
            if stops:
                break
        if "stream_options" in body:
            usage = {"prompt_tokens_details": {"cached_tokens": 64}}
            await answer.write(f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n".encode())
        await answer.write(b"data: [DONE]\n\n")
    finally:
        OPEN.discard(id(body))
    return answer


async def metrics(request: web.Request) -> web.Response:
    lines = [
        "# TYPE vllm:num_requests_running gauge",
        f'vllm:num_requests_running{{engine="0"}} {len(OPEN)}',
        "# TYPE vllm:kv_cache_usage_perc gauge",
        'vllm:kv_cache_usage_perc{engine="0"} 0.5',
        "# TYPE vllm:cache_config_info gauge",
        'vllm:cache_config_info{block_size="32",num_gpu_blocks="101"} 1',
        "# TYPE vllm:prefix_cache_hits counter",
        'vllm:prefix_cache_hits_total{engine="0"} 96',
        "",
    ]
    return web.Response(text="\n".join(lines))


async def main(words: list[str]) -> None:
    options = dict(word.removeprefix("--").partition("=")[::2] for word in words)
    if "exit" in SCRIPT:
        print("ValueError: the model does not fit", file=sys.stderr)
        sys.exit(SCRIPT["exit"])
    if SCRIPT.get("unknown") in options:
        print(f"api_server.py: error: unrecognized arguments: --{SCRIPT['unknown']}", file=sys.stderr)
        sys.exit(2)
    name = SCRIPT.get("name", options.get("served-model-name", "trtqwen"))
    told = {"data": [{"id": name, "max_model_len": int(options.get("max-model-len", 512))}]}
    version = {} if SCRIPT.get("told", "") is None else {"version": SCRIPT.get("told", "0.32.0")}
    app = web.Application()
    app.router.add_post("/v1/completions", completions)
    app.router.add_get("/health", lambda request: _json({}))
    app.router.add_get("/version", lambda request: _json(version))
    app.router.add_get("/v1/models", lambda request: _json(told))
    app.router.add_post(
        "/tokenize", lambda request: _json({"tokens": SCRIPT["tokens"]} if "tokens" in SCRIPT else {})
    )
    app.router.add_get("/metrics", metrics)
    app.router.add_get("/bodies", lambda request: _json(BODIES))
    runner = web.AppRunner(app, shutdown_timeout=0.1, keepalive_timeout=SCRIPT.get("keep_alive", 5))
    await runner.setup()
    uds = options.get("uds")
    site = web.UnixSite(runner, uds, backlog=2048) if uds is not None else web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    if uds is None:
        print(runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()


async def _json(content: Any) -> web.Response:
    return web.json_response(content)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
