"""Free-running answers: what is generated in batches is what one prompt alone gives, and skips start where they should."""

import json
from decimal import Decimal
from functools import partial

import pytest
import torch
from conftest import ROOT, prompts
from test_gates import random_gates
from torch.nn import functional as F

from sedac_core import bench, code_problems, collection, free_running
from sedac_core.cli import SedacError
from sedac_core.code_problems import CodeProblem, runs
from sedac_core.free_running import (
    Answers,
    WordProblem,
    answer_problems,
    compared,
    end_tokens,
    final_number,
    generate,
    problem_prompt,
    read_problems,
)
from sedac_core.gated_model import final_states, gated, logits
from sedac_core.gates import choose

PRICE = -1.0


@pytest.fixture(scope="module")
def model(tiny_model):
    return collection.load_model(str(tiny_model))


@pytest.fixture
def asked() -> list[list[int]]:
    return [prompt[:length] for prompt, length in zip(prompts(5, 20), (3, 20, 7, 1, 12), strict=True)]


def alone(model, prompt, new_tokens, ends=(), gates=None, first=0):
    """The plain twin: greedy, no cache, no padding; gates decide from position `first` on, whole MLPs run before.

    Returns the tokens, and the share of bytes that those which were read again saved.
    """
    ids, shares = list(prompt), torch.zeros(0)

    def decide(layer, x):
        level = choose(gates.gates[str(layer)](x), torch.tensor(PRICE), gates.shape.gains()[layer])
        return level * (torch.arange(x.shape[1]) >= first)

    for _ in range(new_tokens):
        row = torch.tensor([ids])
        if gates is None:
            state = final_states(model, row)
        else:
            with gated(model, gates, PRICE, decide=decide) as levels:
                state = final_states(model, row)
            one_hot = F.one_hot(torch.stack(levels)[:, 0, len(prompt) :], 4)  # [layers, generated, levels]
            shares = gates.shape.saved_share(one_hot.transpose(0, 1).float())
        ids.append(int(logits(state[0, -1:], model.get_output_embeddings().weight).argmax()))
        if ids[-1] in ends:
            break
    return ids[len(prompt) :], float(shares.sum())


@pytest.mark.parametrize("look", [1, 3, 100])
def test_a_batch_gives_what_each_prompt_gives_alone_also_when_rows_end_and_leave(model, asked, look, monkeypatch):
    monkeypatch.setattr(free_running, "LOOK_EVERY", look)
    plain = [alone(model[0], prompt, 14)[0] for prompt in asked]
    assert generate(model[0], asked, 14, set()) == plain
    ends = {plain[0][4], plain[2][8]}
    expected = [alone(model[0], prompt, 14, ends)[0] for prompt in asked]
    assert len({len(row) for row in expected}) > 2
    assert generate(model[0], asked, 14, ends) == expected


@pytest.mark.parametrize("from_prompt", [False, True])
def test_skips_start_with_the_first_generated_token_or_with_the_prompt(model, asked, from_prompt, monkeypatch):
    monkeypatch.setattr(free_running, "LOOK_EVERY", 4)
    gates, lm = random_gates(), model[0]
    found = [alone(lm, prompt, 10, gates=gates, first=0 if from_prompt else len(prompt)) for prompt in asked]
    for gather in (True, False):
        under = partial(gated, lm, gates, PRICE, gather=gather)
        answers = answer_problems(lm, model[1], asked, 10, 3, WordProblem.end, gates, under, from_prompt)
        assert answers.texts == [model[1].decode(ids).rstrip() for ids, _ in found]
        torch.testing.assert_close(answers.saved, torch.tensor([saved for _, saved in found]).double())
    assert [found[1][0], found[4][0]] != [alone(lm, asked[i], 10)[0] for i in (1, 4)], "these gates change answers"


def test_tokens_that_the_model_reads_again_are_counted_up_to_an_answer_s_end(model, asked):
    written = generate(model[0], asked, 9, set())
    ends = {written[1][3]}
    lengths = [row.index(written[1][3]) + 1 if written[1][3] in row else 9 for row in written]
    seen = torch.zeros(5, dtype=torch.int64)
    generate(model[0], asked, 9, ends, watch=lambda levels, rows, alive: seen.index_add_(0, rows, alive.long()))
    assert seen.tolist() == [length - 1 for length in lengths] and min(lengths) <= 4 < max(lengths)


def test_rows_that_are_done_leave_and_the_others_go_on(model, asked, monkeypatch):
    monkeypatch.setattr(free_running, "LOOK_EVERY", 2)
    whole, running = generate(model[0], asked, 12, set()), []

    def done(written):
        running.append(len(written))
        return [len(ids) >= 4 and ids == row[: len(ids)] for ids in written for row in [whole[2]]]

    assert generate(model[0], asked, 12, set(), done=done) == [*whole[:2], whole[2][:4], *whole[3:]]
    assert running == [5, 5, 4, 4, 4, 4]


