"""Step 2: train one probe for each checkpoint on what step 1 collected.

    python train_multilayer_probes.py --data-dir sedac_data --layers 7,14,21 --epochs 20 --batch-size 1024 --rank 64

A probe reads the residual stream after its layer and estimates the risk of exiting there, in nats: the entropy, or with
--target damage what the exit costs, where step 1 collected it. Whole documents are held out; training stops when their
loss has not improved for --patience epochs and keeps the best weights. Writes sedac_probe_layer{l}.pth and records in
manifest.json how good each probe is on the held-out tokens.

    python train_multilayer_probes.py --policy gates --model default --dataset pydoc --data-dir my_gates --steps 200

trains gates instead, on the model itself and without step 1: in each layer a small probe that predicts the damage of
narrowing that MLP, token by token, and adapters that stand in for the neurons left out, distilled to keep the full
model's answers. Writes adapters.safetensors and manifest.json with a price λ for each budget of saved bytes. Started
again with the same options, an interrupted training continues from its last checkpoint; with --start-from my_gates a new
one goes on from gates that were trained before, on other text or for longer. Several GPUs share each batch:
torchrun --nproc-per-node 2 train_multilayer_probes.py --policy gates …

    python train_multilayer_probes.py --policy soft --adapter-rank 64 --layers 7,14,21 --model default --data-dir my_soft

trains a cascade with adapters the same way: gates only in the layers after the checkpoints, each for all layers from
there to the last but --keep-last, and a token that narrowed never widens again. Its MLPs run at the widths of --levels
(soft) or not at all (hard).
"""

import argparse
import contextlib
import copy
import dataclasses
import hashlib
import json
import sys
from pathlib import Path

import torch
from scipy import stats
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from sedac_core import cli, collection, distillation, gates_start, gates_training
from sedac_core.artifacts import (
    TARGETS,
    Fingerprint,
    Manifest,
    check_layers,
    held_out,
    load_collected,
    probe_path,
    replacing,
)
from sedac_core.bench import provenance
from sedac_core.gated_model import check_mlps
from sedac_core.gates import GATE_RANK, LEVELS, Gates, GateShape, in_bits, trained_prices
from sedac_core.probe import LREProbe, risks_of
from sedac_core.settings import EXIT_MODES

