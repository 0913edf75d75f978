"""Running a transformers model: text in, residual streams out, and the cascade applied by hooks.

Besides `demo_model`, the only module that imports transformers or datasets. The residual stream after layer l is the
output of decoder layer l, before any final norm: in vLLM it is `hidden + residual` after that layer.
"""

import contextlib
import dataclasses
import importlib.util
import json
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import demo_model
from .cascade import margin_step
from .cli import SedacError, lines_of
from .probe import LREProbe

LENS_BYTES = 64 << 20  # the largest piece of logits that the logit lens holds at once
DTYPES = ("auto", "float32", "bfloat16", "float16")
PARTS_OF_A_TEXT_FILE = 20
PROMPTS = ("question", "instruction", "prompt")  # fields that a chat model can answer
FIELDS = (("text",), ("content",), ("question", "answer"), ("instruction", "output"), ("prompt", "completion"))


# ---------------------------------------------------------------- the model


def load_model(model: str, dtype: str = "auto", device: str | None = None, load_in_4bit: bool = False):
    """A transformers causal language model in eval mode, and its tokenizer.

    `model` is 'default', a Hub name or a folder; `dtype` 'auto' is the checkpoint's own. Raises `SedacError` where the
    model cannot be had, its decoder is none that SEDAC can read, or 4-bit loading is not possible here.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    options: dict[str, Any] = {"dtype": dtype}
    if load_in_4bit:
        if importlib.util.find_spec("bitsandbytes") is None:
            raise SedacError("--load-in-4bit needs bitsandbytes, which is not installed: pip install bitsandbytes")
        if not torch.cuda.is_available():
            raise SedacError("--load-in-4bit needs an NVIDIA GPU and none is present: run without it")
        compute = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute
        )
        options["device_map"] = {"": device}
    source = demo_model.resolve(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        loaded = AutoModelForCausalLM.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0]
        raise SedacError(
            f"model {model} cannot be loaded ({first}): check its name and the network, or give a folder or 'default'"
        ) from error
    decoder(loaded)
    if not load_in_4bit:
        loaded.to(device)
    return loaded.eval().requires_grad_(False), tokenizer


def decoder(model: nn.Module) -> nn.Module:
    """The stack of a Qwen2- or Llama-like model: it has `layers`, each with an `mlp`, and a final `norm`."""
    stack = getattr(model, "model", None)
    layers = getattr(stack, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not hasattr(stack, "norm") or not hasattr(layers[0], "mlp"):
        raise SedacError(
            f"{type(model).__name__} has no decoder that SEDAC can read: use a model built like Qwen2 or Llama"
        )
    return stack


@contextlib.contextmanager
def replaced_mlps(model: nn.Module, make: Callable[[int, nn.Module], nn.Module]) -> Iterator[None]:
    """Put `make(layer, its MLP)` in place of every MLP inside the block."""
    layers = decoder(model).layers
    before = [layer.mlp for layer in layers]
    try:
        for index, layer in enumerate(layers):
            layer.mlp = make(index, before[index])
        yield
    finally:
        for layer, mlp in zip(layers, before, strict=True):
            layer.mlp = mlp


# ---------------------------------------------------------------- the text


def read_documents(dataset: str, split: str = "train") -> list[str]:
    """The documents of a dataset: 'pydoc' or 'stdlib', a .txt, .md, .json or .jsonl file, or a Hub name ('name:config' with one).

    A document is what must not be split between training and held-out data: a topic of pydoc, a module of the standard
    library (its source: code that is always there), a row of a dataset, an article of wikitext (from the Hub or a text
    file), one of 20 long parts of a text file. Raises `SedacError` where there is no text.
    """
    if dataset == "pydoc":
        from pydoc_data import topics

        documents = [text for _, text in sorted(topics.topics.items())]
    elif dataset == "stdlib":
        modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        documents = [module.read_text(encoding="utf-8") for module in modules]
    elif Path(dataset).suffix in (".txt", ".md", ".jsonl", ".json"):
        documents = _read_file(Path(dataset))
    else:
        documents = _read_hub(dataset, split)
    documents = [text for text in documents if text.strip()]
    if not documents:
        raise SedacError(f"dataset {dataset} holds no text: give another --dataset, such as pydoc")
    return documents


def read_prompts(path: Path) -> list[str]:
    """The questions of a JSONL file, one a row, in its order: what a chat model can be asked."""
    try:
        rows = [json.loads(line) for line in lines_of(path.read_text(encoding="utf-8")) if line]
        return [next(row[name] for name in PROMPTS if name in row) for row in rows]
    except (OSError, ValueError, TypeError, StopIteration) as error:
        raise SedacError(
            f"{path} holds no prompts ({error!r}): give a JSONL file with a field {', '.join(PROMPTS)}"
        ) from None


def _read_file(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SedacError(f"dataset {path} cannot be read as UTF-8 text ({error})") from None
    if path.suffix in (".txt", ".md"):  # one running text: neighbours stay together in long parts
        lines = text.splitlines(keepends=True)
        articles = _articles(lines)
        if len(articles) > PARTS_OF_A_TEXT_FILE:
            return articles
        size = max(1, -(-len(lines) // PARTS_OF_A_TEXT_FILE))
        return ["".join(lines[i : i + size]) for i in range(0, len(lines), size)]
    try:
        rows = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in lines_of(text) if line]
    except ValueError as error:
        raise SedacError(f"dataset {path} is no valid {path.suffix[1:].upper()} ({error})") from None
    return [_text_of(row, str(path)) for row in rows]


def _read_hub(dataset: str, split: str) -> list[str]:
    from datasets import load_dataset

    name, _, config = dataset.partition(":")
    if name == "wikitext":
        name, config = "Salesforce/wikitext", config or "wikitext-2-raw-v1"
    try:
        rows = load_dataset(name, config or None, split=split)
    except (OSError, ValueError) as error:  # no network, no such dataset, config or split
        first = str(error).strip().splitlines()[0]
        raise SedacError(
            f"dataset {dataset} cannot be had from the Hub ({first}): "
            "check its name and the network, or use --dataset pydoc or a local .txt or .jsonl file"
        ) from error
    if name != "Salesforce/wikitext":
        return [_text_of(row, dataset) for row in rows]
    return _articles(row["text"] for row in rows)


def _articles(lines: Iterable[str]) -> list[str]:
    """The articles of wikitext's lines: ' = Title = ' begins one."""
    documents = [""]
    for line in lines:
        if re.fullmatch(r" = [^=].* = \n", line):
            documents.append("")
        documents[-1] += line
    return documents


