"""`python -m sedac_core.bench adaptive`: the exit rates that adaptive thresholds hold, on real risks of real text.

The shipped probes read the default model over three texts: Python's documentation, the source of its library, the German
manual of the system. What reaches the controller then is what reaches it in a server: requests side by side, each a piece of
a text; a forward step takes one token of each, the cascade decides about them, and the controller moves the thresholds before
the next step. First a steady load of one text, judged window by window, beside thresholds that are fixed at what is right for
just these tokens: what they miss is chance and the text. Then the text changes, twice. A rate after a change is the one that
the thresholds in force would give over the whole of the new text, so that no luck of the draw is in it; it is held again from
the token on from which it is near its target on average over the next 4,096 tokens, at every checkpoint.
"""

import argparse
import functools
import gzip
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from . import collection
from ._rust import ThresholdController, evaluate
from .artifacts import Manifest, load_probe
from .bench import results_file, spread
from .calibration import thresholds_for_rates
from .cli import SedacError, float_list, positive
from .policy import HardExit
from .settings import Settings, check_lengths

DEFAULTS = Settings()
MANUAL = Path("/usr/share/man")
NEAR = 0.02  # a rate this near its target is held
LOOK = 128  # tokens between two looks at the thresholds after a change of text
HELD_FOR = 4096  # tokens
WINDOWS = (8192, 16384)  # tokens


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m sedac_core.bench adaptive", description=__doc__.splitlines()[0])
    option = parser.add_argument
    option("--model", help="Hub name, local folder or 'default' (default: the manifest's)")
    option("--probe-dir", type=Path, default=Path("sedac_data"), help="its artefact (default: %(default)s)")
    texts = ["pydoc", "stdlib", "manual:de"]
    option(
        "--texts",
        nargs="+",
        default=texts,
        help=f"one after the other; the first is the steady one (default: {' '.join(texts)})",
    )
    option("--exit-rates", type=float_list, default=DEFAULTS.exit_rates, help="targets (default: %(default)s)")
    option("--tokens", type=positive, default=200_000, help="of steady load (default: %(default)s)")
    option("--after", type=positive, default=40_000, help="tokens after each change of text (default: %(default)s)")
    option("--requests", type=positive, default=16, help="side by side (default: %(default)s)")
    option("--samples", type=positive, default=150, help="pieces of each text (default: %(default)s)")
    option("--max-length", type=positive, default=256, help="tokens of a piece at most (default: %(default)s)")
    option("--alpha", type=float, default=DEFAULTS.adaptive_alpha, help="SEDAC_ADAPTIVE_ALPHA (default: %(default)s)")
    option(
        "--window", type=positive, default=DEFAULTS.adaptive_window, help="SEDAC_ADAPTIVE_WINDOW (default: %(default)s)"
    )
    option("--repeats", type=positive, default=9, help="orders of the requests (default: %(default)s)")
    option("--out", type=Path, default=Path("docs/results/adaptive.json"))
    args = parser.parse_args()
    if args.tokens < max(WINDOWS) or args.after <= HELD_FOR:
        parser.error(
            f"a window is {max(WINDOWS)} tokens, and rates are judged over {HELD_FOR} after a change: give more tokens"
        )
    return args


def main() -> None:
    args = parse_args()
    manifest = Manifest.load(args.probe_dir)
    check_lengths(manifest.checkpoints, exit_rates=args.exit_rates)
    if manifest.gates or not manifest.training:
        raise SedacError(f"{args.probe_dir} holds no plain cascade's probes: train them (train_multilayer_probes.py)")
    model, tokenizer = collection.load_model(args.model or manifest.model, "float32")
    manifest.check_model(model.config)
    probes = {layer: load_probe(args.probe_dir, layer, model.config.hidden_size) for layer in manifest.checkpoints}
    texts = {}
    for name in args.texts:
        samples = collection.make_samples(documents(name), tokenizer, args.samples, args.max_length, seed=0)
        batches = collection.make_batches(samples, 8)
        risks = collection.streamed_risks(model, probes, tqdm(batches, name, file=sys.stderr))
        lengths = [len(sample.ids) for batch in batches for sample in batch]
        texts[name] = torch.cat([risk for risk, _ in risks], 1).T.split(lengths)  # each [tokens, checkpoints]
    records = judge(texts, manifest, args)
    results_file(args.out, records, training=manifest.training["provenance"])
    found = {" ".join(str(r[k]) for k in ("metric", "system", "text", "tokens") if k in r): r["value"] for r in records}
    print(json.dumps({"results": str(args.out)} | found))


