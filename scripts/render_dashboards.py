"""Draw the Grafana dashboards from a real Prometheus: python scripts/render_dashboards.py --output docs/images

Starts `trtqwen serve` with the bundled model, loads it for some minutes, has Prometheus scrape it with the
configuration that `trtqwen deploy monitoring` writes, asks Prometheus for every query of every panel, and draws the
answers at the panels' places. GPU figures come from a recorded exporter. Needs the program prometheus and matplotlib.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from scripts.chaos import Server, ask, build
from tests.deploy.exporter import gpu_exporter
from trtqwen.deploy.dashboards import DASHBOARDS, Dashboard, grafana
from trtqwen.deploy.monitoring import Monitoring, Targets, monitoring_files
from trtqwen.deploy.rules import Thresholds
from trtqwen.system.sockets import listen

INK, PAPER, CARD, DIM = "#d8d9da", "#111217", "#181b1f", "#8e8e8e"  # of Grafana's dark theme
COLORS = ("#73bf69", "#f2cc0c", "#5794f2", "#ff9830", "#f2495c", "#b877d9", "#8ab8ff", "#ffa6b0")
ROW_INCHES = 0.28  # of one unit of height in Grafana's grid


class Prometheus:
    """A Prometheus that scrapes a server; stops with the stack."""

    def __init__(self, home: Path, targets: Targets, stack: ExitStack) -> None:
        program = shutil.which("prometheus")
        if program is None:
            raise SystemExit("error: the program prometheus is missing; install the package prometheus")
        for name, text in monitoring_files(Monitoring(targets, Thresholds(), 2)).items():
            path = home / "monitoring" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        with listen("127.0.0.1", 0) as listener:
            port = listener.getsockname()[1]
        process = subprocess.Popen(
            [
                program,
                f"--config.file={home}/monitoring/prometheus.yml",
                f"--storage.tsdb.path={home}/data",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stderr=subprocess.DEVNULL,
        )
        stack.callback(process.wait)
        stack.callback(process.terminate)
        self._url = f"http://127.0.0.1:{port}/api/v1"

    def range(self, query: str, begin: float, end: float) -> list[dict[str, Any]]:
        """The series of a query between two times."""
        fields = {"query": query, "start": begin, "end": end, "step": max(2.0, (end - begin) / 200)}
        with urllib.request.urlopen(
            f"{self._url}/query_range?{urllib.parse.urlencode(fields)}", timeout=30
        ) as answer:
            series: list[dict[str, Any]] = json.loads(answer.read())["data"]["result"]
            return series


def load(server: Server, stop: threading.Event, seed: int) -> None:
    """Ask one thing after another, with pauses that come in waves."""
    draw = random.Random(seed)
    while not stop.is_set():
        text = " ".join(draw.choice(("tell", "me", "about", "the", "sea")) for _ in range(draw.choice((4, 16, 64))))
        tokens = -1 if draw.random() < 0.05 else draw.choice((4, 32, 120))
        messages = [{"role": "user", "content": text}]
        with suppress(OSError):
            ask(server, messages=messages, max_tokens=tokens, stream=draw.random() < 0.5)
        stop.wait(draw.expovariate(1.5) * (1 + 3 * (time.time() // 45 % 2)))


def draw(dashboard: Dashboard, prometheus: Prometheus, begin: float, end: float, output: Path) -> int:
    """Draw one dashboard; returns how many panels have no data."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = grafana(dashboard)["panels"]
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    figure = pyplot.figure(figsize=(16, height * ROW_INCHES + 0.5), facecolor=PAPER)
    empty = 0
    for panel in panels:
        place = panel["gridPos"]
        bottom = 1 - (place["y"] + place["h"] + 1) / (height + 1.5)
        unit = 1 / (height + 1.5)
        if panel["type"] == "row":
            figure.text(0.01, bottom + 0.3 * unit, panel["title"], color=INK, fontsize=12, weight="bold")
            continue
        box = (place["x"] / 24 + 0.012, bottom + 0.22 * unit, place["w"] / 24 - 0.016, place["h"] * unit - 0.4 * unit)
        figure.add_artist(
            matplotlib.patches.Rectangle(
                box[:2], box[2], box[3], facecolor=CARD, transform=figure.transFigure, zorder=-1
            )
        )
        figure.text(box[0] + 0.005, box[1] + box[3] - 0.85 * unit, panel["title"], color=INK, fontsize=9)
        found = [
            (target["legendFormat"], series)
            for target in panel["targets"]
            for series in prometheus.range(
                target["expr"].replace("$gateway", ".*").replace("$triton", ".*"), begin, end
            )
        ]
        lines = [(_legend(legend, series["metric"]), _points(series)) for legend, series in found]
        lines = [(legend, points) for legend, points in lines if points]
        empty += not lines
        if panel["type"] == "stat":
            value = _text(lines[0][1][-1][1], panel["fieldConfig"]["defaults"]["unit"]) if lines else "no data"
            figure.text(box[0] + box[2] / 2, box[1] + 0.9 * unit, value, color=COLORS[0], fontsize=20, ha="center")
            continue
        axes = figure.add_axes(
            (box[0] + 0.028, box[1] + 1.9 * unit, box[2] - 0.036, box[3] - 3.1 * unit), facecolor=CARD
        )
        _plot(axes, lines, begin, panel["fieldConfig"]["defaults"])
    figure.text(0.01, 1 - 0.75 / (height + 1.5), dashboard.title, color=INK, fontsize=14)
    figure.savefig(output / f"{dashboard.uid}.png", dpi=70, facecolor=PAPER)
    pyplot.close(figure)
    return empty


