"""A fuzzer for the Python border of the Rust core: hostile arguments, and whatever is answered must be right.

    python sedac-core/tests/fuzz_border.py --seconds 60 --seed 1

Arrays of any type, shape and layout (transposed, reversed, broadcast, unaligned, byte-swapped, read-only, fields of packed
records) and other objects go where arrays and numbers belong. A call may raise TypeError, ValueError or OverflowError;
a panic, a crash, another error or an answer unlike the readable twin's ends the run with the number of the call.
`--start N --calls 1` and the same seed repeat it. test_rust.py runs it for a while.
"""

import argparse
import faulthandler
import itertools
import time
import warnings

import numpy as np
import torch

from sedac_core import _rust, calibration
from sedac_core.cascade import decide

REFUSALS = (TypeError, ValueError, OverflowError)
TYPES = (
    "<f4",
    "<f4",
    "<f4",
    "<f4",
    "<f2",
    "<u2",
    ">f4",
    ">u2",
    "<f8",
    "<i4",
    "<i8",
    "?",
    "O",
    "c8",
    "V4",
    "U3",
    "M8[s]",
)
VALUES = (0.0, -0.0, 0.5, 0.8, 1.0, 2.0, 1e-45, 1e-40, 3.4e38, -1.0, float("inf"), float("-inf"), float("nan"))
OBJECTS = (None, 0, 1, -1, 2**64, 10**30, True, "0.5", b"1", object(), [], [[1.0]], {}, (0.5, "x"), float("nan"))


class Refused(Exception):
    """The border said no."""


def ask(function, *arguments):
    """What the core answers; only here may it refuse."""
    try:
        return function(*arguments)
    except REFUSALS as refusal:
        message = str(refusal)
        assert "ndarray' object is not an instance of 'ndarray'" not in message, "says nothing"
        raise Refused(message) from refusal


class Hostile:
    """Arguments for one call."""

    def __init__(self, seed: int, call: int):
        self.rng = np.random.default_rng([seed, call])

    def pick(self, options):
        return options[self.rng.integers(len(options))]

    def chance(self, share: float) -> bool:
        return self.rng.random() < share

    def number(self):
        return self.pick(OBJECTS) if self.chance(0.02) else self.pick(VALUES)

    def share(self):
        return self.number() if self.chance(0.1) else self.pick((0.25, 0.5, 0.7))

    def numbers(self, count: int):
        """Usually as many numbers as belong there, in one of the ways of writing them."""
        if self.chance(0.03):
            return self.pick(OBJECTS)
        values = [self.number() for _ in range(count + (self.chance(0.03) and self.pick((-1, 1))))]
        values = [abs(value) if isinstance(value, float) and self.chance(0.95) else value for value in values]
        try:
            return self.pick((list, tuple, np.float32, np.float64))(values)
        except REFUSALS:
            return values

    def array(self, shape: tuple[int, ...], kind: str | None = None):
        """Usually an array of this shape."""
        if self.chance(0.02):
            return self.pick(OBJECTS)
        if self.chance(0.04):
            shape = tuple(self.rng.integers(0, 4, self.rng.integers(0, 4)))
        kind = np.dtype(self.pick(TYPES) if kind is None or self.chance(0.05) else kind)
        if kind.kind == "f":
            with np.errstate(over="ignore"):
                array = self.rng.choice(np.float64(VALUES), shape).astype(kind)
        elif kind.kind in "ui":
            array = self.rng.integers(0, 2**15, shape).astype(kind)
        else:
            array = np.zeros(shape, kind)
        layout = self.rng.integers(10)
        if array.ndim == 0 or layout == 0 or array.dtype.hasobject:
            return array
        if layout == 1:
            return np.asfortranarray(array)
        if layout == 2:
            return np.repeat(array, 2, axis=-1)[..., ::2]
        if layout == 3:
            return np.flip(np.flip(array).copy())
        if layout == 4:
            return np.broadcast_to(array[:1], shape) if len(array) else array
        if layout == 5:  # unaligned: one byte into its memory
            raw = np.zeros(array.nbytes + 1, np.uint8)
            moved = raw[1:].view(array.dtype).reshape(array.shape) if array.nbytes else array
            moved[...] = array
            return moved
        if layout == 6:  # strides that are no multiple of the element's size
            record = np.zeros(array.shape, [("pad", "u1"), ("field", array.dtype)])
            record["field"] = array
            return record["field"]
        if layout == 7:
            array.flags.writeable = False
        return array

    def shape(self) -> tuple[int, int]:
        return self.pick((0, 1, 1, 2, 3, 3, 4)), self.pick((0, 1, 2, 7, 8, 9, 17, 33))

    def weights(self, checkpoints: int):
        return None if self.chance(0.5) else self.numbers(checkpoints)


def widened(risks: np.ndarray) -> np.ndarray:
    return (risks.astype(np.uint32) << 16).view(np.float32) if risks.dtype == np.uint16 else risks.astype(np.float32)


def same_bits(found: np.ndarray, expected: torch.Tensor) -> None:
    assert np.array_equal(found.view(np.int32), expected.to(torch.float32).numpy().view(np.int32)), (found, expected)


