"""Step 7: measure a matrix of cases against stock, through servers that the suite starts and stops itself.

    python sedac_test_suite.py --config configs/test_matrix_speed.json --out-dir reports --verbose

A stock server runs throughout; each case gets a server beside it, and requests alternate between the two, so that every
ratio is paired. Perplexity comes from prompt log-probabilities through the server, on text that the probes were not
trained on: exits fire there as in any prefill. A case that fails is reported and does not stop the others. Writes
NAME.json (tidy records), NAME.csv and NAME.html to --out-dir, after every case. Exit code 1 if a case failed.
A config is JSON; all but `cases` is optional:

    model        model folder, hub name or 'default'                 probe_dir    folder of probes and manifest
    text         pydoc, a text or JSONL file, or a dataset's name    server_args  arguments for vLLM, for all servers
    repeats      rounds that count, at least 2                       warmup       rounds that do not
    decode       {batches, tokens, prompt_tokens}                    prefill      {tokens: lengths of prompt}
    ppl          {tokens: in all, 0 for none; window}                cases        [{name, …}]

A case is a name and how it exits: `preset`, `thresholds` (a list, or one value such as "inf" or 0 for all checkpoints)
or `exit_rates` (adaptive); without any of them the manifest's thresholds hold. Any other SEDAC_* variable goes by its
name in small letters without the prefix (`gamma`, `keep_last`, …); `"enabled": 0` measures stock against stock.

    python sedac_test_suite.py --config configs/test_matrix_quality.json --probe-dir my_gates --out-dir reports

A config with the key `quality` starts no server: it holds options of `python -m sedac_core.bench quality`, which judges
trained gates beside other ways to save the same bytes, and the report shows what saved bytes cost.
"""

import argparse
import csv
import json
import math
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from sedac_core import bench, bench_quality, cli, collection, demo_model, report, vllm_patch
from sedac_core.artifacts import Manifest, replacing
from sedac_core.cli import SedacError
from sedac_core.serving import Server, counters, get, post
from sedac_core.settings import PRESETS, VARIABLES, Settings

VARIABLE_KEYS = {variable.name.removeprefix("SEDAC_").lower(): variable.name for variable in VARIABLES}
CASE_KEYS = ("name", "preset", *VARIABLE_KEYS)
CONFIG = {
    "model": "default",
    "probe_dir": "sedac_data",
    "text": "pydoc",
    "server_args": ["--max-model-len", "1024"],
    "repeats": 5,
    "warmup": 1,
    "decode": {"batches": [1, 4, 16], "tokens": 32, "prompt_tokens": 8},
    "prefill": {"tokens": [512]},
    "ppl": {"tokens": 4096, "window": 512},
    "cases": [],
}
QUALITY = {  # options of the benchmark, by the kind of their values
    **dict.fromkeys(("probe_dir", "model", "name", "problems", "device", "dtype"), "a"),
    **{key: ["a"] for key in ("dataset", "cascades")},
    **dict.fromkeys(("samples", "max_length", "batch_size", "free_running", "shots"), 1),
    **dict.fromkeys(("max_new_tokens", "answers_at_once"), 1),
    **dict.fromkeys(("no_controls", "no_teacher_forcing"), True),
    "saved": [0.25],
}
MEASURED = (  # the other keys of a record are conditions
    *("value", "low", "high", "repeats", "exit_rate", "unit", "reason"),
    *("saved_bytes", "log_lambda", "threshold", "bound", "certified"),
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config", type=Path, required=True, help="test matrix, such as configs/test_matrix_smoke.json"
    )
    parser.add_argument("--out-dir", type=Path, default=Path("reports"), help="for results (default: %(default)s)")
    parser.add_argument("--model", help="in place of the config's model")
    parser.add_argument("--probe-dir", type=Path, help="in place of the config's probe_dir")
    parser.add_argument("--text", help="in place of the config's text, for perplexity and prompts")
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="also print what changed since these results")
    parser.add_argument("--verbose", action="store_true", help="print server commands, and each figure as it comes")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    old = bench.read_results(args.compare) if args.compare else None
    given = {"model": args.model, "probe_dir": args.probe_dir and str(args.probe_dir), "text": args.text}
    given = {key: value for key, value in given.items() if value}
    config = read_config(args.config)
    if "quality" in config:
        return measure_quality(args, config["quality"], given, old)
    config |= given
    settings = {case["name"]: case_settings(case, config) for case in config["cases"]}
    if any(environment["SEDAC_ENABLED"] == "1" for environment in settings.values()):
        vllm_patch.require_servable()
    model = demo_model.resolve(config["model"])
    text = held_out_text(config)

    records: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    paths = outputs(args)
    with server(model, "stock", {"SEDAC_ENABLED": "0"}, config, args) as stock:
        windows = text_windows(stock, text, config)
        rounds = phases(config) * (config["warmup"] + config["repeats"]) + len(ppl_windows(windows, config))
        for name, environment in settings.items():
            system = "sedac" if environment["SEDAC_ENABLED"] == "1" else "stock"
            known = {"system": system, "model": config["model"], "case": name}
            try:
                get(stock.url, "/health")
                with server(model, name, environment, config, args) as case, tqdm(total=rounds, desc=name) as bar:
                    found = measure(stock, case, windows, config, bar.update)
            except SedacError as error:
                failed[name] = str(error)
                found = [{"metric": "failed", "value": 1, "unit": "", "reason": str(error)}]
                print(f"case {name} failed: {error}", file=sys.stderr)
            records += [{**known, **record} for record in found]
            write(paths, config, records)
            if args.verbose:
                print(*(line(known | record) for record in found), sep="\n", file=sys.stderr)
    print_table(records)
    if old:
        print_changes(old["records"], records)
    print(json.dumps(summary(records, failed) | {kind: str(path) for kind, path in paths.items()}, ensure_ascii=False))
    return 1 if failed else 0


