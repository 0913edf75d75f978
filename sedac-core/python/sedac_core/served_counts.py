"""A server's own counters, held to what clients sent and were answered."""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from . import serving
from .cli import SedacError
from .load import Load
from .serving import Server

SETTLED = 0.5  # seconds until what was counted before has come to /metrics


def settled(server: Server) -> dict[str, float]:
    """Its counters, of all that is done; `SedacError` where its worker's are not among them."""
    time.sleep(SETTLED)
    found = serving.counters(server.url)
    if not by_label(found, "sedac_mlp_bytes_total"):
        said = f"/metrics of {server.name} shows none of its worker's counters: do they have room in the temporary folder? "
        raise SedacError(said + serving.log_says(server.log))
    return found


def difference(now: dict[str, float], before: dict[str, float]) -> dict[str, float]:
    return {name: value - before.get(name, 0.0) for name, value in now.items()}


def by_label(seen: dict[str, float], name: str) -> dict[str, float]:
    """`sedac_steps_by_path_total{path="dense"}` and the like, by the label's value; layers rise."""
    found = {key.split('"')[1]: value for key, value in seen.items() if key.startswith(f"{name}{{")}
    return dict(sorted(found.items(), key=lambda item: (len(item[0]), item[0])))


def saved_share(seen: dict[str, float]) -> float:
    parts = by_label(seen, "sedac_mlp_bytes_total")
    return 1 - parts["read"] / parts["stock"]


def counted(seen: dict[str, float], load: Load, model: str, dtype: str) -> list[dict[str, Any]]:
    """What the server counted under a load, and how much of it is not what the clients were answered."""
    config = json.loads((Path(model) / "config.json").read_text())
    layers = config["num_hidden_layers"]
    mlp = 3 * config["hidden_size"] * config["intermediate_size"] * (4 if dtype == "float32" else 2)  # bytes
    sent = sum(tally.tokens for tally in load.tallies.values())
    tokens, off = seen["sedac_tokens_total"], seen.get('sedac_fallback_tokens_total{reason="request"}', 0)
    rows = {name: seen[f"sedac_mlp_rows_{name}_total"] for name in ("computed", "saved")}
    bytes_of, paths = by_label(seen, "sedac_mlp_bytes_total"), by_label(seen, "sedac_steps_by_path_total")
    pairs = {
        "tokens": (tokens, sent),
        "tokens of requests that opted out": (off, load.tallies["off"].tokens),
        "steps by path": (sum(paths.values()), seen["sedac_forward_steps_total"]),
        "MLP rows": (sum(rows.values()), layers * tokens),
        "bytes that stock needs": (bytes_of["stock"], layers * tokens * mlp),
    }
    levels = by_label(seen, "sedac_mlp_level_rows_total")
    if levels:
        pairs["MLP rows by level"] = (sum(levels.values()), layers * tokens)
        pairs["MLP rows at level 0 that opting out leaves"] = (max(levels["0"], layers * off), levels["0"])
    else:
        pairs["bytes read"] = (bytes_of["read"], rows["computed"] * mlp)
    exits, reached = by_label(seen, "sedac_exits_total"), tokens
    for layer in exits:
        decided = {
            name: seen.get(f'sedac_decisions_total{{checkpoint="{layer}",decision="{name}"}}', 0.0)
            for name in ("exit", "run", "not_finite")
        }
        pairs[f"decisions at layer {layer}"] = (sum(decided.values()), reached)
        pairs[f"risks at layer {layer}"] = (
            seen[f'sedac_risk_bucket{{checkpoint="{layer}",le="+Inf"}}'],
            reached - decided["not_finite"],
        )
        pairs[f"exits at layer {layer}"] = (decided["exit"], exits[layer])
        reached -= decided["exit"]
    wrong = [name for name, (here, there) in pairs.items() if not math.isclose(here, there, rel_tol=1e-9)]
    for name in wrong:
        print(f"counted: {name}: {pairs[name][0]:.12g}, not {pairs[name][1]:.12g}", file=sys.stderr)
    found = {"tokens_sent": sent, "tokens_counted": tokens, "figures_compared": len(pairs), "figures_wrong": len(wrong)}
    records = [{"metric": name, "value": value, "unit": ""} for name, value in found.items()]
    records += [{"metric": "steps", "path": path, "value": value, "unit": ""} for path, value in paths.items() if value]
    for layer, number in exits.items():
        records.append({"metric": "exits", "checkpoint": int(layer), "value": number / tokens, "unit": "share"})
    for level, number in levels.items():
        records.append(
            {"metric": "rows_at_level", "level": int(level), "value": number / layers / tokens, "unit": "share"}
        )
    for reason, number in by_label(seen, "sedac_fallback_tokens_total").items():
        records.append({"metric": "fallback", "reason": reason, "value": number / tokens, "unit": "share"})
    records.append({"metric": "saved_bytes", "value": saved_share(seen), "unit": "share"})
    return [{"load": "openai", **record} for record in records]
