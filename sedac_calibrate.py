"""Step 8: thresholds for a target exit rate, checked on text that the calibration did not see.

    python sedac_calibrate.py --model default --probe-path sedac_data/sedac_probe_layer21.pth --target-exit-rate 0.3
    python sedac_calibrate.py --probe-dir sedac_data --exit-rates 0.2,0.6,0.9 --gamma 0.5
    python sedac_calibrate.py --probe-dir sedac_data --exit-rates 0.01,0.03,0.05 --dataset my.jsonl --quality

The first form calibrates one probe as the only checkpoint, the others all probes as one cascade, whose exit rates are
cumulative. The text is --dataset, or else what step 1 collected and step 2 held out, or else pydoc; documents that the
probes were trained on are left out. Half of its documents set the thresholds, the other half check them. Thresholds go
to manifest.json with how they were made; the last line is one JSON object.

    python sedac_calibrate.py --probe-dir my_gates --max-damage 0.02 --confidence 0.95
    python sedac_calibrate.py --probe-dir my_gates --saved 0.25

For gates (an artefact of train_multilayer_probes.py --policy gates) there is one number to set, the price λ. The first
form takes the highest price at which the expected loss of a document stays under the bound with this confidence (Learn
then Test, documents that training held out); --min-agreement and --max-ppl-increase bound other losses. Its certificate
goes to manifest.json. It holds for new documents of the same kinds in the same mixture, read as they stand
(teacher-forced): not for another text, nor for what the model writes when it goes on from its own tokens. The second
form meets a share of saved MLP bytes and certifies nothing.

    python sedac_calibrate.py --server http://127.0.0.1:8000 --exit-rates 0.1,0.3,0.5
    python sedac_calibrate.py --server http://127.0.0.1:8000 --sedac off

A cascade is certified the same way: of thresholds for rising shares of --exit-rates, the last ones under which the bounds
hold. Adaptive thresholds of a server then never exceed them.

    python sedac_calibrate.py --probe-dir sedac_data --exit-rates 0.02,0.06,0.1 --max-damage 0.02

With --server nothing is calibrated or written: settings of a server started with --admin change while it runs, without
these options it tells what is in force. The API key is --api-key or VLLM_API_KEY.
"""

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sedac_core import _rust, cli, collection, control, serving
from sedac_core.artifacts import Manifest, held_out, hidden_path, load_collected, load_probe
from sedac_core.bench import provenance
from sedac_core.calibration import thresholds_for_rates
from sedac_core.collection import Sample
from sedac_core.gates import Gates, shape_of, trained_prices
from sedac_core.policy_gates import PRESET_SHARES
from sedac_core.probe import LREProbe, risks_of
from sedac_core.quality import (
    Judged,
    Text,
    bootstrapped,
    evaluate_cascade,
    evaluate_gates,
    prices_for_saved,
    unseen_documents,
)
from sedac_core.settings import DEFAULTS, check_lengths

