"""What gates do to the answers, at a row of saved shares, beside other ways to save the same bytes.

    python -m sedac_core.bench quality --probe-dir my_gates --out docs/results/quality_default.json

Teacher-forced, on the documents that training held out (or all of --dataset): for each share of MLP bytes saved, the
price λ that saves it on this text, then KL to the full model, top-1 agreement and perplexity over stock's. At the same
bytes:

    gates           the same gates, each MLP whole or at the last level, none between
    random          the same levels dealt to random tokens, layer by layer
    static_width    one level a layer for all tokens
    static_drop     the same, each layer's MLP whole or at the last level
    entropy_plain   the original method: tokens of low entropy exit at a checkpoint, and their MLPs are skipped plainly.
                    The entropy is the logit lens's own, which no probe can better
    random_plain    as many tokens at random exit there
    uniform         one level for all tokens in all layers, each level in turn
    cascade_hard    and cascade_soft: the artefacts of --cascades, which have adapters of their own

Bounds are put to the test as well: half of the documents certify a price, the other half check it, 200 times.

    python -m sedac_core.bench quality --probe-dir my_gates --out quality.json --free-running 500 --problems gsm8k.jsonl

Free-running, on word problems that training held out, in the chat template after worked examples from the others, or on
programming problems (--problems configs/code_problems.jsonl), whose answers are run: greedy answers of the full model and
under gates, problem by problem. Shares are those saved on the generated tokens, with skips
from the first generated token on and, apart, from the prompt on. Rounding alone changes answers too: the full model in
batches of half the size says how many.
"""

import argparse
import functools
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import collection
from .artifacts import Manifest, unseen
from .bench import results_file
from .calibration import certificate_held
from .cli import SedacError, float_list, positive
from .free_running import Answers, Problem, answer_problems, compared, problem_prompt, read_problems
from .gated_model import check_mlps, gated
from .gates import Gates, trained_prices
from .quality import (
    Chance,
    Judged,
    LensEntropy,
    Text,
    drops_only,
    evaluate_cascade,
    evaluate_gates,
    exits_for_saved,
    find_prices,
    interpolate,
    mean_damage,
    random_levels,
    saved_on,
    static_levels,
    unseen_documents,
    whole_documents,
    whole_or_nothing,
)

SAVED = (0.06, 0.125, 0.19, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6)
ANSWERS_SAVED = (0.125, 0.25, 0.4, 0.5)
NO_PRICE = -100.0  # log λ at which nothing is narrowed
KEEP_LAST = 2  # layers that a plain cascade runs whole
PART = 96  # problems to find a price with
DELTA, CAP = 0.05, 10  # of the certificates: error, and the multiple of the bound that a document's loss is capped at
UNITS = {"kl": "nats", "ppl_ratio": "x", "ppl": "perplexity", "answer_tokens": "tokens"}  # of the others: share


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, of the command line unless given; step 7 makes them from its config."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--probe-dir", type=Path, required=True, help="folder of the trained gates")
    option("--out", type=Path, required=True, help="results file to write")
    option("--model", help="Hub name, local folder or 'default' (default: the manifest's)")
    option("--name", help="what records call the model (default: the last part of --model)")
    option("--dataset", nargs="+", help="text to judge by (default: the held-out documents of the training's)")
    option(
        "--saved", type=float_list, help="shares of MLP bytes (default: ten from 0.06 to 0.6, four of them for answers)"
    )
    option("--samples", type=positive, default=192, help="rows of each text at most (default: %(default)s)")
    option("--max-length", type=positive, default=512, help="tokens of a row (default: %(default)s)")
    option("--batch-size", type=positive, default=16, help="rows run at once (default: %(default)s)")
    option("--cascades", type=Path, nargs="+", default=[], help="folders of cascades with adapters, judged as well")
    option("--no-controls", action="store_true", help="judge the gates only")
    option("--device", help="such as cuda or cpu (default: cuda where there is one)")
    option("--dtype", choices=collection.DTYPES, default="auto", help="default: auto, the checkpoint's own")
    free = parser.add_argument_group("free-running answers to word problems").add_argument
    free("--free-running", type=positive, metavar="N", help="judge by answers to so many problems, too")
    free("--problems", help="JSONL file: question and answer, #### before its number, or prompt and tests of a Python "
         "function (default: the training's)")  # fmt: skip
    free(
        "--shots",
        type=int,
        help="worked examples in the prompt, 0 for an instruction (default: 4; programming problems have none)",
    )
    free("--max-new-tokens", type=positive, default=320, help="tokens of an answer at most (default: %(default)s)")
    free("--answers-at-once", type=positive, default=128, help="problems of a batch (default: %(default)s)")
    free("--no-teacher-forcing", action="store_true", help="free-running answers only")
    args = parser.parse_args(arguments)
    if args.no_teacher_forcing and not args.free_running:
        parser.error("--no-teacher-forcing leaves nothing to judge without --free-running")
    if args.shots is not None and args.shots < 0:
        parser.error("--shots is 0 or more")
    if any(not 0 < share < 1 for share in args.saved or ()):
        parser.error("--saved are shares between 0 and 1")
    args.answers_saved = sorted(args.saved or ANSWERS_SAVED)
    args.saved = sorted(args.saved or SAVED)
    return args