def outputs(args: argparse.Namespace) -> dict[str, Path]:
    return {kind: args.out_dir / f"{args.config.stem}.{kind}" for kind in ("json", "csv", "html")}


def measure_quality(args: argparse.Namespace, options: dict[str, Any], given: dict[str, str], old) -> int:
    """Run `sedac_core.bench quality` with a config's options, and write and print what any matrix does."""
    options = options | {"dataset" if key == "text" else key: value for key, value in given.items()}
    paths, arguments = outputs(args), []
    for key, value in {**options, "out": str(paths["json"])}.items():
        flag = "--" + key.replace("_", "-")
        if key == "saved":
            arguments.append(f"{flag}={','.join(map(str, value))}")
        elif value is not False:
            arguments += [
                flag,
                *(() if value is True else map(str, value) if isinstance(value, list) else [str(value)]),
            ]
    parsed = bench_quality.parse_args(arguments)
    records: list[dict[str, Any]] = []
    for part in bench_quality.measure(parsed):
        records += part
        write(paths, {"quality": options, "model": records[0]["model"]}, records, **bench_quality.origin(parsed))
    if old:
        print_changes(old["records"], records)
    leading = ("kl", "top1_agreement", "accuracy_change", "certificate_held")
    found: dict[str, dict[str, dict[str, float]]] = {}
    for record in records:
        if record["metric"] in leading and record["system"] == "sedac":
            where = str(record.get("budget", record.get("loss")))
            found.setdefault(record["text"], {}).setdefault(record["metric"], {})[where] = record["value"]
    print(json.dumps({"quality": found, **{kind: str(path) for kind, path in paths.items()}}, ensure_ascii=False))
    return 0