def _plot(axes: Any, lines: list[tuple[str, list[tuple[float, float]]]], begin: float, field: dict[str, Any]) -> None:
    for number, (legend, points) in enumerate(lines[:8]):
        times, values = [(at - begin) / 60 for at, _ in points], [value for _, value in points]
        axes.plot(times, values, color=COLORS[number % len(COLORS)], linewidth=1.1, label=legend[:38])
    axes.set_ylim(bottom=0, top=field.get("max"))
    axes.tick_params(colors=DIM, labelsize=7)
    axes.grid(color="#2c3235", linewidth=0.5)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.yaxis.set_major_formatter(lambda value, _: _text(value, field["unit"]))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0f} min")
    if lines:
        axes.legend(loc="upper left", bbox_to_anchor=(-0.03, -0.1), ncol=3, fontsize=6, frameon=False, labelcolor=INK)
    else:
        axes.text(0.5, 0.5, "no data", color=DIM, ha="center", transform=axes.transAxes)


def _points(series: dict[str, Any]) -> list[tuple[float, float]]:
    return [(at, float(value)) for at, value in series["values"] if not math.isnan(float(value))]


def _legend(form: str, labels: dict[str, str]) -> str:
    for name, value in labels.items():
        form = form.replace(f"{{{{{name}}}}}", value)
    return form


def _text(value: float, unit: str) -> str:
    if unit == "percentunit":
        return f"{100 * value:.3g} %"
    if unit == "s":
        return f"{1000 * value:.3g} ms" if abs(value) < 1 else f"{value:.3g} s"
    if unit == "bytes":
        return f"{value / 2**20:.3g} MiB"
    return f"{value:.3g}" + {"reqps": " /s", "watt": " W"}.get(unit, "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/images"))
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--clients", type=int, default=6)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="dashboards-") as place, ExitStack() as stack:
        home = Path(place)
        build(home)
        server = Server(home / "repo").start()
        stack.callback(server.clean)
        dcgm = stack.enter_context(gpu_exporter())
        targets = Targets().changed(
            gateway=[f"127.0.0.1:{server.port}"],
            triton=[server.info["metrics"].partition("/")[0]],
            dcgm=[dcgm],
            alertmanager=None,
        )
        prometheus = Prometheus(home, targets, stack)
        stop = threading.Event()
        threads = [threading.Thread(target=load, args=(server, stop, number)) for number in range(options.clients)]
        begin = time.time()
        for thread in threads:
            thread.start()
        try:
            time.sleep(60 * options.minutes)
            end = time.time()
            empty = sum(draw(dashboard, prometheus, begin, end, options.output) for dashboard in DASHBOARDS)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    print(f"{empty} panels have no data")
    return 1 if empty else 0


if __name__ == "__main__":
    sys.exit(main())
