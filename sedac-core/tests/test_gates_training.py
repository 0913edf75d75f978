"""Training gates: what it computes, and the script, whose gates are better than chance."""

import itertools
import json
import math
import os
import socket
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import run_main
from gate_cases import cascade, random_gates

from sedac_core import bench, collection, distillation, gates_start, gates_training
from sedac_core.artifacts import Manifest, unseen
from sedac_core.cli import SedacError
from sedac_core.collection import replaced_mlps
from sedac_core.distillation import KLToTeacher, Recipe, batches_of, pack_rows, teach
from sedac_core.gated_model import final_states, gated, masked_mlp
from sedac_core.gates import Gates, GateShape, adapters_path
from sedac_core.gates_start import activations, importance, start_adapters
from sedac_core.gates_training import Pass, Pointwise, TrainedMLP, gate_gradients
from sedac_core.policy import load_policy
from sedac_core.quality import find_prices
from sedac_core.settings import Settings


def model_config(folder):
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder)


# ---------------------------------------------------------------- what training computes


def trained(run: Pass, layer: int, mlp) -> TrainedMLP:
    return TrainedMLP(layer, mlp, run, run.gates.position[layer])


def test_one_backward_pass_gives_the_gradients_and_the_damage_that_autograd_gives(model):
    """Against the definition: out = k · MLP(x) + (1 - k) · (prefix + adapter), k a leaf at 0, by plain autograd."""
    mlp, gates = collection.decoder(model[0]).layers[1].mlp, random_gates(rank=3)
    bank, position, widths = gates.banks[1], gates.position[1], torch.tensor(gates.shape.widths)
    x = torch.randn(1, 30, 64, requires_grad=True)
    target = torch.randn(1, 30, 64)

    run = Pass(gates, Pointwise(False), log_lambda=torch.tensor([0.0]))
    found = TrainedMLP(1, mlp, run, position)(x)
    ((found - target) ** 2).sum(-1).mean().backward()
    level = run.levels[1].flatten()
    assert set(level.tolist()) == {0, 1, 2, 3}
    ours = [x.grad, *(p.grad for p in bank.parameters())]
    gate_ours = [p.grad.clone() for p in gates.gates["1"].parameters()]

    x2 = x.detach()[0].requires_grad_()
    k = torch.zeros(30, 1, requires_grad=True)
    bank.zero_grad()
    narrowed = masked_mlp(mlp, bank, position, widths, x2, level)
    out = narrowed + k * (mlp(x2).detach() - narrowed.detach())
    ((out - target[0]) ** 2).sum(-1).mean().backward()
    torch.testing.assert_close(found[0], narrowed)
    for mine, plain in zip(ours, [x2.grad[None], *(p.grad for p in bank.parameters())], strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-5)
    damage = -0.5 * 30 * k.grad[:, 0]
    assert damage[level == 0].abs().max() < 1e-4 * damage.abs().max()
    for mine, plain in zip(gate_ours, gate_gradients(gates.gates["1"], x2.detach(), level, damage), strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-3, atol=1e-5)

    gates.zero_grad()
    run.weight = torch.tensor([4.0])  # a sequence that counts four times teaches the gate the same damage
    found = TrainedMLP(1, mlp, run, position)(x.detach().requires_grad_())
    (4 * ((found - target) ** 2).sum(-1)).mean().backward()
    assert torch.equal(run.levels[1].flatten(), level)
    for parameter, before in zip(bank.parameters(), ours[1:], strict=True):
        torch.testing.assert_close(parameter.grad, 4 * before)
    for parameter, before in zip(gates.gates["1"].parameters(), gate_ours, strict=True):
        torch.testing.assert_close(parameter.grad, before)


def test_a_group_s_leader_learns_the_damage_of_all_its_layers(model):
    gates, run_ids = random_gates(2), torch.randint(3, 250, (2, 12))
    run = Pass(gates, Pointwise(False), log_lambda=torch.zeros(2))
    with replaced_mlps(model[0], partial(trained, run)):
        final_states(model[0], run_ids).square().mean().backward()
    assert isinstance(run.damage, float) and run.damage == 0, "every group's damage was taken up by its leader"
    assert set(run.levels) == {0, 1, 3, 5}
    assert all(p.grad.abs().sum() > 0 for gate in gates.gates.values() for p in gate.parameters())


