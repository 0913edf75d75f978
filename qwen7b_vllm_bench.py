"""Step 6: HTTP load on a running OpenAI-compatible server, or on two in turn.

    python qwen7b_vllm_bench.py --url http://127.0.0.1:8000 --concurrency 8 --requests 64 --max-tokens 128
    python qwen7b_vllm_bench.py --url http://127.0.0.1:8000 --baseline-url http://127.0.0.1:8001 --ignore-eos

Requests are sent in blocks, each with --concurrency of them in flight; with --baseline-url both servers get every
block, in turn, so that ratios are paired. Tokens are those that the server reports, not pieces of the stream. Prints a
table and, as the last line, one JSON object. Exit code 1 if every request to a server failed.
"""

import argparse
import asyncio
import dataclasses
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
from tqdm import tqdm

from sedac_core import bench, cli
from sedac_core.cli import SedacError
from sedac_core.serving import get

BLOCKS = 8  # as many as there are requests for, so that throughput has a spread
SHARES = {"p50": 0.50, "p95": 0.95, "p99": 0.99}
PROMPTS = (
    "Explain in a few sentences why the sky is blue.",
    "Write a Python function that returns the n-th Fibonacci number, and explain how it works.",
    "List three differences between a list and a tuple in Python.",
    "A train leaves at 9:40 and arrives at 13:05. How long does the journey take? Think step by step.",
    "Summarise the plot of Romeo and Juliet for a ten-year-old.",
    "What is the difference between supervised and unsupervised learning?",
    "Translate into French: 'The library opens at eight in the morning.'",
    "Give me a recipe for a simple vegetable soup, with quantities.",
    "Describe the water cycle, from the sea and back to it.",
    "Why do computers use binary numbers?",
    "Write a short, polite e-mail that asks for a meeting to be moved to Thursday.",
    "Name the planets of the solar system and one fact about each of them.",
)


@dataclasses.dataclass
class Answer:
    """What one request came to: times in seconds from its start, or why it failed."""

    failure: str | None = None
    seconds: float = 0.0
    first: float | None = None  # until the first token; None without streaming
    gaps: list[float] = dataclasses.field(default_factory=list)  # [tokens - 1] between tokens
    tokens: int = 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--url", default="http://127.0.0.1:8000", help="the server (default: %(default)s)")
    option("--baseline-url", help="a second server, such as stock, that is measured in turn with the first")
    option("--model", help="model name to ask for (default: the first that the server names)")
    option("--concurrency", type=positive, default=4, help="requests in flight (default: %(default)s)")
    option("--requests", type=positive, default=32, help="requests that count, per server (default: %(default)s)")
    option("--warmup", type=int, default=2, help="requests before those, per server (default: %(default)s)")
    option("--max-tokens", type=positive, default=128, help="longest answer (default: %(default)s)")
    option(
        "--prompts",
        type=Path,
        help='text file with a prompt on each line, or .jsonl with {"prompt": …} (default: built in)',
    )
    option("--no-stream", action="store_true", help="ask for whole answers; no time to first token then")
    option("--ignore-eos", action="store_true", help="answers of exactly --max-tokens tokens (vLLM)")
    option("--seed", type=int, default=0, help="of the order of prompts and of sampling (default: %(default)s)")
    option("--timeout", type=float, default=600.0, help="seconds that one request may take (default: %(default)s)")
    option("--out", type=Path, help="write the results to this JSON file")
    return parser.parse_args()


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, found {text!r}")
    return int(text)


def main() -> int:
    args = parse_args()
    prompts = read_prompts(args.prompts) if args.prompts else list(PROMPTS)
    random.Random(args.seed).shuffle(prompts)
    urls = {"server": args.url.rstrip("/")}
    if args.baseline_url:
        urls["baseline"] = args.baseline_url.rstrip("/")
    models = {name: served_model(url, args.model) for name, url in urls.items()}
    blocks = asyncio.run(load(args, urls, models, prompts))

    results = {name: summary(blocks[name]) for name in urls}
    records = [record for name in urls for record in tidy(name, models[name], args, blocks[name], results[name])]
    if args.baseline_url and all(result["tokens_per_second"] for result in results.values()):
        rates = {name: [tokens(answers) / seconds for seconds, answers in blocks[name]] for name in urls}
        pairs = [(ours, base) for ours, base in zip(rates["server"], rates["baseline"], strict=True) if ours and base]
        if pairs:
            speedup = bench.spread([ours / base for ours, base in pairs])
            results["server"]["speedup"] = speedup
            records.append(
                {**conditions("server", models["server"], args), "metric": "speedup", **speedup, "unit": "x"}
            )
    if args.out:
        bench.results_file(args.out, records, servers=urls)
    print_table(results)
    print(json.dumps({**results, "models": models, "out": args.out and str(args.out)}, ensure_ascii=False))
    return int(any(result["requests"] == 0 for result in results.values()))


