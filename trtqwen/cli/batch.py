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
    engine: Annotated[str, typer.Argument(help="Run this engine directory, or the engine of this recipe.")],
    input_file: Annotated[
        Path, typer.Option(help="Read requests from here: a JSON list of prompts, JSONL, or OpenAI's batch format.")
    ],
    output: Annotated[Path, typer.Option(help="Write the results here, one JSON object per line.")],
    engines: Annotated[Path, typer.Option(help="Look for a recipe's engine here.")] = Path("engines"),
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Limit the answer tokens of requests without a limit.")
    ] = 256,
    temperature: Annotated[
        float | None, typer.Option(min=0, max=2, help="Set the temperature of requests without one.")
    ] = None,
    top_p: Annotated[float | None, typer.Option(min=0, max=1, help="Set top_p of requests without one.")] = None,
    seed: Annotated[int | None, typer.Option(help="Set the seed of requests without one.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat/--no-chat", help="Send prompts as user messages, with the chat template.")
    ] = True,
    force: Force = False,
    json: Json = False,
) -> None:
    """Answer a file of requests at full throughput, without a server.

    Each line gets the answer that the gateway would give. The results have the order of the input. A line that fails
    has an error as its result, and the exit code is 1. If a batch is interrupted, run the command again to resume it.
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