def test_under_a_latch_a_leader_learns_the_damage_of_all_that_its_decision_binds(model, monkeypatch):
    gates, ids, learned = cascade(), torch.randint(3, 250, (2, 12)), []

    def record(gate, x, level, damage):
        learned.append(damage)
        return gate_gradients(gate, x, level, damage)

    monkeypatch.setattr(gates_training, "gate_gradients", record)

    def run_once():
        run = Pass(gates, Pointwise(False), log_lambda=torch.full((2,), 20.0))  # all narrow: the latch changes no level
        window = gates.shape.window
        with replaced_mlps(model[0], lambda i, mlp: trained(run, i, mlp) if i in window else mlp):
            final_states(model[0], ids).square().mean().backward()
        assert isinstance(run.damage, float) and run.damage == 0
        return learned.pop(), learned.pop()  # the first leader's and the last's

    first, last = run_once()
    monkeypatch.setattr(GateShape, "leader_before", lambda shape, leader: None)
    own, same = run_once()
    torch.testing.assert_close(last, same)
    torch.testing.assert_close(first, own + same)
    assert own.abs().mean() > 0 and same.abs().mean() > 0


def test_a_gate_learns_the_mean_of_a_noisy_damage():
    gates = random_gates()
    gate, level = gates.gates["0"], torch.ones(4096, dtype=torch.int64)
    optimiser = torch.optim.Adam(gate.parameters(), 1e-2)
    torch.manual_seed(0)
    for _ in range(200):
        x = torch.randn(4096, 64)
        mean = (x[:, 0] - 3).exp()
        damage = mean * torch.distributions.Gamma(0.5, 0.5).sample((4096,)) + 0.1 * mean * torch.randn(4096)
        for parameter, gradient in zip(gate.parameters(), gate_gradients(gate, x, level, damage), strict=True):
            parameter.grad = gradient
        optimiser.step()
    error = gate(x)[:, 0] - mean.log()
    assert error.abs().mean() < 0.3


def test_kl_and_its_gradient_are_those_of_whole_logits():
    student, teacher, head = torch.randn(7, 16, requires_grad=True), torch.randn(7, 16), torch.randn(50, 16)
    kl = KLToTeacher.apply(student, teacher, head)
    kl.mean().backward()
    twin = student.detach().requires_grad_()
    q, p = (twin @ head.t()).log_softmax(-1), (teacher @ head.t()).log_softmax(-1)
    plain = (p.exp() * (p - q)).sum(-1)
    plain.mean().backward()
    torch.testing.assert_close(kl, plain)
    torch.testing.assert_close(student.grad, twin.grad)


def test_fisher_finds_the_neurons_that_matter(model):
    """Removing the half of the neurons that matters least must hurt less than removing a random half."""
    lm, tokenizer = model
    rows = pack_rows(collection.read_documents("pydoc")[:40], tokenizer, 64)
    teacher = teach(lm, rows, 16)
    gates, damage = random_gates(), {}
    ids, states = teacher.batch(torch.arange(32), "cpu")
    half = lambda layer, x: torch.full(x.shape[:2], 1)  # noqa: E731
    for score in ("fisher", "magnitude", "variance", "random"):
        recipe = Recipe(1, 16, importance=score if score != "random" else "fisher")
        seen = activations(lm, teacher, recipe)
        importances = importance(lm, teacher, recipe, seen)
        if score == "random":
            importances = torch.rand_like(importances)
        gates.order.copy_(importances.argsort(1, descending=True))
        start_adapters(lm, gates, seen.mean)
        with gated(lm, gates, 0.0, decide=half), torch.no_grad():
            student = final_states(lm, ids).flatten(0, 1)
            damage[score] = float(KLToTeacher.apply(student, states, teacher.head).mean())
    assert damage["fisher"] == min(damage.values()) and damage["fisher"] < 0.8 * damage["random"], damage


def test_every_row_is_used_once_an_epoch_and_the_order_is_the_seed_s():
    steps = torch.cat([batches_of(10, 4, 0, step) for step in range(5)])
    assert sorted(steps[:10].tolist()) == sorted(steps[10:].tolist()) == list(range(10))
    assert not torch.equal(steps[:10], steps[10:]) and torch.equal(batches_of(10, 4, 0, 3), steps[12:16])


# ---------------------------------------------------------------- the script

STEP2, STEP8 = "train_multilayer_probes.py", "sedac_calibrate.py"


