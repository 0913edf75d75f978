"""Step 3: simulate the cascade on the held-out tokens of steps 1 and 2; no vLLM, no GPU.

    python test_v6_local.py
    python test_v6_local.py --thresholds 0.8,1.3,1.7 --gamma 0.5 --presets

Prints who exits where, how certain those tokens really were, and what that would save under a cost model that it
states. V6.0 decides at each checkpoint by itself (γ = 0); V6.1 accumulates confidence from checkpoint to checkpoint.
Where step 1 collected damage it is shown beside entropy. The last line is one JSON object.

    python test_v6_local.py --data-dir my_gates --against sedac_data

For gates, and cascades with adapters, the model itself runs on documents that training held out: how wide its MLPs run,
layer by layer, and what each trained budget saves and costs; --against names a plain cascade, judged at the same bytes.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sedac_core import _rust, cli, collection
from sedac_core.artifacts import Manifest, held_out, load_collected, load_probe, replacing
from sedac_core.calibration import thresholds_for_rates
from sedac_core.collection import Sample
from sedac_core.gates import Gates
from sedac_core.probe import risks_of
from sedac_core.quality import Judged, Text, evaluate_cascade, evaluate_gates, unseen_documents
from sedac_core.settings import DEFAULTS, PRESETS, check_lengths


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--data-dir", type=Path, default=Path("sedac_data"), help="folder of steps 1 and 2 (default: %(default)s)")
    option("--thresholds", type=cli.float_list, help="default: the manifest's calibrated ones, else the README's")
    option("--presets", action="store_true", help=f"also compare the presets {', '.join(PRESETS)}")
    option("--gamma", type=float, help="γ, confidence kept between checkpoints (default: the manifest's; V6.1: 0.5)")
    option("--weights", type=cli.float_list, help="weight of each checkpoint (default: the manifest's, else 1)")
    option("--level", type=float, help="exit level (default: the manifest's, 0.5)")
    option("--keep-last", type=int, help="last layers that run whole (default: the manifest's, 2)")
    option("--curves", type=Path, help="also write the arrays behind the report's plots to this JSON file")
    gates = parser.add_argument_group("only for gates, and for cascades with adapters").add_argument
    gates("--model", help="Hub name, local folder or 'default' (default: the manifest's)")
    gates("--against", type=Path, help="folder of a plain cascade's probes, to judge at the same saved bytes")
    gates("--samples", type=cli.positive, default=32, help="pieces of text (default: %(default)s)")
    gates("--max-length", type=cli.positive, default=128, help="tokens a piece has at most (default: %(default)s)")
    gates("--batch-size", type=cli.positive, default=8, help="pieces run at once (default: %(default)s)")
    gates("--device", help="such as cuda or cpu (default: cuda where there is one)")
    gates("--dtype", choices=collection.DTYPES, default="auto", help="default: auto, the checkpoint's own")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    manifest = Manifest.load(args.data_dir)
    if manifest.gates:
        judge_gates(args, manifest)
        return
    if args.against:
        raise cli.SedacError(
            f"--against compares gates, and {args.data_dir} holds a plain cascade: give gates' --data-dir"
        )
    if not manifest.training:
        raise cli.SedacError(f"{args.data_dir} has no trained probes: run train_multilayer_probes.py first")
    layers = manifest.checkpoints
    thresholds = choose_thresholds(args, manifest)
    weights = args.weights or manifest.weights or (1.0,) * len(layers)
    gamma = manifest.gamma if args.gamma is None else args.gamma
    level = manifest.level if args.level is None else args.level
    keep_last = manifest.keep_last if args.keep_last is None else args.keep_last
    check_lengths(layers, thresholds=thresholds, weights=weights)
    if not 0 <= gamma < float("inf") or not 0 < level < 1 or min(weights) <= 0 or keep_last < 0:
        raise cli.SedacError("γ and keep-last start at 0, weights lie above 0, and the level between 0 and 1")
    risks, entropies, costs = held_out_tokens(args.data_dir, manifest)
    cost = Cost.of(manifest, keep_last)
    print(
        f"{manifest.model}: {risks.shape[1]} held-out tokens, checkpoints {','.join(map(str, layers))}, γ={gamma:g}\n"
    )

    simulate = Simulation(risks, entropies, cost, costs)
    result = simulate(thresholds, gamma, weights, level)
    print("--- 阈值设置 --- (thresholds)")
    for i, (layer, thr) in enumerate(zip(layers, thresholds, strict=True)):
        line = f"Layer {layer}: thr={thr:.3f}, exit_rate={result.exit_rates[i]:.1%}, "
        line += f"avg_exit_entropy={result.exit_entropy[i]:.3f}"
        if costs is not None:
            line += f", avg_exit_damage={result.exit_damage[i]:.3f}, exit_agreement={result.exit_agreement[i]:.1%}"
        print(line)
    print("exit_rate is cumulative; avg_exit_entropy is the true entropy (nats) of the tokens that exit there.")
    if costs is not None:
        print("avg_exit_damage is what those exits cost (nats, each exit alone), exit_agreement how many keep their top-1 "
              f"choice; over all exits {result.mean_exit_damage:.3f} and {result.mean_exit_agreement:.1%}, over all tokens, "
              f"were they to exit at the last checkpoint, {costs[0][-1].mean():.3f} and {costs[1][-1].mean():.1%}.")  # fmt: skip
    if not result.exit_rates[-1]:
        print(f"No token exits under these thresholds: the smallest risk is {simulate.smallest_risk()}.")

    print("\n--- 理论加速估算 --- (theoretical speed-up)")
    print(cost.statement())
    print(f"Baseline cost: {cost.layers} layers/token")
    print(f"Actual cost: {result.actual_cost:.2f} layers/token")
    print(f"Theoretical speedup: {result.speedup:.2f}x")
    print(f"Compute savings: {1 - 1 / result.speedup:.1%}")
    print(f"MLP rows saved: {result.mlp_rows_saved:.1%} of {cost.layers} a token")
    print(f"Weight bytes saved: {result.weight_bytes_saved:.1%} of all that a token reads, LM head and probes counted")

    v60 = simulate(thresholds, 0.0, (1.0,) * len(layers), 0.5)
    v61_gamma = gamma or 0.5
    v61 = simulate(thresholds, v61_gamma, weights, level)
    matched = thresholds_for_rates(risks, v60.exit_rates, v61_gamma, list(weights), level)
    v61_matched = simulate(matched, v61_gamma, weights, level)
    print(f"\n--- V6.0 与 V6.1 对比 --- (V6.0 and V6.1, γ={v61_gamma:g}, level={level:g}, on the same tokens)")
    print_table(
        {"V6.0": v60, "V6.1, same thresholds": v61, "V6.1, V6.0's exit rates": v61_matched}, entropies.mean().item()
    )
    if args.presets:
        compare_presets(simulate, layers, v61_gamma, weights, level)

    if args.curves:
        write_curves(args.curves, simulate, layers, gamma, weights, level)

    summary = {"model": manifest.model, "checkpoints": layers, "tokens": risks.shape[1], "thresholds": thresholds}
    rule = {"gamma": gamma, "weights": weights, "level": level, "keep_last": keep_last}
    rules = {"v60": v60, "v61": v61, "v61_at_v60_rates": v61_matched}
    compared = {name: result.as_json() for name, result in rules.items()}
    print("\n" + json.dumps({**summary, **rule, **result.as_json(), "v61_gamma": v61_gamma, **compared}))


def choose_thresholds(args: argparse.Namespace, manifest: Manifest) -> tuple[float, ...]:
    """The user's, else the calibrated ones of the manifest, else the README's defaults with a warning."""
    if args.thresholds:
        return args.thresholds
    if manifest.thresholds:
        return tuple(manifest.thresholds.get(layer, 0.0) for layer in manifest.checkpoints)
    default = DEFAULTS["SEDAC_THRESHOLDS"]
    if manifest.target != "entropy":
        raise cli.SedacError(
            f"the default thresholds are not for {manifest.target}: run sedac_calibrate.py, or give --thresholds"
        )
    print(f"warning: no calibrated thresholds, using the defaults {default}: run sedac_calibrate.py", file=sys.stderr)
    return cli.float_list(default)


def held_out_tokens(folder: Path, manifest: Manifest) -> tuple[Tensor, Tensor, Tensor | None]:
    """Risks and true entropies `[checkpoints, tokens]` of the tokens that training never saw, and, where step 1 collected
    it, the damage and the agreement of an exit, `[2, checkpoints, tokens]`."""
    risks, entropies, costs = [], [], []
    damage = manifest.collection.get("target") == "damage"
    for layer in manifest.checkpoints:
        data = load_collected(folder, layer, damage)
        test = held_out(data.documents, manifest.training["seed"], manifest.training["held_out_share"])
        probe = load_probe(folder, layer, data.hidden.shape[1], manifest.rank)
        risks.append(risks_of(probe, data.hidden, test))
        entropies.append(data.entropy[test])
        if damage:
            costs.append(torch.stack([data.damage[test], data.agreement[test].float()]))
    return torch.stack(risks), torch.stack(entropies), torch.stack(costs, 1) if damage else None


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a token costs in weights read: attention always runs, an exited token skips the MLPs of its window."""

    layers: int
    keep_last: int
    attention: int  # weights of one layer's attention
    mlp: int  # weights of one layer's MLP
    head: int  # weights of the LM head
    probes: int  # weights of all probes
    skipped: np.ndarray  # [checkpoints], layers whose MLP a token skips that exits there

    @classmethod
    def of(cls, manifest: Manifest, keep_last: int) -> "Cost":
        shape, made = manifest.fingerprint, manifest.collection
        hidden, layers = shape.hidden_size, shape.num_hidden_layers
        heads = made["attention_heads"] + made["key_value_heads"]  # q and o of the first, k and v of the second
        skipped = [max(0, layers - keep_last - 1 - layer) for layer in manifest.checkpoints]
        return cls(
            layers=layers,
            keep_last=keep_last,
            attention=2 * hidden * heads * made["head_dim"],
            mlp=3 * hidden * shape.intermediate_size,
            head=hidden * shape.vocab_size,
            probes=len(manifest.checkpoints) * manifest.rank * hidden,
            skipped=np.array(skipped, dtype=np.float64),
        )

    @property
    def mlp_share(self) -> float:
        return self.mlp / (self.mlp + self.attention)

    def statement(self) -> str:
        return (
            f"Cost model: weights read. The MLP is {self.mlp_share:.1%} of a layer's weights; a token that exits at "
            f"checkpoint l skips the MLPs of layers l+1 to {self.layers - 1 - self.keep_last}, attention always runs."
        )


