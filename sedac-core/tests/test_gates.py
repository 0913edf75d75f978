"""Gates: the twin decides as the rule says, saves what it says, and training makes it better than chance."""

import itertools
import json
import math
import os
import shutil
import socket
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import run_main

from sedac_core import bench, collection, distillation, gated_model, gates_start, gates_training
from sedac_core.artifacts import Fingerprint, Manifest, unseen
from sedac_core.cli import SedacError
from sedac_core.collection import replaced_mlps
from sedac_core.distillation import KLToTeacher, Recipe, batches_of, pack_rows, teach
from sedac_core.gated_model import final_states, gated, gathered_bits, gathered_mlp, masked_bits, masked_mlp
from sedac_core.gates import Gates, GateShape, adapters_path, by_level, choose, shape_of
from sedac_core.gates_start import activations, importance, start_adapters
from sedac_core.gates_training import Pass, Pointwise, TrainedMLP, gate_gradients
from sedac_core.policy import load_policy
from sedac_core.precision import COARSE, FINE, Planes
from sedac_core.quality import find_prices
from sedac_core.settings import Settings

LEVELS = (1.0, 0.5, 0.25, 0.0)


def model_config(folder):
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(tiny_model):
    return collection.load_model(str(tiny_model))


def random_gates(every=1, seed=0, rank=4, shape=None) -> Gates:
    """Gates of the tiny model that decide and adapt at random."""
    torch.manual_seed(seed)
    gates = Gates(shape or GateShape(64, 128, 6, LEVELS, rank, every))
    with torch.no_grad():
        for parameter in gates.banks.parameters():
            parameter.normal_(std=0.2)
        for gate in gates.gates.values():
            gate.head.weight.normal_()
        gates.order.copy_(torch.rand(6, 128).argsort(1))
    return gates


# ---------------------------------------------------------------- sizes and decisions


def test_widths_are_whole_blocks_of_neurons_and_savings_count_adapters_and_gates():
    shape = GateShape(896, 4864, 24)
    assert shape.block == 128 and shape.widths == (4864, 27 * 128, 13 * 128, 0)
    adapter = (3 * 896 * 128 + 896) / (3 * 896 * 4864)
    assert shape.saved == pytest.approx((0, 1 - 27 / 38 - adapter, 1 - 13 / 38 - adapter, 1 - adapter))
    whole, nothing = torch.eye(4)[[0] * 24], torch.eye(4)[[3] * 24]
    gate = (896 * 16 + 16 + 16 * 3 + 3) / (3 * 896 * 4864)
    assert shape.saved_share(whole).item() == pytest.approx(-gate, abs=1e-7)
    assert shape.saved_share(nothing).item() == pytest.approx(1 - adapter - gate, abs=1e-6)
    assert GateShape(64, 128, 6, LEVELS, 4).widths == (128, 64, 32, 0)


def test_a_gate_may_decide_for_a_group_of_layers_but_layer_0_stands_alone():
    shape = GateShape(64, 128, 6, LEVELS, 4, gate_every=2)
    assert shape.leaders == (0, 1, 3, 5)
    assert [shape.leader_of(layer) for layer in range(6)] == [0, 1, 1, 3, 3, 5]
    assert list(shape.group(5)) == [5] and list(shape.group(1)) == [1, 2]


def cascade(seed=0, levels=LEVELS) -> Gates:
    """A cascade with adapters that decides and adapts at random: checkpoints 0 and 2, the last layer whole."""
    return random_gates(shape=GateShape(64, 128, 6, levels, 4, checkpoints=(0, 2), keep_last=1), seed=seed)


