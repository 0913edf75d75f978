"""Step 2: train one probe for each checkpoint on what step 1 collected.

    python train_multilayer_probes.py --data-dir sedac_data --layers 7,14,21 --epochs 20 --batch-size 1024 --rank 64

A probe reads the residual stream after its layer and estimates the entropy there, in nats: the risk of exiting. Whole
documents are held out; training stops when their loss has not improved for --patience epochs and keeps the best
weights. Writes sedac_probe_layer{l}.pth and records in manifest.json how good each probe is on the held-out tokens.
"""

import argparse
import contextlib
import copy
import json
import sys
from pathlib import Path

import torch
from scipy import stats
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from sedac_core import cli
from sedac_core.artifacts import Collected, Manifest, held_out, load_collected, probe_path, replacing
from sedac_core.bench import provenance
from sedac_core.probe import LREProbe, risks_of


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--data-dir", type=Path, default=Path("sedac_data"), help="step 1's --save-dir (default: %(default)s)")
    option("--layers", type=cli.layer_list, default="7,14,21", help="checkpoints to train (default: %(default)s)")
    option("--epochs", type=cli.positive, default=20, help="passes over the data at most (default: %(default)s)")
    option("--batch-size", type=cli.positive, default=1024, help="tokens a step (default: %(default)s)")
    option("--rank", type=cli.positive, default=64, help="rank of the probes (default: %(default)s)")
    option("--lr", type=float, default=1e-3, help="learning rate of AdamW, falling to 0 (default: %(default)s)")
    option("--patience", type=cli.positive, default=5, help="epochs to wait for a better one (default: %(default)s)")
    option("--held-out", type=float, default=0.1, help="share of documents to hold out (default: %(default)s)")
    option("--seed", type=int, default=0, help="of the held-out split and the training (default: %(default)s)")
    args = parser.parse_args()
    if not 0 < args.held_out < 1 or not 0 < args.lr < float("inf"):
        parser.error("--held-out lies between 0 and 1, and --lr above 0")
    return args


def main() -> None:
    args = parse_args()
    manifest = Manifest.load(args.data_dir)
    for layer in args.layers:
        if layer not in manifest.collection.get("layers", ()):
            collected = ",".join(map(str, manifest.collection.get("layers", ()))) or "none"
            raise cli.SedacError(
                f"layer {layer} was not collected in {args.data_dir}, which has {collected}: run step 1"
            )

    # Everything is trained before anything is written, so a failure leaves the old artefact whole.
    probes, metrics = {}, {}
    for layer in args.layers:
        data = load_collected(args.data_dir, layer)
        if data.hidden.shape[1] != manifest.fingerprint.hidden_size:
            raise cli.SedacError(
                f"the hidden states of layer {layer} have size {data.hidden.shape[1]}, the manifest says "
                f"{manifest.fingerprint.hidden_size}: run collect_multilayer_data.py --save-dir {args.data_dir} again"
            )
        test = held_out(data.documents, args.seed, args.held_out)
        probes[layer] = train(data, test, args, layer)
        metrics[str(layer)] = score = evaluate(probes[layer], data, test)
        print(
            f"Layer {layer}: held-out loss={score['loss']:.4f}, rank correlation={score['rank_correlation']:.3f}, "
            f"R²={score['r2']:.3f} on {score['tokens']} tokens"
        )

    with contextlib.ExitStack() as together:  # all probes are replaced, or none
        for layer, probe in probes.items():
            torch.save(probe.state_dict(), together.enter_context(replacing(probe_path(args.data_dir, layer))))
    record(manifest, args, data.documents, test, metrics)
    manifest.save(args.data_dir)
    print(json.dumps({"checkpoints": args.layers, "rank": args.rank, "held_out": metrics}))


