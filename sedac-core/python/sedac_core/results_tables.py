"""Sections of docs/RESULTS.md: how each results file becomes lines of Markdown, and what the sections share."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

Record = dict[str, Any]
SECTIONS: dict[str, tuple[str, Callable[[list[Record]], list[str]]]] = {}  # by file name or pattern, as on the page


def section(name: str, title: str):
    """Register how results files of this name, or that match this pattern, become lines of Markdown."""

    def register(lines: Callable[[list[Record]], list[str]]):
        SECTIONS[name] = title, lines
        return lines

    return register


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def text(record: Record | None, unit: str = "", digits: int = 3) -> str:
    """A figure with its interval, `–` where there is none."""
    if record is None:
        return "–"
    value = f"{record['value']:.{digits}f}{unit}"
    return value if "low" not in record else f"{value} ({record['low']:.{digits}f}–{record['high']:.{digits}f})"


def find(records: Iterable[Record], **conditions: Any) -> Record | None:
    return next((r for r in records if all(r.get(key) == value for key, value in conditions.items())), None)


def cells(found: list[Record | None], columns: dict[str, tuple[str, str, int]]) -> list[str]:
    return [text(record, unit, digits) for record, (_, unit, digits) in zip(found, columns.values(), strict=True)]


def percent(record: Record) -> Record:
    return {**record, **{key: 100 * record[key] for key in ("value", "low", "high") if key in record}}
