"""`trtqwen gateway`: serve the web gateway alone, in front of running Triton servers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trtqwen.cli.output import AdminKeys, ApiKeys, Json, ModelName, ModelsFile, print_json, stderr, stdout
from trtqwen.gateway.config import gateway_config
from trtqwen.gateway.listener import bind


def command(
    repo: Annotated[
        Path | None, typer.Option(help="Read this model repository, which the Triton servers serve.")
    ] = None,
    triton: Annotated[
        list[str] | None,
        typer.Option(metavar="HOST:PORT", help="Set the gRPC address of a replica. Repeat it for more replicas."),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Set the address to listen on. [default: 127.0.0.1]")] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Set the port; 0 picks a free one. [default: 8080]")
    ] = None,
    models: ModelsFile = None,
    api_keys: ApiKeys = None,
    admin_keys: AdminKeys = None,
    model_name: ModelName = None,
    config: Annotated[Path | None, typer.Option(help="Read these and more settings from a YAML file.")] = None,
    json: Json = False,
) -> None:
    """Serve the OpenAI routes and the chat page in front of running Triton servers until Ctrl-C or SIGTERM.

    A request goes to the replica with the fewest outstanding tokens. With enable_kv_cache_reuse, it goes to the
    replica that has read the beginning of its prompt, unless that one is overloaded. A failed replica gets no
    requests until it answers again. The gateway reads config, tokenizer and engine limits from the repository.

    With --models, it serves the models of a table, each with the repository and addresses that the table names.
    `trtqwen models` changes the table while clients are served.

    Settings of --config, by name: repository, triton, model_name; models, admin_keys, engine_start_seconds; host,
    port, workers, api_keys, allow_anonymous, rates_url, allowed_hosts, trusted_proxies, path_prefix;
    allowed_origins, unknown_fields, special_tokens_in_messages, reasoning; default_max_tokens, max_tokens,
    max_choices, max_body_bytes, max_header_bytes; max_queued_requests, max_queued_tokens, kv_cache_tokens, key_share,
    share_kv_cache, prefix_routing, throttle_seconds; max_connections, max_connections_per_address, request_memory;
    queue_seconds, request_seconds, stall_seconds, body_seconds, drain_seconds, probe_seconds,
    prompt_tokens_per_second; access_log, protect_metrics, supervisor.
    """
    settings = gateway_config(
        config,
        repository=repo,
        triton=tuple(triton) if triton else None,
        host=host,
        port=port,
        models=models,
        api_keys=api_keys,
        admin_keys=admin_keys,
        model_name=model_name,
    )
    from trtqwen.gateway.server import serve  # loads the web framework: not for --help and mistakes

    def started() -> None:
        if json:
            place = {"triton": settings.triton, "repository": str(settings.repository)}
            print_json({"gateway": url, **(place if settings.models is None else {"models": str(settings.models)})})
        else:
            behind = ", ".join(settings.triton) if settings.models is None else f"the Tritons of {settings.models}"
            stdout.print(f"gateway: {url} in front of {behind}", highlight=False)

    with bind(settings) as listener:
        url = settings.model_copy(update={"port": listener.getsockname()[1]}).url
        serve(settings, listener, started)
    stderr.print("stopped", highlight=False)