def _text_of(row: Any, dataset: str) -> str:
    """The text of one record: a string itself, the fields of `FIELDS`, or its only field of text."""
    if isinstance(row, str):
        return row
    if isinstance(row, dict):
        strings = {name: value for name, value in row.items() if isinstance(value, str)}
        for names in (*FIELDS, tuple(strings) if len(strings) == 1 else ("text",)):
            if all(name in strings for name in names):
                return "\n".join(strings[name] for name in names)
        found = f"the fields {', '.join(map(str, row))}" if row else "no fields"
    else:
        found = f"a {type(row).__name__}"
    known = ", ".join("+".join(names) for names in FIELDS)
    raise SedacError(f"a record of dataset {dataset} has {found}, expected text in one of: {known}")


@dataclasses.dataclass(frozen=True)
class Sample:
    """A piece of one document, at most `max_length` tokens long."""

    document: int  # its place in the dataset
    ids: tuple[int, ...]


def make_samples(
    documents: Sequence[str], tokenizer: Any, count: int, max_length: int, seed: int, skip: Iterable[int] = ()
) -> list[Sample]:
    """Tokenise documents in a seeded random order, less those in `skip`, until they give `count` samples.

    No document gives more than a 32nd of them (at least one) while there are others: a held-out split needs many.
    """
    samples: list[Sample] = []
    rest: list[Sample] = []
    skip, most = set(skip), max(1, count // 32)
    for index in torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist():
        if len(samples) >= count:
            break
        if index in skip:
            continue
        ids = tokenizer(documents[index], verbose=False)["input_ids"]
        pieces = [Sample(index, tuple(ids[i : i + max_length])) for i in range(0, len(ids), max_length)]
        samples += pieces[:most]
        rest += pieces[most:]
    samples = (samples + rest)[:count]
    if not samples:
        raise SedacError("the dataset gave no tokens: give another --dataset, such as pydoc")
    return samples


def make_batches(samples: Sequence[Sample], batch_size: int) -> list[list[Sample]]:
    """Batches of samples of like length, longest first, so that little is padding and memory peaks at the start."""
    ordered = sorted(samples, key=lambda sample: -len(sample.ids))
    return [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)]