def read_prompts(path: Path) -> list[str]:
    """One prompt a line, or one JSON object with a `prompt` a line; empty lines do not count."""
    try:
        lines = [line for line in cli.lines_of(path.read_text(encoding="utf-8")) if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise SedacError(f"prompts {path} cannot be read as UTF-8 text ({error})") from None
    if path.suffix == ".jsonl":
        for i, line in enumerate(lines):
            try:
                lines[i] = json.loads(line)["prompt"]
            except (ValueError, KeyError, TypeError):
                lines[i] = None
            if not isinstance(lines[i], str):
                raise SedacError(f'line {i + 1} of {path} is no JSON object such as {{"prompt": "…"}}: {line[:80]}')
    if not lines:
        raise SedacError(f"{path} holds no prompts: write one on each line")
    return lines


def served_model(url: str, wanted: str | None) -> str:
    """The model to ask for; refuses a server that is not there, or that serves another model."""
    try:
        served = [model["id"] for model in json.loads(get(url, "/v1/models"))["data"]]
    except (ValueError, KeyError, TypeError):
        raise SedacError(f"{url} is no OpenAI-compatible server: its /v1/models is not a list of models") from None
    if not served or (wanted and wanted not in served):
        raise SedacError(
            f"{url} serves {', '.join(served) or 'no model'}, not {wanted or 'any'}: choose another --model"
        )
    return wanted or served[0]


async def load(args, urls, models, prompts) -> dict[str, list[tuple[float, list[Answer]]]]:
    """Blocks by server: the seconds that each took, and its answers."""
    sizes = block_sizes(args.requests, args.concurrency)
    blocks: dict[str, list[tuple[float, list[Answer]]]] = {name: [] for name in urls}
    session = aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=args.timeout), connector=aiohttp.TCPConnector(limit=0)
    )
    with tqdm(total=len(urls) * (args.warmup + args.requests), desc="requests") as bar:
        async with session:
            for name in urls:
                await block(session, urls[name], models[name], prompts, range(args.warmup), args, bar)
            start = 0
            for turn, size in enumerate(sizes):
                for name in list(urls) if turn % 2 == 0 else list(urls)[::-1]:
                    numbers = range(start, start + size)
                    blocks[name].append(await block(session, urls[name], models[name], prompts, numbers, args, bar))
                start += size
    return blocks


