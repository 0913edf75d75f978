"""What the documents say: links lead somewhere, the map of modules has them all, and figures are those of docs/results."""

import fnmatch
import functools
import re
from pathlib import Path

import pytest

from sedac_core.bench import read_results

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
QUOTING = pytest.mark.parametrize("page", ["README.md", "docs/figures.md"])


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_the_map_of_modules_has_them_all():
    named = set(re.findall(r"`([\w*]+\.py)`", (ROOT / "docs/architecture.md").read_text()))
    modules = {path.name for path in (ROOT / "sedac-core/python/sedac_core").glob("*.py")} - {"__init__.py"}
    left = {module for module in modules if not any(fnmatch.fnmatch(module, name) for name in named)}
    assert not left, "docs/architecture.md has no room for these"
    assert all(fnmatch.filter(modules, name) for name in named), "docs/architecture.md names what is not there"


@QUOTING
def test_speeds_of_a_cascade_are_those_of_the_records(page):
    for label, *cells in rows_of(page, r"\| \| 3B, none exit"):
        step, last = step_of(label), {"keep_last": 0} if "to the last layer" in label else {}
        file = "gpu_h200_to_last" if last else "gpu_h200_captured" if step["captured"] else "gpu_h200"
        step |= last | {"metric": "replay_speedup" if "captured step" in label else "speedup", "pattern": "random"}
        cases = [(model, rate) for model in ("qwen2.5-3b", "qwen2.5-7b") for rate in (0, 0.5, 1)]
        for cell, (model, rate) in zip(cells, cases, strict=True):
            if cell != "–":
                assert cell == f"{value(file, model=model, exit_rate=rate, **step):.2f}", label


@QUOTING
def test_speeds_of_gates_are_those_of_the_records(page):
    for label, *cells in rows_of(page, r"\| \| 3B, widths"):
        step = step_of(label)
        rates = {"nothing": 0, "40 % of tokens": 0.4, "half of the tokens": 0.5, "all at": 1}
        (rate,) = [rate for words, rate in rates.items() if words in label]
        saved = label.endswith("MLP bytes saved")
        metric, unit = ("saved_bytes", " %") if saved else ("speedup", "")
        cases = [(model, kind) for model in ("qwen2.5-3b", "qwen2.5-7b") for kind in ("width", "bits")]
        for cell, (model, kind) in zip(cells, cases, strict=True):
            if cell == "–":
                continue
            file = f"gpu_gates_{'h200' if step['phase'] == 'decode' else 'h100'}{'_bits' if kind == 'bits' else ''}"
            case = {"model": model, "narrowed": rate, kind: level_of(label, kind), **step}
            found = [value(file, metric=metric, **case)]
            if step["phase"] == "decode":
                found.insert(0, value(file, metric=f"replay_{metric}", recording="predicated", **case))
            texts = [f"{100 * one:.0f}{unit}" if saved else f"{one:.2f}" for one in found]
            assert cell == texts[0] + "".join(f" ({text})" for text in texts[1:]), label


@QUOTING
def test_what_is_left_of_answers_is_what_the_records_say(page):
    (head,) = re.findall(r"^\| (?:gates in bits|bits, GSM8K).*", (ROOT / page).read_text(), re.MULTILINE)
    for row in rows_of(page, re.escape(head)):
        for title, cell in zip(cells_of(head), row, strict=True):
            system = "entropy_plain" if "exits" in title else "sedac"
            text = "wikitext2" if "wikitext-2" in title else "gsm8k"
            told = re.fullmatch(r"(0\.\d{4}|\d\.\d\d), ([\d.]+) % at ([\d.]+) %", cell)
            known = {"text": text, "system": system}
            file = "quality_coder_0.5b_bits" if "bits" in title else "quality_coder_0.5b"
            saved = {r["saved_bytes"] for r in records(file) if known.items() <= r.items() and r["metric"] == "kl"}
            (saved,) = [share for share in saved if f"{100 * share:.1f}" == told[3]]
            found = [value(file, metric=metric, saved_bytes=saved, **known) for metric in ("kl", "top1_agreement")]
            digits = len(told[1].partition(".")[2])
            assert told.group(1, 2) == (f"{found[0]:.{digits}f}", f"{100 * found[1]:.1f}"), (title, cell)


def cells_of(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_free_running_answers_are_those_of_the_records():
    for saved, solved, same in rows_of("docs/figures.md", r"\| MLP bytes saved on the generated tokens"):
        share, kind = re.fullmatch(r"([\d.]+) %, in (bits|widths)", saved).groups()
        file = "quality_coder_0.5b_bits" if kind == "bits" else "quality_coder_0.5b_own"
        known = {"text": "gsm8k", "mode": "free_running", "system": "sedac", "skips": "generated"}
        found = [r for r in records(file) if known.items() <= r.items() and f"{100 * r['saved_bytes']:.1f}" == share]
        found = {r["metric"]: r for r in found}
        points = [signed(text) for text in re.fullmatch(r"(.+) \((.+) to (.+)\)", solved).groups()]
        assert points == [round(100 * found["accuracy_change"][key], 1) for key in ("value", "low", "high")], saved
        assert same == f"{100 * found['same_answer']['value']:.1f} %"


def signed(text: str) -> float:
    """ "0.6 points more" or "0.2 less" as a number; "the same" is none."""
    number, *_, way = text.split()
    return 0.0 if text == "the same" else float(number) * {"more": 1, "less": -1}[way]


def rows_of(page: str, head: str) -> list[list[str]]:
    """The cells of each row of the page's table whose first line starts so."""
    (rows,) = re.findall(rf"^{head}.*\n\| ---.*\n((?:\|.*\n)+)", (ROOT / page).read_text(), re.MULTILINE)
    return list(map(cells_of, rows.splitlines()))


def step_of(label: str) -> dict:
    """What a row's label says of its step, as records say it."""
    tokens = int(re.search(r"(?:decode|prefill|prompts of),? ([\d,]*\d) tokens?", label)[1].replace(",", ""))
    if "decode" in label:
        return {"phase": "decode", "batch": tokens, "captured": None}
    prompts = re.search(r"(\d+) prompts", label)
    step = {"phase": "prefill", "tokens": tokens, "prompts": prompts and int(prompts[1])}
    gates = any(word in label for word in ("narrows", "neurons"))
    return step | {"captured": (2048 if gates else 8192) if "captured as well" in label else None}


def level_of(label: str, kind: str) -> float:
    """The narrowest level of tokens that narrow by a row's label, in the widths or the bits that records name."""
    if kind == "bits":
        return float(found[1]) if (found := re.search(r"(\d) bits", label)) else 4.0
    return 0.35 if "35 % of the neurons" in label else 0.0


@functools.cache
def records(name: str) -> list[dict]:
    return read_results(ROOT / "docs/results" / f"{name}.json")["records"]


def value(name: str, **wanted) -> float:
    """Of the one record of SEDAC's with these fields; of runs that are not the usual ones only where `wanted` says so."""
    wanted = dict.fromkeys(("captured", "keep_last", "gathered", "prompts")) | {"system": "sedac"} | wanted
    found = {r["value"] for r in records(name) if all(r.get(key) == wanted[key] for key in wanted)}
    assert len(found) == 1, (name, wanted, found)
    return found.pop()
