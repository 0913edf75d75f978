"""What gates do to the answers, at a row of saved shares, beside controls at the same bytes.

    python -m sedac_core.bench quality --probe-dir my_gates --out docs/results/quality_default.json

Teacher-forced, on the documents that training held out (or all of --dataset): for each share of MLP bytes saved, the
price λ that saves it on this text, then KL to the full model, top-1 agreement and perplexity over stock's. Controls:
the same levels dealt to random tokens layer by layer, and one level a layer for all tokens, with the same adapters.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import collection
from .artifacts import Manifest, held_out
from .bench import results_file
from .cli import SedacError, float_list, positive
from .gates import Gates, check_mlps
from .quality import (
    Judged,
    Text,
    evaluate_gates,
    mean_damage,
    prices_for_saved,
    random_levels,
    static_levels,
    whole_documents,
)

SAVED = (0.125, 0.25, 0.4, 0.5)
NO_PRICE = -100.0  # log λ at which nothing is narrowed
UNITS = {"kl": "nats", "top1_agreement": "share", "ppl_ratio": "x", "ppl": "perplexity"}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--probe-dir", type=Path, required=True, help="folder of the trained gates")
    option("--out", type=Path, required=True, help="results file to write")
    option("--model", help="Hub name, local folder or 'default' (default: the manifest's)")
    option("--name", help="what records call the model (default: the last part of --model)")
    option("--dataset", nargs="+", help="text to judge by (default: the held-out documents of the training's)")
    option("--saved", type=float_list, default=SAVED, help="shares of MLP bytes (default: 0.125,0.25,0.4,0.5)")
    option("--samples", type=positive, default=192, help="rows of each text at most (default: %(default)s)")
    option("--max-length", type=positive, default=512, help="tokens of a row (default: %(default)s)")
    option("--batch-size", type=positive, default=16, help="rows run at once (default: %(default)s)")
    option("--no-controls", action="store_true", help="leave the controls out")
    option("--device", help="such as cuda or cpu (default: cuda where there is one)")
    option("--dtype", choices=collection.DTYPES, default="auto", help="default: auto, the checkpoint's own")
    args = parser.parse_args()
    if any(not 0 < share < 1 for share in args.saved):
        parser.error("--saved are shares between 0 and 1")
    return args


def main() -> None:
    args = parse_args()
    manifest = Manifest.load(args.probe_dir)
    training = manifest.training
    texts = {}
    for dataset in args.dataset or training.get("datasets", []):
        documents = collection.read_documents(dataset)
        chosen = torch.arange(len(documents))
        if dataset in training.get("datasets", []):  # never judge by what gates were trained on
            chosen = chosen[held_out(chosen, training["seed"], training["held_out_share"])]
        texts[label(dataset)] = [documents[i] for i in chosen.tolist()]
    if not texts:
        raise SedacError("there is no text to judge by: give --dataset")
    model, tokenizer = collection.load_model(args.model or manifest.model, args.dtype, args.device)
    manifest.check_model(model.config)
    check_mlps(model)
    gates = Gates.load(args.probe_dir, manifest, model.device)
    name = args.name or Path(args.model or manifest.model).name

    records: list[dict[str, Any]] = []
    for text_name, documents in texts.items():
        samples = whole_documents(documents, tokenizer, args.max_length, args.samples)
        text = Text.of(model, samples, args.batch_size)
        condition = {"model": name, "weights": "real", "text": text_name}
        records += judge(model, gates, text, manifest, args, condition)
    results_file(args.out, records, artefact=str(args.probe_dir), training=training.get("provenance"))
    print(f"wrote {args.out}")


def label(dataset: str) -> str:
    return re.sub(r"_(train|valid|test)$", "", Path(dataset).stem)


def judge(model, gates: Gates, text: Text, manifest: Manifest, args, condition: dict) -> list[dict[str, Any]]:
    budgets = manifest.gates.get("budgets") or [{"log_lambda": price} for price in (-6.0, -4.0, -2.0)]
    guesses = [budget["log_lambda"] for budget in budgets]
    few = text.part(max(4096, sum(int(mask.sum()) for _, mask in text.batches) // 4))
    prices, _ = prices_for_saved(model, gates, few.batches, args.saved, guesses)
    damage = None if args.no_controls else mean_damage(model, gates, few)
    stock = evaluate_gates(model, gates, text, NO_PRICE).summary()["stock_ppl"]
    records = [{**condition, "system": "stock", "saved_bytes": 0.0, "metric": "ppl", "unit": UNITS["ppl"], **stock}]
    for saved, price in zip(tqdm(args.saved, condition["text"], file=sys.stderr), prices, strict=True):
        judged = evaluate_gates(model, gates, text, price)
        systems = {"sedac": judged}
        if damage is not None:
            dealt = random_levels(judged.level_shares, model.device)
            systems["random"] = evaluate_gates(model, gates, text, price, dealt)
            fixed = static_levels(gates, damage, judged.saved_share())
            systems["static_width"] = evaluate_gates(model, gates, text, price, fixed)
        for system, result in systems.items():
            records += as_records(result, {**condition, "system": system, "budget": saved, "log_lambda": price})
    return records


def as_records(judged: Judged, condition: dict) -> list[dict[str, Any]]:
    """One record a metric; prints a line."""
    metrics = judged.summary()
    del metrics["stock_ppl"]
    condition = {**condition, "saved_bytes": metrics.pop("saved_bytes")["value"]}
    print(
        f"{condition['text']:<12} {condition['system']:<13} saved {condition['saved_bytes']:6.1%}   "
        f"KL {metrics['kl']['value']:.4f} ({metrics['kl']['low']:.4f} to {metrics['kl']['high']:.4f})   "
        f"top-1 {metrics['top1_agreement']['value']:.1%}   perplexity {metrics['ppl_ratio']['value']:.4f} of stock's"
    )
    return [{**condition, "metric": name, "unit": UNITS[name], **values} for name, values in metrics.items()]