def test_a_cascade_is_a_few_gates_whose_decisions_bind_to_the_windows_end():
    shape = cascade().shape
    assert shape.leaders == (1, 3) and list(shape.window) == [1, 2, 3, 4] and shape.latch
    assert [shape.leader_of(layer) for layer in range(6)] == [None, 1, 1, 3, 3, None]
    assert list(shape.group(1)) == [1, 2] and list(shape.span(1)) == [1, 2, 3, 4] and list(shape.span(3)) == [3, 4]
    assert torch.equal(shape.gains()[1], 2 * shape.gains()[3])
    assert (shape.leader_before(3), shape.leader_before(1)) == (1, None)
    levels = {1: torch.tensor([0, 2]), 3: torch.tensor([3, 2])}
    assert shape.by_layer(levels).tolist() == [[0, 0], [0, 2], [0, 2], [3, 2], [3, 2], [0, 0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"levels": (0.7, 0.0)}, "levels start with 1"),
        ({"levels": (1.0, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.0)}, "8 in all at most"),
        ({"levels": (1.0, 0.5, 0.5)}, "levels must fall by at least one block of 16 of the 128 neurons"),
        ({"adapter_rank": 100}, "adapters of rank 100 read more than"),
    ],
)
def test_levels_that_save_nothing_are_refused(change, message):
    with pytest.raises(SedacError, match=message):
        GateShape(**{"hidden_size": 64, "intermediate_size": 128, "num_layers": 6, "levels": LEVELS, **change})


def test_a_token_takes_the_level_with_the_least_damage_less_what_its_bytes_are_worth():
    gain = torch.tensor([0.25, 0.5, 1.0])
    damage = torch.rand(1000, 3, generator=torch.Generator().manual_seed(0)) * 2
    price = torch.tensor(1.0)
    costs = torch.cat([torch.zeros(1000, 1), damage - gain], 1)
    assert torch.equal(choose(damage.log(), price.log(), gain), costs.argmin(1))
    assert choose(damage.log(), torch.tensor(-100.0), gain).max() == 0, "at no price the whole MLP runs"
    shares = [choose(damage.log(), torch.tensor(price), gain).float().mean() for price in (-3.0, -1.0, 1.0)]
    assert shares == sorted(shares)


# ---------------------------------------------------------------- the twin


def test_gathered_tokens_and_a_prefix_of_neurons_compute_what_masks_compute(model):
    mlp, gates = collection.decoder(model[0]).layers[2].mlp, random_gates()
    x = torch.randn(50, 64)
    for level in (torch.randint(0, 4, (50,)), torch.zeros(50, dtype=torch.int64), torch.full((50,), 3)):
        bank, order, widths = gates.banks[2], gates.order[2], gates.shape.widths
        with torch.no_grad():
            masked = masked_mlp(mlp, bank, order.argsort(), torch.tensor(widths), x, level)
            gathered = gathered_mlp(mlp, bank, order, widths, x, level)
        torch.testing.assert_close(masked, gathered, rtol=1e-4, atol=1e-4)
        whole = mlp(x)
        assert torch.equal(gathered[level == 0], whole[level == 0]) or not (level == 0).any()
        assert (level == 0).all() or (gathered - whole)[level > 0].abs().max() > 0.1


@pytest.mark.parametrize("step", [1, 16])
@pytest.mark.parametrize("tokens", [1, 17, 50])
def test_each_level_sees_its_own_tokens_and_a_step_only_rounds_their_number_up(step, tokens):
    x, level = torch.randn(tokens, 8), torch.randint(0, 4, (tokens,))
    seen = []

    def run(index):
        return lambda own: (seen.append((index, len(own))), own * (index + 1))[1]

    out = by_level([run(index) for index in range(4)], x, level, step)
    assert torch.equal(out, x * (level + 1)[:, None])
    for index, size in seen:
        count = int((level == index).sum())
        assert count <= size <= tokens and (size in (count, tokens) or size % step == 0)
    assert step > 1 or sum(size for _, size in seen) == tokens


def test_at_no_price_the_gated_model_is_the_model_and_at_any_price_all_run_the_least(model):
    ids = torch.randint(3, 250, (2, 20))
    stock, gates = final_states(model[0], ids), random_gates()
    for gather in (True, False):
        with gated(model[0], gates, -100.0, gather=gather) as levels:
            torch.testing.assert_close(final_states(model[0], ids), stock, rtol=1e-4, atol=1e-4)
        assert torch.stack(levels).max() == 0
    with gated(model[0], gates, 20.0) as levels:
        final_states(model[0], ids)
    assert torch.stack(levels).min() == 3
    torch.testing.assert_close(final_states(model[0], ids), stock, rtol=0, atol=0)  # and it is whole again afterwards


