"""A running `trtqwen serve --models`, and what it has started."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

from tests.command_line import trtqwen

ADMIN = "sk-admin-0123456789"


def of_repository(repository: Path) -> list[int]:
    """Processes with the repository among their arguments."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_text()
        except OSError:
            continue
        if f"--model-repository={repository}\0" in command:
            found.append(int(entry.name))
    return found


class Service:
    """A running `serve --models`."""

    def __init__(self, table: Path, admins: Path) -> None:
        command = [sys.executable, "-m", "trtqwen", "serve", f"--models={table}", f"--admin-keys={admins}"]
        self.process = subprocess.Popen(
            [*command, "--gateway-port=0", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        text, line = "", ""
        while line != "}\n":
            line = self.process.stdout.readline()
            assert line, self.process.stderr and self.process.stderr.read()
            text += line
        self.url = str(json.loads(text)["gateway"])

    def models(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        url = [] if "--url" in arguments else ["--url", self.url]
        return trtqwen("models", *arguments, *url, env={**os.environ, "TRTQWEN_ADMIN_KEY": ADMIN})

    def ask(self, text: str) -> Any:
        messages = [{"role": "user", "content": text}]
        return self.post("/v1/chat/completions", {"model": "qwen", "messages": messages, "max_tokens": 200})

    def post(self, path: str, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}{path}", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())

    def stop(self) -> int:
        """The exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)
