"""What the target of a plain cascade's probes is worth: who exits, at the same exit rates.

    python -m sedac_core.bench target --probe-dir my_entropy my_damage --out docs/results/target_default.json

Each folder holds probes of one model and of the same checkpoints, trained on entropy or on damage (step 2's --target).
Teacher-forced, on documents that none of them was trained on: at each exit rate, reached in even steps over the
checkpoints, the tokens that each kind of probe calls safe exit, and as many drawn at random. KL to the full model, top-1
agreement and perplexity over stock's. Thresholds are set on the risks of the judged text itself, so that rates are equal.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from . import collection
from .artifacts import Manifest, load_probe
from .bench import results_file
from .bench_quality import as_records, label
from .calibration import thresholds_for_rates
from .cli import SedacError, float_list, positive
from .quality import Chance, Text, evaluate_cascade, whole_documents

SYSTEMS = {"entropy": "entropy_plain", "damage": "sedac_plain"}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--probe-dir", type=Path, nargs="+", required=True, help="folders of steps 1 and 2, one a target")
    option("--out", type=Path, required=True, help="results file to write")
    option("--model", help="Hub name, local folder or 'default' (default: the manifest's)")
    option("--dataset", help="text to judge by (default: the documents of step 1's that no probe was trained on)")
    option(
        "--exit-rates", type=float_list, default=(0.05, 0.1, 0.3), help="by the last checkpoint (default: 0.05,0.1,0.3)"
    )
    option("--samples", type=positive, default=64, help="rows of text at most (default: %(default)s)")
    option("--max-length", type=positive, default=256, help="tokens of a row (default: %(default)s)")
    option("--batch-size", type=positive, default=8, help="rows run at once (default: %(default)s)")
    option("--device", help="such as cuda or cpu (default: cuda where there is one)")
    option("--dtype", choices=collection.DTYPES, default="auto", help="default: auto, the checkpoint's own")
    args = parser.parse_args()
    if any(not 0 < rate <= 1 for rate in args.exit_rates):
        parser.error("--exit-rates are shares above 0, at most 1")
    return args


def main() -> None:
    args = parse_args()
    manifests = [Manifest.load(folder) for folder in args.probe_dir]
    first = manifests[0]
    for folder, manifest in zip(args.probe_dir, manifests, strict=True):
        if manifest.gates or not manifest.training:
            raise SedacError(f"{folder} holds no plain cascade's probes: train them (train_multilayer_probes.py)")
        if (manifest.checkpoints, manifest.keep_last) != (first.checkpoints, first.keep_last):
            raise SedacError(
                f"{folder} has other checkpoints or --keep-last than {args.probe_dir[0]}: train them alike"
            )
    if len({manifest.target for manifest in manifests}) < len(manifests):
        raise SedacError("two of these folders have the same target: give one of each")
    model, tokenizer = collection.load_model(args.model or first.model, args.dtype, args.device)
    systems: dict[str, dict[int, nn.Module]] = {"random": {layer: Chance() for layer in first.checkpoints}}
    for folder, manifest in zip(args.probe_dir, manifests, strict=True):
        manifest.check_model(model.config)
        size = model.config.hidden_size
        systems[SYSTEMS[manifest.target]] = {layer: load_probe(folder, layer, size) for layer in manifest.checkpoints}

    dataset = args.dataset or first.collection["dataset"]
    documents = collection.read_documents(dataset)
    trained = {
        int(index)
        for manifest in manifests
        if manifest.collection["dataset"] == dataset
        for index in manifest.training["trained_documents"].split(",")
    }
    unseen = [text for index, text in enumerate(documents) if index not in trained]
    samples = whole_documents(unseen, tokenizer, args.max_length, args.samples)
    text = Text.of(model, samples, args.batch_size)
    condition = {"model": Path(args.model or first.model).name, "weights": "real", "text": label(dataset)}
    condition |= {"checkpoints": list(first.checkpoints), "keep_last": first.keep_last}
    records = judge(model, text, samples, systems, args, condition)
    results_file(args.out, records, training=[manifest.training["provenance"] for manifest in manifests])
    print(f"wrote {args.out}")


def judge(
    model, text: Text, samples, systems: dict[str, dict[int, nn.Module]], args, condition
) -> list[dict[str, Any]]:
    records = []
    steps = torch.arange(1, len(condition["checkpoints"]) + 1) / len(condition["checkpoints"])
    for system, probes in tqdm(systems.items(), "systems", file=sys.stderr):
        torch.manual_seed(0)
        batches = collection.make_batches(samples, args.batch_size)
        risks = torch.cat([risk for risk, _ in collection.streamed_risks(model, probes, batches)], 1)
        for rate in args.exit_rates:
            thresholds = thresholds_for_rates(risks, (rate * steps).tolist())
            judged = evaluate_cascade(model, text, probes, thresholds, condition["keep_last"])
            records += as_records(judged, {**condition, "system": system, "exit_rate": rate})
    return records