def read_config(path: Path) -> dict[str, Any]:
    """The config with its defaults; a key that is not known is named together with those that are."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SedacError(f"config {path} cannot be read as JSON ({error})") from None
    if isinstance(found, dict) and "quality" in found:
        unknown_key(found, ("quality",), f"{path} has a matrix of quality, which starts no server, and")
        return {"quality": checked_options(found["quality"], str(path))}
    config = checked(found, CONFIG, str(path))
    if not isinstance(found.get("cases"), list) or not found["cases"]:
        raise SedacError(
            f"{path} has no cases: give a list of them, such as [{{'name': 'all exit', 'thresholds': 'inf'}}]"
        )
    names = set()
    for case in config["cases"]:
        name = case.get("name") if isinstance(case, dict) else None
        if not isinstance(name, str) or not name.strip("./ ") or name in names or name == "stock" or "/" in name:
            raise SedacError(
                f"{path}: each case needs a name of its own, without '/' and other than 'stock', found {case}"
            )
        names.add(name)
        unknown_key(case, CASE_KEYS, f"{path}, case {name}")
    if config["ppl"]["window"] < 2:
        raise SedacError(f"{path}: ppl.window must be at least 2 tokens, found {config['ppl']['window']}")
    if config["repeats"] < 2:
        raise SedacError(f"{path}: repeats must be at least 2, a single round has no spread")
    return config


def checked(found: Any, defaults: dict[str, Any], where: str) -> dict[str, Any]:
    """`found` over `defaults`; every value must be of its default's kind: a text, a count, or a list of either."""
    if not isinstance(found, dict):
        raise SedacError(f"{where} must be an object with the keys {', '.join(defaults)}, found {found!r}")
    unknown_key(found, defaults, where)
    for key, value in found.items():
        default = defaults[key]
        if isinstance(default, dict):
            found = found | {key: checked(value, default, f"{where}, {key}")}
            continue
        kind = type(default[0]) if isinstance(default, list) and default else type(default)
        items = value if isinstance(default, list) and isinstance(value, list) else [value]
        fits = isinstance(value, list) == isinstance(default, list) and all(type(item) is kind for item in items)
        least = 0 if key == "warmup" or where.endswith("ppl") else 1
        if key != "cases" and not (fits and (kind is str or all(item >= least for item in items))):
            raise SedacError(f"{where}: {key} must look like {json.dumps(default)}, found {json.dumps(value)}")
    return defaults | found


def checked_options(found: Any, where: str) -> dict[str, Any]:
    """Options of the quality benchmark; every value must be of its option's kind."""
    if not isinstance(found, dict) or "probe_dir" not in found:
        raise SedacError(f"{where}: quality must be an object with at least a probe_dir, found {json.dumps(found)}")
    unknown_key(found, QUALITY, f"{where}, quality")
    for key, value in found.items():
        like = QUALITY[key]
        items = value if isinstance(value, list) else [value]
        kind = type(like[0]) if isinstance(like, list) else type(like)
        if (
            isinstance(value, list) != isinstance(like, list)
            or not items
            or any(type(item) is not kind for item in items)
        ):
            raise SedacError(f"{where}, quality: {key} must look like {json.dumps(like)}, found {json.dumps(value)}")
    return found


def unknown_key(found: dict[str, Any], valid: Any, where: str) -> None:
    for key in found:
        if key not in valid:
            raise SedacError(f"{where} has an unknown key {key!r}: valid keys are {', '.join(valid)}")


def case_settings(case: dict[str, Any], config: dict[str, Any]) -> dict[str, str]:
    """The SEDAC_* environment of a case, checked as the server will check it."""
    if not case.get("enabled", 1):
        return {"SEDAC_ENABLED": "0"}
    sources = [key for key in ("preset", "thresholds", "exit_rates") if key in case]
    if len(sources) > 1:
        raise SedacError(f"case {case['name']} has both {' and '.join(sources)}: give one of them")
    if case.get("preset", "balanced") not in PRESETS:
        raise SedacError(f"case {case['name']}: preset must be one of {', '.join(PRESETS)}, found {case['preset']!r}")
    folder = Path(case.get("probe_dir", config["probe_dir"])).resolve()
    values = {key: value for key, value in case.items() if key in VARIABLE_KEYS}
    if "preset" in case:
        values["thresholds"] = list(PRESETS[case["preset"]])
    if isinstance(values.get("thresholds"), int | float | str):
        layers = values.get("probe_layers") or Manifest.load(folder).checkpoints
        values["thresholds"] = [values["thresholds"]] * len(layers)
    values = {"enabled": 1, "adaptive": int("exit_rates" in case)} | values | {"probe_dir": folder}
    environment = {
        VARIABLE_KEYS[key]: ",".join(map(str, value)) if isinstance(value, list) else str(value)
        for key, value in values.items()
    }
    try:
        Settings.from_env(environment)
    except SedacError as error:
        raise SedacError(f"case {case['name']}: {error}") from None
    return environment