PRICES = 25  # tried for gates
CAP = 10  # times the bound: a document worse than this counts as this, for a certificate bounds no unbounded loss


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--model", help="Hub name, local folder or 'default' (default: the manifest's model)")
    option("--probe-path", type=Path, help="one probe, calibrated as the only checkpoint; needs --target-exit-rate")
    option("--target-exit-rate", type=share, help="share of tokens that exit at that probe, such as 0.3")
    option("--probe-dir", type=Path, default=Path("sedac_data"), help="folder of all probes (default: %(default)s)")
    usual = DEFAULTS["SEDAC_EXIT_RATES"]
    option("--exit-rates", type=shares, help=f"cumulative (default: {usual})")
    option("--gamma", type=float, help="γ, confidence kept between checkpoints (default: the manifest's)")
    option("--weights", type=cli.float_list, help="weight of each checkpoint (default: the manifest's, else 1)")
    option("--level", type=float, help="exit level (default: the manifest's)")
    option("--dataset", help="Hub name, .txt, .json or .jsonl file, or pydoc (default: the collected held-out tokens)")
    option("--split", default="train", help="split of a Hub dataset (default: %(default)s)")
    option("--samples", type=cli.positive, default=64, help="pieces of --dataset to run (default: %(default)s)")
    option("--max-length", type=cli.positive, default=512, help="tokens a piece has at most (default: %(default)s)")
    option("--batch-size", type=cli.positive, default=8, help="pieces run at once (default: %(default)s)")
    option("--quality", action="store_true", help="also measure what the exits cost: perplexity, KL, top-1 agreement")
    option("--seed", type=int, default=0, help="of the choice of documents and their halves (default: %(default)s)")
    option("--device", help="such as cuda or cpu (default: cuda where there is one)")
    option("--dtype", choices=collection.DTYPES, default="auto", help="default: auto, the checkpoint's own")
    option("--load-in-4bit", action="store_true", help="load the model in 4 bits (bitsandbytes, NVIDIA GPU)")
    gates = parser.add_argument_group("for gates, bounds for cascades as well").add_argument
    gates("--max-damage", type=float, help="bound on a document's mean KL to the full model, in nats, such as 0.02")
    gates("--min-agreement", type=float, help="bound on a document's share of top-1 choices kept, such as 0.97")
    gates("--max-ppl-increase", type=float, help="bound on a document's perplexity over stock's, 0.01 for 1 %% more")
    gates("--confidence", type=float, default=0.95, help="with which the bounds hold (default: %(default)s)")
    gates("--saved", type=float, help="share of MLP bytes to save, without a certificate, such as 0.25")
    live = parser.add_argument_group("of a running server").add_argument
    live("--server", metavar="URL", help="change settings of this server; --exit-rates makes its thresholds adaptive")
    live("--api-key", default=os.environ.get("VLLM_API_KEY"), help="the server's (default: VLLM_API_KEY)")
    live("--thresholds", type=cli.float_list, help="fixed thresholds, one for each checkpoint")
    live("--sedac-lambda", type=float, metavar="LOG_LAMBDA", help="gates: log λ")
    live("--adaptive", choices=("on", "off"), help="off keeps the thresholds where they are")
    live("--beyond-certificate", action="store_true", help="let --thresholds or --sedac-lambda give the certificate up")
    live("--sedac", choices=("on", "off"), help="off runs every MLP whole")
    args = parser.parse_args()
    args.changes = changes(args)
    if args.changes and not args.server:
        parser.error(f"--{next(iter(args.changes)).replace('_', '-')} is for a running server: give --server")
    if args.exit_rates is None:
        args.exit_rates = shares(usual)
    elif args.server:
        args.changes["exit_rates"] = list(args.exit_rates)
    for name in ("max_damage", "min_agreement", "max_ppl_increase", "confidence", "saved"):
        value = getattr(args, name)
        if value is not None and not 0 < value < 1:
            parser.error(f"--{name.replace('_', '-')} lies between 0 and 1")
    args.bounded = any(bound is not None for bound in (args.max_damage, args.min_agreement, args.max_ppl_increase))
    if args.bounded and args.saved is not None:
        parser.error("--saved meets a share of bytes, --max-damage and the like bound the loss: give one or other")
    if (args.probe_path is None) != (args.target_exit_rate is None):
        parser.error("--probe-path and --target-exit-rate go together")
    return args


def share(text: str) -> float:
    return shares(text)[0] if "," not in text else shares("nan")[0]


def shares(text: str) -> tuple[float, ...]:
    rates = cli.float_list(text)
    if any(not 0 <= rate <= 1 for rate in rates) or list(rates) != sorted(rates):
        raise argparse.ArgumentTypeError(f"exit rates lie from 0 to 1 and do not fall, found {text}")
    return rates


def changes(args: argparse.Namespace) -> dict[str, Any]:
    """What an admin call would be asked to change, target rates apart."""
    given = {
        "thresholds": args.thresholds and ["inf" if math.isinf(value) else value for value in args.thresholds],
        "log_lambda": args.sedac_lambda,
        "adaptive": args.adaptive and args.adaptive == "on",
        "enabled": args.sedac and args.sedac == "on",
        "beyond_certificate": args.beyond_certificate or None,
    }
    return {name: value for name, value in given.items() if value is not None}


def main() -> None:
    args = parse_args()
    if args.server:
        steer(args)
        return
    folder, layers, rates = what_to_calibrate(args)
    manifest = Manifest.load(folder)
    if manifest.gates or args.saved is not None:
        calibrate_gates(args, folder, manifest)
        return
    if not manifest.training:
        raise cli.SedacError(f"{folder} has no trained probes: run train_multilayer_probes.py first")
    layers = layers or manifest.checkpoints
    one = args.probe_path is not None
    gamma = 0.0 if one else manifest.gamma if args.gamma is None else args.gamma
    level = manifest.level if args.level is None else args.level
    weights = (1.0,) if one else args.weights or manifest.weights or (1.0,) * len(layers)
    check_lengths(layers, exit_rates=rates, weights=weights)
    probes = {layer: load_probe(folder, layer, manifest.fingerprint.hidden_size, manifest.rank) for layer in layers}

    model, samples = None, []
    if args.bounded and one:
        raise cli.SedacError("a bound is certified for a whole cascade: give --probe-dir in place of --probe-path")
    if args.dataset or args.quality or args.bounded or not hidden_path(folder, layers[0]).is_file():
        dataset = args.dataset or "pydoc"
        model, samples = model_and_text(args, manifest, dataset)
        batches = collection.make_batches(samples, args.batch_size)
        parts = tqdm(collection.streamed_risks(model, probes, batches), "calibrating", len(batches), unit="batch")
        risks, documents = (torch.cat(column, dim=-1) for column in zip(*parts, strict=True))
    else:
        dataset = "held-out tokens of " + manifest.collection["dataset"]
        risks, documents = collected_risks(folder, manifest, probes)

    check = held_out(documents, args.seed, 0.5)
    if args.bounded:
        rule = {"gamma": gamma, "weights": weights, "level": level}
        text = Text.of(model, of_documents(samples, documents[check]), args.batch_size)
        certify_cascade(args, folder, manifest, model, text, probes, risks[:, ~check], rates, rule, dataset)
        return
    try:
        thresholds = thresholds_for_rates(risks[:, ~check], rates, gamma, weights, level)
        exits, _ = _rust.evaluate(risks[:, check].numpy(), thresholds, list(weights), gamma, level)
    except ValueError as error:  # the settings themselves are out of range
        raise cli.SedacError(f"these settings cannot be calibrated: {error}") from None
    exits, checked = torch.from_numpy(exits), documents[check]

    print(f"{dataset}: {int((~check).sum())} tokens to calibrate, {len(checked)} to check the thresholds on")
    record = {"dataset": dataset, "seed": args.seed, "documents": len(documents.unique()), "tokens": risks.shape[1]}
    achieved = []
    for i, (layer, threshold, rate) in enumerate(zip(layers, thresholds, rates, strict=True)):
        low, high = interval(exits <= i, checked)
        achieved.append(float((exits <= i).float().mean()))
        print(f"Layer {layer}: thr={threshold:.4f}, target exit_rate={rate:.1%}, on the other half {achieved[i]:.1%} "
              f"(95 % interval over its {len(checked.unique())} documents: {low:.1%} to {high:.1%})")  # fmt: skip
        record[str(layer)] = {"target": rate, "achieved": achieved[i], "low": low, "high": high}
    if args.quality:
        judged = of_documents(samples, checked)
        rule = (list(probes.values()), layers, thresholds, gamma, weights, level, manifest.keep_last)
        record["quality"] = quality(model, collection.make_batches(judged, args.batch_size), rule)
        print(", ".join(f"{name} {value:.4g}" for name, value in record["quality"].items()))

    if not one:
        manifest.thresholds, manifest.gamma, manifest.weights, manifest.level = {}, gamma, weights, level
    manifest.thresholds |= dict(zip(layers, thresholds, strict=True))
    manifest.calibration = {**record, "cascade": not one, "provenance": provenance()}
    manifest.save(folder)
    results = {"checkpoints": layers, "thresholds": thresholds, "target_exit_rates": rates, "exit_rates": achieved}
    print(json.dumps({"model": manifest.model, **results, **{k: v for k, v in record.items() if k == "quality"}}))


def steer(args: argparse.Namespace) -> None:
    """Change a running server's settings, or tell them."""
    url = args.server.rstrip("/")
    if not args.changes:
        print(serving.get(url, control.PATH, api_key=args.api_key).strip())
        return
    told = serving.post(url, control.PATH, args.changes, api_key=args.api_key)
    for name, value in told["now"].items():
        if value != told["before"].get(name):
            print(f"{name}: was {told['before'].get(name)}, is {value}")
    print(json.dumps(told))


def what_to_calibrate(args: argparse.Namespace) -> tuple[Path, tuple[int, ...] | None, tuple[float, ...]]:
    """The artefact's folder, the checkpoints (None: all of the manifest's), their target rates."""
    if args.probe_path is None:
        return args.probe_dir, None, args.exit_rates
    name = re.fullmatch(r"sedac_probe_layer(\d+)\.pth", args.probe_path.name)
    if not name:
        raise cli.SedacError(f"--probe-path must name a sedac_probe_layer<number>.pth, found {args.probe_path}")
    return args.probe_path.parent, (int(name[1]),), (args.target_exit_rate,)


def model_and_text(args: argparse.Namespace, manifest: Manifest, dataset: str) -> tuple[torch.nn.Module, list[Sample]]:
    """The artefact's model, and samples of documents that its probes were not trained on."""
    documents = collection.read_documents(dataset, args.split)
    model, tokenizer = collection.load_model(args.model or manifest.model, args.dtype, args.device, args.load_in_4bit)
    manifest.check_model(model.config)
    same = (dataset, args.split) == (manifest.collection.get("dataset"), manifest.collection.get("split"))
    trained = [int(index) for index in manifest.training["trained_documents"].split(",")] if same else []
    return model, collection.make_samples(documents, tokenizer, args.samples, args.max_length, args.seed, skip=trained)


def collected_risks(folder: Path, manifest: Manifest, probes: dict[int, LREProbe]) -> tuple[Tensor, Tensor]:
    """Risks `[checkpoints, tokens]` and documents `[tokens]` of the tokens that training held out."""
    risks = []
    for layer, probe in probes.items():
        data = load_collected(folder, layer)
        test = held_out(data.documents, manifest.training["seed"], manifest.training["held_out_share"])
        risks.append(risks_of(probe, data.hidden, test))
    return torch.stack(risks), data.documents[test]


def of_documents(samples: Sequence[Sample], documents: Tensor) -> list[Sample]:
    wanted = set(documents.tolist())
    return [sample for sample in samples if sample.document in wanted]


def interval(exited: Tensor, documents: Tensor) -> tuple[float, float]:
    """95 % interval of an exit rate by resampling whole documents (tokens of one document depend on each other)."""
    _, index = documents.unique(return_inverse=True)
    count = int(index.max()) + 1
    sizes = torch.bincount(index, minlength=count).double()
    exits = torch.bincount(index, weights=exited.double(), minlength=count)
    rate = bootstrapped(lambda rows: {"rate": exits[rows].sum(1) / sizes[rows].sum(1)}, count)["rate"]
    return rate["low"], rate["high"]


def quality(model: torch.nn.Module, batches: Sequence[Sequence[Sample]], rule: tuple) -> dict[str, float]:
    """What the exits cost on the check half: perplexity without and with them, KL and top-1 agreement."""
    sums = torch.zeros(4, dtype=torch.float64)  # stock's and SEDAC's loss, KL, agreement
    tokens = exited = 0
    head = model.get_output_embeddings()
    with torch.inference_mode():
        for batch in tqdm(batches, "quality", unit="batch"):
            ids, mask = collection.padded(batch, model.device)
            judged = mask[:, 1:]  # positions whose next token is known
            run = {"input_ids": ids, "attention_mask": mask.long(), "use_cache": False}
            stock = model.model(**run).last_hidden_state[:, :-1][judged]  # [tokens, hidden]
            with collection.cascade_hooks(model, *rule) as decided:
                sedac = model.model(**run).last_hidden_state[:, :-1][judged]
                exited += int((decided.exit_checkpoint[:, :-1][judged] < len(rule[1])).sum())
            tokens += len(stock)
            for a, b, target in zip(stock.split(256), sedac.split(256), ids[:, 1:][judged].split(256), strict=True):
                p, q = head(a).float().log_softmax(-1), head(b).float().log_softmax(-1)  # [part, vocab]
                losses = [-x.gather(1, target[:, None]).sum() for x in (p, q)]
                kl, same = (p.exp() * (p - q)).sum(), (p.argmax(-1) == q.argmax(-1)).sum()
                sums += torch.stack([*losses, kl, same]).double().cpu()
    stock_loss, sedac_loss, kl, agreement = (sums / tokens).tolist()
    perplexity = torch.tensor([stock_loss, sedac_loss]).exp().tolist()
    return {"ppl_stock": perplexity[0], "ppl_sedac": perplexity[1], "kl": kl, "top1_agreement": agreement,
            "exit_rate": exited / tokens, "tokens": tokens}  # fmt: skip


def certify_cascade(
    args: argparse.Namespace,
    folder: Path,
    manifest: Manifest,
    model: torch.nn.Module,
    text: Text,
    probes: dict[int, LREProbe],
    risks: Tensor,
    rates: Sequence[float],
    rule: dict[str, Any],
    dataset: str,
) -> None:
    """Choose thresholds for a bound on the loss, of those that other documents' risks set, and note them in the manifest."""
    shares = (np.arange(1, PRICES + 1) / PRICES).tolist()  # of the exit rates; the most careful first
    try:
        settings = [thresholds_for_rates(risks, [rate * share for rate in rates], **rule) for share in shares]
    except ValueError as error:
        raise cli.SedacError(f"these settings cannot be calibrated: {error}") from None

    def judge(thresholds: list[float]) -> Judged:
        on_device = {layer: probe.to(model.device) for layer, probe in probes.items()}
        return evaluate_cascade(model, text, on_device, thresholds, manifest.keep_last, **rule)

    thresholds, found = certified(settings, judge, args, "thresholds")
    record = {"dataset": dataset, "seed": args.seed, "documents": len(text.documents.unique()), "cascade": True}
    manifest.thresholds = dict(zip(probes, thresholds, strict=True))
    manifest.gamma, manifest.weights, manifest.level = rule["gamma"], tuple(rule["weights"]), rule["level"]
    manifest.calibration = {**record, **found, "provenance": provenance()}
    manifest.save(folder)
    print(f"thresholds {', '.join(f'{value:.4g}' for value in thresholds)} save "
          f"{found['saved_bytes']['value']:.1%} of MLP bytes on {record['documents']} documents")  # fmt: skip
    tell_bounds(found)
    print(
        json.dumps({"model": manifest.model, "checkpoints": list(probes), "thresholds": thresholds, **record, **found})
    )


def tell_bounds(found: dict[str, Any]) -> None:
    for bound in found.get("bounds", []):
        print("certified: {loss} is under {bound:g} in expectation, with confidence {confidence:g} "
              "(mean {mean_loss:.4f}, p = {p_value:.2g})".format(**bound))  # fmt: skip


# ---------------------------------------------------------------- gates


def calibrate_gates(args: argparse.Namespace, folder: Path, manifest: Manifest) -> None:
    """Choose the price λ for a bound on the loss, or for a share of saved bytes, and note it in the manifest."""
    shape_of(manifest)  # refuses an artefact that has no gates
    if not args.bounded and args.saved is None:
        raise cli.SedacError(
            "gates are calibrated by --max-damage, --min-agreement, --max-ppl-increase or --saved: give one"
        )
    model, tokenizer = collection.load_model(args.model or manifest.model, args.dtype, args.device, args.load_in_4bit)
    manifest.check_model(model.config)
    gates = Gates.load(folder, manifest, model.device)
    datasets, samples = held_out_samples(args, manifest, tokenizer)
    text = Text.of(model, samples, args.batch_size)
    guesses = list(trained_prices(manifest).values())
    record = {"datasets": datasets, "documents": len(text.documents.unique()), "max_length": args.max_length}
    record |= {"seed": args.seed, "provenance": provenance()}

    if args.saved is not None:
        (price,), _ = prices_for_saved(model, gates, text.batches, [args.saved], guesses)
        found = evaluate_gates(model, gates, text, price).summary()
        record |= {"target_saved_bytes": args.saved, "log_lambda": price, "certified": False, **found}
    else:
        prices = np.linspace(min(guesses) - 2, max(guesses) + 1, PRICES).tolist()  # the most careful first
        price, found = certified(prices, lambda price: evaluate_gates(model, gates, text, price), args, "price")
        record |= {"log_lambda": price, **found}
    manifest.calibration = record
    manifest.gates["log_lambda"] = record["log_lambda"]
    manifest.gates["presets"] = presets = presets_of(model, gates, text, guesses)
    manifest.save(folder)
    print(f"log λ {record['log_lambda']:.3f} saves {record['saved_bytes']['value']:.1%} of MLP bytes on {record['documents']} "
          f"documents: KL {record['kl']['value']:.4f}, top-1 {record['top1_agreement']['value']:.1%}")  # fmt: skip
    tell_bounds(record)
    for name, preset in presets.items():
        print(f"preset {name}: log λ {preset['log_lambda']:.3f} saves {preset['saved_bytes']:.1%}")
    print(json.dumps({"model": manifest.model, **{k: v for k, v in record.items() if k != "provenance"}}))


def held_out_samples(args: argparse.Namespace, manifest: Manifest, tokenizer) -> tuple[list[str], list[Sample]]:
    """The beginnings of up to --samples documents that training did not see, mixed evenly over the datasets' documents."""
    datasets = [args.dataset] if args.dataset else manifest.training["datasets"]
    pool = [text for name in datasets for text in unseen_documents(name, [manifest.training], args.split).values()]
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(args.seed))[: args.samples].tolist()
    ids = [tokenizer(pool[i], verbose=False)["input_ids"][: args.max_length] for i in order]
    return datasets, [Sample(number, tuple(tokens)) for number, tokens in enumerate(ids)]


