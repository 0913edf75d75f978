"""What every SEDAC command shares: its errors, its exit codes, and the lists it takes on the command line and line by line."""

import argparse
import itertools
import os
import sys
from collections.abc import Callable


class SedacError(Exception):
    """A user's mistake, or a fact about the machine, in one sentence that says what to do."""


def run(main: Callable[[], int | None]) -> None:
    """Run a script's `main` and exit: 0, its own code, 2 with one sentence for a `SedacError`, 130 on Ctrl-C."""
    try:
        code = main()
        sys.stdout.flush()
    except SedacError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # the reader (head, less) left: nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    sys.exit(code or 0)


def positive(text: str) -> int:
    """'500' -> 500: a whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


def lines_of(text: str) -> list[str]:
    """Its lines, such as the rows of a JSONL file. They end at "\n" alone: `str.splitlines` also cuts at U+2028, U+0085 and others, which
    a row may hold."""
    return text.split("\n")


def layer_list(text: str) -> tuple[int, ...]:
    """'7,14,21' -> (7, 14, 21): non-negative, strictly rising."""
    try:
        layers = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no comma-separated list of layers such as 7,14,21") from None
    if any(layer < 0 for layer in layers) or any(a >= b for a, b in itertools.pairwise(layers)):
        raise argparse.ArgumentTypeError(f"layers must be non-negative and rise, found {text}")
    return layers


def float_list(text: str) -> tuple[float, ...]:
    """'0.8,1.3,1.7' -> (0.8, 1.3, 1.7); 'inf' is a number, 'nan' is not."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = (float("nan"),)
    if any(value != value for value in values):
        raise argparse.ArgumentTypeError(f"{text!r} is no comma-separated list of numbers such as 0.8,1.3,1.7")
    return values