LEVELS_OF = {"hard": (1.0, 0.0), "soft": (1.0, 0.5, 0.25, 0.0), "gates": LEVELS}  # shares of neurons


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--data-dir", type=Path, default=Path("sedac_data"), help="step 1's --save-dir (default: %(default)s)")
    option("--layers", type=cli.layer_list, default="7,14,21", help="checkpoints to train (default: %(default)s)")
    option("--target", choices=TARGETS, help="what probes estimate (default: what step 1 collected, see its --target)")
    option("--epochs", type=cli.positive, default=20, help="passes over the data at most (default: %(default)s)")
    option("--batch-size", type=cli.positive, default=1024, help="tokens a step (default: %(default)s)")
    option("--rank", type=cli.positive, default=64, help="rank of the probes (default: %(default)s)")
    option(
        "--lr",
        type=float,
        help=f"learning rate of AdamW, falling to 0 (default: 0.001 for probes, {distillation.Recipe.lr} for adapters)",
    )
    option("--patience", type=cli.positive, default=5, help="epochs to wait for a better one (default: %(default)s)")
    option("--held-out", type=float, default=0.1, help="share of documents to hold out (default: %(default)s)")
    option("--seed", type=int, default=0, help="of the held-out split and the training (default: %(default)s)")
    option("--policy", choices=EXIT_MODES, default="hard", help="what to train (default: %(default)s)")
    gates = parser.add_argument_group("only for gates, and for cascades with adapters").add_argument
    gates("--adapter-rank", type=cli.positive, help="of the adapters (default: 128; with --policy hard: no adapters)")
    gates("--keep-last", type=int, default=2, help="cascades: last layers that run whole (default: %(default)s)")
    gates("--model", default="default", help="Hub name, local folder or 'default' (default: %(default)s)")
    gates("--dataset", nargs="+", default=["pydoc"], help="one or more: Hub names, files, pydoc (default: pydoc)")
    gates("--max-length", type=cli.positive, default=512, help="tokens of a sequence (default: %(default)s)")
    gates("--steps", type=cli.positive, default=2000, help="steps at most (default: %(default)s)")
    gates("--minutes", type=float, help="minutes of distillation at most (default: no limit)")
    rate = distillation.Recipe.gate_lr
    gates("--gate-lr", type=float, default=rate, help="learning rate of the gates; --lr is the adapters' (%(default)s)")
    gates("--gate-every", type=cli.positive, default=1, help="layers that share a gate (default: %(default)s)")
    gates(
        "--levels",
        type=cli.float_list,
        help="shares of neurons (default: 1,0.7,0.35,0; soft: 1,0.5,0.25,0; hard: 1,0), or bits a weight (16,8,6,5,4)",
    )
    gates("--budgets", type=cli.float_list, help="shares of MLP bytes to save (default: 0.06 to 0.6 as far as can be)")
    gates("--start-from", type=Path, help="folder of gates to go on from, trained on this model before")
    gates("--importance", choices=gates_start.SCORES, default="fisher", help="orders neurons (default: %(default)s)")
    gates("--checkpoint-every", type=cli.positive, default=200, help="steps (default: %(default)s)")
    gates("--gradient-checkpointing", action="store_true", help="a third more work, far less memory")
    gates("--compile", action="store_true", help="fuse element-wise steps and replay CUDA graphs: for GPUs")
    gates("--device", help="such as cuda or cpu (default: cuda where there is one)")
    gates("--dtype", choices=collection.DTYPES, default="auto", help="default: auto, the checkpoint's own")
    args = parser.parse_args()
    args.adapted = args.policy != "hard" or args.adapter_rank is not None
    if args.lr is None:
        args.lr = distillation.Recipe.lr if args.adapted else 1e-3
    if not 0 < args.held_out < 1 or not 0 < args.lr < float("inf"):
        parser.error("--held-out lies between 0 and 1, and --lr above 0")
    args.levels = args.levels or LEVELS_OF[args.policy]
    if in_bits(args.levels) and (args.policy != "gates" or args.adapter_rank):
        parser.error("--levels in bits are for --policy gates, and have no adapters: leave out --adapter-rank")
    args.adapter_rank = 0 if in_bits(args.levels) else args.adapter_rank or 128
    if args.policy == "hard" and args.levels != LEVELS_OF["hard"]:
        parser.error("--policy hard skips MLPs whole, at the levels 1,0: for others take --policy soft")
    budgets = args.budgets or distillation.BUDGETS
    if list(budgets) != sorted(set(budgets)) or not 0 < budgets[0] <= budgets[-1] < 1:
        parser.error("--budgets are shares between 0 and 1 that rise")
    if args.keep_last < 0:
        parser.error("--keep-last starts at 0")
    if not 0 < args.gate_lr < float("inf"):
        parser.error("--gate-lr lies above 0")
    if args.minutes is not None and not args.minutes > 0:
        parser.error("--minutes are above 0")
    return args


def main() -> None:
    args = parse_args()
    if args.adapted:
        train_gates(args)
    else:
        train_probes(args)


def train_probes(args: argparse.Namespace) -> None:
    manifest = Manifest.load(args.data_dir)
    for layer in args.layers:
        if layer not in manifest.collection.get("layers", ()):
            collected = ",".join(map(str, manifest.collection.get("layers", ()))) or "none"
            raise cli.SedacError(
                f"layer {layer} was not collected in {args.data_dir}, which has {collected}: run step 1"
            )

    collected = manifest.collection.get("target", "entropy")
    args.target = args.target or collected
    if args.target == "damage" != collected:
        raise cli.SedacError(
            f"{args.data_dir} holds entropies and no damage: run step 1 again with --target damage, or train on --target entropy"
        )

    # Everything is trained before anything is written, so a failure leaves the old artefact whole.
    probes, metrics = {}, {}
    for layer in args.layers:
        data = load_collected(args.data_dir, layer, args.target == "damage")
        target = data.entropy if args.target == "entropy" else data.damage
        if data.hidden.shape[1] != manifest.fingerprint.hidden_size:
            raise cli.SedacError(
                f"the hidden states of layer {layer} have size {data.hidden.shape[1]}, the manifest says "
                f"{manifest.fingerprint.hidden_size}: run collect_multilayer_data.py --save-dir {args.data_dir} again"
            )
        test = held_out(data.documents, args.seed, args.held_out)
        probes[layer] = train(data.hidden, target, test, args, layer)
        metrics[str(layer)] = score = evaluate(probes[layer], data.hidden, target, test)
        print(
            f"Layer {layer}: held-out loss={score['loss']:.4f}, rank correlation={score['rank_correlation']:.3f}, "
            f"R²={score['r2']:.3f} on {score['tokens']} tokens"
        )

    with contextlib.ExitStack() as together:  # all probes are replaced, or none
        for layer, probe in probes.items():
            torch.save(probe.state_dict(), together.enter_context(replacing(probe_path(args.data_dir, layer))))
    record(manifest, args, data.documents, test, metrics)
    manifest.save(args.data_dir)
    print(json.dumps({"checkpoints": args.layers, "target": args.target, "rank": args.rank, "held_out": metrics}))