def documents(name: str) -> list[str]:
    """A dataset's documents, or with 'manual:de' the German pages of the system's manual without their markup."""
    if not name.startswith("manual:"):
        return collection.read_documents(name)
    folder = MANUAL / name.removeprefix("manual:")
    pages = [gzip.decompress(page.read_bytes()).decode(errors="replace") for page in sorted(folder.rglob("*.gz"))]
    texts = [re.sub(r"^[.'].*\n|\\f.|\\&|\\(?=-)", "", page, flags=re.MULTILINE) for page in pages]
    found = [text for text in texts if len(text) > 500]
    if not found:
        raise SedacError(f"there is no manual in {folder}: name other --texts, such as a .txt file in another language")
    return found


def judge(texts: Mapping[str, Sequence[Tensor]], manifest: Manifest, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The records of a steady load of the first text and of changes to the others, the same in several orders."""
    (steady, pieces), *others = texts.items()
    rule = {"gamma": manifest.gamma, "weights": manifest.weights, "level": manifest.level}
    targets = np.array(args.exit_rates)
    rates: dict[str, list[np.ndarray]] = {
        "adaptive": [],
        "fixed": [],
    }  # by order: each token's exits [tokens, checkpoints]
    off: dict[str, list[float]] = {name: [] for name, _ in others}
    held: dict[str, list[int | None]] = {name: [] for name, _ in others}
    for order in tqdm(range(args.repeats), "orders", file=sys.stderr):
        draw = np.random.default_rng(order)
        served = Served(manifest, args)
        for risks in stream(pieces, args.requests, DEFAULTS.calibration_steps * args.requests, draw):
            served.step(risks)  # a server, too, observes before it lets any exit
        steps = [(risks, served.step(risks)) for risks in stream(pieces, args.requests, args.tokens, draw)]
        rates["adaptive"].append(by_checkpoint(torch.cat([at for _, at in steps]).numpy(), targets))
        seen = torch.cat([risks for risks, _ in steps]).T.contiguous()
        right = thresholds_for_rates(seen, args.exit_rates, **rule)
        rates["fixed"].append(by_checkpoint(evaluate(seen.numpy(), right, **rule)[0], targets))
        for name, changed in others:
            whole, misses = torch.cat(list(changed)).T.contiguous().numpy(), []
            for risks in stream(changed, args.requests, args.after, draw):
                served.step(risks)
                if served.tokens % LOOK < args.requests:
                    at, _ = evaluate(whole, served.policy.thresholds.tolist(), **rule)
                    misses.append(by_checkpoint(at, targets).mean(0) - targets)
            off[name].append(float(np.abs(misses[0]).max()))
            held[name].append(held_from(np.array(misses)))
    known = {"model": Path(args.model or manifest.model).name, "weights": "real", "targets": list(args.exit_rates)}
    known |= {"alpha": args.alpha, "window": args.window, "requests": args.requests}
    sizes = {name: sum(map(len, own)) for name, own in texts.items()}
    known_steady = {**known, "text": steady, "text_tokens": sizes[steady]}
    records = [{**known_steady, **record} for name in rates for record in steadiness(name, rates[name], targets)]
    for name, _ in others:
        tokens = [args.after if found is None else found for found in held[name]]
        some = {**known, "text": name, "text_tokens": sizes[name], "system": "adaptive"}
        records += [
            {**some, "metric": "off_at_change", **spread(off[name]), "unit": ""},
            {**some, "metric": "tokens_to_hold", **spread(tokens), "unit": "tokens"},
            {**some, "metric": "tokens_to_hold_at_most", "value": max(tokens), "unit": "tokens"},
            {
                **some,
                "metric": "orders_held",
                "value": len(tokens) - held[name].count(None),
                "of": len(tokens),
                "unit": "",
            },
        ]
    return records


class Served:
    """The cascade and its controller as a worker runs them, given risks `[tokens, checkpoints]` for residual streams."""

    def __init__(self, manifest: Manifest, args: argparse.Namespace):
        layers, nothing = manifest.checkpoints, [0.0] * len(manifest.checkpoints)
        columns: Any = tuple(functools.partial(torch.select, dim=1, index=index) for index in range(len(layers)))
        weights = manifest.weights or (1.0,) * len(layers)
        self.policy = HardExit(
            layers, columns, torch.tensor(nothing), manifest.gamma, weights, manifest.level, manifest.keep_last,
            manifest.fingerprint.num_hidden_layers, "adaptive",
        )  # fmt: skip
        self.controller = ThresholdController(list(args.exit_rates), args.alpha, args.window, nothing)
        self.tokens = 0

    def step(self, risks: Tensor) -> Tensor:
        """The checkpoint at which each token exits, `[tokens]`; the number of checkpoints where none lets it."""
        at, margin, before = torch.zeros(len(risks), dtype=torch.long), None, torch.zeros(len(risks))
        for index in range(risks.shape[1]):
            risk, exits = self.policy.step(index, risks, margin)
            critical = self.policy.critical(index, risk, before)[before < torch.inf]
            self.controller.observe(index, critical.numpy())
            margin = before = exits.margin
            at += margin < torch.inf
        self.controller.update()
        self.policy.thresholds.copy_(torch.tensor(self.controller.thresholds()))
        self.tokens += len(risks)
        return at


def stream(pieces: Sequence[Tensor], requests: int, tokens: int, draw: np.random.Generator) -> Iterator[Tensor]:
    """The steps of so many requests side by side, `[requests, checkpoints]`: pieces in random order, each from its beginning
    but for the first ones, and over again when all have had their turn."""
    order: list[int] = []

    def another() -> Tensor:
        order.extend([] if order else draw.permutation(len(pieces)).tolist())
        return pieces[order.pop()]

    lanes = [another() for _ in range(requests)]
    places = [int(draw.integers(len(lane))) for lane in lanes]
    for _ in range(tokens // requests):
        for lane in range(requests):
            if places[lane] >= len(lanes[lane]):
                lanes[lane], places[lane] = another(), 0
        yield torch.stack([lane[place] for lane, place in zip(lanes, places, strict=True)])
        places = [place + 1 for place in places]


def by_checkpoint(at: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Whether each token has exited by each checkpoint, `[tokens, checkpoints]`."""
    return at[:, None] <= np.arange(len(targets))


def steadiness(system: str, orders: Sequence[np.ndarray], targets: np.ndarray) -> list[dict[str, Any]]:
    """By window size the greatest miss of any order, window and checkpoint; and how much rates move from the first half to the
    second, on average over the orders."""
    records = []
    for size in WINDOWS:
        misses = [np.abs(part.mean(0) - targets).max() for own in orders for part in windows(own, size)]
        counts = {
            "value": float(max(misses)),
            "windows": len(misses),
            "within": int(sum(miss <= NEAR for miss in misses)),
        }
        records.append({"system": system, "tokens": size, "metric": "window_miss", **counts, "unit": ""})
    halves = [own[len(own) // 2 :].mean(0) - own[: len(own) // 2].mean(0) for own in orders]
    drift = float(np.abs(np.mean(halves, 0)).max())
    tokens = len(orders[0])
    return [
        *records,
        {"system": system, "tokens": tokens, "metric": "drift", "value": drift, "orders": len(orders), "unit": ""},
    ]


def windows(exited: np.ndarray, size: int) -> list[np.ndarray]:
    return [exited[i : i + size] for i in range(0, len(exited) - size + 1, size)]


def held_from(misses: np.ndarray) -> int | None:
    """Tokens after the change from which rates are held: misses `[looks, checkpoints]`, one each LOOK tokens."""
    span = HELD_FOR // LOOK
    for look in range(len(misses) - span + 1):
        if np.abs(misses[look : look + span].mean(0)).max() <= NEAR:
            return look * LOOK
    return None
