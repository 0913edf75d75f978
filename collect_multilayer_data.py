"""Step 1: collect what the probes learn from.

    python collect_multilayer_data.py --model Qwen/Qwen2.5-3B-Instruct --layers 7,14,21 --samples 500 --load-in-4bit
    python collect_multilayer_data.py --model default --dataset pydoc      # needs no network but the package index

Runs the model once over the text and writes, for each layer l of --layers:

    hidden_states_layer{l}.pt   [num_tokens, hidden_dim]  the residual stream after layer l, in the model's dtype
    entropies_layer{l}.pt       [num_tokens]              entropy (nats) of the next token, read there by the logit lens

With --target damage also what an exit at l costs, the MLPs of the layers after it, but for the last --keep-last, left out:

    damage_layer{l}.pt          [num_tokens]              KL (nats) of the full model's next token to the exit's
    agreement_layer{l}.pt       [num_tokens]              1 where the most likely next token stays the same, else 0

Each token is taken to exit alone, the tokens before it whole; one more pass measures that exactly for all checkpoints.

Row i is the same token in every file, documents.pt names its document, and manifest.json, written last, says how the
data was made. Tokens go to disk batch by batch, so memory stays flat; an interrupted run continues where it was when
started again with the same options.

    python collect_multilayer_data.py --generate 500 --model default --dataset questions.jsonl --save-dir my_sedac

writes generated.jsonl instead: what the model itself answers to questions, in its chat template, every other batch
sampled, the others greedy; with --gates, under the gates of that folder. It is text like any other for gates to be
trained, judged or calibrated on: a model goes on from its own words. The questions are the training's, so that those
that step 2 holds out with the same --seed and --held-out stay unseen; --held-out-questions takes those instead. With
--go-on it continues pieces of any --dataset, sampled.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm, trange

from sedac_core import cli, collection
from sedac_core.artifacts import (
    TARGETS,
    Fingerprint,
    Manifest,
    agreement_path,
    check_layers,
    damage_path,
    disk_space,
    documents_path,
    entropy_path,
    held_out,
    hidden_path,
    load_collected,
    replacing,
)
from sedac_core.bench import provenance
from sedac_core.collection import Sample
from sedac_core.free_running import chat_prompt, write_on
from sedac_core.gated_model import gated
from sedac_core.gates import Gates

PathOf = Callable[[Path, int], Path]  # where the file of one kind and layer lies
BEGINNING = 64  # tokens of a piece that the model goes on from


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--model", default="Qwen/Qwen2.5-3B-Instruct", help="Hub name, local folder, or 'default', the embedded one")
    option("--layers", type=cli.layer_list, default="7,14,21", help="checkpoints (default: %(default)s)")
    option("--target", choices=TARGETS, default="entropy", help="damage: what exits cost, too (default: %(default)s)")
    option("--keep-last", type=int, default=2, help="last layers that always run whole (default: %(default)s)")
    option("--samples", type=cli.positive, default=500, help="pieces of text to run (default: %(default)s)")
    option("--max-length", type=cli.positive, default=512, help="tokens a piece has at most (default: %(default)s)")
    option("--save-dir", type=Path, default=Path("sedac_data"), help="where to write (default: %(default)s)")
    option(
        "--dataset",
        default="wikitext",
        help="Hub name, .txt, .json or .jsonl file, pydoc or stdlib (default: %(default)s)",
    )
    option("--split", default="train", help="split of a Hub dataset (default: %(default)s)")
    option("--load-in-4bit", action="store_true", help="load the model in 4 bits (bitsandbytes, NVIDIA GPU)")
    option("--batch-size", type=cli.positive, default=8, help="pieces run at once (default: %(default)s)")
    option("--seed", type=int, default=0, help="of the choice of documents (default: %(default)s)")
    option("--device", help="such as cuda or cpu (default: cuda where there is one)")
    option("--dtype", choices=collection.DTYPES, default="auto", help="default: auto, the checkpoint's own")
    own = parser.add_argument_group("text that the model itself writes").add_argument
    own("--generate", type=cli.positive, help="answers to write to generated.jsonl, instead of collecting")
    own(
        "--go-on",
        action="store_true",
        help="go on after pieces of --dataset's text, instead of answering its questions",
    )
    own("--new-tokens", type=cli.positive, default=256, help="tokens of an answer at most (default: %(default)s)")
    own("--gates", type=Path, help="answer under the gates of this folder, at its price λ")
    own("--held-out", type=float, default=0.1, help="step 2's share of held-out documents (default: %(default)s)")
    own("--held-out-questions", action="store_true", help="ask those that step 2 holds out, to judge by")
    args = parser.parse_args()
    if not 0 < args.held_out < 1:
        parser.error("--held-out lies between 0 and 1")
    if args.keep_last < 0:
        parser.error("--keep-last starts at 0")
    return args


def main() -> None:
    args = parse_args()
    if args.generate:
        generate(args)
        return
    documents = collection.read_documents(args.dataset, args.split)
    model, tokenizer = collection.load_model(args.model, args.dtype, args.device, args.load_in_4bit)
    check_layers(args.layers, model.config.num_hidden_layers, args.keep_last if args.target == "damage" else 0)
    samples = collection.make_samples(documents, tokenizer, args.samples, args.max_length, args.seed)
    batches = collection.make_batches(samples, args.batch_size)

    manifest = describe(args, model, samples)
    shards = Shards.open(args.save_dir, args.layers, model, manifest, samples)
    if shards.batches:
        print(f"continuing after batch {shards.batches} of {len(batches)}", file=sys.stderr)
    bar = tqdm(batches, desc="collecting", unit="batch", initial=shards.batches)
    for batch in bar.iterable[shards.batches :]:
        streams = collection.residual_streams(model, args.layers, batch)
        found = {hidden_path: streams}
        found[entropy_path] = {layer: collection.lens_entropy(model, hidden) for layer, hidden in streams.items()}
        if args.target == "damage":
            found[damage_path], found[agreement_path] = collection.exit_damage(
                model, args.layers, batch, args.keep_last
            )
        shards.append(found, collection.documents_of(batch))
        bar.update()
    bar.close()

    shards.finish(manifest)
    for layer in args.layers:
        data = load_collected(args.save_dir, layer, args.target == "damage")
        cost = ""
        if data.damage is not None:
            agreed = data.agreement.float().mean()
            cost = f"; an exit costs {data.damage.mean():.3f} nats on average and keeps {agreed:.1%} of top-1 choices"
        print(f"Layer {layer}: {hidden_path(args.save_dir, layer)}, mean entropy {data.entropy.mean():.3f} nats{cost}")
    record = {name: manifest.collection[name] for name in ("dataset", "documents", "samples", "tokens")}
    print(json.dumps({"model": args.model, "checkpoints": args.layers, **record, "save_dir": str(args.save_dir)}))


def describe(args: argparse.Namespace, model: torch.nn.Module, samples: Sequence[Sample]) -> Manifest:
    """The manifest of this collection. The digest of its tokens makes it differ when model or text have changed."""
    config = model.config
    ids = np.fromiter((token for sample in samples for token in sample.ids), dtype=np.int64)
    return Manifest(
        model=args.model,
        fingerprint=Fingerprint.of(config),
        checkpoints=args.layers,
        keep_last=args.keep_last,
        collection={
            "target": args.target,
            "layers": list(args.layers),
            "dataset": args.dataset,
            "split": args.split,
            "documents": len({sample.document for sample in samples}),
            "samples": len(samples),
            "tokens": len(ids),
            "tokens_sha256": hashlib.sha256(ids.tobytes()).hexdigest(),
            "max_length": args.max_length,
            "batch_size": args.batch_size,
            "seed": args.seed,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": model.device.type,
            "load_in_4bit": args.load_in_4bit,
            "attention_heads": config.num_attention_heads,
            "key_value_heads": config.num_key_value_heads,
            "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        },
    )


@dataclasses.dataclass
class Shards:
    """The collected rows on their way: one growing file for each tensor, and a note of how far they can be trusted."""

    save_dir: Path
    layers: tuple[int, ...]
    kinds: dict[PathOf, tuple[torch.dtype, int]]  # each layer's files: their type, numbers a token
    plan: dict
    batches: int = 0
    tokens: int = 0

    @property
    def folder(self) -> Path:
        return self.save_dir / ".shards"

    @classmethod
    def open(cls, save_dir, layers, model, manifest: Manifest, samples: Sequence[Sample]) -> "Shards":
        """Continue a run with the very same manifest, else start anew, given room for shards and final files."""
        plan = json.loads(json.dumps(dataclasses.asdict(manifest)))
        kinds = {hidden_path: (model.dtype, model.config.hidden_size), entropy_path: (torch.float32, 1)}
        if manifest.collection["target"] == "damage":
            kinds |= {damage_path: (torch.float32, 1), agreement_path: (torch.uint8, 1)}
        shards = cls(save_dir, layers, kinds, plan)
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError):
            progress = json.loads((shards.folder / "progress.json").read_text())
            if progress["plan"] == plan:
                shards.batches, shards.tokens = progress["batches"], progress["tokens"]
        if not shards.batches:
            shutil.rmtree(shards.folder, ignore_errors=True)
        row = sum(dtype.itemsize * width for _, dtype, width in shards.columns().values())  # bytes of a token
        disk_space(save_dir, row * (2 * manifest.collection["tokens"] - shards.tokens))
        return shards

    def columns(self) -> dict[Path, tuple[Path, torch.dtype, int]]:
        """Each final file: its shard, its type, and how many numbers a token has in it."""
        columns = {documents_path(self.save_dir): (self.folder / "documents", torch.int32, 1)}
        for path, (dtype, width) in self.kinds.items():
            for final in (path(self.save_dir, layer) for layer in self.layers):
                columns[final] = (self.folder / final.stem, dtype, width)
        return columns

    def append(self, found: dict[PathOf, dict[int, Tensor]], documents: Tensor) -> None:
        """Write one batch, what was found by kind and layer; it counts once progress.json says so, and a torn write is cut
        off by the next run."""
        rows = {documents_path(self.save_dir): documents}
        rows |= {path(self.save_dir, layer): row for path, layers in found.items() for layer, row in layers.items()}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for final, (shard, dtype, width) in self.columns().items():
                with open(shard, "r+b" if shard.exists() else "wb") as file:
                    file.truncate(self.tokens * width * dtype.itemsize)
                    file.seek(0, 2)
                    file.write(rows[final].to("cpu", dtype).contiguous().view(torch.uint8).numpy())
        except OSError as error:
            raise cli.SedacError(
                f"cannot write to {self.folder} ({error}): make room and run the same command to continue"
            ) from error
        self.batches, self.tokens = self.batches + 1, self.tokens + len(documents)
        with replacing(self.folder / "progress.json") as temporary:
            temporary.write_text(json.dumps({"plan": self.plan, "batches": self.batches, "tokens": self.tokens}))

    def finish(self, manifest: Manifest) -> None:
        """Turn the shards into the final files, all at once or none, then the manifest."""
        columns = self.columns()
        with contextlib.ExitStack() as together:
            for final, (shard, dtype, width) in columns.items():
                rows = torch.from_file(str(shard), shared=False, size=self.tokens * width, dtype=dtype)  # memory-mapped
                torch.save(rows.view(-1, width) if width > 1 else rows, together.enter_context(replacing(final)))
            # From here on all files are written: without a manifest nobody trusts them until all are in place.
            together.callback((self.save_dir / "manifest.json").unlink, missing_ok=True)
        for old in self.save_dir.glob("*_layer*.pt"):
            if old not in columns:
                old.unlink()  # another run's layers or target, whose rows are other tokens
        manifest.collection["provenance"] = provenance()
        manifest.save(self.save_dir)
        shutil.rmtree(self.folder)


# ---------------------------------------------------------------- the model's own words


def generate(args: argparse.Namespace) -> None:
    texts = collection.read_documents(args.dataset) if args.go_on else collection.read_prompts(Path(args.dataset))
    unseen = held_out(torch.arange(len(texts)), args.seed, args.held_out)
    pool = [texts[i] for i in (unseen if args.held_out_questions else ~unseen).nonzero().squeeze(1).tolist()]
    model, tokenizer = collection.load_model(args.model, args.dtype, args.device, args.load_in_4bit)
    if args.go_on:
        prompts = collection.beginnings(pool, tokenizer, args.generate, BEGINNING, args.seed)
    else:
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(args.seed))[: args.generate]
        prompts = [chat_prompt(tokenizer, [{"role": "user", "content": pool[i]}]) for i in order.tolist()]
    price, under = None, contextlib.nullcontext()
    if args.gates:
        manifest = Manifest.load(args.gates)
        manifest.check_model(model.config)
        gates = Gates.load(args.gates, manifest, model.device)
        price = manifest.gates["log_lambda"]
        under = gated(model, gates, price)

    rows = []
    torch.manual_seed(args.seed)
    with under:
        for number, start in enumerate(trange(0, len(prompts), args.batch_size, desc="writing", unit="batch")):
            asked, sample = prompts[start : start + args.batch_size], args.go_on or number % 2 == 1
            written = write_on(model, tokenizer, asked, args.new_tokens, sample)
            rows += [{"text": text, "sampled": sample, "log_lambda": price} for text in written]
    path = args.save_dir / "generated.jsonl"
    with replacing(path) as temporary:
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(json.dumps({"model": args.model, "answers": len(rows), "log_lambda": price, "file": str(path)}))


if __name__ == "__main__":
    cli.run(main)