@pytest.mark.parametrize("every", [1, 2])
def test_a_decision_depends_on_its_token_alone_and_its_group_follows_the_leader(model, every):
    gates, price = random_gates(every), torch.tensor([0.0, -1.0])
    ids = torch.randint(3, 250, (2, 16), generator=torch.Generator().manual_seed(1))
    with gated(model[0], gates, price) as levels:
        final_states(model[0], ids)
    both = torch.stack(levels)  # [layers, batch, seq]
    assert 0 < (both > 0).float().mean() < 1
    with gated(model[0], gates, price[1:]) as levels:
        final_states(model[0], ids[1:])
    assert torch.equal(torch.stack(levels)[:, 0], both[:, 1])
    for layer in range(6):
        assert torch.equal(both[layer], both[gates.shape.leader_of(layer)])


@pytest.mark.parametrize("gather", [True, False])
def test_a_long_step_goes_through_its_mlps_piece_by_piece(model, monkeypatch, gather):
    gates, sizes = random_gates(), []
    ids = torch.randint(3, 250, (2, 20), generator=torch.Generator().manual_seed(1))
    with gated(model[0], gates, 0.0, gather=gather):
        at_once = final_states(model[0], ids)
    name = "gathered_mlp" if gather else "masked_mlp"
    run = getattr(gated_model, name)
    monkeypatch.setattr(gated_model, name, lambda *args: (sizes.append(len(args[-1])), run(*args))[1])
    monkeypatch.setattr(gated_model, "AT_ONCE", 16)
    with gated(model[0], gates, 0.0, gather=gather):
        torch.testing.assert_close(final_states(model[0], ids), at_once)
    assert sizes == [16, 16, 8] * 6


def test_a_cascade_never_widens_again_and_runs_whole_outside_its_window(model):
    gates = cascade()
    ids = torch.randint(3, 250, (4, 32), generator=torch.Generator().manual_seed(1))
    with gated(model[0], gates, 0.5) as levels:
        gathered = final_states(model[0], ids)
        chosen = torch.stack(levels)
    assert chosen[[0, 5]].max() == 0 and torch.equal(chosen[1], chosen[2]) and torch.equal(chosen[3], chosen[4])
    assert (chosen[3] >= chosen[1]).all() and (chosen[3] > chosen[1]).any() and len(chosen[1].unique()) > 1
    with gated(model[0], gates, 0.5, decide=lambda layer, x: chosen[layer], gather=False):
        torch.testing.assert_close(final_states(model[0], ids), gathered, rtol=1e-4, atol=1e-4)


def test_an_artefact_comes_back_as_it_was_written_and_damaged_ones_are_refused(tmp_path, model):
    gates = random_gates(2)
    manifest = Manifest("tiny", Fingerprint.of(model[0].config), (), policy="gates")
    manifest.gates = {"levels": LEVELS, "adapter_rank": 4, "gate_every": 2}
    gates.save(tmp_path)
    manifest.save(tmp_path)
    loaded = Gates.load(tmp_path, Manifest.load(tmp_path))
    assert torch.equal(loaded.order, gates.order)
    assert torch.equal(loaded.gates["3"].proj.weight, gates.gates["3"].proj.weight)
    assert torch.equal(loaded.banks[4].down, gates.banks[4].down.bfloat16().float())

    manifest.gates["adapter_rank"] = 8
    with pytest.raises(SedacError, match="does not fit its manifest"):
        Gates.load(tmp_path, manifest)
    manifest.gates["adapter_rank"] = 4
    adapters_path(tmp_path).write_bytes(adapters_path(tmp_path).read_bytes()[:-100])
    with pytest.raises(SedacError, match=r"adapters.safetensors cannot be read"):
        Gates.load(tmp_path, manifest)
    adapters_path(tmp_path).unlink()
    with pytest.raises(SedacError, match="SEDAC adapters are missing"):
        Gates.load(tmp_path, manifest)
    with pytest.raises(SedacError, match="has policy hard and no adapters"):
        shape_of(Manifest("tiny", manifest.fingerprint, (1,)))


# ---------------------------------------------------------------- levels in bits

BITS = (16.0, 8.0, 6.0, 4.0)


def gates_in_bits(seed=0) -> Gates:
    return random_gates(shape=GateShape(64, 128, 6, BITS, 0), seed=seed)