def padded(batch: Sequence[Sample], device: Any) -> tuple[Tensor, Tensor]:
    """Token ids and mask, `[samples, longest]`; padding stands on the right, where causal attention never sees it."""
    ids = nn.utils.rnn.pad_sequence([torch.tensor(sample.ids) for sample in batch], batch_first=True)
    lengths = torch.tensor([len(sample.ids) for sample in batch])
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    return ids.to(device), mask.to(device)


def beginnings(documents: Sequence[str], tokenizer: Any, count: int, tokens: int, seed: int) -> list[str]:
    """Pieces of documents, each `tokens` long, from places drawn evenly over all their tokens."""
    ids = [tokenizer(text, verbose=False)["input_ids"] for text in documents]
    places = torch.tensor([max(1, len(own) - tokens) for own in ids])
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.multinomial(places.float(), count, replacement=True, generator=generator).tolist()
    starts = (torch.rand(count, generator=generator) * places[chosen]).long().tolist()
    return [tokenizer.decode(ids[i][start : start + tokens]) for i, start in zip(chosen, starts, strict=True)]


# ---------------------------------------------------------------- the residual stream


def residual_streams(model: nn.Module, layers: Sequence[int], batch: Sequence[Sample]) -> dict[int, Tensor]:
    """The residual stream after each of `layers`, `{layer: [tokens, hidden]}`, padding left out, the model's dtype.

    Tokens stand in the batch's order, sample after sample. Layers past the last one asked for are not run.
    """
    stack = decoder(model)
    ids, mask = padded(batch, model.device)
    streams: dict[int, Tensor] = {}

    def keep(layer: int):
        return lambda module, args, output: streams.__setitem__(layer, _tensor(output)[mask])  # [tokens, hidden]

    whole = stack.layers
    handles = [whole[layer].register_forward_hook(keep(layer)) for layer in layers]
    stack.layers = whole[: max(layers) + 1]
    try:
        with torch.inference_mode():
            stack(input_ids=ids, attention_mask=mask.long(), use_cache=False)
    finally:
        stack.layers = whole
        for handle in handles:
            handle.remove()
    return streams


