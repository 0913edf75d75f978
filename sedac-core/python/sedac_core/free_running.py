"""What a model writes when it goes on from its own words, also under gates: the judge that teacher forcing is not.

`generate` continues a batch of prompts, greedily or sampled, with skips in force from the prompt on or only from the
first generated token. Word problems whose answer is one number judge it, or programming problems (code_problems.py): the full
model's answers beside those under gates, problem by problem, with 95 % intervals from drawing problems anew.
"""

import contextlib
import dataclasses
import json
import re
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from .cli import SedacError, lines_of
from .code_problems import CodeProblem
from .collection import decoder
from .gated_model import fp32_stream, logits
from .gates import Gates
from .quality import bootstrapped

LOOK_EVERY = 16  # steps between looks at which answers are done: a look waits for the device
INSTRUCTION = "Reason step by step, and end with a line that holds only #### and the answer as a number."
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
LAST_LINE = re.compile(r"####[^\n]*\d[^\n]*\n")  # the end of a worked answer, once its line is complete

Under = AbstractContextManager[list[Tensor]]  # `gated(…)`: yields the latest pass's levels by layer, [rows, seq] each


# ---------------------------------------------------------------- generation


@torch.inference_mode()
def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    ends: set[int],
    sample: bool = False,
    under: Under | None = None,
    from_prompt: bool = False,
    watch: Callable[[list[Tensor], Tensor, Tensor], None] | None = None,
    done: Callable[[list[list[int]]], list[bool]] | None = None,
) -> list[list[int]]:
    """The tokens with which a model goes on from each prompt, up to and with one of `ends`, at most `new_tokens`.

    Greedy, or sampled from the model's own distribution (torch's global seed). `under` is entered after the prompts
    have been computed, or before (`from_prompt`); `watch(levels, rows, alive)` sees every generated token that the
    model reads again: the levels by layer `[running, 1]`, the prompt of each running row, and which rows count, both
    `[running]`. `done` looks at the tokens of each running row every 16 steps and says which need not go on. Rows that
    have ended leave the batch then.
    """
    ids, mask = left_padded(prompts, model.device)
    final = torch.tensor(sorted(ends), device=model.device)
    rows = torch.arange(len(prompts), device=model.device)
    alive = torch.ones_like(rows, dtype=torch.bool)
    written = torch.full((len(prompts), new_tokens), -1, device=model.device)  # -1: nothing
    stack, head = decoder(model), model.get_output_embeddings().weight
    position, cache, levels = (mask.cumsum(1) - 1).clamp_min(0), None, []

    with contextlib.ExitStack() as skips:
        for step in range(new_tokens):
            if under is not None and step == (0 if from_prompt else 1):
                levels = skips.enter_context(under)
            with fp32_stream(model):
                out = stack(
                    input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True
                )
            cache = out.past_key_values
            if step and watch is not None:
                watch(levels, rows, alive)
            scores = logits(out.last_hidden_state[:, -1].to(model.dtype), head)  # [running, vocabulary]
            token = scores.softmax(-1).multinomial(1).squeeze(1) if sample else scores.argmax(-1)
            written[rows, step] = torch.where(alive, token, -1)
            alive = alive & ~torch.isin(token, final)
            position = position[:, -1:] + 1
            if step % LOOK_EVERY == LOOK_EVERY - 1:
                if done is not None:
                    found = [[token for token in row if token >= 0] for row in written[rows].tolist()]
                    alive = alive & ~torch.tensor(done(found), device=model.device)
                kept = alive.nonzero().squeeze(1)
                if not len(kept):
                    break
                if len(kept) < len(rows):
                    rows, alive, token, mask, position = (t[kept] for t in (rows, alive, token, mask, position))
                    cache.batch_select_indices(kept)
            ids, mask = token[:, None], F.pad(mask, (0, 1), value=1)
    return [[token for token in row if token >= 0] for row in written.tolist()]