@dataclasses.dataclass(frozen=True)
class Result:
    """What one setting of the cascade does to the held-out tokens."""

    exit_rates: list[float]  # [checkpoints], cumulative
    exit_entropy: list[float]  # [checkpoints], mean true entropy of the tokens that exit there; NaN where none does
    mean_exit_entropy: float  # the same over all exits
    exit_damage: list[float]  # [checkpoints], nats; empty where no damage was collected, as the next ones
    mean_exit_damage: float | None
    exit_agreement: list[float]
    mean_exit_agreement: float | None
    mlp_rows_saved: float
    weight_bytes_saved: float
    actual_cost: float  # layers a token
    speedup: float

    def as_json(self) -> dict:
        values = dataclasses.asdict(self)
        values["theoretical_speedup"] = values.pop("speedup")
        clean = lambda value: None if value != value else value  # noqa: E731 - JSON has no NaN
        return {k: [clean(x) for x in v] if isinstance(v, list) else clean(v) for k, v in values.items()}


@dataclasses.dataclass(frozen=True)
class Simulation:
    """The cascade over fixed tokens; call it with thresholds, γ, weights and level."""

    risks: Tensor  # [checkpoints, tokens]
    entropies: Tensor  # [checkpoints, tokens]
    cost: Cost
    costs: Tensor | None = None  # [2, checkpoints, tokens]: damage in nats and agreement of an exit

    def __call__(self, thresholds, gamma: float, weights, level: float) -> Result:
        exits, _ = _rust.evaluate(self.risks.numpy(), list(thresholds), list(weights), gamma, level)
        count, tokens = self.risks.shape
        left = np.bincount(exits, minlength=count + 1)[:count] / tokens

        def of_exits(values: Tensor) -> tuple[list[float], float]:  # [checkpoints, tokens]
            own = [values[i].numpy()[exits == i] for i in range(count)]
            return [mean(part) for part in own], mean(np.concatenate(own))

        damage, agreement = map(of_exits, self.costs) if self.costs is not None else (([], None), ([], None))
        return self.priced(np.cumsum(left), *of_exits(self.entropies), *damage, *agreement)

    def priced(self, exit_rates: np.ndarray, entropy: list[float], mean_entropy: float, *costs) -> Result:
        """Put the cost model's price on exit rates `[checkpoints]`."""
        damage, mean_damage, agreement, mean_agreement = costs or ([], None, [], None)
        cost = self.cost
        skipped = float(np.diff(exit_rates, prepend=0) @ cost.skipped)  # layers a token, on average
        actual = cost.layers - cost.mlp_share * skipped
        whole = cost.layers * (cost.attention + cost.mlp) + cost.head
        return Result(
            exit_rates=[float(rate) for rate in exit_rates],
            exit_entropy=entropy,
            mean_exit_entropy=mean_entropy,
            exit_damage=damage,
            mean_exit_damage=mean_damage,
            exit_agreement=agreement,
            mean_exit_agreement=mean_agreement,
            mlp_rows_saved=skipped / cost.layers,
            weight_bytes_saved=(skipped * cost.mlp - cost.probes) / whole,
            actual_cost=actual,
            speedup=cost.layers / actual,
        )

    def smallest_risk(self) -> str:
        return ", ".join(f"{risk:.3f}" for risk in self.risks.min(1).values.tolist())