def test_the_script_writes_a_whole_artefact(tiny_gates, gates_text):
    manifest = Manifest.load(tiny_gates)
    assert manifest.policy == "gates" and manifest.gates["widths"] == [128, 64, 32, 0] and manifest.gates["block"] == 16
    budgets = manifest.gates["budgets"]
    assert [budget["saved_bytes"] for budget in budgets] == [0.125, 0.25, 0.4]
    prices = [budget["log_lambda"] for budget in budgets]
    assert prices == sorted(prices) and manifest.gates["log_lambda"] == prices[1]
    assert [budget["realised"] for budget in budgets] == pytest.approx([0.125, 0.25, 0.4], abs=0.02)
    assert manifest.training["datasets"] == [str(gates_text)] and manifest.training["steps_done"] == 60
    assert sorted(path.name for path in tiny_gates.iterdir()) == ["adapters.safetensors", "manifest.json"]


def test_the_script_trains_gates_in_bits_which_beat_random_tokens(gates_options, tmp_path):
    folder, out = tmp_path / "in_bits", tmp_path / "quality.json"
    options = gates_options(folder, 60, "--levels", "16,8,6,4", "--budgets", "0.3,0.5,0.6")
    with pytest.raises(SystemExit):
        run_main(STEP2, *options)  # with adapters
    adapters = options.index("--adapter-rank")
    run_main(STEP2, *options[:adapters], *options[adapters + 2 :])
    manifest = Manifest.load(folder)
    assert manifest.gates["levels"] == [16, 8, 6, 4] and manifest.gates["widths"] == [128, 128, 64, 0]
    assert [budget["realised"] for budget in manifest.gates["budgets"]] == pytest.approx([0.3, 0.5, 0.6], abs=0.03)
    with pytest.MonkeyPatch.context() as patch:
        arguments = ["quality", "--probe-dir", folder, "--out", out, "--saved", "0.3,0.6", "--max-length", 64]
        patch.setattr("sys.argv", ["bench", *map(str, arguments)])
        bench.main()
    records = bench.read_results(out)["records"]
    kl = {(r["system"], r["budget"]): r for r in records if r["metric"] == "kl"}
    assert [kl["sedac", budget]["saved_bytes"] for budget in (0.3, 0.6)] == pytest.approx([0.3, 0.6], abs=0.02)
    assert (
        kl["sedac", 0.3]["value"] <= kl["random", 0.3]["high"] and kl["sedac", 0.6]["value"] < kl["random", 0.6]["low"]
    )
    six_bits = next(r for r in records if r["metric"] == "kl" and r.get("level") == "6 bits")
    assert six_bits["saved_bytes"] < 0.6 and kl["sedac", 0.6]["high"] < six_bits["low"], "each token its own bits"


def test_gates_beat_random_tokens_and_fixed_widths_at_the_same_bytes_on_unseen_text(tiny_gates, tmp_path):
    """The twin, the controls and the results file; and the file's shape."""
    out = tmp_path / "quality_tiny.json"
    with pytest.MonkeyPatch.context() as patch:
        arguments = ["quality", "--probe-dir", tiny_gates, "--out", out, "--saved", "0.125,0.3", "--max-length", 64]
        patch.setattr("sys.argv", ["bench", *map(str, arguments)])
        bench.main()
    records = bench.read_results(out)["records"]
    assert records[0]["system"] == "stock" and records[0]["metric"] == "ppl"
    kl = {(r["system"], r["budget"]): r for r in records if r["metric"] == "kl"}
    for budget in (0.125, 0.3):
        ours, random, static = (kl[system, budget] for system in ("sedac", "random", "static_width"))
        assert ours["saved_bytes"] == pytest.approx(budget, abs=0.02)
        assert random["saved_bytes"] == pytest.approx(ours["saved_bytes"], abs=0.01)
        assert static["saved_bytes"] >= ours["saved_bytes"] - 1e-6
        assert 0 < ours["low"] < ours["value"] < ours["high"] < random["low"] and ours["high"] < static["low"]
        assert ours["high"] < kl["gates", budget]["low"], "widths between all and nothing are worth having"
        assert ours["saved_bytes"] == pytest.approx(kl["gates", budget]["saved_bytes"], abs=0.02)
        for system in ("entropy_plain", "random_plain"):  # the original method, and chance in its place
            plain = kl[system, budget]
            assert plain["saved_bytes"] == pytest.approx(budget, abs=0.01) and plain["low"] > 2 * ours["high"]
        assert kl["static_drop", budget]["saved_bytes"] >= ours["saved_bytes"] - 1e-6
    uniform = [r for r in records if r["system"] == "uniform" and r["metric"] == "kl"]
    assert [r["level"] for r in uniform] == ["width 64", "width 32", "width 0"]
    assert all(a["value"] < b["value"] for a, b in itertools.pairwise(uniform))
    certificates = {r["loss"]: r for r in records if r["metric"] == "certificate_held"}
    assert certificates.keys() == {"kl", "disagreement", "ppl_increase"}
    assert all(r["value"] >= 0.95 and r["documents"] > 30 for r in certificates.values())
    assert {r["metric"] for r in records} - {"certificate_held"} == {
        "kl",
        "top1_agreement",
        "ppl_ratio",
        "ppl",
        "realised",
    }
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(SedacError, match="has policy gates: --cascades are folders"),
    ):
        patch.setattr("sys.argv", ["bench", *map(str, [*arguments, "--cascades", tiny_gates])])
        bench.main()
    assert {r["text"] for r in records} == {"paragraphs"} and min(r["repeats"] for r in kl.values()) > 30


