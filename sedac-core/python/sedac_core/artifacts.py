"""The artefact: one folder that holds one trained SEDAC for one model, named by its manifest.json.

    manifest.json                  Manifest below
    sedac_probe_layer{l}.pth       the probe's state dict, read with weights_only=True
    hidden_states_layer{l}.pt      [num_tokens, hidden_dim]   collected, not needed to serve
    entropies_layer{l}.pt          [num_tokens], nats
    damage_layer{l}.pt             [num_tokens], nats: what an exit there costs, where step 1 measured it (--target damage)
    agreement_layer{l}.pt          [num_tokens], 1 where the most likely next token survives that exit, else 0
    documents.pt                   [num_tokens], int32: the document each token came from
    adapters.safetensors           policy `gates`: adapters, gates and the order of neurons (gates.py)

Every reader refuses what it cannot trust with a `SedacError` that says what was found and what to do.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .cli import SedacError
from .probe import LREProbe, probe_from_state

FORMAT = 1
TARGETS = ("entropy", "damage")  # what a probe estimates, both in nats
MAX_PROBE_BYTES = 256 << 20  # a probe is hidden × rank numbers: far less than this for any model


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """The shape of a model, as far as a probe depends on it."""

    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    vocab_size: int

    @classmethod
    def of(cls, config: Any) -> "Fingerprint":
        """Read it off a transformers config (or any object with these four attributes)."""
        return cls(*(getattr(config, field.name) for field in dataclasses.fields(cls)))

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(self).items())


@dataclasses.dataclass
class Manifest:
    """What manifest.json says. `collection`, `training` and `calibration` are the records of steps 1, 2 and 8."""

    model: str
    fingerprint: Fingerprint
    checkpoints: tuple[int, ...]
    policy: str = "hard"
    target: str = "entropy"  # of the probes: one of TARGETS; gates predict "marginal damage"
    rank: int | None = None
    thresholds: dict[int, float] = dataclasses.field(default_factory=dict)
    gamma: float = 0.0
    weights: tuple[float, ...] | None = None
    level: float = 0.5
    keep_last: int = 2
    collection: dict[str, Any] = dataclasses.field(default_factory=dict)
    training: dict[str, Any] = dataclasses.field(default_factory=dict)
    calibration: dict[str, Any] = dataclasses.field(default_factory=dict)
    gates: dict[str, Any] = dataclasses.field(default_factory=dict)  # policy `gates`: levels, ranks, λ by budget
    format: int = FORMAT

    def save(self, folder: Path) -> None:
        """Write manifest.json atomically."""
        data = dataclasses.asdict(self)
        data["thresholds"] = {str(layer): value for layer, value in sorted(self.thresholds.items())}
        text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
        with replacing(folder / "manifest.json") as temporary:
            temporary.write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        path = folder / "manifest.json"
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            known = {field.name for field in dataclasses.fields(cls)}
            if data["format"] != FORMAT:
                raise SedacError(f"{path} has format {data['format']}, this SEDAC reads format {FORMAT}: make it anew")
            data = {name: value for name, value in data.items() if name in known}
            if data.get("target", "entropy") not in (*TARGETS, "marginal damage"):
                raise SedacError(
                    f"{path} says that its probes estimate {data['target']}, this SEDAC knows {' and '.join(TARGETS)}: "
                    "train them again"
                )
            data["fingerprint"] = Fingerprint(**data["fingerprint"])
            data["checkpoints"] = tuple(int(layer) for layer in data["checkpoints"])
            data["thresholds"] = {int(layer): float(value) for layer, value in data.get("thresholds", {}).items()}
            data["weights"] = tuple(float(value) for value in data["weights"]) if data.get("weights") else None
            return cls(**data)
        except FileNotFoundError:
            raise SedacError(
                f"no manifest.json in {folder}: run collect_multilayer_data.py --save-dir {folder}"
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SedacError(f"{path} is no SEDAC manifest ({error!r}): run collect_multilayer_data.py again") from None

    def check_model(self, config: Any) -> None:
        """Refuse a model whose shape is not the one this artefact was made for."""
        found = Fingerprint.of(config)
        if found != self.fingerprint:
            raise SedacError(
                f"this artefact was made for {self.model} ({self.fingerprint}), not for a model with {found}: "
                "set SEDAC_PROBE_DIR to a folder made for this model"
            )


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; on success it replaces `path`, on any error `path` stays as it was."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        raise SedacError(f"cannot write {path} ({error}): what was there before is untouched") from error
    finally:
        temporary.unlink(missing_ok=True)


def save_tensor(tensor: Any, path: Path) -> None:
    """torch.save, atomically; also for a dict of tensors."""
    with replacing(path) as temporary:
        torch.save(tensor, temporary)


def hidden_path(folder: Path, layer: int) -> Path:
    return folder / f"hidden_states_layer{layer}.pt"


def entropy_path(folder: Path, layer: int) -> Path:
    return folder / f"entropies_layer{layer}.pt"


def damage_path(folder: Path, layer: int) -> Path:
    return folder / f"damage_layer{layer}.pt"


def agreement_path(folder: Path, layer: int) -> Path:
    return folder / f"agreement_layer{layer}.pt"


def documents_path(folder: Path) -> Path:
    return folder / "documents.pt"


def probe_path(folder: Path, layer: int) -> Path:
    return folder / f"sedac_probe_layer{layer}.pth"


def _load(path: Path, hint: str) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise SedacError(f"{path} is missing: {hint}") from None
    except (RuntimeError, ValueError, EOFError, KeyError, OSError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise SedacError(f"{path} cannot be read, it is truncated or no torch file ({error}): {hint}") from None


def load_tensor(path: Path, ndim: int) -> Tensor:
    """A collected tensor, memory-mapped."""
    hint = f"run collect_multilayer_data.py --save-dir {path.parent}"
    tensor = _load(path, hint)
    if not isinstance(tensor, Tensor) or tensor.ndim != ndim:
        raise SedacError(f"{path} holds no tensor of {ndim} dimension(s): {hint}")
    return tensor


@dataclasses.dataclass(frozen=True)
class Collected:
    """One layer's collected data: row i is the same token in all of them and in every layer's."""

    hidden: Tensor  # [num_tokens, hidden_dim], the model's dtype
    entropy: Tensor  # [num_tokens], float32, nats
    documents: Tensor  # [num_tokens], int32
    damage: Tensor | None = None  # [num_tokens], float32, nats, where it was asked for
    agreement: Tensor | None = None  # [num_tokens], uint8


def load_collected(folder: Path, layer: int, damage: bool = False) -> Collected:
    """Read one layer's data, and what its exits cost where asked; refuses files of different lengths, or that hold NaN."""
    hidden = load_tensor(hidden_path(folder, layer), 2)
    entropy = load_tensor(entropy_path(folder, layer), 1)
    documents = load_tensor(documents_path(folder), 1)
    again = f"run collect_multilayer_data.py --save-dir {folder} again"
    columns = {"hidden states": hidden, "entropies": entropy, "document numbers": documents}
    if damage:
        columns["damages"] = load_tensor(damage_path(folder, layer), 1)
        columns["agreements"] = load_tensor(agreement_path(folder, layer), 1)
    if len({len(tensor) for tensor in columns.values()}) > 1:
        *others, last = (f"{len(tensor)} {name}" for name, tensor in columns.items())
        raise SedacError(f"layer {layer} in {folder} has {', '.join(others)} and {last}: {again}")
    if not len(hidden):
        raise SedacError(f"layer {layer} in {folder} has no tokens: {again}")
    for name, tensor in columns.items():
        bad = sum(int((~part.isfinite()).sum()) for part in tensor.split(65536))
        if bad:
            raise SedacError(f"{bad} {name} of layer {layer} in {folder} are NaN or infinite: {again}")
    return Collected(hidden, entropy, documents, columns.get("damages"), columns.get("agreements"))