def held_out_text(config: dict[str, Any]) -> str:
    """The text for prompts and perplexity, less the documents that the probes were trained on, in a seeded order."""
    documents = collection.read_documents(config["text"])
    folder = Path(config["probe_dir"])
    trained: set[int] = set()
    if (folder / "manifest.json").exists():
        manifest = Manifest.load(folder)
        if manifest.collection.get("dataset") == config["text"]:
            trained = {int(index) for index in manifest.training.get("trained_documents", "").split(",") if index}
    seen = {documents[index] for index in trained if index < len(documents)}  # some texts stand under several names
    kept = sorted(set(documents) - seen)
    if not kept:
        raise SedacError(f"all of {config['text']} was trained on: give another text (--text), for figures that count")
    return "\n\n".join(kept[index] for index in np.random.default_rng(0).permutation(len(kept)))


def server(model: str, name: str, settings: dict[str, str], config: dict[str, Any], args: argparse.Namespace) -> Server:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("SEDAC_")}  # a case says all itself
    log = args.out_dir / "logs" / f"{args.config.stem}-{name}.log"
    # Cached prefixes would skip the prefill that is measured, and mix keys computed with and without exits.
    vllm_args = ["--no-enable-prefix-caching", *config["server_args"]]
    started = Server(model, log, settings, vllm_args, name=f"server for {name}", base=clean)
    if args.verbose:
        print(" ".join(f"{key}={value}" for key, value in settings.items()), *started.command, file=sys.stderr)
    return started


def text_windows(stock: Server, text: str, config: dict[str, Any]) -> list[int]:
    """Token ids of the text, enough for every phase, from the server's own tokenizer."""
    longest = max([config["ppl"]["tokens"], 16 * config["decode"]["prompt_tokens"], *config["prefill"]["tokens"], 2])
    needed = max([longest, *(batch * config["decode"]["prompt_tokens"] for batch in config["decode"]["batches"])])
    body = {"model": stock.model, "prompt": text[: 16 * needed], "add_special_tokens": False}
    ids = post(stock.url, "/tokenize", body)["tokens"]
    if len(ids) < needed:
        raise SedacError(f"text {config['text']} gives {len(ids)} held-out tokens and {needed} are needed: give more")
    return ids


def phases(config: dict[str, Any]) -> int:
    return len(config["decode"]["batches"]) + len(config["prefill"]["tokens"])


def ppl_windows(ids: list[int], config: dict[str, Any]) -> list[list[int]]:
    size, end = config["ppl"]["window"], config["ppl"]["tokens"]
    windows = [ids[i : min(i + size, end)] for i in range(0, end, size)]
    return [window for window in windows if len(window) > 1]  # a token alone is predicted from nothing


def measure(stock: Server, case: Server, ids: list[int], config: dict[str, Any], tick) -> list[dict[str, Any]]:
    """All phases of one case: records less what they have in common."""
    records: list[dict[str, Any]] = []
    for batch in config["decode"]["batches"]:
        size, tokens = config["decode"]["prompt_tokens"], config["decode"]["tokens"]
        prompts = [ids[i * size : (i + 1) * size] for i in range(batch)]
        # Decode is what a long answer takes beyond the median answer of one token, which is all prefill.
        times, seen = timed(stock, case, prompts, {"": 1, " long": 1 + tokens}, config, tick)
        decode = {
            name: [long - statistics.median(times[name]) for long in times[f"{name} long"]]
            for name in ("stock", "case")
        }
        records += rates({"phase": "decode", "batch": batch}, decode, batch * tokens, seen)
    for size in config["prefill"]["tokens"]:
        times, seen = timed(stock, case, [ids[:size]], {"": 1}, config, tick)
        records += rates({"phase": "prefill", "tokens": size}, times, size, seen)
    windows = ppl_windows(ids, config)
    if windows:
        records += perplexity(stock, case, windows, config["text"], tick)
    return records