def test_prices_are_found_for_one_share_or_many_from_guesses_that_miss_them():
    asked = []

    def share(price):
        asked.append(price)
        return 1 / (1 + math.exp(-price))

    for saved, guesses, rounds in ([[0.25], [-4.0, 1.0], 3], [[0.1, 0.3, 0.6], [-3.0, -1.0, 0.0], 2]):
        asked.clear()
        found = find_prices(share, saved, guesses, rounds)
        assert len(asked) == len(guesses) + (rounds - 1) * len(saved)
        assert [share(price) for price in found] == pytest.approx(saved, abs=0.02)


def test_an_interrupted_training_continues_to_the_same_result(gates_options, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_main(STEP2, *gates_options(whole, 12, "--checkpoint-every", 5))
    save, written = gates_training.save_tensor, []

    def interrupted(state, path):
        save(state, path)
        written.append(state["progress"]["step"])
        raise KeyboardInterrupt

    monkeypatch.setattr(gates_training, "save_tensor", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_main(STEP2, *gates_options(parts, 12, "--checkpoint-every", 5))
    assert written == [5] and not adapters_path(parts).exists()
    monkeypatch.setattr(gates_training, "save_tensor", save)
    monkeypatch.setattr(gates_training, "prepare", None)  # a training that starts anew would need it
    run_main(STEP2, *gates_options(parts, 12, "--checkpoint-every", 5))
    assert adapters_path(parts).read_bytes() == adapters_path(whole).read_bytes()
    assert Manifest.load(parts).gates == Manifest.load(whole).gates


def test_a_training_goes_on_from_gates_and_leaves_out_what_they_had_held_out(tiny_gates, gates_options, tmp_path):
    folder, before = tmp_path / "more", Manifest.load(tiny_gates)
    still = "--lr", 1e-9, "--gate-lr", 1e-9
    run_main(STEP2, *gates_options(folder, 3, "--start-from", tiny_gates, *still))
    manifest = Manifest.load(folder)
    started, ended = (Gates.load(path, Manifest.load(path)).state_dict() for path in (tiny_gates, folder))
    for name, tensor in started.items():
        torch.testing.assert_close(ended[name], tensor, rtol=1e-4, atol=1e-5)
    found, wanted = ([budget["log_lambda"] for budget in m.gates["budgets"]] for m in (manifest, before))
    assert found == pytest.approx(wanted, abs=0.1)
    assert manifest.training["start"] == before.training
    other = {**manifest.training, "datasets": ["other.txt"]}
    assert torch.equal(unseen(other, "paragraphs.txt", 50), unseen(before.training, "paragraphs.txt", 50))
    assert len(unseen(other, "a_third.txt", 50)) == 50
    for option, value, fault in (
        ("--adapter-rank", 3, "differ in adapter_rank: give the options with which they were trained"),
        ("--seed", 1, "trained with seed 0, and now it is 1: give the same"),
    ):
        with pytest.raises(SedacError, match=fault):
            run_main(STEP2, *gates_options(folder, 12, "--start-from", tiny_gates, option, value))


@pytest.mark.parametrize("policy", ["hard", "soft"])
def test_a_cascade_with_adapters_is_trained_judged_calibrated_and_set_up_for_serving(
    call, gates_options, tiny_gates, tiny_model, tmp_path, policy
):
    folder, out = tmp_path / "cascade", tmp_path / "quality.json"
    options = gates_options(
        folder, 25, "--policy", policy, "--layers", "0,2", "--keep-last", 1, "--budgets", "0.1,0.2,0.3"
    )
    options[options.index("--levels") : options.index("--levels") + 2] = []
    run_main(STEP2, *options)
    manifest = Manifest.load(folder)
    assert (manifest.policy, manifest.checkpoints, manifest.keep_last) == (policy, (0, 2), 1)
    assert manifest.gates["widths"] == {"hard": [128, 0], "soft": [128, 64, 32, 0]}[policy]
    assert [budget["realised"] for budget in manifest.gates["budgets"]] == pytest.approx([0.1, 0.2, 0.3], abs=0.03)

    kl = []
    for judged in ((folder,), (tiny_gates, "--cascades", folder)):  # by itself, and beside gates
        arguments = ["bench", "quality", "--probe-dir", *judged, "--out", out, "--saved", "0.2", "--samples", "16"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", list(map(str, arguments)))
            bench.main()
        kl.append({r["system"]: r for r in bench.read_results(out)["records"] if r["metric"] == "kl"})
    alone, beside = kl
    assert alone["sedac"]["saved_bytes"] == pytest.approx(0.2, abs=0.03)
    assert alone["sedac"]["value"] < 0.9 * alone["random"]["value"]
    for key in ("value", "saved_bytes"):
        assert beside[f"cascade_{policy}"][key] == pytest.approx(alone["sedac"][key], rel=1e-3)
    assert beside["sedac"]["value"] != alone["sedac"]["value"]

    _, result = call(STEP8, "--probe-dir", folder, "--saved", 0.2, "--samples", 40, "--max-length", 64)
    served = load_policy(Settings(probe_dir=folder), model_config(tiny_model))
    assert served.log_lambda.item() == pytest.approx(result["log_lambda"])
    assert f"{policy} cascade with adapters, checkpoints (0, 2), window layers 1 to 4" in served.describe(Settings())
    assert served.graph_key() == {"policy": policy, "leaders": [1, 3], "window": [1, 5]}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--layers", "0,4"], "its last 2 always run whole, so the last checkpoint is at most 2"),
        (["--layers", "2", "--budgets", "0.3"], "save at most 1[0-9].[0-9]% of MLP bytes: give lower --budgets"),
    ],
)
def test_a_cascade_that_cannot_save_what_is_asked_is_refused(gates_options, tmp_path, more, message):
    with pytest.raises(SedacError, match=message):
        run_main(STEP2, *gates_options(tmp_path / "cascade", 1, "--policy", "soft", *more))


TEAM = """
import sys
from pathlib import Path
import torch
from torch import distributed
from sedac_core import collection, distillation, gates_training
from sedac_core.gates import Gates, GateShape
torch.manual_seed(int(sys.argv[2]))  # the processes start from different gates
model, _ = collection.load_model(sys.argv[1])
gates = Gates(GateShape(64, 128, 6, (1.0, 0.5, 0.0), 4))
rows = torch.arange(1024).view(32, 32) % 251
recipe = distillation.Recipe(steps=12, batch=4, minutes=60.0)
team = distillation.Team.join(4)
gates_training.train(model, gates, rows, recipe, Path(sys.argv[3]), "plan", team)
mine = torch.cat([value.flatten().float() for value in gates.state_dict().values()])
both = [torch.empty_like(mine) for _ in range(2)]
distributed.all_gather(both, mine)
assert torch.equal(*both), (both[0] - both[1]).abs().max()
print(f"process {team.rank}: {len(mine)} values alike")
team.leave()
"""


def test_two_processes_share_each_batch_and_end_with_the_same_gates(tiny_model, tmp_path):
    script = tmp_path / "team.py"
    script.write_text(TEAM)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        **os.environ,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    members = [
        subprocess.Popen(
            [sys.executable, str(script), str(tiny_model), str(rank), str(tmp_path)],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    said = [member.communicate(timeout=120)[0] for member in members]
    assert [member.returncode for member in members] == [0, 0], said
    assert all("values alike" in text for text in said)


def test_a_batch_that_processes_cannot_share_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SedacError, match="make it a multiple of 2"):
        distillation.Team.join(3)


def test_a_folder_of_probes_is_not_overwritten_with_gates(gates_options, tiny_artifact):
    with pytest.raises(SedacError, match="holds an artefact of policy hard without adapters: give another --data-dir"):
        run_main(STEP2, *gates_options(tiny_artifact))


def plain_and_recomputing(folder):
    """A model, and the same whose layers recompute their activations in the backward pass."""
    for recompute in (False, True):
        lm, _ = collection.load_model(str(folder))
        if recompute:
            gates_training.checkpointed(lm)
        yield lm


def test_layers_that_recompute_their_activations_give_the_same_gradients(tiny_model):
    gradients = []
    for lm in plain_and_recomputing(tiny_model):
        gates = random_gates()
        run = Pass(gates, Pointwise(False), noise=0.5, log_lambda=torch.zeros(2))
        torch.manual_seed(0)
        with replaced_mlps(lm, partial(trained, run)):
            final_states(lm, torch.arange(3, 43).view(2, 20)).square().mean().backward()
        gradients.append([p.grad for p in gates.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_layers_that_recompute_their_activations_order_neurons_alike(tiny_model):
    scores = []
    for lm in plain_and_recomputing(tiny_model):
        recipe = distillation.Recipe(steps=1, batch=2)
        teacher = distillation.teach(lm, torch.arange(3, 83).view(4, 20), recipe.batch)
        scores.append(gates_start.importance(lm, teacher, recipe, gates_start.activations(lm, teacher, recipe)))
    torch.testing.assert_close(*scores)
    assert scores[0].max() > 0


def test_a_bf16_model_trains_and_keeps_a_float32_stream(gates_options, tmp_path, tiny_model):
    run_main(STEP2, *gates_options(tmp_path / "bf16", 4, "--dtype", "bfloat16", "--gate-every", 2))
    manifest = Manifest.load(tmp_path / "bf16")
    lm, _ = collection.load_model(str(tiny_model), "bfloat16")
    gates, ids = Gates.load(tmp_path / "bf16", manifest), torch.arange(3, 43).view(2, 20)
    seen = []
    hook = collection.decoder(lm).layers[3].register_forward_hook(lambda m, a, out: seen.append(out.dtype))
    stock = final_states(lm, ids)
    with gated(lm, gates, -100.0):
        assert torch.equal(final_states(lm, ids), stock)
    with gated(lm, gates, 5.0), torch.no_grad():
        assert not torch.equal(final_states(lm, ids), stock)
    hook.remove()
    assert set(seen) == {torch.float32} and stock.dtype == torch.bfloat16


def test_the_model_answers_questions_in_its_own_words_also_under_gates(call, tiny_gates, tiny_model, tmp_path):
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps({"question": f"What is {i}?", "answer": "?"}) + "\n" for i in range(10)))
    ask = ["collect_multilayer_data.py", "--model", tiny_model, "--dataset", questions, "--batch-size", 4,
           "--new-tokens", 6, "--save-dir", tmp_path, "--held-out", 0.3]  # fmt: skip
    texts = {}
    for name, more in {
        "plain": [],
        "again": [],
        "gates": ["--gates", tiny_gates],
        "rest": ["--held-out-questions"],
    }.items():
        _, result = call(*ask, "--generate", 50, *more)
        texts[name] = collection.read_documents(str(tmp_path / "generated.jsonl"))
        assert result["answers"] == len(texts[name]) == (3 if name == "rest" else 7)
    assert texts["plain"] == texts["again"] != texts["gates"]
    asked = [{text.split("?")[0] for text in texts[name]} for name in ("plain", "gates", "rest")]
    assert asked[0] == asked[1] and not asked[0] & asked[2]
    assert all(text.startswith("<|im_start|>user\nWhat is ") for text in texts["plain"])
    _, result = call(*ask, "--generate", 5, "--go-on")
    went_on = collection.read_documents(str(tmp_path / "generated.jsonl"))
    assert result["answers"] == len(went_on) == 5 and all("What is" in text for text in went_on)
    with pytest.raises(SedacError, match="holds no prompts"):
        call(*ask[:4], tmp_path / "generated.jsonl", "--generate", 2)
