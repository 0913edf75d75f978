"""`python -m sedac_core.bench dashboard`: the dashboard's panels (docs/grafana.json), drawn from a Prometheus' answers.

    python -m sedac_core.bench dashboard --prometheus http://127.0.0.1:9090 --minutes 30 --out dashboard.png

For where no Grafana is at hand, and for the picture in docs: each panel's expressions are asked for over the last minutes, as
Grafana asks for them, and drawn at the panel's place.
"""

import argparse
import contextlib
import datetime
import json
import math
import re
import subprocess
import time
import urllib.parse
from pathlib import Path
from typing import Any

from . import serving
from .artifacts import replacing
from .cli import SedacError
from .report import RC

UNITS = {"percentunit": ("%", 100), "s": ("s", 1), "ops": ("a second", 1)}  # Grafana's: what it is called, times what
POINTS = 240  # of a line
START_SECONDS = 60.0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sedac_core.bench dashboard", description=__doc__.splitlines()[0])
    option = parser.add_argument
    option("--prometheus", required=True, metavar="URL", help="of a Prometheus that scrapes the server")
    option("--minutes", type=float, default=30.0, help="how far to look back (default: %(default)s)")
    option("--dashboard", type=Path, default=Path("docs/grafana.json"), help="default: %(default)s")
    option("--out", type=Path, default=Path("docs/dashboard.png"), help="default: %(default)s")
    arguments = parser.parse_args()
    now = time.time()
    shown = draw(arguments.prometheus, now - 60 * arguments.minutes, now, arguments.out, arguments.dashboard)
    print(json.dumps({"picture": str(arguments.out), "lines": shown}))


class Prometheus:
    """A Prometheus that scrapes one server inside the block; its data stay in `folder`.

    Raises `SedacError` where it does not start.
    """

    def __init__(self, target: str, folder: Path, command: str = "prometheus", interval: str = "5s"):
        self.folder = folder.resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        job = {"job_name": "sedac", "static_configs": [{"targets": [target.removeprefix("http://")]}]}
        config = self.folder / "prometheus.yml"
        settings = {"global": {"scrape_interval": interval}, "scrape_configs": [job]}
        config.write_text(json.dumps(settings))  # JSON is YAML
        port = serving.free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.command = [command, f"--config.file={config}", f"--storage.tsdb.path={self.folder / 'data'}"]
        self.command += [f"--web.listen-address=127.0.0.1:{port}"]

    def __enter__(self) -> "Prometheus":
        log = self.folder / "log"
        with open(log, "wb") as output:
            try:
                self.process = subprocess.Popen(
                    self.command, stdout=output, stderr=output, preexec_fn=serving.end_with_parent
                )
            except OSError as error:
                raise SedacError(f"{self.command[0]} cannot be run ({error.strerror}): install Prometheus") from None
        give_up = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(SedacError):
                serving.get(self.url, "/-/ready")
                return self
            if self.process.poll() is not None or time.monotonic() > give_up:
                self.__exit__()
                raise SedacError(f"Prometheus did not start. {serving.log_says(log)}")
            time.sleep(0.2)

    def __exit__(self, *error: object) -> None:
        self.process.terminate()
        self.process.wait()


def ask(url: str, kind: str, **parameters: Any) -> list[dict[str, Any]]:
    """What Prometheus answers to `query` or `query_range`: one entry a line, its labels as `metric`."""
    answer = json.loads(serving.get(url, f"/api/v1/{kind}?{urllib.parse.urlencode(parameters)}"))
    return sorted(answer["data"]["result"], key=lambda line: [(len(value), value) for value in line["metric"].values()])


def draw(url: str, start: float, end: float, out: Path, dashboard: Path = Path("docs/grafana.json")) -> int:
    """Draw all panels of a dashboard over this time (seconds since 1970); returns how many lines there were."""
    import matplotlib
    from matplotlib.figure import Figure

    panels = json.loads(dashboard.read_text())["panels"]
    step = max(5.0, (end - start) / POINTS)
    places = [panel["gridPos"] for panel in panels]
    columns, rows = max(p["x"] // p["w"] for p in places) + 1, max(p["y"] // p["h"] for p in places) + 1
    shown = 0
    with matplotlib.rc_context({**RC, "font.size": 7.5, "axes.titlesize": 8.5}):
        figure = Figure(figsize=(3.6 * columns, 2.05 * rows), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat:
            axes.set_visible(False)
        for panel, place in zip(panels, places, strict=True):
            axes = grid[place["y"] // place["h"], place["x"] // place["w"]]
            axes.set_visible(True)
            unit, scale = UNITS.get(panel["fieldConfig"]["defaults"]["unit"], ("", 1))
            axes.set_title(panel["title"] + (f", {unit}" if unit else ""), loc="left")
            lines = 0
            for target in panel["targets"]:
                expression = target["expr"].replace("$__rate_interval", f"{max(20, round(4 * step))}s")
                for line in ask(url, "query_range", query=expression, start=start, end=end, step=step):
                    times, values = zip(
                        *((float(at), scale * float(value)) for at, value in line["values"]), strict=True
                    )
                    axes.plot(
                        [(at - start) / 60 for at in times], values, linewidth=0.9, label=legend(target, line["metric"])
                    )
                    lines += any(map(math.isfinite, values))
            if lines:
                axes.legend(fontsize=6 if lines < 7 else 5, ncols=-(-lines // 3), loc="best")
                axes.set_xlim(0, (end - start) / 60)
                axes.set_ylim(bottom=0)
            else:
                axes.text(
                    0.5, 0.5, panel["description"].split(". ")[0].rstrip("."), ha="center", va="center", color="#9aa5b1"
                )
                axes.set_xticks([])
                axes.set_yticks([])
            shown += lines
        when = datetime.datetime.fromtimestamp(end, datetime.UTC).date()
        figure.suptitle(
            f"SEDAC's dashboard, {(end - start) / 60:.0f} minutes (below each panel), {when}",
            x=0.01,
            ha="left",
            fontsize=9,
        )
        with replacing(out) as temporary:
            figure.savefig(temporary, format="png", dpi=80)
    return shown


def legend(target: dict[str, Any], labels: dict[str, str]) -> str:
    """Grafana's `{{label}}` filled in."""
    return re.sub(r"{{\s*(\w+)\s*}}", lambda found: labels.get(found[1], ""), target["legendFormat"])