def write_curves(path: Path, simulate: Simulation, layers, gamma: float, weights, level: float) -> None:
    """Risk and entropy of each token by checkpoint, and what one threshold at all of them would do, on a grid of 40."""
    grid = np.linspace(0, float(torch.quantile(simulate.risks[:, :100_000], 0.99)), 40)
    results = [simulate([threshold] * len(layers), gamma, weights, level) for threshold in grid]
    curves = {
        "risk": dict(zip(layers, simulate.risks.tolist(), strict=True)),
        "entropy": dict(zip(layers, simulate.entropies.tolist(), strict=True)),
        "thresholds": grid.tolist(),
        "exit_rate": {layer: [result.exit_rates[i] for result in results] for i, layer in enumerate(layers)},
        "saved_rows": [result.mlp_rows_saved for result in results],
    }
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(curves))


def mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")


def print_table(results: dict[str, Result], all_entropy: float) -> None:
    for name, result in results.items():
        rates = " ".join(f"{rate:6.1%}" for rate in result.exit_rates)
        damage = f"damage {result.mean_exit_damage:.3f}   " if result.mean_exit_damage is not None else ""
        print(
            f"{name:<24} exit rates {rates}   entropy of exits {result.mean_exit_entropy:.3f}   {damage}"
            f"MLP rows saved {result.mlp_rows_saved:5.1%}   speedup {result.speedup:.2f}x"
        )
    print(f"{'all tokens':<24} entropy {all_entropy:.3f}")