def held_out(documents: Tensor, seed: int, share: float = 0.1) -> Tensor:
    """The tokens `[num_tokens]` (bool) of the documents set apart from training, seeded.

    At least two documents where there are four, so that calibration can check itself on what it has not seen.

    Steps 2, 3 and 8 call it with the manifest's seed and so agree on the split.
    """
    names = documents.unique()
    if len(names) < 2:
        raise SedacError("the text is one document, and a held-out split needs two: take more samples or other text")
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
    return torch.isin(documents, names[order[: max(1, min(2, len(names) // 2), round(share * len(names)))]])


def unseen(training: dict[str, Any], dataset: str, count: int) -> Tensor:
    """The places, rising, of a dataset's `count` documents that a training of gates held out, and whatever it went on from;
    all if it never read it.

    Datasets are known by their file's name, because another machine keeps them in another folder.
    """
    every = torch.arange(count)
    if Path(dataset).name in {Path(trained).name for trained in training.get("datasets", [])}:
        return every[held_out(every, training["seed"], training["held_out_share"])]
    return unseen(training["start"], dataset, count) if "start" in training else every


def load_probe(folder: Path, layer: int, hidden_size: int, rank: int | None = None) -> LREProbe:
    """One probe, checked against the model's hidden size and, if given, a rank."""
    path = probe_path(folder, layer)
    train = f"Train it (python train_multilayer_probes.py --layers {layer}) or set SEDAC_PROBE_DIR."
    if not path.is_file():
        raise SedacError(f"SEDAC probe missing for layer {layer}: {path}. {train}")
    if path.stat().st_size > MAX_PROBE_BYTES:
        raise SedacError(f"SEDAC probe for layer {layer} is too large to be one: {path}. {train}")
    state = _load(path, train)
    try:
        probe = probe_from_state({name: tensor.clone() for name, tensor in state.items()})
    except (ValueError, AttributeError) as error:
        raise SedacError(f"SEDAC probe for layer {layer} is unusable: {path}: {error}. {train}") from None
    if probe.hidden_size != hidden_size:
        raise SedacError(
            f"SEDAC probe for layer {layer} reads hidden size {probe.hidden_size}, the model has {hidden_size}: {path} "
            f"is another model's. {train}"
        )
    if rank is not None and probe.rank != rank:
        raise SedacError(
            f"SEDAC probe for layer {layer} has rank {probe.rank}, SEDAC_PROBE_RANK asks for {rank}: {path}. {train}"
        )
    return probe


def check_layers(layers: tuple[int, ...], num_hidden_layers: int, keep_last: int = 0) -> None:
    """Refuse checkpoints that are not layers of the model, or after which nothing is left to skip."""
    if not layers:
        raise SedacError("no checkpoints were given: name at least one layer")
    if any(a >= b for a, b in itertools.pairwise(layers)) or layers[0] < 0:
        raise SedacError(f"checkpoints must rise, found {','.join(map(str, layers))}")
    last = num_hidden_layers - keep_last - 2
    if layers[-1] > last:
        kept = f" and its last {keep_last} always run whole" if keep_last else ""
        raise SedacError(
            f"checkpoint {layers[-1]} leaves no layer to skip: the model has layers 0 to {num_hidden_layers - 1}"
            f"{kept}, so the last checkpoint is at most {last}"
        )


def disk_space(folder: Path, needed: int) -> None:
    """Refuse long work whose result, `needed` bytes, would not fit."""
    folder.mkdir(parents=True, exist_ok=True)
    stat = os.statvfs(folder)
    free = stat.f_bavail * stat.f_frsize
    if free < needed:
        raise SedacError(f"{folder} has {free / 2**30:.1f} GiB free and {needed / 2**30:.1f} GiB are needed: make room")
