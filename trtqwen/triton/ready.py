"""Readiness of a tritonserver, over HTTP or gRPC."""

from __future__ import annotations

import urllib.request

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

_SECONDS = 2  # that an answer may take


def is_ready(http_url: str | None, grpc_url: str) -> bool:
    """Whether every model of the server is loaded.

    Args:
        http_url: host:port of its HTTP endpoint; None uses gRPC.
    """
    return _answers_grpc(grpc_url) if http_url is None else _answers_http(http_url)


def _answers_grpc(url: str) -> bool:
    with grpc.insecure_channel(url) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        try:
            return bool(stub.ServerReady(service_pb2.ServerReadyRequest(), timeout=_SECONDS).ready)
        except grpc.RpcError:
            return False


def _answers_http(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://{url}/v2/health/ready", timeout=_SECONDS) as response:
            return bool(response.status == 200)
    except OSError:
        return False