def compare_presets(simulate: Simulation, layers, gamma: float, weights, level: float) -> None:
    """All presets under both rules, in one sweep each."""
    for name, thresholds in PRESETS.items():
        check_lengths(layers, **{f"preset {name}": thresholds})
    grid = np.array(list(PRESETS.values()), dtype=np.float32)  # [presets, checkpoints]
    for rule, g, w, lev in (("V6.0", 0.0, (1.0,) * len(layers), 0.5), ("V6.1", gamma, weights, level)):
        rates, _, entropy = _rust.sweep(simulate.risks.numpy(), grid, [g], [lev], list(w), simulate.entropies.numpy())
        rows = {
            f"{rule} {name}": simulate.priced(rates[i, 0, 0], [], float(entropy[i, 0, 0]))
            for i, name in enumerate(PRESETS)
        }
        print(f"\n--- presets, {rule} ---")
        print_table(rows, simulate.entropies.mean().item())


# ---------------------------------------------------------------- gates


def judge_gates(args: argparse.Namespace, manifest: Manifest) -> None:
    """Run the gates at the price of each trained budget on unseen text, and print what that saves and costs."""
    against = Manifest.load(args.against) if args.against else None
    if against and not against.calibration.get("cascade"):
        raise cli.SedacError(
            f"--against needs a plain cascade with calibrated thresholds, and {args.against} holds none"
        )
    model, tokenizer = collection.load_model(args.model or manifest.model, args.dtype, args.device)
    for artefact in filter(None, (manifest, against)):
        artefact.check_model(model.config)
    gates = Gates.load(args.data_dir, manifest, model.device)
    samples = unseen_samples(args, manifest, against, tokenizer)
    text = Text.of(model, samples, args.batch_size)
    print(f"{manifest.model}, policy {manifest.policy}: {sum(len(states) for states in text.states)} tokens of "
          f"{len(text.documents.unique())} documents that training held out\n")  # fmt: skip

    plain = plain_cascade(args.against, against, model, samples, args) if against else None
    names, rows = gates.shape.names, []
    for budget in tqdm(manifest.gates["budgets"], "budgets", file=sys.stderr):
        judged = evaluate_gates(model, gates, text, budget["log_lambda"])
        rows.append({"budget": budget["saved_bytes"], "log_lambda": budget["log_lambda"], **short(judged)})
        rows[-1]["levels"] = dict(zip(names, judged.level_shares.T.tolist(), strict=True))
        if plain:
            rows[-1]["cascade"] = short(plain(text, judged.saved_share()))

    middle = min(rows, key=lambda row: abs(row["log_lambda"] - manifest.gates["log_lambda"]))
    print(f"--- levels by layer at log λ {middle['log_lambda']:.3f} --- (share of tokens that run at each)")
    print("layer  " + " ".join(f"{name:>11}" for name in names))
    for layer, shares in enumerate(zip(*middle["levels"].values(), strict=True)):
        print(f"{layer:5}  " + " ".join(f"{share:11.1%}" for share in shares))
    print("\n--- what a budget of saved MLP bytes costs --- (adapters, gates and probes counted against)")
    for row in rows:
        print(f"budget {row['budget']:5.1%}: {sentence(row)}")
        if plain:
            print(f"  plain cascade: {sentence(row['cascade'])}")
    tokens = sum(len(states) for states in text.states)
    print("\n" + json.dumps({"model": manifest.model, "policy": manifest.policy, "tokens": tokens, "budgets": rows}))