def _tensor(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output  # older decoder layers return a tuple


def lens_entropy(model: nn.Module, hidden: Tensor) -> Tensor:
    """Entropy in nats, `[tokens]` float32, of the next-token distribution in residual streams `[tokens, hidden]`.

    The final norm and LM head read it (the logit lens, nostalgebraist 2020), 64 MiB of logits at a time.
    """
    norm, head = decoder(model).norm, model.get_output_embeddings()
    rows = max(1, LENS_BYTES // (4 * head.weight.shape[0]))
    with torch.inference_mode():
        return torch.cat([_entropy(head(norm(part)).float()) for part in hidden.split(rows)])


def _entropy(logits: Tensor) -> Tensor:
    log_p = logits.log_softmax(-1)
    # A probability of 0 has log -inf, and adds 0 to the entropy.
    return -(log_p.exp() * log_p.clamp_min(torch.finfo(log_p.dtype).min)).sum(-1)


def exit_damage(
    model: nn.Module, layers: Sequence[int], batch: Sequence[Sample], keep_last: int
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """What it costs a token to exit after each of `layers`, by layer, `[tokens]`, in the order of `residual_streams`.

    The damage: KL(the full model's next-token distribution ‖ the one after the exit) in nats, float32; and whether the
    most likely next token stays, bool. From the layer after its exit to the last but `keep_last` the token's MLP adds
    nothing. It exits alone: it attends to the tokens before it as the full model has them, and to itself as the exit
    left it. What its changed keys and values do to later tokens is not in it.

    One pass does it: at each checkpoint a copy of the sequence joins the whole one and goes its own way, each of its
    tokens blind to the others.
    """
    stack = decoder(model)
    ids, mask = padded(batch, model.device)
    length, window = ids.shape[1], range(len(stack.layers) - keep_last)
    copies = 0

    def make(index: int, mlp: nn.Module) -> nn.Module:
        return _OfTheWhole(mlp, length) if index in window else mlp

    with torch.inference_mode(), replaced_mlps(model, make):
        hidden = stack.embed_tokens(ids)  # [batch, (1 + copies) * length, hidden]
        for index, layer in enumerate(stack.layers):
            if index == 0 or index - 1 in layers:
                if index:
                    hidden, copies = torch.cat([hidden, hidden[:, :length]], 1), copies + 1
                places = torch.arange(length, device=ids.device).repeat(1 + copies)[None]
                context = {
                    "attention_mask": _alone(length, copies, hidden),
                    "position_ids": places,
                    "position_embeddings": stack.rotary_emb(hidden, places),
                }
            hidden = _tensor(layer(hidden, **context))
        whole, *exited = stack.norm(hidden).split(length, 1)
        kl, same = zip(*(_compared(model, whole[mask], own[mask]) for own in exited), strict=True)
    return dict(zip(layers, kl, strict=True)), dict(zip(layers, same, strict=True))


class _OfTheWhole(nn.Module):
    """An MLP for the first `length` tokens of a sequence; nothing for the others, which have exited."""

    def __init__(self, mlp: nn.Module, length: int):
        super().__init__()
        self.mlp, self.length = mlp, length

    def forward(self, x: Tensor) -> Tensor:  # [batch, seq, hidden]
        return F.pad(self.mlp(x[:, : self.length]), (0, 0, 0, x.shape[1] - self.length))


def _alone(length: int, copies: int, hidden: Tensor) -> Tensor:
    """The mask `[1, 1, queries, keys]`, added to attention: a copy's token sees the whole sequence before it, and itself."""
    size = (1 + copies) * length
    seen = torch.eye(size, dtype=torch.bool, device=hidden.device)
    before = torch.ones(length, length, dtype=torch.bool, device=hidden.device).tril(-1)
    seen[:, :length] |= before.repeat(1 + copies, 1)
    return torch.zeros(size, size, dtype=hidden.dtype, device=hidden.device).masked_fill(
        ~seen, torch.finfo(hidden.dtype).min
    )[None, None]


def _compared(model: nn.Module, whole: Tensor, exited: Tensor) -> tuple[Tensor, Tensor]:
    """KL and agreement `[tokens]` of two sets of normed states `[tokens, hidden]`, 64 MiB of logits at a time."""
    head = model.get_output_embeddings()
    rows = max(1, LENS_BYTES // (4 * head.weight.shape[0]))
    kl, same = [], []
    for a, b in zip(whole.split(rows), exited.split(rows), strict=True):
        p, q = head(a).float().log_softmax(-1), head(b).float().log_softmax(-1)
        kl.append((p.exp() * (p - q)).sum(-1).clamp_min(0))
        same.append(p.argmax(-1) == q.argmax(-1))
    return torch.cat(kl), torch.cat(same)


def streamed_risks(
    model: nn.Module, probes: dict[int, LREProbe], batches: Iterable[Sequence[Sample]]
) -> Iterator[tuple[Tensor, Tensor]]:
    """For each batch the risks `[checkpoints, tokens]` float32 and the documents `[tokens]` int32, on the CPU."""
    for batch in batches:
        streams = residual_streams(model, tuple(probes), batch)
        risks = torch.stack([probe.to(model.device)(streams[layer]) for layer, probe in probes.items()])
        yield risks.float().cpu(), documents_of(batch)


def documents_of(batch: Sequence[Sample]) -> Tensor:
    """The document of each token of a batch, `[tokens]` int32."""
    names = torch.tensor([sample.document for sample in batch], dtype=torch.int32)
    return names.repeat_interleave(torch.tensor([len(sample.ids) for sample in batch]))


# ---------------------------------------------------------------- the cascade, by hooks


@dataclasses.dataclass
class Decided:
    """What the cascade decided in the model's latest forward pass."""

    exit_checkpoint: Tensor  # [batch, seq], int64: index of the checkpoint; the number of checkpoints if none
    risks: Tensor  # [checkpoints, batch, seq], float32


@contextlib.contextmanager
def cascade_hooks(
    model: nn.Module,
    probes: Sequence[LREProbe],
    layers: Sequence[int],
    thresholds: Sequence[float],
    gamma: float = 0.0,
    weights: Sequence[float] | None = None,
    level: float = 0.5,
    keep_last: int = 2,
) -> Iterator[Decided]:
    """Make a transformers model decide as a patched vLLM does: the readable twin that serving is tested against.

    Inside the block, each forward pass asks probe i about the residual stream after `layers[i]`; from the layer after
    its exit to the last but `keep_last`, an exited token's MLP adds nothing. Yields a `Decided` that each forward pass
    fills anew.
    """
    stack, count = decoder(model), len(layers)
    scalars = {"dtype": torch.float32, "device": model.device}
    threshold = torch.tensor(thresholds, **scalars)
    weight = torch.ones(count, **scalars) if weights is None else torch.tensor(weights, **scalars)
    gamma_, level_ = torch.tensor(gamma, **scalars), torch.tensor(level, **scalars)
    decided = Decided(torch.empty(0, 0, dtype=torch.int64), torch.empty(count, 0, 0))
    margin = torch.empty(0, 0)

    def begin(module, args, kwargs):
        nonlocal margin
        hidden = args[0] if args else kwargs["hidden_states"]  # [batch, seq, hidden]
        margin = torch.zeros(hidden.shape[:2], **scalars)
        decided.exit_checkpoint = torch.full(hidden.shape[:2], count, device=hidden.device)
        decided.risks = torch.full((count, *hidden.shape[:2]), float("nan"), **scalars)

    def decide(i: int):
        def hook(module, args, output):
            nonlocal margin
            risk = probes[i](_tensor(output))  # [batch, seq]
            margin = margin_step(risk, threshold[i], margin, gamma_, weight[i], level_)
            exits = (decided.exit_checkpoint == count) & (margin > 0)
            decided.exit_checkpoint = torch.where(exits, i, decided.exit_checkpoint)
            decided.risks[i] = risk

        return hook

    def skip(module, args, output):
        return output.masked_fill((decided.exit_checkpoint < count).unsqueeze(-1), 0)

    window = stack.layers[layers[0] + 1 : len(stack.layers) - keep_last]
    handles = [stack.layers[0].register_forward_pre_hook(begin, with_kwargs=True)]
    handles += [stack.layers[layer].register_forward_hook(decide(i)) for i, layer in enumerate(layers)]
    handles += [layer.mlp.register_forward_hook(skip) for layer in window]
    for probe in probes:
        probe.to(model.device)
    try:
        yield decided
    finally:
        for handle in handles:
            handle.remove()