def main() -> None:
    args = parse_args()
    records: list[dict[str, Any]] = []
    for part in measure(args):
        records += part
        results_file(args.out, records, **origin(args))  # what is measured is kept, should the rest fail
    print(f"wrote {args.out}")


def origin(args: argparse.Namespace) -> dict[str, Any]:
    """What the provenance says of the artefact."""
    return {"artefact": str(args.probe_dir), "training": Manifest.load(args.probe_dir).training.get("provenance")}


def measure(args: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """Records, as they come: those of a text, or of one price for free-running answers."""
    manifest = Manifest.load(args.probe_dir)
    others = {}
    for folder in args.cascades:
        other = Manifest.load(folder)
        if other.policy not in ("hard", "soft") or f"cascade_{other.policy}" in others:
            raise SedacError(
                f"{folder} has policy {other.policy}: --cascades are folders of hard and soft, one of each"
            )
        others[f"cascade_{other.policy}"] = folder, other
    trainings = [manifest.training, *(other.training for _, other in others.values())]
    texts = {}
    for dataset in () if args.no_teacher_forcing else args.dataset or manifest.training.get("datasets", []):
        texts[label(dataset)] = [*unseen_documents(dataset, trainings).values()]
    if not texts and not args.free_running:
        raise SedacError("there is no text to judge by: give --dataset")
    problems = problems_of(args, manifest.training) if args.free_running else None
    model, tokenizer = collection.load_model(args.model or manifest.model, args.dtype, args.device)
    check_mlps(model)
    loaded = {}
    for system, (folder, other) in {"sedac": (args.probe_dir, manifest), **others}.items():
        other.check_model(model.config)
        loaded[system] = Gates.load(folder, other, model.device), trained_prices(other)
    gates = loaded.pop("sedac")[0]
    name = args.name or Path(args.model or manifest.model).name

    for text_name, documents in texts.items():
        samples = whole_documents(documents, tokenizer, args.max_length, args.samples)
        text = Text.of(model, samples, args.batch_size)
        condition = {"model": name, "weights": "real", "text": text_name}
        yield judge(model, gates, manifest, loaded, text, args, condition)
    if problems:
        text_name, judged, examples = problems
        condition = {"model": name, "weights": "real", "text": text_name}
        yield from judge_answers(model, tokenizer, gates, judged, examples, trained_prices(manifest), args, condition)


def label(dataset: str) -> str:
    return re.sub(r"_(train|valid|test)$", "", Path(dataset).stem)


def judge(
    model, gates: Gates, manifest: Manifest, cascades: dict, text: Text, args, condition: dict
) -> list[dict[str, Any]]:
    """Records of one text: every system at every share of saved bytes, and whether certificates hold."""
    few = text.part(max(2048, sum(int(mask.sum()) for _, mask in text.batches) // 4))

    @functools.cache
    def share(own: Gates, deciding, price: float) -> float:
        return saved_on(model, own, few.batches, price, deciding and deciding(own, price))

    def priced(own: Gates, near: Iterable[float], deciding=None) -> list[float]:
        return find_prices(functools.partial(share, own, deciding), args.saved, list(near), rounds=2)

    trained = trained_prices(manifest)
    prices = priced(gates, trained.values())
    stock = evaluate_gates(model, gates, text, NO_PRICE).summary()["stock_ppl"]
    records = [{**condition, "system": "stock", "saved_bytes": 0.0, "metric": "ppl", "unit": UNITS["ppl"], **stock}]
    judged = []
    for saved, price in zip(tqdm(args.saved, condition["text"], file=sys.stderr), prices, strict=True):
        judged.append(evaluate_gates(model, gates, text, price))
        records += as_records(judged[-1], {**condition, "system": "sedac", "budget": saved, "log_lambda": price})
    records += certificates(judged, condition)
    records += realised(functools.partial(share, gates, None), trained, condition, len(few.documents.unique()))
    for system, (own, near) in cascades.items():
        for saved, price in zip(args.saved, priced(own, near.values()), strict=True):
            found = evaluate_gates(model, own, text, price)
            records += as_records(found, {**condition, "system": system, "budget": saved, "log_lambda": price})
    if args.no_controls:
        return records

    damage, deciding = mean_damage(model, gates, few), {}
    if manifest.policy == "gates" and len(gates.shape.levels) > 2:
        bare = priced(gates, [*prices, max(prices) + 2], whole_or_nothing)  # save less at the same price
        deciding["gates"] = [whole_or_nothing(gates, price) for price in bare]
    deciding["random"] = [random_levels(found.level_shares, model.device) for found in judged]
    shares = [found.saved_share() for found in judged]
    deciding["static_width"] = [static_levels(gates, damage, share) for share in shares]
    deciding["static_drop"] = [static_levels(gates, drops_only(damage), share) for share in shares]
    for system, ways in deciding.items():
        for saved, decide in zip(tqdm(args.saved, system, file=sys.stderr), ways, strict=True):
            found = evaluate_gates(model, gates, text, 0.0, decide)
            records += as_records(found, {**condition, "system": system, "budget": saved})

    checkpoint = gates.shape.num_layers // 4
    for system, probe in {"entropy_plain": LensEntropy(model), "random_plain": Chance()}.items():
        torch.manual_seed(0)
        for saved, threshold in zip(
            tqdm(args.saved, system, file=sys.stderr),
            exits_for_saved(model, text, probe, checkpoint, args.saved, KEEP_LAST),
            strict=True,
        ):
            if threshold is None:
                continue  # all exit, and that does not save so much
            found = evaluate_cascade(model, text, {checkpoint: probe}, [threshold], KEEP_LAST)
            where = {**condition, "system": system, "budget": saved, "checkpoint": checkpoint, "threshold": threshold}
            records += as_records(found, where)

    for level, name in enumerate(tqdm(gates.shape.names[1:], "uniform", file=sys.stderr), 1):
        found = evaluate_gates(
            model, gates, text, 0.0, lambda layer, x, level=level: x.new_full(x.shape[:2], level, dtype=torch.int64)
        )
        where = {**condition, "system": "uniform", "level": name, "budget": round(found.saved_share(), 3)}
        records += as_records(found, where)
    return records


def realised(
    share: Callable[[float], float], trained: dict[float, float], condition: dict, repeats: int
) -> list[dict[str, Any]]:
    """What the prices found on the training's mixture save on so many documents or problems of this kind; prints a line."""
    shares = {budget: share(price) for budget, price in trained.items()}
    found = ", ".join(f"{saved:.1%} for {budget:.1%}" for budget, saved in shares.items())
    print(f"{condition['text']:<12} the training's own prices save {found}", flush=True)
    about = {**condition, "system": "sedac", "metric": "realised", "unit": "share", "repeats": repeats}
    return [
        {**about, "budget": budget, "log_lambda": trained[budget], "saved_bytes": saved, "value": saved}
        for budget, saved in shares.items()
    ]


def certificates(judged: Sequence[Judged], condition: dict) -> list[dict[str, Any]]:
    """Whether bounds that half of the documents certify hold on the other half: a record for each loss.

    The bound is halfway between the mean losses at the least price and at the greatest: some prices break it and some keep it by
    far, so that there is something to find out.
    """
    documents, records = len(judged[0].tokens), []
    if documents < 4:
        return []
    for loss in judged[0].means():
        losses = torch.stack([found.means()[loss] for found in judged])  # [prices, documents], the least damage first
        bound = float(losses[[0, -1]].mean())
        if bound <= 0:
            continue
        cap = min(CAP * bound, 1.0) if loss == "disagreement" else CAP * bound
        held, certified = certificate_held((losses / cap).clamp(0, 1).numpy(), bound / cap, DELTA)
        metric = {"metric": "certificate_held", "value": held, "unit": "share", "repeats": 200, "documents": documents}
        about = {"loss": loss, "bound": bound, "confidence": 1 - DELTA, "certified": certified}
        records.append({**condition, "system": "sedac", **about, **metric})
        checked = f", held on the other half in {held:.1%}" if certified else ": too few documents to certify it"
        print(f"{condition['text']:<12} a bound of {bound:.4g} on {loss}: certified by half of {documents} documents in "
              f"{certified:.0%} of 200 resamplings{checked}")  # fmt: skip
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
    return [
        {**condition, "metric": name, "unit": UNITS.get(name, "share"), **values} for name, values in metrics.items()
    ]


# ---------------------------------------------------------------- free-running


def problems_of(args, training: dict) -> tuple[str, list[Problem], list[Problem]]:
    """The name of a file of problems, those to judge by, which no training saw, and worked examples from the others."""
    path = args.problems
    for dataset in training.get("datasets", []) if path is None else ():
        try:
            read_problems(dataset)
        except SedacError:
            continue
        path = dataset
        break
    if path is None:
        raise SedacError("none of the training's texts is a file of word problems: give --problems")
    problems = read_problems(path)
    shots = problems[0].shots if args.shots is None else args.shots
    if shots and not problems[0].shots:
        raise SedacError(f"{path} has no worked examples: give --shots 0, or leave it out")
    pool = unseen(training, path, len(problems))
    draw = torch.Generator().manual_seed(training.get("seed", 0))
    chosen = pool[torch.randperm(len(pool), generator=draw)[: args.free_running]].tolist()
    if len(chosen) < args.free_running:
        print(f"{path} has {len(chosen)} problems that training did not see: all are judged", file=sys.stderr)
    seen = sorted(set(range(len(problems))) - set(pool.tolist())) or sorted(set(range(len(problems))) - set(chosen))
    if len(seen) < shots:
        raise SedacError(f"{path} leaves {len(seen)} problems for {shots} examples: lower --free-running or --shots")
    examples = [seen[i] for i in torch.randperm(len(seen), generator=draw)[:shots].tolist()]
    return label(path), [problems[i] for i in chosen], [problems[i] for i in examples]


def judge_answers(
    model, tokenizer, gates: Gates, problems: list[Problem], examples: list[Problem], guesses, args, condition: dict
) -> Iterator[list[dict[str, Any]]]:
    """Records of the full model's answers, and of those at each share saved on generated tokens."""
    prompts = [problem_prompt(tokenizer, problem, examples) for problem in problems]
    few = prompts[:: max(1, len(prompts) // PART)]

    def run(log_lambda: float | None, prompts=prompts, at_once=args.answers_at_once, from_prompt=False) -> Answers:
        under = None if log_lambda is None else lambda: gated(model, gates, log_lambda)
        return answer_problems(
            model,
            tokenizer,
            prompts,
            args.max_new_tokens,
            at_once,
            problems[0].end,
            gates,
            under,
            from_prompt=from_prompt,
        )

    stock = run(None)
    condition = {**condition, "mode": "free_running", "shots": len(examples)}
    yield answer_records(compared(stock, stock, problems), {**condition, "system": "stock"}, ("accuracy",))
    again = compared(run(None, at_once=max(1, args.answers_at_once // 2)), stock, problems)
    yield answer_records(again, {**condition, "system": "stock", "control": "batches of half the size"})

    trained = sorted(guesses.items())
    near = {saved: interpolate(trained, saved) for saved in args.answers_saved}
    shares = realised(lambda price: run(price, few).saved_share(), near, condition, len(few))
    yield shares
    met = [(found["value"], found["budget"]) for found in shares]
    for saved in args.answers_saved:
        # The model's own tokens save another share than the text that the budgets were trained on.
        price = interpolate(trained, interpolate([(0.0, 0.0), *sorted(met)], saved))
        for skips in ("generated", "prompt"):
            found = compared(run(price, from_prompt=skips == "prompt"), stock, problems)
            where = {**condition, "system": "sedac", "skips": skips, "budget": saved, "log_lambda": price}
            yield answer_records(found, where)


def answer_records(metrics: dict, condition: dict, only: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """One record a metric; prints a line."""
    condition = {**condition, "saved_bytes": metrics["saved_bytes"]["value"]}
    shown = ("accuracy", "accuracy_change", "same_answer", "same_text")
    print(
        f"{condition['text']:<12} {condition['system']:<6} skips {condition.get('skips', 'none'):<9} "
        f"saved {condition['saved_bytes']:6.1%}   "
        + "   ".join(
            f"{name} {metrics[name]['value']:.1%} ({metrics[name]['low']:.1%} to {metrics[name]['high']:.1%})"
            for name in shown
        )
        + f"   {metrics['answer_tokens']['value']:.0f} tokens",
        flush=True,
    )
    return [
        {**condition, "metric": name, "unit": UNITS.get(name, "share"), **values}
        for name, values in metrics.items()
        if not only or name in only or name == "answer_tokens"
    ]
