"""Measure what a shadow costs clients: python scripts/bench_shadow.py --rounds 10

Two Tritons with an engine that answers at a given pace and computes nothing stand behind one gateway, so that only
the gateway's own work is measured. Rounds without and with a shadow of all requests alternate in one run, on the same
servers. Prints medians and 95th percentiles of the time to the first piece and between pieces, and their ratios.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from scripts.chaos import RECIPE, build
from scripts.sse_load import Figures, one
from scripts.stand_in_engine import write_stand_in_repository
from trtqwen.gateway.config import GatewayConfig
from trtqwen.gateway.process import GatewayProcess
from trtqwen.triton.ports import Ports
from trtqwen.triton.server import TritonServer

ADMIN = "sk-admin-0123456789"


def put(url: str, targets: list[dict[str, Any]]) -> None:
    """Have the model served by targets."""
    request = urllib.request.Request(
        f"{url}/admin/models/{RECIPE}",
        json.dumps({"targets": targets}).encode(),
        {"Content-Type": "application/json", "Authorization": f"Bearer {ADMIN}"},
        method="PUT",
    )
    with urllib.request.urlopen(request, timeout=60):
        return


async def ask(url: str, clients: int, requests: int, figures: Figures) -> None:
    """Clients that ask one after another."""
    body = {"model": RECIPE, "prompt": "/again 100 x ", "max_tokens": 60, "stream": True}
    content = json.dumps({**body, "ignore_eos": True}).encode()

    async def client() -> None:
        for _ in range(requests):
            await one(url, content, figures)

    await asyncio.gather(*(client() for _ in range(clients)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--requests", type=int, default=5, help="of each client in a round")
    parser.add_argument("--step-ms", type=float, default=10)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="shadow-") as place, ExitStack() as stack:
        home = Path(place)
        build(home)
        repository = home / RECIPE
        write_stand_in_repository(home / "repo", repository, step_ms=options.step_ms)
        tritons = [stack.enter_context(TritonServer(repository, ports=Ports(0, 0, 0))) for _ in range(2)]
        stable, shadow = (
            {"name": name, "repository": str(repository), "triton": [triton.grpc_url]}
            for name, triton in zip(("stable", "shadow"), tritons, strict=True)
        )
        (home / "models.yaml").write_text(json.dumps({"models": {RECIPE: {"targets": [stable]}}}))
        (home / "admins.yaml").write_text(json.dumps({"keys": [{"name": "operator", "key": ADMIN}]}))
        config = GatewayConfig(models=home / "models.yaml", admin_keys=home / "admins.yaml", port=0)
        gateway = stack.enter_context(GatewayProcess(config))
        stack.callback(gateway.close)
        shadowing: dict[str, Any] = {**shadow, "shadow": 1}
        alone, shadowed = Figures(), Figures()
        begun = time.monotonic()
        for _ in range(options.rounds):
            for figures, others in ((alone, []), (shadowed, [shadowing])):
                put(gateway.url, [stable, *others])
                asyncio.run(ask(gateway.url, options.clients, options.requests, figures))
    print(json.dumps({"alone": alone.summary(time.monotonic() - begun), "shadowed": shadowed.summary(1)}))
    for name in ("first", "gaps"):
        ratio = median(getattr(shadowed, name)) / median(getattr(alone, name))
        print(f"{name}: with a shadow {ratio:.3f} times the median without")
    return 0 if not alone.errors + shadowed.errors else 1


if __name__ == "__main__":
    sys.exit(main())
