"""`trtqwen batch`: offline inference, without a server."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from trtqwen.batch.lines import Defaults, read_lines
from trtqwen.batch.run import find_engine, run_batch
from trtqwen.cli.output import Force, Json, print_json, progress_bars, stdout


def command(
    engine: Annotated[str, typer.Argument(help="Engine directory, or a recipe that was built.")],
    input_file: Annotated[
        Path, typer.Option(help="Read requests from here: a JSON list of prompts, JSONL, or OpenAI's batch format.")
    ],
    output: Annotated[Path, typer.Option(help="Write the results here, one JSON object a line.")],
    engines: Annotated[Path, typer.Option(help="Look for a recipe's engine here.")] = Path("engines"),
    max_tokens: Annotated[int, typer.Option(min=1, help="Limit answers whose request names no limit.")] = 256,
    temperature: Annotated[
        float | None, typer.Option(min=0, max=2, help="Set the temperature of requests that name none.")
    ] = None,
    top_p: Annotated[float | None, typer.Option(min=0, max=1, help="Set top_p of requests that name none.")] = None,
    seed: Annotated[int | None, typer.Option(help="Set the seed of requests that name none.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat/--no-chat", help="Send a prompt as a user's message, by the chat template.")
    ] = True,
    force: Force = False,
    json: Json = False,
) -> None:
    """Answer a file of requests at full throughput, without a server.

    A line is answered as the gateway would. Results stand in order of the input; a bad line is an error in its own
    result. A batch that was stopped goes on where it was when you run the command again.

    Exit code 1 if a line failed.
    """
    given = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    defaults = Defaults(chat, {name: value for name, value in given.items() if value is not None})
    directory, serve = find_engine(engine, engines)
    lines = read_lines(input_file, defaults)
    begun = time.monotonic()
    with progress_bars() as bars:
        advance = bars.rated("answering", len(lines), unit="requests", what="tok/s")
        done = run_batch(directory, serve, lines, output, force=force, on_progress=advance)
    seconds = time.monotonic() - begun
    rate = done.output_tokens / seconds
    if json:
        content = {"lines": done.lines, "reused": done.reused, "failed": done.failed}
        print_json(content | {"output_tokens": done.output_tokens, "seconds": seconds, "output": str(output)})
    else:
        earlier = f", {done.reused} of them before" if done.reused else ""
        stdout.print(
            f"{output}: {done.lines} results{earlier}, {done.failed} errors, {rate:,.0f} tokens/s",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    if done.failed:
        raise typer.Exit(1)