def test_sampling_follows_the_seed_and_differs_from_greedy(model, asked):
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(generate(model[0], asked, 8, set(), sample=True))
    assert found[0] == found[1] != found[2] and generate(model[0], asked, 8, set()) not in found


def test_a_bf16_model_generates_under_gates(tiny_model, asked):
    lm, _ = collection.load_model(str(tiny_model), "bfloat16")
    gates = random_gates()
    plain = generate(lm, asked, 6, set())
    assert generate(lm, asked, 6, set(), under=gated(lm, gates, -100.0, gather=False)) == plain
    assert generate(lm, asked, 6, set(), under=gated(lm, gates, 20.0, gather=False)) != plain


# ---------------------------------------------------------------- word problems


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("It is 3 + 4 = 7.\n#### 7", "7"),
        ("#### $1,234.50 in all, not 9", "1234.5"),
        ("So \\boxed{18} in 2 steps.", "18"),
        ("She pays 3 and then -12.", "-12"),
        ("#### none, though 5 came up", "5"),
        ("nothing", None),
        ("#### 72.00", "72"),
    ],
)
def test_the_number_an_answer_ends_with(text, number):
    assert final_number(text) == (number and Decimal(number))


def test_problems_are_read_without_notes_for_a_calculator_and_bad_files_are_refused(tmp_path):
    path = tmp_path / "p.jsonl"
    row = {"question": "2+3\u2028?", "answer": "2+3=<<2+3=5>>5\n#### 5"}
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_problems(path) == [WordProblem("2+3\u2028?", "2+3=5\n#### 5", Decimal(5))]
    assert collection.read_prompts(path) == ["2+3\u2028?"]
    for bad in ("", "no json", '{"question": "?"}', '{"question": "?", "answer": "seven"}'):
        path.write_text(bad)
        with pytest.raises(SedacError, match="holds no problems"):
            read_problems(path)


