"""What gates do to the answers, at a row of saved shares, beside controls at the same bytes.

    python -m sedac_core.bench quality --probe-dir my_gates --out docs/results/quality_default.json

Teacher-forced, on the documents that training held out (or all of --dataset): for each share of MLP bytes saved, the
price λ that saves it on this text, then KL to the full model, top-1 agreement and perplexity over stock's. Controls:
the same levels dealt to random tokens layer by layer, and one level a layer for all tokens, with the same adapters.

    python -m sedac_core.bench quality --probe-dir my_gates --out quality.json --free-running 500 --problems gsm8k.jsonl

Free-running, on word problems that training held out, in the chat template after worked examples from the others: greedy
answers of the full model and under gates, problem by problem. Shares are those saved on the generated tokens, with skips
from the first generated token on and, apart, from the prompt on. Rounding alone changes answers too: the full model in
batches of half the size says how many.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import collection
from .artifacts import Manifest, unseen
from .bench import results_file
from .cli import SedacError, float_list, positive
from .free_running import Answers, Problem, answer_problems, compared, problem_prompt, read_problems
from .gates import Gates, check_mlps, gated
from .quality import (
    Judged,
    Text,
    evaluate_gates,
    interpolate,
    mean_damage,
    prices_for_saved,
    random_levels,
    static_levels,
    whole_documents,
)

SAVED = (0.125, 0.25, 0.4, 0.5)
NO_PRICE = -100.0  # log λ at which nothing is narrowed
PART = 96  # problems to find a price with
UNITS = {"kl": "nats", "ppl_ratio": "x", "ppl": "perplexity", "answer_tokens": "tokens"}  # of the others: share


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
    free = parser.add_argument_group("free-running answers to word problems").add_argument
    free("--free-running", type=positive, metavar="N", help="judge by answers to so many problems, too")
    free("--problems", help="JSONL file with question and answer, #### before its number (default: the training's)")
    free(
        "--shots",
        type=int,
        default=4,
        help="worked examples in the prompt, 0 for an instruction (default: %(default)s)",
    )
    free("--max-new-tokens", type=positive, default=320, help="tokens of an answer at most (default: %(default)s)")
    free("--answers-at-once", type=positive, default=128, help="problems of a batch (default: %(default)s)")
    free("--no-teacher-forcing", action="store_true", help="free-running answers only")
    args = parser.parse_args()
    if args.no_teacher_forcing and not args.free_running:
        parser.error("--no-teacher-forcing leaves nothing to judge without --free-running")
    if args.shots < 0:
        parser.error("--shots is 0 or more")
    if any(not 0 < share < 1 for share in args.saved):
        parser.error("--saved are shares between 0 and 1")
    return args


def main() -> None:
    args = parse_args()
    manifest = Manifest.load(args.probe_dir)
    training = manifest.training
    texts = {}
    for dataset in () if args.no_teacher_forcing else args.dataset or training.get("datasets", []):
        documents = collection.read_documents(dataset)
        texts[label(dataset)] = [documents[i] for i in unseen(training, dataset, len(documents)).tolist()]
    if not texts and not args.free_running:
        raise SedacError("there is no text to judge by: give --dataset")
    problems = problems_of(args, training) if args.free_running else None
    model, tokenizer = collection.load_model(args.model or manifest.model, args.dtype, args.device)
    manifest.check_model(model.config)
    check_mlps(model)
    gates = Gates.load(args.probe_dir, manifest, model.device)
    name = args.name or Path(args.model or manifest.model).name

    records: list[dict[str, Any]] = []
    for text_name, documents in texts.items():
        samples = whole_documents(documents, tokenizer, args.max_length, args.samples)
        text = Text.of(model, samples, args.batch_size)
        records += judge(model, gates, text, manifest, args, {"model": name, "weights": "real", "text": text_name})
    if problems:
        text_name, judged, examples = problems
        condition = {"model": name, "weights": "real", "text": text_name}
        records += judge_answers(model, tokenizer, gates, judged, examples, manifest, args, condition)
    results_file(args.out, records, artefact=str(args.probe_dir), training=training.get("provenance"))
    print(f"wrote {args.out}")


def label(dataset: str) -> str:
    return re.sub(r"_(train|valid|test)$", "", Path(dataset).stem)


def guesses(manifest: Manifest) -> dict[float, float]:
    """log λ by the share of bytes it was trained to save."""
    budgets = manifest.gates.get("budgets")
    if not budgets:
        raise SedacError("the manifest names no λ for any budget: train the gates to their end")
    return {budget["saved_bytes"]: budget["log_lambda"] for budget in budgets}


def judge(model, gates: Gates, text: Text, manifest: Manifest, args, condition: dict) -> list[dict[str, Any]]:
    few = text.part(max(4096, sum(int(mask.sum()) for _, mask in text.batches) // 4))
    prices, _ = prices_for_saved(model, gates, few.batches, args.saved, list(guesses(manifest).values()))
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
    pool = unseen(training, path, len(problems))
    draw = torch.Generator().manual_seed(training.get("seed", 0))
    chosen = pool[torch.randperm(len(pool), generator=draw)[: args.free_running]].tolist()
    if len(chosen) < args.free_running:
        print(f"{path} has {len(chosen)} problems that training did not see: all are judged", file=sys.stderr)
    seen = sorted(set(range(len(problems))) - set(pool.tolist())) or sorted(set(range(len(problems))) - set(chosen))
    if len(seen) < args.shots:
        raise SedacError(
            f"{path} leaves {len(seen)} problems for {args.shots} examples: lower --free-running or --shots"
        )
    examples = [seen[i] for i in torch.randperm(len(seen), generator=draw)[: args.shots].tolist()]
    return label(path), [problems[i] for i in chosen], [problems[i] for i in examples]


def judge_answers(
    model, tokenizer, gates: Gates, problems: list[Problem], examples: list[Problem], manifest, args, condition: dict
) -> list[dict[str, Any]]:
    """Records of the full model's answers, and of those at each share saved on generated tokens."""
    prompts = [problem_prompt(tokenizer, problem, examples) for problem in problems]
    few = prompts[:: max(1, len(prompts) // PART)]
    gather = model.device.type == "cpu"  # on a GPU, gathering would wait at each layer

    def run(log_lambda: float | None, prompts=prompts, at_once=args.answers_at_once, from_prompt=False) -> Answers:
        under = None if log_lambda is None else lambda: gated(model, gates, log_lambda, gather=gather)
        return answer_problems(
            model, tokenizer, prompts, args.max_new_tokens, at_once, gates, under, from_prompt=from_prompt
        )

    stock = run(None)
    condition = {**condition, "mode": "free_running", "shots": len(examples)}
    records = answer_records(compared(stock, stock, problems), {**condition, "system": "stock"}, ("accuracy",))
    again = compared(run(None, at_once=max(1, args.answers_at_once // 2)), stock, problems)
    records += answer_records(again, {**condition, "system": "stock", "control": "batches of half the size"})

    trained = sorted(guesses(manifest).items())
    met = [(run(interpolate(trained, saved), few).saved_share(), saved) for saved in args.saved]
    for saved in args.saved:  # the model's own tokens save another share than the text the budgets were trained on
        price = interpolate(trained, interpolate([(0.0, 0.0), *sorted(met)], saved))
        for skips in ("generated", "prompt"):
            found = compared(run(price, from_prompt=skips == "prompt"), stock, problems)
            where = {**condition, "system": "sedac", "skips": skips, "budget": saved, "log_lambda": price}
            records += answer_records(found, where)
    return records


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