def evaluate(hostile: Hostile) -> None:
    checkpoints, tokens = hostile.shape()
    risks = hostile.array((checkpoints, tokens), hostile.pick(("<f4", "<f2", "<u2")))
    thresholds, weights = hostile.numbers(checkpoints), hostile.weights(checkpoints)
    gamma, level = hostile.share(), hostile.share()
    before = risks.copy() if isinstance(risks, np.ndarray) else None
    soft, out = hostile.chance(0.5), None
    if soft:
        exits, confidence, width, unusable = ask(_rust.evaluate_soft, risks, thresholds, weights, gamma, level)
    else:
        if hostile.chance(0.5):
            out = (hostile.array((tokens,), "<i4"), hostile.array((tokens,), "<f4"))
            if hostile.chance(0.1) and isinstance(risks, np.ndarray) and risks.ndim:
                out = (out[0], risks[0]) if len(risks) else (out[0],)
        exits, confidence = ask(_rust.evaluate, risks, thresholds, weights, gamma, level, out)
    assert before.tobytes() == risks.tobytes()
    weights = None if weights is None else np.float32(list(weights)).ravel()
    twin = decide(widened(risks), np.float32(list(thresholds)).ravel(), gamma, weights, level)
    assert np.array_equal(exits, twin.exit_checkpoint)
    same_bits(confidence, twin.confidence)
    if soft:
        same_bits(width, twin.width)
        usable = (widened(risks) >= 0) & (widened(risks) < np.inf)
        assert unusable == (~usable).sum()


def sweep(hostile: Hostile) -> None:
    checkpoints, tokens = hostile.shape()
    risks = hostile.array((checkpoints, tokens), hostile.pick(("<f4", "<f2", "<u2")))
    thresholds = hostile.array((2, checkpoints), "<f4")
    if isinstance(thresholds, np.ndarray) and thresholds.dtype == np.float32:
        thresholds = np.abs(thresholds)
        thresholds = np.where(np.isnan(thresholds), np.float32(1), thresholds)
    gammas, levels = [hostile.share() for _ in range(hostile.pick((0, 1, 2)))], [hostile.share()]
    weights, target = hostile.weights(checkpoints), None
    if hostile.chance(0.5):
        target = hostile.array((checkpoints, tokens), "<f4")
    skipped = None if hostile.chance(0.5) else hostile.numbers(checkpoints)
    rates, saved, mean = ask(_rust.sweep, risks, thresholds, gammas, levels, weights, target, skipped)
    assert saved.shape == mean.shape == rates.shape[:3]
    weights = None if weights is None else np.float32(list(weights)).ravel()
    for (i, row), (j, gamma), (k, level) in itertools.product(*map(enumerate, (thresholds, gammas, levels))):
        assert np.array_equal(rates[i, j, k], decide(widened(risks), row, gamma, weights, level).exit_rates())


def certify(hostile: Hostile) -> None:
    means = hostile.array((hostile.pick((0, 1, 3)), hostile.pick((0, 1, 4))), "<f8")
    if isinstance(means, np.ndarray) and means.dtype == np.float64 and hostile.chance(0.8):
        means = np.nan_to_num(means, posinf=1).clip(0, 1)
    samples, tolerated, delta = hostile.pick((0, 1, 100, 10**6, 2**63, -1, 0.5)), hostile.share(), hostile.share()
    certified, p_values = ask(_rust.certify, means, samples, tolerated, delta)
    assert certified.shape == p_values.shape == means.shape and (p_values <= 1).all() and (p_values >= 0).all()
    if samples <= 10**6:
        assert np.allclose(p_values, calibration.certify(means, samples, tolerated, delta)[1], rtol=1e-5, atol=1e-12)


def histogram(hostile: Hostile) -> None:
    one, other = _rust.RiskHistogram(), _rust.RiskHistogram()
    counted = 0
    for into in (one, other):
        risks = hostile.array((hostile.pick((0, 1, 9)),), "<f4")
        ask(into.add, risks)
        counted += len(risks)
    ask(one.merge, hostile.pick((other, other, other, None, one)))
    assert one.total in (counted, 2 * (counted - other.total))
    ask(one.quantile, hostile.share())


def controller(hostile: Hostile) -> None:
    rates, initial = hostile.numbers(2), hostile.numbers(2)
    if hostile.chance(0.9):
        rates, initial = [0.2, 0.6], [1.0, 1.0]
    thresholds = ask(
        _rust.ThresholdController, rates, hostile.share(), hostile.pick((1, 2, 100, 0, -1, 2**64)), initial
    )
    for _ in range(4):
        if hostile.chance(0.5):
            ask(thresholds.observe, hostile.pick((0, 1, 1, 2, -1)), hostile.array((hostile.pick((0, 1, 9)),), "<f4"))
        if hostile.chance(0.5):
            ask(thresholds.publish, hostile.numbers(2))
        thresholds.update()
        assert all(threshold >= 0 for threshold in thresholds.thresholds())


TARGETS = (evaluate, evaluate, evaluate, sweep, certify, histogram, controller)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="number of the first call")
    parser.add_argument("--calls", type=int, default=10**12)
    parser.add_argument("--seconds", type=float, default=60)
    arguments = parser.parse_args()
    faulthandler.enable()  # says where, should the core crash
    warnings.simplefilter("ignore")
    np.seterr(all="ignore")
    answered = {target.__name__: 0 for target in TARGETS}
    until = time.monotonic() + arguments.seconds
    for call in range(arguments.start, arguments.start + arguments.calls):
        if time.monotonic() > until:
            break
        hostile = Hostile(arguments.seed, call)
        target = hostile.pick(TARGETS)
        try:
            target(hostile)
            answered[target.__name__] += 1
        except Refused:
            pass
        except BaseException:
            print(f"call {call} of seed {arguments.seed}, {target.__name__}:", flush=True)
            raise
    assert arguments.calls < 1000 or all(answered.values()), answered
    print(f"{call + 1 - arguments.start} calls, answered and right: {answered}")


if __name__ == "__main__":
    main()
