"""What the gateway is started with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from trtqwen.errors import InputError

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class GatewayConfig(BaseModel):
    """Addresses and limits. A field that is None follows from the engine.

    Attributes:
        repository: the model repository that Triton serves; tokenizer and engine limits are read from it.
        triton: host:port of each replica's gRPC endpoint; a request goes to the one with the fewest tokens to do.
        model_name: what clients call the model; None is the repository directory's name.
        api_keys: YAML file with the keys; None asks for no key, which only a loopback address allows
            (`allow_anonymous` lifts that).
        max_body_bytes, max_header_bytes: of one HTTP request.
        max_choices: answers of one request, `n` times the prompts.
        default_max_tokens: answer tokens when the request names no limit; the context may leave fewer.
        max_tokens: the largest limit that a request may name; None is the context.
        kv_cache_tokens: tokens that one replica's KV cache holds; None is the repository's
            `max_tokens_in_paged_kv_cache`, else room for a whole batch of full-length requests.
        max_queued_requests, max_queued_tokens: what waits in front of the engine before requests are refused; None
            is twice what the replicas run at once.
        queue_seconds: how long a request may wait for its turn.
        request_seconds: how long a request may take in all.
        stall_seconds: an answer without a new token for so long is ended.
        body_seconds: how long a client may take to send headers, and again for the body.
        drain_seconds: how long running requests may finish once SIGTERM has come.
        probe_seconds: how long an engine may be silent before it is asked for a token, and how long that may take.
            Triton needs a second to notice that its python backend was killed: with less than 1.5, such an engine
            counts as silent, and its answers end only when they are stalled.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    repository: Path
    triton: Annotated[tuple[str, ...], Field(min_length=1)] = ("127.0.0.1:8001",)
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8080
    model_name: str | None = None
    api_keys: Path | None = None
    allow_anonymous: bool = False
    max_body_bytes: Count = 4 << 20
    max_header_bytes: Count = 32 << 10
    max_choices: Count = 16
    default_max_tokens: Count = 1024
    max_tokens: Count | None = None
    kv_cache_tokens: Count | None = None
    max_queued_requests: Annotated[int, Field(ge=0)] | None = None
    max_queued_tokens: Annotated[int, Field(ge=0)] | None = None
    queue_seconds: Seconds = 30
    request_seconds: Seconds = 600
    stall_seconds: Seconds = 60
    body_seconds: Seconds = 30
    drain_seconds: Seconds = 30
    probe_seconds: Seconds = 2

    @model_validator(mode="after")
    def _keys_beyond_loopback(self) -> GatewayConfig:
        loopback = self.host in ("localhost", "::1") or self.host.startswith("127.")
        if not (loopback or self.api_keys or self.allow_anonymous):
            raise ValueError(
                f"{self.host} can be reached by others and there are no API keys; name a keys file or allow "
                "anonymous use"
            )
        return self


def gateway_config(**settings: Any) -> GatewayConfig:
    """A config from settings that people gave.

    Raises:
        InputError: naming the setting, if one is out of range.
    """
    try:
        return GatewayConfig(**settings)
    except ValidationError as problem:
        first = problem.errors()[0]
        name = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        raise InputError(f"gateway: {name}: {message}; correct it" if name else f"gateway: {message}") from None