def test_weights_are_rounded_to_sixteen_steps_of_their_group_and_those_to_sixteen_parts():
    weight = torch.randn(3, 192, generator=torch.Generator().manual_seed(0))
    planes = Planes.of(weight)
    assert planes.high.shape == planes.low.shape == (3, 96) and planes.scale.shape == (3, 3, 2)
    for bits, most, parts in ((COARSE, 0.6, 16), (FINE, 0.08, 256)):  # of a step; its ends are rounded to bf16 as well
        for group, own in zip(weight.split(64, 1), planes.values(bits).split(64, 1), strict=True):
            step = (group.amax(1) - group.amin(1)) / 15
            assert all(len(row.unique()) <= parts for row in own)
            assert ((own - group).abs().amax(1) < most * step).all()
    even = torch.linspace(-1, 14, 16).repeat(2, 4)
    assert torch.equal(Planes.of(even).values(COARSE), even)
    assert torch.equal(Planes.of(torch.ones(2, 64)).values(FINE), torch.ones(2, 64)), (
        "a group of equal values has no steps"
    )


def test_levels_in_bits_save_what_they_do_not_read_scales_counted():
    shape = GateShape(896, 4864, 24, (16, 8, 6, 5, 4), 0)
    assert shape.bits and shape.widths == (4864, 4864, 19 * 128, 10 * 128, 0)
    assert shape.saved == pytest.approx((0, 1 - 8.5 / 16, 1 - 6.5 / 16, 1 - (4.5 + 4 * 10 / 38) / 16, 1 - 4.5 / 16))
    assert shape.names[0] == "16 bits" and not GateShape(896, 4864, 24).bits


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"levels": (16, 9, 4)}, "go on from 8 to 4"),
        ({"levels": (16,)}, "levels in bits start with 16"),
        ({"levels": (16, 4.2, 4)}, "fall by at least one block of 64"),
        ({"adapter_rank": 8}, "have no adapters"),
        ({"hidden_size": 96}, "rows of 96 and 128 values are no multiples of"),
    ],
)
def test_levels_in_bits_that_cannot_be_are_refused(change, message):
    given = {"hidden_size": 64, "intermediate_size": 128, "num_layers": 6, "levels": BITS, "adapter_rank": 0}
    with pytest.raises(SedacError, match=message):
        GateShape(**given | change)


def test_rounded_weights_compute_the_mlp_and_the_better_the_more_bits_they_have(model):
    mlp, gates = collection.decoder(model[0]).layers[2].mlp, gates_in_bits()
    x, widths = torch.randn(50, 64), gates.shape.widths
    with torch.no_grad():
        rounded, whole = gates.rounded(2, mlp), mlp(x)
        assert gates.rounded(2, mlp) is rounded, "made once"
        errors = [(rounded(x, width) - whole).norm() / whole.norm() for width in widths[1:]]
        assert errors[0] < 0.02 and errors == sorted(errors) and errors[-1] < 0.3
        level = torch.randint(0, 4, (50,))
        apart = torch.stack([whole, *(rounded(x, width) for width in widths[1:])])[level, torch.arange(50)]
        masked = masked_bits(mlp, rounded, torch.tensor(widths), x, level)
        gathered = gathered_bits(mlp, rounded, widths, x, level)
    assert torch.allclose(masked, apart, atol=1e-4) and torch.allclose(gathered, apart, atol=1e-4)
    assert torch.equal(masked[level == 0], whole[level == 0]), "the whole MLP is the model's own"


def test_the_damage_of_rounding_is_half_of_what_undoing_it_would_change(model):
    """Against finite differences of k in `k · MLP + (1 - k) · rounded`, and the whole MLP's gradient where nothing is rounded."""
    mlp, gates = collection.decoder(model[0]).layers[2].mlp, gates_in_bits()
    owner = TrainedMLP(2, mlp, Pass(gates, Pointwise(False)), gates.position[2])
    seen = []
    owner.learn = lambda x, level, by_k: seen.append(by_k) or (None,) * 4
    x, wanted = torch.randn(20, 64, requires_grad=True), torch.randn(20, 64)
    level = torch.tensor([0, 1, 2, 3] * 5)
    parameters = tuple(owner.gate.parameters())
    out = gates_training._Rounded.apply(x, level, owner, *parameters)
    (out * wanted).sum().backward()
    with torch.no_grad():
        change = ((mlp(x) - out) * wanted).sum(-1)
    assert torch.allclose(seen[0], change, atol=1e-5) and (seen[0][level == 0] == 0).all()
    by_x = x.grad.clone()
    x.grad = None
    (mlp(x) * wanted).sum().backward()
    assert torch.allclose(by_x, x.grad, atol=1e-5)


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


