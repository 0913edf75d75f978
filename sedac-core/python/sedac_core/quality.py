"""What gates, or the exits of a cascade, do to a model's answers, teacher-forced: KL, top-1 agreement, perplexity and saved bytes, with intervals.

Every figure is a mean over tokens; its 95 % interval comes from drawing whole documents anew, because the tokens of one
document depend on each other. Controls run at the same bytes: levels dealt to random tokens, and levels fixed by layer.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .artifacts import unseen
from .cli import SedacError
from .collection import Sample, cascade_hooks, decoder, lens_entropy, make_batches, padded, read_documents
from .gated_model import final_states, gated, logits
from .gates import Gates, choose

RESAMPLES = 2000
BETWEEN = "\n\n"  # documents that share a row
PIECE = 2048  # tokens whose logits are held at once


def whole_documents(documents: Sequence[str], tokenizer: Any, length: int, count: int) -> list[Sample]:
    """Rows of at most `length` tokens, at most `count`, such that rows of different documents share none.

    Short documents share a row, each whole, and count as one document. A long one gives several rows of one document,
    at most a 32nd of all (at least one) while there are other documents: intervals need many.
    """
    samples: list[Sample] = []
    rest: list[Sample] = []
    row: list[int] = []
    most = max(1, count // 32)
    for index, text in enumerate(documents):
        ids = tokenizer(text + BETWEEN, verbose=False)["input_ids"]
        if row and len(row) + len(ids) > length:
            samples.append(Sample(-index, tuple(row)))  # negative: a name no single document has
            row = []
        if len(ids) <= length:
            row += ids
        else:
            pieces = [Sample(index + 1, tuple(ids[i : i + length])) for i in range(0, len(ids), length)]
            samples += pieces[:most]
            rest += pieces[most:]
        if len(samples) >= count:
            return samples[:count]
    if row:
        samples.append(Sample(-len(documents), tuple(row)))
    return (samples + rest)[:count]


def unseen_documents(dataset: str, trainings: Sequence[Mapping[str, Any]], split: str = "train") -> dict[int, str]:
    """The documents of a dataset, by their places in it, that none of these trainings of gates (their manifests' records)
    read; `SedacError` where none is left."""
    documents = read_documents(dataset, split)
    places = set(range(len(documents)))
    for training in trainings:
        places &= set(unseen(training, dataset, len(documents)).tolist())
    if not places:
        raise SedacError(
            f"the trainings have read all of {dataset} between them: train them with one --seed and --held-out"
        )
    return {place: documents[place] for place in sorted(places)}


@dataclasses.dataclass
class Text:
    """Text to judge by, with what the full model makes of it."""

    batches: list[tuple[Tensor, Tensor]]  # ids and mask, [batch, seq], on the CPU
    states: list[Tensor]  # what the LM head reads in the full model, [judged tokens, hidden], on the CPU
    documents: Tensor  # [samples], which document each sample belongs to, counted from 0

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module, samples: Sequence[Sample], batch_size: int) -> "Text":
        batches = make_batches([sample for sample in samples if len(sample.ids) > 1], batch_size)
        if not batches:
            raise SedacError("the text to judge by has no two tokens in a row: give other text")
        padding = [padded(batch, "cpu") for batch in batches]
        states = [final_states(model, ids.to(model.device))[:, :-1].cpu()[mask[:, 1:]] for ids, mask in padding]
        names = torch.tensor([sample.document for batch in batches for sample in batch])
        return cls(padding, states, names.unique(return_inverse=True)[1])

    def part(self, tokens: int) -> "Text":
        """Every n-th batch, so many that they hold about this many tokens."""
        sizes = [int(mask.sum()) for _, mask in self.batches]
        every = max(1, round(sum(sizes) / max(1, tokens)))
        first = torch.tensor([0, *(len(mask) for _, mask in self.batches)]).cumsum(0)
        chosen = range(0, len(sizes), every)
        documents = torch.cat([self.documents[first[i] : first[i + 1]] for i in chosen])
        return Text(
            [self.batches[i] for i in chosen],
            [self.states[i] for i in chosen],
            documents.unique(return_inverse=True)[1],
        )


@dataclasses.dataclass(frozen=True)
class Judged:
    """Sums over the tokens of each document `[documents]`, float64, and what ran."""

    tokens: Tensor  # judged tokens
    kl: Tensor  # nats
    agreed: Tensor  # tokens whose most likely next token is the full model's
    loss: Tensor  # nats, of the true next token
    stock_loss: Tensor
    saved: Tensor  # share of MLP bytes not read, times judged tokens
    level_shares: Tensor  # [layers, levels], of all tokens

    def saved_share(self) -> float:
        return float(self.saved.sum() / self.tokens.sum())

    def means(self) -> dict[str, Tensor]:
        """Means of each document `[documents]`: losses for a certificate.

        `ppl_increase` is the logarithm of its perplexity over stock's where that rose, else 0: bounding its mean bounds
        the geometric mean of the documents' ratios.
        """
        rise = ((self.loss - self.stock_loss) / self.tokens).clamp_min(0)
        return {"kl": self.kl / self.tokens, "disagreement": 1 - self.agreed / self.tokens, "ppl_increase": rise}

    def summary(self) -> dict[str, dict[str, float]]:
        """`{metric: {value, low, high, repeats}}`, repeats being documents."""

        def metrics(rows: Tensor) -> dict[str, Tensor]:
            tokens, kl, agreed, loss, stock, saved = (
                sums[rows].sum(1)
                for sums in (self.tokens, self.kl, self.agreed, self.loss, self.stock_loss, self.saved)
            )
            return {
                "kl": kl / tokens,
                "top1_agreement": agreed / tokens,
                "ppl_ratio": ((loss - stock) / tokens).exp(),
                "ppl": (loss / tokens).exp(),
                "stock_ppl": (stock / tokens).exp(),
                "saved_bytes": saved / tokens,
            }

        return bootstrapped(metrics, len(self.tokens))


def bootstrapped(metrics: Callable[[Tensor], dict[str, Tensor]], count: int) -> dict[str, dict[str, float]]:
    """`{metric: {value, low, high, repeats}}` with 95 % intervals from drawing `count` documents or problems anew.

    `metrics` gives each metric `[samples]` of rows of their numbers `[samples, count]`.
    """
    drawn = torch.randint(count, (RESAMPLES, count), generator=torch.Generator().manual_seed(0))
    values, resampled = metrics(torch.arange(count)[None]), metrics(drawn)
    quantiles = torch.tensor([0.025, 0.975], dtype=torch.float64)
    return {
        name: dict(
            zip(("value", "low", "high"), (float(values[name]), *sample.quantile(quantiles).tolist()), strict=True),
            repeats=count,
        )
        for name, sample in resampled.items()
    }


@torch.no_grad()
def evaluate_gates(
    model: nn.Module,
    gates: Gates,
    text: Text,
    log_lambda: float,
    decide: Callable[[int, Tensor], Tensor] | None = None,
) -> Judged:
    """Run the text under gates at price λ, or under the levels of `decide(layer, x)`, and compare with the full model."""
    shape = gates.shape
    with gated(model, gates, log_lambda, decide=decide) as levels:

        def ran() -> tuple[Tensor, Tensor]:
            one_hot = F.one_hot(torch.stack(levels), len(shape.levels))  # [layers, batch, seq, levels]
            return one_hot, shape.saved_share(one_hot.permute(1, 2, 0, 3).float())

        return judge(model, text, ran)


@torch.no_grad()
def evaluate_cascade(
    model: nn.Module,
    text: Text,
    probes: Mapping[int, nn.Module],
    thresholds: Sequence[float],
    keep_last: int,
    **rule: Any,
) -> Judged:
    """The same under a plain cascade, which skips MLPs and has no adapters: level 1 is the exit.

    `probes` by checkpoint and what else the rule takes are `cascade_hooks`'. Probes count against what is saved.
    """
    layers, mlp = decoder(model).layers, sum(p.numel() for p in decoder(model).layers[0].mlp.parameters())
    cost = sum(p.numel() for probe in probes.values() for p in probe.parameters()) / mlp / len(layers)
    exit_layer = torch.tensor([*probes, len(layers)], device=model.device)
    layer = torch.arange(len(layers), device=model.device)[:, None, None]
    with cascade_hooks(model, [*probes.values()], [*probes], thresholds, keep_last=keep_last, **rule) as decided:

        def ran() -> tuple[Tensor, Tensor]:
            skipped = (layer > exit_layer[decided.exit_checkpoint]) & (layer < len(layers) - keep_last)
            return F.one_hot(skipped.long(), 2), skipped.float().mean(0) - cost

        return judge(model, text, ran)


def judge(model: nn.Module, text: Text, ran: Callable[[], tuple[Tensor, Tensor]]) -> Judged:
    """Run the text and compare it with the full model. `ran()` tells of the latest pass the levels `[layers, batch, seq,
    levels]`, one-hot, and the share of MLP bytes that each token saved, `[batch, seq]`."""
    head = model.get_output_embeddings().weight
    sums = torch.zeros(6, int(text.documents.max()) + 1, dtype=torch.float64)
    shares, all_tokens, first = torch.zeros((), dtype=torch.float64), 0, 0
    for (ids, mask), stock in zip(text.batches, text.states, strict=True):
        judged = mask[:, 1:]
        student = final_states(model, ids.to(model.device))[:, :-1][judged.to(model.device)]
        one_hot, saved = ran()
        shares = shares + one_hot[:, mask.to(model.device)].sum(1).double().cpu()
        all_tokens += int(mask.sum())
        rows = [compare(a, b, head, y) for a, b, y in pieces(student, stock, ids[:, 1:][judged])]
        columns = torch.cat(rows, 1).double().cpu()  # [4, judged tokens]
        names = text.documents[first : first + len(ids)].repeat_interleave(judged.sum(1))
        own = saved[:, :-1].cpu()[judged].double()[None]
        sums.index_add_(1, names, torch.cat([torch.ones_like(columns[:1]), columns, own]))
        first += len(ids)
    return Judged(*sums, level_shares=shares / all_tokens)


def pieces(student: Tensor, stock: Tensor, target: Tensor):
    on_device = (part.to(student.device) for part in stock.split(PIECE))
    targets = (part.to(student.device) for part in target.split(PIECE))
    return zip(student.split(PIECE), on_device, targets, strict=True)


def compare(student: Tensor, stock: Tensor, head: Tensor, target: Tensor) -> Tensor:
    """KL, agreement, loss and the full model's loss, `[4, tokens]`, of states `[tokens, hidden]`."""
    q, p = (logits(states, head).log_softmax(-1) for states in (student, stock))
    kl = (p.exp() * (p - q)).sum(-1)
    losses = [-x.gather(1, target[:, None]).squeeze(1) for x in (q, p)]
    return torch.stack([kl, (p.argmax(-1) == q.argmax(-1)).float(), *losses])


# ---------------------------------------------------------------- prices


Batches = Sequence[tuple[Tensor, Tensor]]  # ids and mask, [batch, seq]
Decide = Callable[[int, Tensor], Tensor]  # a layer and its MLP's input [batch, seq, hidden]: the levels [batch, seq]


def prices_for_saved(
    model: nn.Module, gates: Gates, batches: Batches, saved: Sequence[float], guesses: Sequence[float], rounds: int = 3
) -> tuple[list[float], list[float]]:
    """log λ at which this text saves these shares, and the shares it did save at the last round's prices."""

    def share(price: float) -> float:
        return saved_on(model, gates, batches, price)

    prices = find_prices(share, saved, guesses, rounds)
    return prices, [share(price) for price in prices]


def find_prices(
    share: Callable[[float], float], saved: Sequence[float], guesses: Sequence[float], rounds: int
) -> list[float]:
    """log λ at which `share(log λ)`, which rises, comes to these shares.

    Measures at the guesses, then where lines between the measured points cross the targets.
    """
    known: dict[float, float] = {}
    prices = list(guesses)
    for _ in range(rounds):
        for price in prices:
            if price not in known:
                known[price] = share(price)
        prices = [interpolate(sorted((share, price) for price, share in known.items()), target) for target in saved]
    return prices


@torch.no_grad()
def saved_on(
    model: nn.Module, gates: Gates, batches: Batches, log_lambda: float, decide: Decide | None = None
) -> float:
    """The share of MLP bytes that a text saves; cheaper than judging it."""
    shape = gates.shape
    total = tokens = 0.0
    with gated(model, gates, log_lambda, decide=decide) as levels:
        for ids, mask in batches:
            final_states(model, ids.to(model.device))
            chosen = F.one_hot(torch.stack(levels)[:, mask.to(model.device)], len(shape.levels)).double()
            total += float(shape.saved_share(chosen.mean(1))) * int(mask.sum())
            tokens += int(mask.sum())
    return total / tokens


def interpolate(points: list[tuple[float, float]], target: float) -> float:
    """Where the line through the two points next to it, by their first number, gives the target; extrapolates."""
    if len(points) == 1:
        return points[0][1]
    above = min(max(1, sum(share < target for share, _ in points)), len(points) - 1)
    (x0, y0), (x1, y1) = points[above - 1], points[above]
    step = (target - x0) / max(x1 - x0, 1e-6)
    return y0 + min(max(step, -3.0), 4.0) * (y1 - y0)


# ---------------------------------------------------------------- controls


def random_levels(level_shares: Tensor, device: Any, seed: int = 0) -> Callable[[int, Tensor], Tensor]:
    """Each layer deals its levels to random tokens, in the shares `[layers, levels]` in which the gates chose them."""
    generator = torch.Generator(device).manual_seed(seed)
    borders = level_shares.cumsum(1)[:, :-1].float().to(device)

    def decide(layer: int, x: Tensor) -> Tensor:
        draw = torch.rand(x.shape[:2], generator=generator, device=x.device)
        return torch.bucketize(draw, borders[layer], right=True)

    return decide


def static_levels(gates: Gates, damage: Tensor, saved: float) -> Callable[[int, Tensor], Tensor]:
    """One level for all tokens of a layer: the price at which `damage` `[layers, levels - 1]`, the mean that gates
    predict, saves at least this share with the fewest bytes over it."""
    shape = gates.shape
    gain = torch.tensor(shape.saved[1:], device=damage.device)
    low, high = -30.0, 20.0  # log λ

    def at(log_lambda: float) -> Tensor:
        return choose(damage.log(), torch.full_like(damage[:, 0], log_lambda), gain)  # [layers]

    for _ in range(50):
        middle = (low + high) / 2
        share = float(shape.saved_share(F.one_hot(at(middle), len(shape.levels)).float()))
        low, high = (middle, high) if share < saved else (low, middle)
    levels = at(high).tolist()
    return lambda layer, x: torch.full(x.shape[:2], levels[layer], device=x.device)


def whole_or_nothing(gates: Gates, log_lambda: float) -> Decide:
    """The gates' own decisions at price λ, with no width between the whole MLP and the last level."""
    shape = gates.shape
    gains = {leader: gain.clone() for leader, gain in shape.gains(gates.order.device).items()}
    for gain in gains.values():
        gain[:-1] = -torch.inf
    levels: dict[int, Tensor] = {}

    def decide(layer: int, x: Tensor) -> Tensor:
        leader = shape.leader_of(layer)
        if layer == leader:
            price = torch.full(x.shape[:2], log_lambda, device=x.device)
            levels[leader] = choose(gates.gates[str(leader)](x), price, gains[leader])
        return levels[leader]

    return decide


def drops_only(damage: Tensor) -> Tensor:
    """`damage` `[layers, levels - 1]` with which `static_levels` drops MLPs whole, or not at all."""
    dear = torch.full_like(damage, torch.inf)
    dear[:, -1] = damage[:, -1]
    return dear


class LensEntropy(nn.Module):
    """A perfect entropy probe: the entropy of the next-token distribution that the logit lens reads at its checkpoint."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.entropy = lambda hidden: lens_entropy(model, hidden)  # no parameter of the model is the probe's own

    def forward(self, hidden: Tensor) -> Tensor:  # [batch, seq, hidden]
        return self.entropy(hidden.flatten(0, 1)).view(hidden.shape[:2])


class Chance(nn.Module):
    """A probe that knows nothing: its risks are uniform random numbers."""

    def forward(self, hidden: Tensor) -> Tensor:  # [batch, seq, hidden]
        return torch.rand(hidden.shape[:-1], device=hidden.device)


@torch.no_grad()
def exits_for_saved(
    model: nn.Module, text: Text, probe: nn.Module, checkpoint: int, saved: Sequence[float], keep_last: int = 2
) -> list[float | None]:
    """The threshold at this only checkpoint under which plain exits save each share on this text, None where none can."""
    count = len(decoder(model).layers)
    window, risks = count - keep_last - checkpoint - 1, []
    with cascade_hooks(model, [probe], [checkpoint], [0.0], keep_last=keep_last) as decided:
        for ids, mask in text.batches:
            final_states(model, ids.to(model.device))
            risks.append(decided.risks[0][mask.to(model.device)])
    rates = torch.tensor([share * count / window for share in saved], dtype=torch.float64)
    ordered = torch.cat(risks).double().cpu()
    return [float(ordered.quantile(rate)) if rate <= 1 else None for rate in rates]


@torch.no_grad()
def mean_damage(model: nn.Module, gates: Gates, text: Text) -> Tensor:
    """The mean damage in nats that gates predict when nothing is narrowed, `[layers, levels - 1]`.

    A span's damage is shared evenly among its layers; it is infinite where nothing can narrow.
    """
    shape = gates.shape
    total = torch.zeros(shape.num_layers, len(shape.levels) - 1, device=model.device)
    real: list[Tensor] = []

    def watch(layer: int, x: Tensor) -> Tensor:
        leader = shape.leader_of(layer)
        if layer == leader:
            group, binds = shape.group(leader), len(shape.span(leader))
            total[group.start : group.stop] += gates.gates[str(layer)](x).exp()[real[-1]].sum(0) / binds
        return torch.zeros(x.shape[:2], dtype=torch.int64, device=x.device)

    tokens = 0
    with gated(model, gates, 0.0, decide=watch):
        for ids, mask in text.batches:
            real.append(mask.to(model.device))
            final_states(model, ids.to(model.device))
            tokens += int(mask.sum())
    outside = [layer for layer in range(shape.num_layers) if layer not in shape.window]
    total[outside] = torch.inf
    return total / tokens
