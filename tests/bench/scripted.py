"""A server of OpenAI's completions whose token times are known: it writes down when it sent what.

Run as a program with a JSON script: `first` seconds to the first token, `gap` seconds between tokens, `fail` every
n-th request, `burst` tokens in one event. It prints its port. `GET /log` tells what it did: the times of the system's
monotonic clock at which each request arrived and each token was written.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

from aiohttp import web


def application(script: dict[str, float]) -> web.Application:
    log: list[dict[str, object]] = []

    async def completions(request: web.Request) -> web.StreamResponse:
        arrived = time.monotonic()
        body = await request.json()
        number = len(log)
        entry = {"arrived": arrived, "tokens": [], "prompt": len(body["prompt"]), "key": body["prompt"][0]}
        log.append(entry)
        if script.get("fail") and number % int(script["fail"]) == int(script["fail"]) - 1:
            return web.json_response({"error": {"message": "no room"}}, status=429)
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await answer.prepare(request)
        head = {"id": f"cmpl-{number}", "object": "text_completion", "created": 0, "model": "scripted"}
        burst, count = int(script.get("burst", 1)), int(script.get("stop_at", body["max_tokens"]))
        for index in range(0, count, burst):
            await asyncio.sleep(script["gap"] if index else script["first"])
            ids = list(range(index, min(index + burst, count)))
            event = {**head, "choices": [{"index": 0, "text": "x" * len(ids), "token_ids": ids}]}
            entry["tokens"].append(time.monotonic())
            await answer.write(f"data: {json.dumps(event)}\n\n".encode())
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": count}
        await answer.write(
            f"data: {json.dumps({**head, 'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n".encode()
        )
        return answer

    async def models(request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "scripted", "owned_by": "vllm"}]})

    async def version(request: web.Request) -> web.Response:
        return web.json_response({"version": "scripted"})

    async def told(request: web.Request) -> web.Response:
        return web.json_response(log)

    app = web.Application()
    app.router.add_post("/v1/completions", completions)
    app.router.add_get("/v1/models", models)
    app.router.add_get("/version", version)
    app.router.add_get("/log", told)
    return app


async def main() -> None:
    runner = web.AppRunner(application(json.loads(sys.argv[1])))
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