def test_a_prompt_is_the_chat_of_worked_examples_and_ends_where_the_answer_begins(model):
    tokenizer = model[1]
    one, two = WordProblem("1+1?", "1+1=2\n#### 2", Decimal(2)), WordProblem("2+2?", "#### 4", Decimal(4))
    text = tokenizer.decode(problem_prompt(tokenizer, two, [one]))
    assert text == (
        "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n1+1=2\n#### 2<|im_end|>\n"
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert free_running.INSTRUCTION in tokenizer.decode(problem_prompt(tokenizer, two, []))
    assert end_tokens(*model) == {tokenizer.convert_tokens_to_ids("<|im_end|>")}


def test_answers_are_compared_problem_by_problem():
    problems = [WordProblem("?", "", Decimal(i)) for i in range(40)]
    tokens = torch.full((40,), 10.0, dtype=torch.float64)

    def answers(wrong, other):
        texts = [f"{'Well' if i in other else 'So'}: #### {-1 if i in wrong else i}" for i in range(40)]
        return Answers(texts, tokens, tokens - 1, 0.25 * (tokens - 1))

    stock = answers(wrong=range(10), other=())
    same = compared(stock, stock, problems)
    assert same["accuracy"]["value"] == 0.75 and same["accuracy"]["low"] < 0.75 < same["accuracy"]["high"]
    assert all(same["accuracy_change"][key] == 0 for key in ("value", "low", "high"))
    assert same["same_answer"]["low"] == same["same_text"]["low"] == 1
    found = compared(answers(wrong=range(5, 20), other=range(20, 25)), stock, problems)
    assert found["accuracy_change"]["value"] == pytest.approx(-5 / 40) and found["accuracy_change"]["low"] < -0.125
    assert found["same_answer"]["value"] == 25 / 40 and found["same_text"]["value"] == 20 / 40
    assert found["saved_bytes"]["value"] == 0.25 and found["answer_tokens"]["value"] == 10


def test_the_benchmark_judges_by_problems_that_no_training_saw(tiny_gates, tmp_path, monkeypatch, capsys):
    path = tmp_path / "sums_train.jsonl"
    rows = [{"question": f"What is {i}+1?", "answer": f"It is {i + 1}.\n#### {i + 1}"} for i in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "quality.json"
    arguments = ["quality", "--probe-dir", tiny_gates, "--out", out, "--no-teacher-forcing", "--free-running", 6,
                 "--problems", path, "--shots", 2, "--max-new-tokens", 8, "--saved", "0.3"]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["bench", *map(str, arguments)])
    bench.main()
    records = bench.read_results(out)["records"]
    assert {r["text"] for r in records} == {"sums"} and {r["mode"] for r in records} == {"free_running"}
    realised = [r for r in records if r["metric"] == "realised"]
    assert len(realised) == 1 and realised[0]["budget"] == 0.3 and 0.2 < realised[0]["value"] < 0.4
    records = [r for r in records if r not in realised]
    assert {r["repeats"] for r in records} == {6}
    ours = [r for r in records if r["system"] == "sedac"]
    assert {r["skips"] for r in ours} == {"generated", "prompt"}
    metrics = {"accuracy", "accuracy_change", "same_answer", "same_text", "answer_tokens", "saved_bytes"}
    assert {r["metric"] for r in ours} == metrics
    assert [r["value"] for r in ours if r["metric"] == "saved_bytes" and r["skips"] == "generated"] == [
        pytest.approx(0.3, abs=0.06)
    ]
    assert [r["value"] for r in records if r.get("control") and r["metric"] == "same_text"] == [1]
    monkeypatch.setattr("sys.argv", ["bench", "quality", "--probe-dir", str(tiny_gates), "--out", str(out),
                                     "--free-running", "5"])  # fmt: skip
    with pytest.raises(SedacError, match="none of the training's texts is a file of word problems"):
        bench.main()


# ---------------------------------------------------------------- programming problems

CODE = ROOT / "configs/code_problems.jsonl"


def test_every_programming_problem_can_be_solved_and_not_by_doing_nothing():
    problems = read_problems(CODE)
    solutions = [json.loads(line)["solution"] for line in CODE.read_text().splitlines()]
    assert len(problems) >= 50 and len({problem.question for problem in problems}) == len(problems)
    for problem, solution in zip(problems, solutions, strict=True):
        head = problem.question
        assert not runs(f"{head}\n    return None\n\n{problem.tests}"), head
        exec(f"{head}\n{solution}\n\n{problem.tests}", {})


def test_an_answer_is_run_from_its_first_block_of_code():
    problem = CodeProblem.checked('def one() -> int:\n    """One."""', "assert one() == 1")
    right = "def one():\n    return 1"
    assert problem.solved(f"Here:\n```python\n{right}\n```\n```python\nnonsense(\n```") and problem.solved(right)
    assert problem.final(f"```py\n{right}\n```") == right == problem.final(right)
    for wrong in (
        "def one():\n    return 2",
        "def one(:",
        "",
        "raise SystemExit(0)",
        f"{right}\nquit()",
        "def one():\n    return one()",
    ):
        assert not problem.solved(f"```python\n{wrong}\n```"), wrong
    assert problem.messages([])[0]["content"].endswith('```python\ndef one() -> int:\n    """One."""\n```')


@pytest.mark.parametrize(
    "program",
    [
        "import os\nos.system('touch x')",
        "import subprocess\nsubprocess.run(['true'])",
        "open('x', 'w')",
        "import os\nos.open('x', os.O_CREAT | os.O_WRONLY)",
        "import os\nos.remove('kept')",
        "import shutil\nshutil.rmtree('.')",
        "import socket\nsocket.create_connection(('127.0.0.1', 9))",
        "import ctypes\nctypes.CDLL(None)",
        "'x' * (1 << 31)",
        "while True: pass",
    ],
)  # fmt: skip
def test_a_program_that_does_harm_by_mistake_is_held_back(program, monkeypatch):
    monkeypatch.setattr(code_problems, "RUNNER", code_problems.RUNNER.replace("RLIMIT_CPU, 5", "RLIMIT_CPU, 1"))
    assert runs("import math, itertools, collections, re\nopen(math.__spec__.origin or re.__file__, 'rb').read(10)")
    assert not runs(program)


def test_programming_problems_are_judged_without_examples(tiny_gates, tmp_path, monkeypatch):
    out = tmp_path / "quality.json"
    arguments = ["quality", "--probe-dir", tiny_gates, "--out", out, "--no-teacher-forcing", "--free-running", 3,
                 "--problems", CODE, "--max-new-tokens", 8, "--saved", "0.3"]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["bench", *map(str, arguments)])
    bench.main()
    records = bench.read_results(out)["records"]
    assert {r["text"] for r in records} == {"code_problems"} and {r["shots"] for r in records} == {0}
    assert {r["value"] for r in records if r["metric"] == "accuracy"} == {0}
    monkeypatch.setattr("sys.argv", ["bench", *map(str, arguments), "--shots", "2"])
    with pytest.raises(SedacError, match="has no worked examples: give --shots 0"):
        bench.main()
