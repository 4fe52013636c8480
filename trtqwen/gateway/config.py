"""The settings of the gateway."""

from __future__ import annotations

import ipaddress
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from trtqwen.diagnostics import InputError, SettingError, first_hint, first_problem
from trtqwen.system.sockets import reachable
from trtqwen.yaml_file import read_mapping

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _host_and_port(text: str) -> str:
    host, _, port = text.rpartition(":")
    if not host or "/" in host or not (port.isascii() and port.isdecimal() and int(port) < 65536):
        raise SettingError(f"{text!r} is not host:port", "write it like 127.0.0.1:8001")
    return text


def _origin(text: str) -> str:
    scheme, _, host = text.partition("://")
    if text not in ("*", LOOPBACK_ORIGINS) and (scheme not in ("http", "https") or not host or "/" in host):
        raise SettingError(f"{text!r} is not an origin", f"write https://chat.example.com, *, or {LOOPBACK_ORIGINS}")
    return text


def _rates_url(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in ("redis", "rediss", "unix") or not (parts.hostname or parts.path):
        what = f"{parts.scheme}://{parts.hostname or ''} is not the address of a Redis"
        raise SettingError(what, "write it like redis://host:6379/0")
    if parts.password:  # other users of the machine can read a process's arguments
        raise SettingError(
            "the address contains a password, which other users can read",
            "remove it, and set the environment variable TRTQWEN_RATES_PASSWORD",
        )
    return text


def _network(text: str) -> str:
    return str(ipaddress.ip_network(text))


def _path_prefix(text: str) -> str:
    if text and (not text.startswith("/") or text.endswith("/")):
        raise SettingError(f"{text!r} is not a path", "write it like /llm")
    return text


LOOPBACK_ORIGINS = "loopback"
LOOPBACK_PATTERN = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:[0-9]+)?"
_CPUS_A_WORKER, _MOST_WORKERS = 4, 8
Address = Annotated[str, AfterValidator(_host_and_port)]
Count = Annotated[int, Field(ge=1)]