def presets_of(model: torch.nn.Module, gates: Gates, text: Text, guesses: list[float]) -> dict[str, dict[str, float]]:
    """What a request may choose by name: the log λ that comes nearest to the preset's share of saved bytes, and its own."""
    prices, saved = prices_for_saved(model, gates, text.batches, [*PRESET_SHARES.values()], guesses)
    return {
        name: {"log_lambda": price, "saved_bytes": own}
        for (name, share), price, own in zip(PRESET_SHARES.items(), prices, saved, strict=True)
        if abs(own - share) < 0.05  # a cascade saves no more than its window has
    }


def certified(settings: Sequence[Any], judge: Callable[[Any], Judged], args, what: str) -> tuple[Any, dict[str, Any]]:
    """The last of these settings, the most careful first, whose bounds are all certified, and its record; they are tried
    until one fails."""
    bounds = {}
    if args.max_damage is not None:
        bounds["kl"] = (args.max_damage, CAP * args.max_damage)
    if args.min_agreement is not None:
        bounds["disagreement"] = (1 - args.min_agreement, 1.0)
    if args.max_ppl_increase is not None:
        rise = math.log1p(args.max_ppl_increase)
        bounds["ppl_increase"] = (rise, CAP * rise)
    best, losses = None, {name: [] for name in bounds}
    for setting in tqdm(settings, what, file=sys.stderr):
        judged = judge(setting)
        p_values = {}
        for name, (bound, cap) in bounds.items():
            loss = (judged.means()[name] / cap).clamp(0, 1).numpy()  # [documents]
            losses[name].append(float(loss.mean()))
            tests = _rust.certify(np.array([losses[name]]), len(loss), bound / cap, 1 - args.confidence)
            p_values[name] = (bool(tests[0][0, -1]), float(tests[1][0, -1]))
        if not all(certified for certified, _ in p_values.values()):
            break
        if judged.saved_share() > 0:
            best = (setting, judged, p_values, {name: values[-1] for name, values in losses.items()})
    if best is None:
        found = ", ".join(f"{name} {values[-1] * bounds[name][1]:.4g}" for name, values in losses.items())
        raise cli.SedacError(
            f"no {what} with savings can be certified on {len(judged.tokens)} documents (mean loss at the first "
            f"that fails: {found}): give more --samples or text, a looser bound or less --confidence"
        )
    setting, judged, p_values, means = best
    words = {
        "kl": f"a document's mean KL in nats, at most {CAP * (args.max_damage or 0):g}",
        "disagreement": "a document's share of other top-1 choices",
        "ppl_increase": "the logarithm of a document's perplexity over stock's where it rose, else 0, "
        f"at most {CAP * math.log1p(args.max_ppl_increase or 0):.3g}",
    }
    return setting, {
        "certified": True,
        "bounds": [
            {
                "loss": words[name],
                "bound": bound,
                "confidence": args.confidence,
                "mean_loss": means[name] * cap,
                "p_value": p_values[name][1],
            }
            for name, (bound, cap) in bounds.items()
        ],
        **judged.summary(),
    }


if __name__ == "__main__":
    cli.run(main)
