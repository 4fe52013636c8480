"""`trtqwen infer`: stream one answer over gRPC."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from trtqwen.cli.output import Json, print_json
from trtqwen.triton.client import SamplingOptions, stream


def command(
    prompt: Annotated[str, typer.Argument(help="Send this prompt.")],
    url: Annotated[str, typer.Option(help="Set the gRPC address of Triton, host:port.")] = "127.0.0.1:8001",
    max_tokens: Annotated[int, typer.Option(min=1, max=2**31 - 1, help="Limit the tokens of the answer.")] = 256,
    raw: Annotated[bool, typer.Option("--raw", help="Send the prompt without the chat template.")] = False,
    top_k: Annotated[
        int | None, typer.Option(min=0, max=2**31 - 1, help="Sample from the k most likely tokens.")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Sample from the most likely tokens with this total probability."),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="Set the temperature; needs --top-k or --top-p.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**64 - 1, help="Set the seed of the sampling.")] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(min=0, help="Penalize repeated tokens with a value above 1.")
    ] = None,
    timeout: Annotated[float, typer.Option(min=0, help="Limit the seconds for the answer.")] = 300,
    json: Json = False,
) -> None:
    """Ask a running server and stream its answer."""
    sampling = SamplingOptions(
        top_k=top_k, top_p=top_p, temperature=temperature, seed=seed, repetition_penalty=repetition_penalty
    )
    pieces = []
    for piece in stream(url, prompt, max_tokens, sampling=sampling, chat=not raw, timeout=timeout):
        pieces.append(piece)
        if not json:
            sys.stdout.write(piece.text)
            sys.stdout.flush()
    if json:
        text = "".join(piece.text for piece in pieces)
        print_json({"prompt": prompt, "text": text, "tokens": sum(piece.num_tokens for piece in pieces)})
    else:
        sys.stdout.write("\n")
