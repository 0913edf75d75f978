"""What a server's processes take while it is under load, and whether that grows."""

import contextlib
import csv
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from .serving import Server

WATCH_SECONDS = 2.0


class Watch:
    """Memory, open files and metrics folder of a server's processes, looked at every so often inside the block."""

    def __init__(self, server: Server, log: Path, load: str):
        self.server, self.log = server, log
        self.load = load  # what the server is under: each load is judged by itself, as another one needs other memory
        # load, seconds, MiB resident, open files, MiB of the folder
        self.samples: list[tuple[str, float, float, int, float]] = []
        self.end = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)

    def __enter__(self) -> "Watch":
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.end.set()
        self.thread.join()

    def run(self) -> None:
        start = time.monotonic()
        with open(self.log, "w", newline="", buffering=1) as file:  # whatever ends a soak, what was seen is kept
            rows = csv.writer(file)
            rows.writerow(["load", "seconds", "resident_mib", "open_files", "metrics_mib"])
            while True:
                now = time.monotonic() - start
                used = *taken(self.server.process.pid), folder_mib(self.server.metrics_folder)
                self.samples.append((self.load, now, *used))
                rows.writerow(self.samples[-1])
                if self.end.wait(WATCH_SECONDS):
                    return

    def records(self) -> list[dict[str, Any]]:
        names = {"memory": ("mib", "MiB"), "files": ("open", ""), "metrics_folder": ("mib", "MiB")}
        records = []
        for load in dict.fromkeys(sample[0] for sample in self.samples):
            seconds, *series = np.array([sample[1:] for sample in self.samples if sample[0] == load]).T
            minutes = (seconds - seconds[0]) / 60
            for values, (name, (suffix, unit)) in zip(series, names.items(), strict=True):
                records += [{"load": load, **record} for record in trend(minutes, values, name, suffix, unit)]
        return records


def trend(minutes: np.ndarray, values: np.ndarray, name: str, suffix: str, unit: str) -> list[dict[str, Any]]:
    """The medians of the first and of the last third, and how much a minute it grows over the last two thirds.

    Growth is the Theil-Sen slope, the median of the slopes between all pairs of samples, with its 95 % interval: no
    single peak moves it.
    """
    third = minutes[-1] / 3
    settled = minutes >= third
    slope, _, low, high = stats.theilslopes(values[settled], minutes[settled])
    medians = [("first", values[~settled]), ("last", values[minutes >= 2 * third])]
    records = [
        {"metric": f"{name}_{suffix}", "third": which, "value": float(np.median(part)), "unit": unit}
        for which, part in medians
    ]
    growth = {"value": float(slope), "low": float(low), "high": float(high), "repeats": int(settled.sum())}
    return [*records, {"metric": f"{name}_growth", **growth, "unit": f"{unit}/min" if unit else "1/min"}]


def taken(group: int) -> tuple[float, int]:
    """Resident MiB (what processes share counts in each) and open files of all processes of a group."""
    pages = files = 0
    for process in Path("/proc").iterdir():
        if process.name.isdecimal():
            try:
                if os.getpgid(int(process.name)) == group:
                    pages += int((process / "statm").read_text().split()[1])
                    files += len(os.listdir(process / "fd"))
            except (OSError, IndexError):
                continue  # it has ended
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, files


def folder_mib(folder: Path) -> float:
    total = 0
    for file in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # its process has ended
            total += file.stat().st_size
    return total / 2**20