def train(data: Collected, test: Tensor, args: argparse.Namespace, layer: int) -> LREProbe:
    """The probe with the least Huber loss on the held-out tokens: exact near the target, calm about outliers."""
    torch.manual_seed(args.seed)
    rows = (~test).nonzero().squeeze(1)
    mean, std = moments(data.hidden, rows)
    probe = LREProbe(len(mean), args.rank)
    probe.head.bias.data.fill_(float(data.entropy[rows].mean().expm1().clamp_min(1e-3).log()))  # softplus's inverse
    optimiser = torch.optim.AdamW(probe.parameters(), lr=args.lr, weight_decay=0.01)
    steps = args.epochs * -(-len(rows) // args.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, args.lr, total_steps=steps, pct_start=0.1)

    best, best_loss, waited = copy.deepcopy(probe), float("inf"), 0
    bar = tqdm(range(args.epochs), desc=f"training layer {layer}", unit="epoch", file=sys.stderr)
    for _ in bar:
        for chosen in rows[torch.randperm(len(rows))].split(args.batch_size):
            hidden = (data.hidden[chosen].float() - mean) / std  # [batch, hidden]
            loss = F.huber_loss(probe(hidden), data.entropy[chosen])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        loss = float(F.huber_loss(risks_of(fold(probe, mean, std), data.hidden, test), data.entropy[test]))
        bar.set_postfix(held_out_loss=f"{loss:.4f}")
        waited += 1
        if loss < best_loss:
            best, best_loss, waited = copy.deepcopy(probe), loss, 0
        if waited == args.patience:
            break
    bar.close()
    if best_loss == float("inf"):
        raise cli.SedacError(f"training the probe of layer {layer} diverged: try a lower --lr than {args.lr}")
    return fold(best, mean, std).requires_grad_(False)


def moments(hidden: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation `[hidden]` over some rows, read in pieces so that memory stays flat."""
    total = torch.zeros(2, hidden.shape[1], dtype=torch.float64)
    for part in rows.split(8192):
        values = hidden[part].double()
        total += torch.stack([values.sum(0), values.square().sum(0)])
    mean, square = total / len(rows)
    return mean.float(), (square - mean.square()).clamp_min(1e-12).sqrt().float()


def fold(probe: LREProbe, mean: Tensor, std: Tensor) -> LREProbe:
    """The same probe, reading raw hidden states: (x - mean) / std goes into its first Linear."""
    folded = copy.deepcopy(probe)
    with torch.no_grad():
        folded.proj.weight /= std
        folded.proj.bias -= folded.proj.weight @ mean
    return folded


def evaluate(probe: LREProbe, data: Collected, test: Tensor) -> dict[str, float | int]:
    """How well the risks tell the true entropies of the held-out tokens."""
    risk, entropy = risks_of(probe, data.hidden, test), data.entropy[test]
    unexplained = (entropy - risk).square().sum() / (entropy - entropy.mean()).square().sum().clamp_min(1e-12)
    return {
        "loss": float(F.huber_loss(risk, entropy)),
        "rank_correlation": float(torch.tensor(stats.spearmanr(risk, entropy).statistic).nan_to_num()),
        "r2": float(1 - unexplained),
        "tokens": len(risk),
    }


def record(manifest: Manifest, args: argparse.Namespace, documents: Tensor, test: Tensor, metrics: dict) -> None:
    """Note the training in the manifest; thresholds calibrated for earlier probes no longer hold."""
    if (manifest.rank, manifest.training.get("seed")) != (args.rank, args.seed):
        manifest.training = {}
    manifest.checkpoints = tuple(sorted(set(args.layers) | set(map(int, manifest.training.get("layers", {})))))
    manifest.rank, manifest.thresholds, manifest.calibration = args.rank, {}, {}
    manifest.training = {
        "seed": args.seed,
        "held_out_share": args.held_out,
        "trained_documents": ",".join(map(str, documents[~test].unique().tolist())),
        "epochs": args.epochs,
        "batch_size": args.batch_size,
        "lr": args.lr,
        "patience": args.patience,
        "layers": {**manifest.training.get("layers", {}), **metrics},
        "provenance": provenance(),
    }


if __name__ == "__main__":
    cli.run(main)
