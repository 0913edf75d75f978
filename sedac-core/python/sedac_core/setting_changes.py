"""Settings that an admin call changes while a server is at work: what each saves, and what the change costs those who wait."""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import math
import re
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from . import serving
from .cli import SedacError
from .load import KEY, Answer, Load, answers, compared, tally_of
from .served_counts import by_label, difference, saved_share, settled
from .serving import Server

FEW = 4  # clients while settings change: where steps are small, whatever is skipped is saved


@dataclasses.dataclass
class Setting:
    name: str
    change: dict[str, Any]  # what the admin call asks for
    saves: int  # more than settings of lower numbers


def settings_of(now: dict[str, Any]) -> list[Setting]:
    """Settings for a server in its own, `now`: some that save less and more, off, and back."""
    if now["policy"] == "hard":
        own = [float(value) for value in now["thresholds"]]
        steps = [{"thresholds": [factor * value for value in own]} for factor in (0.5, 2.0, 1.0)]
    else:
        steps = [{"log_lambda": now["log_lambda"] + step} for step in (-1.0, 1.0, 0.0)]
    less, more, back = steps
    beyond = {"beyond_certificate": True}
    return [
        Setting("less", less, 1),
        Setting("more", {**more, **beyond}, 3),
        Setting("off", {"enabled": False}, 0),
        Setting("on again", {"enabled": True, **back}, 2),
    ]


def settings_change(
    sedac: Server, prompts: list[str], wanted: list[Answer], own: list[Answer], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """What each admin call does to a server at work: the share of MLP bytes saved, the time between tokens, /metrics, the log,
    and answers one at a time where SEDAC is off and where it is back."""
    seconds = min(10.0, 6 * arguments.minutes)
    log_before = len(sedac.log.read_text(errors="replace"))
    now = json.loads(serving.get(sedac.url, "/sedac", api_key=KEY))["now"]
    load = Load(sedac, prompts, arguments.max_tokens, math.inf)
    records = []
    with running(load, FEW):
        for setting in (Setting("as it stands", {}, 2), *settings_of(now)):
            called = time.perf_counter()
            told = serving.post(sedac.url, "/sedac", setting.change, api_key=KEY)["now"] if setting.change else now
            taken = time.perf_counter() - called
            before, begin = settled(sedac), time.perf_counter()
            time.sleep(seconds)
            seen, after = difference(serving.counters(sedac.url), before), serving.counters(sedac.url)
            gaps = gaps_between(load, begin, time.perf_counter())
            told_right = in_force(after, told)
            found = [
                {"metric": "saved_bytes", "value": saved_share(seen), "unit": "share", "saves": setting.saves},
                {"metric": "mean_itl_ms", "value": 1000 * sum(gaps) / len(gaps), "unit": "ms"},
                {"metric": "longest_itl_ms", "value": 1000 * max(gaps), "unit": "ms"},
                {"metric": "call_ms", "value": 1000 * taken, "unit": "ms"},
                {"metric": "wrong_on_metrics", "value": int(not told_right), "unit": ""},
            ]
            records += [{"setting": setting.name, **record} for record in found]
    records.append({"metric": "failures", "value": len(load.failures), "unit": ""})
    log = sedac.log.read_text(errors="replace")[log_before:]
    records.append({"metric": "requests", "value": len(load.gaps), "unit": ""})
    records.append({"metric": "changes_logged", "value": log.count("SEDAC changed by an admin call"), "unit": ""})
    compiled = re.findall(r"(?i)^.*(?:captur|compil|dynamo).*$", log, re.MULTILINE)
    for line in compiled:
        print(f"log: {line}", file=sys.stderr)
    records.append({"metric": "compiled_or_captured", "value": len(compiled), "unit": "lines of the log"})
    size = arguments.max_tokens
    serving.post(sedac.url, "/sedac", {"enabled": False}, api_key=KEY)
    off = tally_of(asyncio.run(answers(sedac, prompts, size)), wanted)
    records += [
        {"setting": "off", **record} for record in compared("off", off)
    ]  # held to stock's like those that opt out
    serving.post(sedac.url, "/sedac", {"enabled": True}, api_key=KEY)
    back = tally_of(asyncio.run(answers(sedac, prompts, size)), own)
    records.append({"setting": "on again", "metric": "unlike_before", "value": back.unlike(), "unit": ""})
    return [{"load": "settings change", **record} for record in records]


@contextlib.contextmanager
def running(load: Load, concurrency: int) -> Iterator[None]:
    """A load in a thread of its own, until the block ends."""
    thread = threading.Thread(target=lambda: asyncio.run(load.run(concurrency)))
    thread.start()
    try:
        yield
    finally:
        load.end = True
        thread.join()


def gaps_between(load: Load, begin: float, end: float) -> list[float]:
    """Seconds between tokens of requests that were answered, of those that came between the two times."""
    found = [gap for at, gap in list(load.times) if begin <= at <= end]
    if not found:
        raise SedacError(f"no answer came from {load.server.url} in {end - begin:.0f} s: read {load.server.log}")
    return found


def in_force(counters: dict[str, float], told: dict[str, Any]) -> bool:
    """Whether /metrics shows the settings that the admin call says are in force."""
    if bool(counters.get('sedac_calibration{state="switched off"}')) == told["enabled"]:
        return False
    if not told["enabled"]:
        return True
    if told["policy"] == "hard":
        shown = list(by_label(counters, "sedac_threshold").values())
        wanted = [float(value) for value in told["thresholds"]]
    else:
        shown, wanted = [by_label(counters, "sedac_log_lambda")[told["source"]]], [told["log_lambda"]]
    return all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(shown, wanted, strict=True))