def unseen_samples(args: argparse.Namespace, manifest: Manifest, against: Manifest | None, tokenizer) -> list[Sample]:
    """Pieces of documents on which neither the gates nor the cascade's probes were trained, of as many as there are."""
    trained = set()
    if against:
        trained = {(against.collection["dataset"], int(i)) for i in against.training["trained_documents"].split(",")}
    unseen = {dataset: unseen_documents(dataset, [manifest.training]) for dataset in manifest.training["datasets"]}
    texts = [text for dataset, found in unseen.items() for i, text in found.items() if (dataset, i) not in trained]
    if not texts:
        raise cli.SedacError("no document is left that neither training has seen: train gates with a larger --held-out")
    return collection.make_samples(texts, tokenizer, args.samples, args.max_length, manifest.training["seed"])


def plain_cascade(folder: Path, manifest: Manifest, model, samples: list[Sample], args: argparse.Namespace):
    """A function that judges a text under the cascade's probes at a share of saved bytes: its calibrated exit rates, all
    scaled alike, on the risks of the samples."""
    size, layers = model.config.hidden_size, manifest.checkpoints
    probes = {layer: load_probe(folder, layer, size, manifest.rank) for layer in layers}
    batches = collection.make_batches(samples, args.batch_size)
    risks = torch.cat([risk for risk, _ in collection.streamed_risks(model, probes, batches)], 1)
    cost = Cost.of(manifest, manifest.keep_last)
    calibrated = np.array([manifest.calibration[str(layer)]["target"] for layer in layers])

    def judged(text: Text, saved: float) -> Judged:
        rows = saved + cost.probes / (cost.layers * cost.mlp)  # what exits must save for the probes to be paid
        low, high = 0.0, 1 / max(1e-6, calibrated[calibrated > 0].min())
        for _ in range(50):
            scale = (low + high) / 2
            rates = np.minimum(scale * calibrated, 1)
            enough = np.diff(rates, prepend=0) @ cost.skipped / cost.layers >= rows
            low, high = (low, scale) if enough else (scale, high)
        thresholds = thresholds_for_rates(risks, rates.tolist(), manifest.gamma, manifest.weights, manifest.level)
        rule = {"gamma": manifest.gamma, "weights": manifest.weights, "level": manifest.level}
        return evaluate_cascade(model, text, probes, thresholds, manifest.keep_last, **rule)

    return judged


def short(judged: Judged) -> dict[str, float]:
    return {name: value["value"] for name, value in judged.summary().items() if name not in ("ppl", "stock_ppl")}


def sentence(row: dict[str, float]) -> str:
    return (
        f"saves {row['saved_bytes']:5.1%}, KL {row['kl']:.4f}, top-1 {row['top1_agreement']:.1%}, "
        f"perplexity {row['ppl_ratio']:.3f} of the full model's"
    )


if __name__ == "__main__":
    cli.run(main)