def timed(stock, case, prompts, lengths, config, tick) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of one request that carries all prompts, to both servers in turn, and what SEDAC counted meanwhile."""

    def ask(target: Server, other: Server, length: int):
        options = {"max_tokens": length, "min_tokens": length, "ignore_eos": True, "temperature": 0}

        def answer() -> None:
            with other.paused():
                post(target.url, "/v1/completions", {"model": target.model, "prompt": prompts, **options})

        return answer

    actions = {
        name + suffix: ask(target, other, length)
        for name, target, other in (("stock", stock, case), ("case", case, stock))
        for suffix, length in lengths.items()
    }
    before = counters(case.url)
    times = bench.paired(actions, config["repeats"], config["warmup"], tick)
    return times, counted(case, before)


def counted(case: Server, before: dict[str, float]) -> dict[str, Any]:
    """What the case's server counted since `before`: exit rates by checkpoint, MLP rows saved, thresholds in force."""
    if case.environment.get("SEDAC_ENABLED") != "1":
        return {}
    now = counters(case.url)
    delta = {name: value - before.get(name, 0.0) for name, value in now.items()}
    tokens, rows = delta.get("sedac_tokens_total", 0.0), delta.get("sedac_mlp_rows_computed_total", 0.0)
    if not tokens:
        raise SedacError("its server counted no tokens, so SEDAC is not at work there: see its log")
    saved = delta.get("sedac_mlp_rows_saved_total", 0.0)

    def by_checkpoint(name: str, values: dict[str, float]) -> dict[int, float]:
        found = {int(key.split('"')[1]): value for key, value in values.items() if key.startswith(name + "{")}
        return dict(sorted(found.items()))

    exits = by_checkpoint("sedac_exits_total", delta)
    return {
        "exits": sum(exits.values()),
        "exit_rates": dict(zip(exits, (float(part) for part in np.cumsum(list(exits.values())) / tokens), strict=True)),
        "mlp_rows_saved": saved / max(1.0, saved + rows),
        "thresholds": by_checkpoint("sedac_threshold", now),
    }


def rates(known: dict[str, Any], times: dict[str, Any], tokens: int, seen: dict[str, Any]) -> list[dict[str, Any]]:
    if min(map(min, times.values())) <= 0:
        raise SedacError(f"{known} is too noisy to time: raise decode.tokens, or leave the machine alone")
    names = {"stock": {"system": "stock", "measured": "baseline"}, "case": {"measured": "case"}}
    records = [
        {**names[name], **known, "metric": "tokens_per_second", **bench.spread([tokens / s for s in times[name]])}
        for name in names
    ]
    speedup = bench.spread(bench.ratios(times["stock"], times["case"]))
    records.append({**names["case"], **known, "metric": "speedup", **speedup, "unit": "x"})
    return records_with(seen, known, [{"unit": "tokens/s"} | record for record in records])