# ---------------------------------------------------------------- calibration


@pytest.fixture
def copy(tiny_gates, tmp_path):
    return shutil.copytree(tiny_gates, tmp_path / "copy")


def test_a_bound_on_damage_is_certified_on_unseen_documents(call, copy):
    calibrate = [STEP8, "--probe-dir", copy, "--samples", 160, "--max-length", 48]
    out, loose = call(*calibrate, "--max-damage", 0.2)
    assert "certified: a document's mean KL in nats, at most 2 is under 0.2 in expectation" in out
    (bound,) = loose["bounds"]
    assert bound["mean_loss"] < 0.2 and bound["p_value"] <= 0.05 and loose["documents"] == 160
    manifest = Manifest.load(copy)
    assert manifest.gates["log_lambda"] == loose["log_lambda"] and manifest.calibration["bounds"] == [bound]
    assert manifest.calibration["datasets"] == manifest.training["datasets"]
    _, tight = call(*calibrate, "--max-damage", 0.1)
    assert 0 < tight["saved_bytes"]["value"] < loose["saved_bytes"]["value"]
    _, both = call(*calibrate, "--max-damage", 0.2, "--min-agreement", 0.5)
    assert both["log_lambda"] <= loose["log_lambda"] and len(both["bounds"]) == 2
    assert both["top1_agreement"]["value"] > 0.5


def test_a_rise_of_perplexity_is_bounded_and_a_fall_does_not_make_up_for_it(call, copy):
    calibrate = [STEP8, "--probe-dir", copy, "--samples", 160, "--max-length", 48]
    _, result = call(*calibrate, "--max-ppl-increase", 0.05)
    (bound,) = result["bounds"]
    assert bound["bound"] == pytest.approx(0.04879, abs=1e-5) and 0 < bound["mean_loss"] < bound["bound"]
    ratio = result["ppl_ratio"]["value"]
    assert ratio < 1.05 and bound["mean_loss"] > math.log(ratio), "the mean of rises is over the rise of the mean"
    assert result["saved_bytes"]["value"] > 0


def test_a_share_of_bytes_is_met(call, copy):
    out, result = call(STEP8, "--probe-dir", copy, "--samples", 100, "--max-length", 64, "--saved", 0.3)
    assert result["saved_bytes"]["value"] == pytest.approx(0.3, abs=0.02) and not result["certified"]
    presets = Manifest.load(copy).gates["presets"]
    assert [preset["saved_bytes"] for preset in presets.values()] == pytest.approx([0.12, 0.25, 0.4], abs=0.03)
    prices = [preset["log_lambda"] for preset in presets.values()]
    assert prices == sorted(prices) and prices[1] < result["log_lambda"] < prices[2]
    assert list(presets) == ["conservative", "balanced", "aggressive"] and "preset balanced: log λ" in out


def test_bounds_that_cannot_be_certified_and_wrong_artefacts_are_refused(call, copy, tiny_artifact):
    calibrate = [STEP8, "--probe-dir", copy, "--max-length", 64]
    before = (copy / "manifest.json").read_bytes()
    with pytest.raises(SedacError, match="no price with savings can be certified on 8 documents"):
        call(*calibrate, "--samples", 8, "--max-damage", 0.1)
    with pytest.raises(
        SedacError, match="gates are calibrated by --max-damage, --min-agreement, --max-ppl-increase or --saved"
    ):
        call(*calibrate)
    with pytest.raises(SedacError, match="has policy hard and no adapters"):
        call(STEP8, "--probe-dir", tiny_artifact, "--saved", 0.2)
    with pytest.raises(SystemExit):
        call(*calibrate, "--saved", 0.2, "--max-damage", 0.1)
    assert (copy / "manifest.json").read_bytes() == before


def test_a_text_file_of_wikitext_is_split_by_article(tmp_path):
    articles = [f" = Title {i} = \n \n Some text . \n = = Section = = \n More . \n" for i in range(30)]
    path = tmp_path / "wikitext.txt"
    path.write_text(" \n" + "".join(articles))
    assert collection.read_documents(str(path)) == articles


def test_the_sources_of_the_standard_library_are_a_dataset_that_is_always_there():
    documents = collection.read_documents("stdlib")
    assert len(documents) > 100 and any("class Fraction(" in text for text in documents)