class GatewayConfig(BaseModel):
    """Addresses and limits. A field that is None follows from the engine.

    Attributes:
        repository: the model repository that Triton serves; tokenizer and engine limits are read from it.
        models: YAML file with a table of models, in place of repository, triton and model_name. A changed file is
            read again.
        admin_keys: YAML file with the keys of the admin routes, in the form of `api_keys`; None has no admin routes.
        engine_start_seconds: longest time until an added engine answers.
        triton: host:port of each replica's gRPC endpoint; `prefix_routing` says which one a request goes to.
        host: address that the gateway listens on; a loopback address serves this machine alone.
        port: TCP port that the gateway listens on; 0 takes a free one.
        model_name: what clients call the model; None is the repository directory's name.
        api_keys: YAML file with the keys; None requires no key, which only a loopback address allows
            (`allow_anonymous` lifts that).
        allow_anonymous: serve clients without a key on any address.
        workers: processes that serve clients behind one port, with one admission; None is one for each four CPUs,
            eight at most.
        rates_url: Redis or Valkey server that keeps the rates of keys for several gateways, such as
            `redis://host:6379/0`; None keeps them in the gateway. The password is in `TRTQWEN_RATES_PASSWORD`.
        max_body_bytes: largest body of a request; None is 32 bytes for each token of the context, and 1 MiB at least.
        max_header_bytes: largest headers of a request.
        max_choices: answers of one request, `n` times the prompts.
        allowed_origins: origins whose web pages may read answers (CORS); `*` is any, `loopback` any on this machine.
        path_prefix: prefix that a proxy leaves in front of the paths, such as `/llm`; the paths work without it too.
        unknown_fields: effect of a field that no API here has: `refuse` the request, `warn` in the log and in the
            header `x-trtqwen-ignored`, or `ignore` it.
        special_tokens_in_messages: let the text of special tokens in messages and tools become special tokens.
            They can end a turn and forge another.
        reasoning: separate the reasoning between `<think>` and `</think>` from the answer; None does so if the chat
            template of the model has these tags.
        default_max_tokens: answer tokens of a request without a limit; None is the rest of the context.
        max_tokens: the largest limit of a request; None is the context.
        kv_cache_tokens: tokens that one replica's KV cache holds; None is the repository's
            `max_tokens_in_paged_kv_cache`, else room for a whole batch of full-length requests.
        max_queued_requests: requests in the queue; further ones are refused. None is twice what the replicas run at
            once, and at least 1024.
        max_queued_tokens: tokens of the requests in the queue; further requests are refused. None is twice what the
            replicas run at once, and at least 2**21.
        key_share: share of the engines that one API key may use at a time if there are several keys.
        prefix_routing: send a request to the replica that has read the beginning of its prompt, unless that one is
            loaded; None does so if there are several replicas and their engines reuse KV cache blocks.
        throttle_seconds: while requests of the last minute took longer than this on average, a request that would
            have to wait is refused with status 429; None refuses none.
        queue_seconds: longest wait of a request for its turn.
        request_seconds: longest time of a whole request.
        stall_seconds: end an answer without a new token for this time. An answer without its first token waits as
            long as the engine has tokens for other requests.
        body_seconds: longest time for a client to send the headers, and again for the body.
        drain_seconds: time for running requests to finish after SIGTERM.
        probe_seconds: silence of an engine before the gateway requests a token from it, and the longest time for
            that token. If no other engine works, the gateway asks again, and the engine counts as dead after ten
            times this silence, or after `stall_seconds` if that is less. Triton needs a second to notice that its
            python backend was killed: with less than 1.5, such an engine counts as silent, and its answers end only
            after `stall_seconds`.
        max_connections: of each worker. At this limit, the oldest idle connection is closed for a new one.
        max_connections_per_address: None is half of `max_connections`. Behind a proxy, all connections come from its
            address: name it among `trusted_proxies`, for which this limit does not hold.
        trusted_proxies: addresses or networks of proxies. The headers X-Forwarded-For and X-Forwarded-Prefix count
            only if one of them sends the request.
        request_memory: bytes of memory that the bodies of requests in work may take in all, by an estimate from their
            bytes and values; with several keys, one key may take half of it.
        access_log: write a line of JSON for each request to standard error; None does so if there are API keys.
        protect_metrics: require an API key for /metrics and /openapi.json too.
        allowed_hosts: names that requests may give in the Host header, without the port. None allows all if there
            are API keys, and only the names of this machine's loopback addresses if there are none: a web page whose
            name is bound to a loopback address (DNS rebinding) is refused.
        share_kv_cache: let API keys reuse each other's KV cache blocks. It saves work where they send the same
            prompts, and lets one key find out by timing what another one sends.
        supervisor: file in which `trtqwen serve` writes whether it restarts an engine; set by `serve`.
        prompt_tokens_per_second: slowest rate at which a working engine reads prompts. During that time, the gateway
            expects no token.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    repository: Path | None = None
    models: Path | None = None
    admin_keys: Path | None = None
    engine_start_seconds: Positive = 600
    triton: Annotated[tuple[Address, ...], Field(min_length=1)] = ("127.0.0.1:8001",)
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8080
    model_name: str | None = None
    api_keys: Path | None = None
    allow_anonymous: bool = False
    rates_url: Annotated[str, AfterValidator(_rates_url)] | None = None
    workers: Count | None = None
    max_body_bytes: Count | None = None
    max_header_bytes: Count = 32 << 10
    max_choices: Count = 16
    allowed_origins: tuple[Annotated[str, AfterValidator(_origin)], ...] = (LOOPBACK_ORIGINS,)
    path_prefix: Annotated[str, AfterValidator(_path_prefix)] = ""
    unknown_fields: Literal["refuse", "warn", "ignore"] = "warn"
    special_tokens_in_messages: bool = False
    reasoning: bool | None = None
    default_max_tokens: Count | None = None
    max_tokens: Count | None = None
    kv_cache_tokens: Count | None = None
    max_queued_requests: Annotated[int, Field(ge=0)] | None = None
    max_queued_tokens: Annotated[int, Field(ge=0)] | None = None
    prefix_routing: bool | None = None
    throttle_seconds: Positive | None = None
    queue_seconds: Positive = 30
    key_share: Annotated[float, Field(gt=0, le=1)] = 0.75
    request_seconds: Positive = 600
    stall_seconds: Positive = 60
    body_seconds: Positive = 30
    drain_seconds: Positive = 30
    probe_seconds: Positive = 2
    prompt_tokens_per_second: Positive = 1000
    max_connections: Count = 4096
    max_connections_per_address: Count | None = None
    trusted_proxies: tuple[Annotated[str, AfterValidator(_network)], ...] = ()
    request_memory: Count = 96 << 20
    access_log: bool | None = None
    protect_metrics: bool = False
    allowed_hosts: tuple[str, ...] | None = None
    share_kv_cache: bool = False
    supervisor: Path | None = None

    @property
    def num_workers(self) -> int:
        """Workers on this machine."""
        return self.workers or max(1, min(_MOST_WORKERS, len(os.sched_getaffinity(0)) // _CPUS_A_WORKER))

    def allows_origin(self, origin: str, host: str) -> bool:
        """Return whether a page may use the gateway, by its origin and the host that it requested."""
        loopback = LOOPBACK_ORIGINS in self.allowed_origins and re.fullmatch(LOOPBACK_PATTERN, origin) is not None
        own = origin.partition("://")[2] == host
        return own or loopback or "*" in self.allowed_origins or origin in self.allowed_origins

    @property
    def url(self) -> str:
        """The gateway's URL for clients on this machine."""
        host = reachable(self.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    @property
    def loopback(self) -> bool:
        """Whether only this machine reaches the gateway."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False  # a name that begins with 127. is still a name

    @model_validator(mode="after")
    def _one_source_of_models(self) -> GatewayConfig:
        if (self.repository is None) == (self.models is None):
            raise SettingError(
                "either a repository or a table of models is needed, and not both", "give --repo or --models"
            )
        if self.models is not None and self.model_name is not None:
            raise SettingError(
                "model_name is for a single repository", "remove it: the table of models has the names"
            )
        return self

    @model_validator(mode="after")
    def _keys_beyond_loopback(self) -> GatewayConfig:
        if not (self.loopback or self.api_keys or self.allow_anonymous):
            raise SettingError(
                f"{self.host} can be reached by others and there are no API keys",
                "pass --api-keys, or set allow_anonymous in the settings file",
            )
        return self


def gateway_config(file: Path | None = None, **settings: Any) -> GatewayConfig:
    """A config from settings that people gave.

    Args:
        file: YAML with further settings, by the fields' names; a path in it is relative to the file.
        settings: None is not given. A given setting must not also be in the file.

    Raises:
        InputError: naming file and setting, if one is unknown, given twice or out of range.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    where, written = "gateway", {}
    if file is not None:
        where, written = str(file), _read(file)
        if twice := sorted(given.keys() & written.keys()):
            raise InputError(f"{file}: {twice[0]}: is also set by the command", "remove it from the file")
    try:
        return GatewayConfig.model_validate(written | given)
    except ValidationError as problem:
        hint = "correct the options" if file is None else "correct the file or the options"
        raise InputError(f"{where}: {first_problem(problem)}", first_hint(problem) or hint) from None


def _read(file: Path) -> dict[str, Any]:
    content = read_mapping(file)
    for name in ("repository", "models", "api_keys", "admin_keys"):
        if isinstance(content.get(name), str):
            content[name] = file.parent / content[name]
    return content