def train(hidden: Tensor, target: Tensor, test: Tensor, args: argparse.Namespace, layer: int) -> LREProbe:
    """The probe with the least Huber loss on the held-out tokens: exact near the target, calm about outliers."""
    torch.manual_seed(args.seed)
    rows = (~test).nonzero().squeeze(1)
    mean, std = moments(hidden, rows)
    probe = LREProbe(len(mean), args.rank)
    probe.head.bias.data.fill_(float(target[rows].mean().expm1().clamp_min(1e-3).log()))  # softplus's inverse
    optimiser = torch.optim.AdamW(probe.parameters(), lr=args.lr, weight_decay=0.01)
    steps = args.epochs * -(-len(rows) // args.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, args.lr, total_steps=steps, pct_start=0.1)

    best, best_loss, waited = copy.deepcopy(probe), float("inf"), 0
    bar = tqdm(range(args.epochs), desc=f"training layer {layer}", unit="epoch", file=sys.stderr)
    for _ in bar:
        for chosen in rows[torch.randperm(len(rows))].split(args.batch_size):
            scaled = (hidden[chosen].float() - mean) / std  # [batch, hidden]
            loss = F.huber_loss(probe(scaled), target[chosen])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        loss = float(F.huber_loss(risks_of(fold(probe, mean, std), hidden, test), target[test]))
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


def evaluate(probe: LREProbe, hidden: Tensor, target: Tensor, test: Tensor) -> dict[str, float | int]:
    """How well the risks tell the true target of the held-out tokens."""
    risk, true = risks_of(probe, hidden, test), target[test]
    unexplained = (true - risk).square().sum() / (true - true.mean()).square().sum().clamp_min(1e-12)
    return {
        "loss": float(F.huber_loss(risk, true)),
        "rank_correlation": float(torch.tensor(stats.spearmanr(risk, true).statistic).nan_to_num()),
        "r2": float(1 - unexplained),
        "tokens": len(risk),
    }


def record(manifest: Manifest, args: argparse.Namespace, documents: Tensor, test: Tensor, metrics: dict) -> None:
    """Note the training in the manifest; thresholds calibrated for earlier probes no longer hold."""
    if (manifest.rank, manifest.target, manifest.training.get("seed")) != (args.rank, args.target, args.seed):
        manifest.training = {}
    manifest.target = args.target
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


# ---------------------------------------------------------------- gates


def train_gates(args: argparse.Namespace) -> None:
    if (args.data_dir / "manifest.json").exists():
        found = Manifest.load(args.data_dir)
        if found.policy != args.policy or not found.gates:
            holds = f"an artefact of policy {found.policy}" + ("" if found.gates else " without adapters")
            raise cli.SedacError(f"{args.data_dir} holds {holds}: give another --data-dir")
    texts = {dataset: collection.read_documents(dataset) for dataset in args.dataset}
    batch = max(1, args.batch_size // args.max_length)
    team = distillation.Team.join(batch)
    device = args.device or distillation.local_device()
    model, tokenizer = collection.load_model(args.model, args.dtype, device)
    check_mlps(model)
    config, shape = model.config, Fingerprint.of(model.config)
    sizes = (shape.hidden_size, shape.intermediate_size, shape.num_hidden_layers)
    cascade = () if args.policy == "gates" else (args.layers, args.keep_last)
    if cascade:
        check_layers(args.layers, shape.num_hidden_layers, args.keep_last)
    torch.manual_seed(args.seed)
    gates = Gates(GateShape(*sizes, args.levels, args.adapter_rank, args.gate_every, *cascade)).to(model.device)
    budgets = affordable(args.budgets, gates.shape)
    earlier = trained_before(args, gates, model) if args.start_from else None

    split = {name: held_out(torch.arange(len(text)), args.seed, args.held_out) for name, text in texts.items()}
    trained = [text[i] for name, text in texts.items() for i in (~split[name]).nonzero().squeeze(1).tolist()]
    rows = distillation.pack_rows(trained, tokenizer, args.max_length)
    recipe = distillation.Recipe(
        steps=args.steps,
        batch=batch,
        lr=args.lr,
        gate_lr=args.gate_lr,
        minutes=args.minutes,
        importance=args.importance,
        budgets=budgets,
        seed=args.seed,
        checkpoint_every=args.checkpoint_every,
        compile=args.compile,
    )
    if args.gradient_checkpointing:
        gates_training.checkpointed(model)
    print(f"{args.model}: {len(rows)} rows of {args.max_length} tokens, {recipe.batch} a step", file=sys.stderr)

    manifest = Manifest(args.model, shape, gates.shape.checkpoints, args.policy, "marginal damage", GATE_RANK)
    manifest.keep_last = gates.shape.keep_last
    manifest.training = {
        "datasets": args.dataset,
        "seed": args.seed,
        "held_out_share": args.held_out,
        "rows": len(rows),
        "tokens_sha256": hashlib.sha256(rows.numpy().tobytes()).hexdigest(),
        "max_length": args.max_length,
        "dtype": str(model.dtype).removeprefix("torch."),
        **dataclasses.asdict(recipe),
    }
    if earlier:
        manifest.training["start"] = earlier.training
    plan = json.dumps([dataclasses.asdict(manifest), gates.shape.as_json(), config.to_dict()], default=str)
    args.data_dir.mkdir(parents=True, exist_ok=True)
    start = trained_prices(earlier) if earlier else None
    progress = gates_training.train(model, gates, rows, recipe, args.data_dir, plan, team, start)
    team.leave()
    if team.rank:
        return  # the first process goes on alone

    prices, saved = gates_training.prices(model, gates, rows, recipe, progress)
    manifest.training |= {"steps_done": progress.step, "seconds": progress.seconds, "kl": progress.history}
    if model.device.type == "cuda":
        manifest.training["peak_memory_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 1)
        print(f"Memory of the GPU, at most: {manifest.training['peak_memory_gib']} GiB")
    manifest.training["provenance"] = provenance()
    manifest.gates = gates.shape.as_json()
    manifest.gates["budgets"] = [
        {"saved_bytes": budget, "log_lambda": price, "realised": share}
        for budget, price, share in zip(budgets, prices, saved, strict=True)
    ]
    manifest.gates["log_lambda"] = prices[min(range(len(prices)), key=lambda i: abs(budgets[i] - 0.25))]
    gates.save(args.data_dir)
    manifest.save(args.data_dir)
    (args.data_dir / gates_training.CHECKPOINT).unlink(missing_ok=True)
    for budget, price, share in zip(budgets, prices, saved, strict=True):
        print(f"Budget {budget:.1%}: log λ={price:.3f} saves {share:.1%} of MLP bytes on training text")
    print(json.dumps({"policy": args.policy, "steps": progress.step, "budgets": manifest.gates["budgets"]}))


def trained_before(args: argparse.Namespace, gates: Gates, model: torch.nn.Module) -> Manifest:
    """Load what --start-from names into `gates`; its manifest. `SedacError` where it has another shape, or held out other
    documents: what was held out must stay so."""
    manifest = Manifest.load(args.start_from)
    manifest.check_model(model.config)
    before = Gates.load(args.start_from, manifest, model.device)
    if before.shape != gates.shape:
        differ = [
            f.name
            for f in dataclasses.fields(GateShape)
            if getattr(before.shape, f.name) != getattr(gates.shape, f.name)
        ]
        raise cli.SedacError(
            f"the gates of {args.start_from} differ in {', '.join(differ)}: give the options with which they were trained"
        )
    for name, own in (("seed", args.seed), ("held_out_share", args.held_out)):
        if manifest.training[name] != own:
            raise cli.SedacError(
                f"the gates of {args.start_from} were trained with {name} {manifest.training[name]}, and now it is {own}: "
                "give the same, so that the documents held out stay so"
            )
    trained_prices(manifest)  # it says so if there are none, before the long work
    gates.load_state_dict(before.state_dict())
    return manifest


def affordable(budgets: tuple[float, ...] | None, shape: GateShape) -> tuple[float, ...]:
    """The budgets that were asked for, or the usual ones, none over what these levels and this window can save."""
    all_narrowed = torch.zeros(shape.num_layers, len(shape.levels))
    all_narrowed[:, 0] = 1
    all_narrowed[list(shape.window)] = torch.eye(len(shape.levels))[-1]
    most = shape.saved_share(all_narrowed).item()
    usual = tuple(budget for budget in distillation.BUDGETS if budget < most)
    if not usual or (budgets and budgets[-1] >= most):
        raise cli.SedacError(
            f"these layers, levels and adapters save at most {most:.1%} of MLP bytes: give lower --budgets, or earlier --layers"
        )
    return budgets or usual


if __name__ == "__main__":
    cli.run(main)