def left_padded(prompts: Sequence[Sequence[int]], device: Any) -> tuple[Tensor, Tensor]:
    """Token ids and mask, `[prompts, longest]` int64; padding stands on the left, so that all end together."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    return ids, (torch.arange(longest, device=device) >= longest - lengths[:, None]).long()


def chat_prompt(tokenizer: Any, messages: Sequence[dict[str, str]]) -> str:
    """The text that a chat model answers; `SedacError` if it has no chat template."""
    if not tokenizer.chat_template:
        raise SedacError("the model has no chat template: give one that was made to chat")
    return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text that holds all its special tokens already."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def end_tokens(model: nn.Module, tokenizer: Any) -> set[int]:
    """The tokens that end an answer: the tokenizer's, the generation config's, and what the chat template puts there."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    several = configured if isinstance(configured, list) else [configured]
    ends = {tokenizer.eos_token_id, *several} - {None}
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "(answer)"}]
        after = token_ids(tokenizer, tokenizer.apply_chat_template(turn, tokenize=False).partition("(answer)")[2])
        ends |= set(after[:1]) & set(tokenizer.all_special_ids)
    return ends


def write_on(model: nn.Module, tokenizer: Any, texts: Sequence[str], new_tokens: int, sample: bool) -> list[str]:
    """Each text, such as a `chat_prompt`, with what the model goes on with, at most `new_tokens` long."""
    written = generate(
        model, [token_ids(tokenizer, text) for text in texts], new_tokens, end_tokens(model, tokenizer), sample
    )
    return [text + tokenizer.decode(ids) for text, ids in zip(texts, written, strict=True)]


# ---------------------------------------------------------------- problems


class Problem(Protocol):
    """What a model is asked, and how its answer is judged."""

    end: ClassVar[re.Pattern]  # what an answer ends with
    shots: ClassVar[int]  # worked examples that a prompt has by default; 0 where problems of this kind have none

    def messages(self, examples: Sequence[Any]) -> list[dict[str, str]]:
        """The conversation that asks it, after worked examples of its kind."""

    def final(self, text: str) -> Hashable:
        """What the answer comes to."""

    def solved(self, text: str) -> bool:
        """Whether that is right."""


@dataclasses.dataclass(frozen=True)
class WordProblem:
    """A question, a worked answer that ends with '#### 72', and that number."""

    end: ClassVar[re.Pattern] = LAST_LINE
    shots: ClassVar[int] = 4
    question: str
    worked: str
    number: Decimal

    def messages(self, examples: Sequence["WordProblem"]) -> list[dict[str, str]]:
        turns = [
            turn
            for example in examples
            for turn in zip(("user", "assistant"), (example.question, example.worked), strict=True)
        ]
        asked = self.question if examples else f"{self.question}\n{INSTRUCTION}"
        return [{"role": role, "content": content} for role, content in [*turns, ("user", asked)]]

    def final(self, text: str) -> Decimal | None:
        return final_number(text)

    def solved(self, text: str) -> bool:
        return final_number(text) == self.number


def read_problems(path: Path | str) -> list[WordProblem] | list[CodeProblem]:
    """The rows of a JSONL file with a question and an answer, as GSM8K has them, or with a prompt and tests, in its order."""
    try:
        rows = [json.loads(line) for line in lines_of(Path(path).read_text(encoding="utf-8")) if line.strip()]
        if rows and "tests" in rows[0]:
            return [CodeProblem.checked(row["prompt"], row["tests"]) for row in rows]
        problems = []
        for row in rows:
            worked = re.sub(r"<<.*?>>", "", row["answer"])  # GSM8K's notes for a calculator
            if "####" not in worked or (number := final_number(worked)) is None:
                raise ValueError(f"the answer {row['answer'][-40:]!r} ends with no number after ####")
            problems.append(WordProblem(row["question"], worked, number))
    except (OSError, ValueError, KeyError, TypeError, SyntaxError) as error:
        raise SedacError(
            f"{path} holds no problems ({error!r}): give a JSONL file with a question and an answer that ends "
            "with #### and a number in each row, or with a prompt, the head of a Python function, and tests"
        ) from None
    if not problems:
        raise SedacError(f"{path} holds no problems: it is empty")
    return problems


def final_number(text: str) -> Decimal | None:
    """The number that an answer ends with: the first after ####, else the last in \\boxed{}, else the last of all."""
    _, marked, rest = text.partition("####")
    boxed = re.findall(r"\\boxed\{([^}]*)\}", text)
    found = NUMBER.findall(rest)[:1] if marked else NUMBER.findall(boxed[-1] if boxed else text)[-1:]
    return Decimal(found[0].replace(",", "")) if found else None