def records_with(seen: dict[str, Any], known: dict[str, Any], records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`records` with the exit rate they were measured at, and one record for each thing that SEDAC counted."""
    if not seen:
        return records
    exit_rate = max(seen["exit_rates"].values(), default=0.0)
    records = [record | {"exit_rate": exit_rate} if record["measured"] == "case" else record for record in records]
    facts: list[tuple[dict[str, Any], float, str]] = [
        ({"metric": "exits"}, seen["exits"], "tokens"),
        ({"metric": "mlp_rows_saved"}, seen["mlp_rows_saved"], "share"),
        *(({"metric": "exit_rate", "checkpoint": layer}, rate, "share") for layer, rate in seen["exit_rates"].items()),
        *(
            ({"metric": "threshold", "checkpoint": layer}, value, "nats")
            for layer, value in seen["thresholds"].items()
            if math.isfinite(value)  # JSON has no infinity
        ),
    ]
    return records + [
        {"measured": "case", **known, **fact, "value": value, "unit": unit} for fact, value, unit in facts
    ]


def perplexity(stock: Server, case: Server, windows: list[list[int]], text: str, tick) -> list[dict[str, Any]]:
    """Perplexity of both on the same windows, in turn, and their ratio, with bootstrap intervals over the windows."""
    before = counters(case.url)
    losses = []  # [windows][2]: sums over a window's tokens, in nats
    for turn, window in enumerate(windows):
        pair = {name: window_loss(target, window) for name, target in in_turn(turn, stock, case)}
        losses.append([pair["stock"], pair["case"]])
        tick()
    sums, counts = np.array(losses), np.array([len(window) - 1 for window in windows])  # [windows, 2], [windows]
    again = np.random.default_rng(0).integers(len(windows), size=(2000, len(windows)))  # [resamples, windows]
    resampled = sums[again].sum(1) / counts[again].sum(1)[:, None]  # [resamples, 2], mean nats a token
    whole = sums.sum(0) / counts.sum()

    def record(measured: dict[str, str], metric: str, value: float, samples: np.ndarray, unit: str) -> dict[str, Any]:
        low, high = (float(edge) for edge in np.exp(np.quantile(samples, [0.025, 0.975])))
        known = {"phase": "prefill", "text": text, "metric": metric, "value": math.exp(value)}
        return {**measured, **known, "low": low, "high": high, "repeats": len(windows), "unit": unit}

    records = [
        record({"system": "stock", "measured": "baseline"}, "ppl", whole[0], resampled[:, 0], ""),
        record({"measured": "case"}, "ppl", whole[1], resampled[:, 1], ""),
        record({"measured": "case"}, "ppl_ratio", whole[1] - whole[0], resampled[:, 1] - resampled[:, 0], "x"),
    ]
    return records_with(counted(case, before), {"phase": "prefill", "text": text}, records)


def in_turn(turn: int, stock: Server, case: Server) -> list[tuple[str, Server]]:
    pair = [("stock", stock), ("case", case)]
    return pair if turn % 2 == 0 else pair[::-1]


def window_loss(target: Server, window: list[int]) -> float:
    """Negative log-likelihood, in nats, of all tokens of a window but its first."""
    body = {"model": target.model, "prompt": [window], "max_tokens": 1, "prompt_logprobs": 0, "temperature": 0}
    found = post(target.url, "/v1/completions", body)["choices"][0]["prompt_logprobs"]
    return -sum(entry[str(token)]["logprob"] for token, entry in zip(window[1:], found[1:], strict=True))


def write(paths: dict[str, Path], config: dict[str, Any], records: list[dict[str, Any]], **origin: Any) -> None:
    results = bench.results_file(paths["json"], records, config=config, **origin)
    columns = list(dict.fromkeys(key for record in records for key in record))
    with replacing(paths["csv"]) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(records)
    report.write_report(paths["html"], f"SEDAC against stock: {config['model']}", results)


def line(record: dict[str, Any]) -> str:
    known = ("text", "phase", "batch", "tokens", "checkpoint", "budget", "skips", "loss")
    where = " ".join(f"{key} {record[key]}" for key in known if key in record)
    span = f" ({record['low']:.4g} to {record['high']:.4g})" if "low" in record else ""
    who = f"{record.get('case', ''):<20} {'stock' if record.get('measured') == 'baseline' else record['system']:<6}"
    return f"{who} {where:<26} {record['metric']:<18} {record['value']:>10.4g}{span} {record['unit']}"


def print_table(records: list[dict[str, Any]]) -> None:
    shown = ("tokens_per_second", "speedup", "ppl", "ppl_ratio", "mlp_rows_saved", "failed")
    print(*(line(record) for record in records if record["metric"] in shown), sep="\n")


def print_changes(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> None:
    """Every figure that both results hold under the same conditions: then, now, and their ratio."""

    def conditions(record: dict[str, Any]) -> str:
        return json.dumps({key: value for key, value in record.items() if key not in MEASURED}, sort_keys=True)

    before = {conditions(record): record["value"] for record in old}
    print("\nsince the older results:")
    for record in new:
        then = before.get(conditions(record))
        if then is not None and record["metric"] != "failed":
            ratio = f"{record['value'] / then:.3f}x" if then else "from 0"
            print(f"{line(record)}  was {then:.4g}, now {ratio}")


def summary(records: list[dict[str, Any]], failed: dict[str, str]) -> dict[str, Any]:
    """By case: the figures that a reader looks for first."""
    cases: dict[str, dict[str, Any]] = {}
    for record in records:
        case = cases.setdefault(record["case"], {})
        metric, phase = record["metric"], record.get("phase")
        if metric == "speedup":
            size = record.get("batch", record.get("tokens"))
            case.setdefault(f"{phase}_speedup", {})[str(size)] = record["value"]
        elif metric == "ppl":
            case["ppl_stock" if record["measured"] == "baseline" else "ppl"] = record["value"]
        elif metric == "exits":
            case["exits_total"] = case.get("exits_total", 0) + int(record["value"])
    return {"cases": cases, "failed": failed}


if __name__ == "__main__":
    cli.run(main)