def block_sizes(requests: int, concurrency: int) -> list[int]:
    """Up to `BLOCKS` blocks of like size, none of fewer than two requests for each that may be in flight."""
    count = max(1, min(BLOCKS, requests // (2 * concurrency)))
    return [requests * (i + 1) // count - requests * i // count for i in range(count)]


async def block(session, url, model, prompts, numbers, args, bar) -> tuple[float, list[Answer]]:
    """Send the requests of these numbers, `--concurrency` at a time; both servers get the same for a number."""
    waiting, answers = iter(numbers), []

    async def worker() -> None:
        for number in waiting:
            body = {
                "model": model,
                "prompt": prompts[number % len(prompts)],
                "max_tokens": args.max_tokens,
                "temperature": 0,
                "seed": args.seed + number,
                "stream": not args.no_stream,
            }
            if not args.no_stream:
                body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
            if args.ignore_eos:
                body["ignore_eos"] = True
            answers.append(await ask(session, f"{url}/v1/completions", body))
            bar.update()

    start = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(args.concurrency)))
    return time.perf_counter() - start, answers


async def ask(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> Answer:
    """One request, timed; whatever goes wrong with it becomes its failure."""
    start = time.perf_counter()
    answer = Answer()
    try:
        async with session.post(url, json=body) as response:
            if response.status != 200:
                answer.failure = f"HTTP {response.status}: {(await response.text())[:200]}"
            elif body["stream"]:
                await read_stream(response, answer, start)
            else:
                answer.tokens = (await response.json())["usage"]["completion_tokens"]
    except TimeoutError:
        answer.failure = f"no whole answer in {session.timeout.total:g} s"
    except aiohttp.ClientError as error:
        answer.failure = f"{type(error).__name__}: {error}"
    except (ValueError, KeyError, TypeError) as error:
        answer.failure = f"the answer is not what OpenAI's protocol says ({error!r})"
    answer.seconds = time.perf_counter() - start
    return answer


async def read_stream(response: aiohttp.ClientResponse, answer: Answer, start: float) -> None:
    last = start
    done = reported = False
    async for data in events(response):
        now = time.perf_counter()
        if data == "[DONE]":
            done = True
            break
        piece = json.loads(data)
        if "error" in piece:
            answer.failure = f"error in the stream: {str(piece['error'])[:200]}"
            return
        usage = piece.get("usage")
        reported = reported or usage is not None
        # vLLM says with each piece how many tokens there are by now; elsewhere a piece with text counts as one.
        news = usage["completion_tokens"] - answer.tokens if usage else int(any(c["text"] for c in piece["choices"]))
        if news and piece["choices"]:
            if answer.first is None:
                answer.first, news_after_first = now - start, news - 1
            else:
                news_after_first = news
            # Tokens that come together share the time they took.
            answer.gaps += [(now - last) / news] * news_after_first
            last = now
        answer.tokens = usage["completion_tokens"] if usage else answer.tokens + news
    if not done:
        answer.failure = "the stream ended before [DONE]"
    elif not reported:
        answer.failure = "the server reported no usage, so its tokens cannot be counted"


async def events(response: aiohttp.ClientResponse) -> AsyncIterator[str]:
    """The data of server-sent events; lines of any length."""
    buffer = b""
    async for part in response.content.iter_any():
        *lines, buffer = (buffer + part).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip().decode()


def tokens(answers: list[Answer]) -> int:
    return sum(answer.tokens for answer in answers if answer.failure is None)


def summary(blocks: list[tuple[float, list[Answer]]]) -> dict[str, Any]:
    """Figures of one server over all blocks; throughput by block has a spread."""
    answers = [answer for _, block in blocks for answer in block]
    good = [answer for answer in answers if answer.failure is None]
    result: dict[str, Any] = {
        "requests": len(good),
        "failures": dict(Counter(answer.failure for answer in answers if answer.failure)),
        "tokens": tokens(good),
    }
    for key, values in {
        "ttft_ms": [answer.first for answer in good if answer.first is not None],
        "itl_ms": [gap for answer in good for gap in answer.gaps],
        "latency_ms": [answer.seconds for answer in good],
    }.items():
        result[key] = (
            {name: 1000 * bench.percentile(values, share) for name, share in SHARES.items()} if values else None
        )
    result["tokens_per_second"] = bench.spread([tokens(block) / seconds for seconds, block in blocks]) if good else None
    counts = [sum(answer.failure is None for answer in block) for _, block in blocks]
    result["requests_per_second"] = (
        bench.spread([count / blocks[i][0] for i, count in enumerate(counts)]) if good else None
    )
    return result


def conditions(name: str, model: str, args: argparse.Namespace) -> dict[str, Any]:
    known = {"system": name, "model": model, "phase": "serving", "concurrency": args.concurrency}
    return known | {"max_tokens": args.max_tokens, "stream": not args.no_stream}


def tidy(name, model, args, blocks, result) -> list[dict[str, Any]]:
    """The summary of one server as records."""
    known = conditions(name, model, args)
    failures = sum(result["failures"].values())
    records = [{"metric": "requests", "value": result["requests"]}, {"metric": "failures", "value": failures}]
    for key in ("ttft_ms", "itl_ms", "latency_ms"):
        stem = key.removesuffix("_ms")
        records += [
            {"metric": f"{share}_{stem}_ms", "value": value, "unit": "ms"}
            for share, value in (result[key] or {}).items()
        ]
    for key, unit in (("tokens_per_second", "tokens/s"), ("requests_per_second", "requests/s")):
        if result[key]:
            records.append({"metric": key, **result[key], "unit": unit})
    return [{**known, "unit": "", "repeats": len(blocks)} | record for record in records]


def print_table(results: dict[str, dict[str, Any]]) -> None:
    print(f"{'':<26}" + "".join(f"{name:>14}" for name in results))
    rows = {"requests": "requests", "tokens": "tokens"}
    for key, label in rows.items():
        print(f"{label:<26}" + "".join(f"{result[key]:>14}" for result in results.values()))
    for key, label in (("tokens_per_second", "tokens/s"), ("requests_per_second", "requests/s")):
        print(f"{label:<26}" + "".join(f"{cell(result[key], 'value'):>14}" for result in results.values()))
    for key, label in (("ttft_ms", "first token"), ("itl_ms", "between tokens"), ("latency_ms", "whole answer")):
        for share in SHARES:
            print(
                f"{label + ', ' + share + ', ms':<26}" + "".join(f"{cell(r[key], share):>14}" for r in results.values())
            )
    if "speedup" in results["server"]:
        speedup = results["server"]["speedup"]
        print(f"speed-up, tokens/s: {speedup['value']:.3f}x ({speedup['low']:.3f} to {speedup['high']:.3f})")
    for name, result in results.items():
        for reason, count in result["failures"].items():
            print(f"{count} failed on {name}: {reason}")


def cell(values: dict[str, float] | None, key: str) -> str:
    return "–" if values is None else f"{values[key]:.2f}"


if __name__ == "__main__":
    cli.run(main)