def problem_prompt(tokenizer: Any, problem: Problem, examples: Sequence[Problem]) -> list[int]:
    """The tokens of a problem in the chat template, after worked examples, or with an instruction if there are none."""
    return token_ids(tokenizer, chat_prompt(tokenizer, problem.messages(examples)))


@dataclasses.dataclass
class Answers:
    """What a model wrote, problem by problem, and what its generated tokens saved."""

    texts: list[str]  # up to what ends an answer, without what may follow it
    tokens: Tensor  # [problems] float64, generated tokens
    reread: Tensor  # [problems] float64, those that the model read again: all but the last
    saved: Tensor  # [problems] float64, share of MLP bytes not read, summed over `reread`; gates counted against

    def saved_share(self) -> float:
        return float(self.saved.sum() / self.reread.sum())


def answer_problems(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    batch_size: int,
    end: re.Pattern,
    gates: Gates | None = None,
    under: Callable[[], Under] | None = None,
    from_prompt: bool = False,
) -> Answers:
    """Greedy answers to prompts, each up to the first match of `end`, under gates if `under` makes such a context; prompts
    of like length run together."""
    count = len(prompts)
    texts, tokens = [""] * count, torch.zeros(count, dtype=torch.float64)
    reread, saved = (torch.zeros(count, dtype=torch.float64, device=model.device) for _ in range(2))
    ends = end_tokens(model, tokenizer)

    def finished(written: list[list[int]]) -> list[bool]:
        return [end.search(text) is not None for text in tokenizer.batch_decode(written)]

    order = sorted(range(count), key=lambda i: -len(prompts[i]))
    for start in tqdm(range(0, count, batch_size), "answering", unit="batch", leave=False):
        chosen = order[start : start + batch_size]
        places = torch.tensor(chosen, device=model.device)

        def watch(levels: list[Tensor], rows: Tensor, alive: Tensor, places: Tensor = places) -> None:
            reread.index_add_(0, places[rows], alive.double())
            if levels and gates is not None:
                one_hot = F.one_hot(torch.stack(levels)[:, :, 0], len(gates.shape.levels))  # [layers, running, levels]
                share = gates.shape.saved_share(one_hot.transpose(0, 1).float())  # [running]
                saved.index_add_(0, places[rows], share.double() * alive)

        written = generate(
            model, [prompts[i] for i in chosen], new_tokens, ends, under=under() if under else None,
            from_prompt=from_prompt, watch=watch, done=finished,
        )  # fmt: skip
        for i, ids in zip(chosen, written, strict=True):
            text = tokenizer.decode([token for token in ids if token not in ends])
            last = end.search(text)
            texts[i], tokens[i] = (text[: last.end()] if last else text).rstrip(), len(ids)
    return Answers(texts, tokens, reread.cpu(), saved.cpu())


def compared(answers: Answers, stock: Answers, problems: Sequence[Problem]) -> dict[str, dict[str, float]]:
    """`{metric: {value, low, high, repeats}}` of answers beside the full model's, repeats being problems.

    Shares of problems solved, solved more than by the full model, with its final answer, and with its very text; of
    MLP bytes saved on generated tokens; and the mean number of tokens.
    """
    ours, theirs = (
        [p.final(text) for p, text in zip(problems, found.texts, strict=True)] for found in (answers, stock)
    )
    solved, before = (
        torch.tensor([p.solved(text) for p, text in zip(problems, found.texts, strict=True)]).double()
        for found in (answers, stock)
    )
    same = torch.tensor([a == b for a, b in zip(ours, theirs, strict=True)]).double()
    identical = torch.tensor([a == b for a, b in zip(answers.texts, stock.texts, strict=True)]).double()

    def metrics(rows: Tensor) -> dict[str, Tensor]:  # rows [samples, problems]
        found = {
            "accuracy": solved,
            "accuracy_change": solved - before,
            "same_answer": same,
            "same_text": identical,
            "answer_tokens": answers.tokens,
        }
        means = {name: value[rows].mean(1) for name, value in found.items()}
        return means | {"saved_bytes": answers.saved[rows].sum(1) / answers.reread[rows].sum(1).clamp_min(1)}

    return bootstrapped(metrics, len(problems))
