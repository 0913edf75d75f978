"""Gates: sizes and decisions, the twin in transformers, and levels in bits."""

import pytest
import torch
from gate_cases import LEVELS, cascade, random_gates

from sedac_core import collection, gated_model, gates_training
from sedac_core.artifacts import Fingerprint, Manifest
from sedac_core.cli import SedacError
from sedac_core.gated_model import final_states, gated, gathered_bits, gathered_mlp, masked_bits, masked_mlp
from sedac_core.gates import Gates, GateShape, adapters_path, by_level, choose, shape_of
from sedac_core.gates_training import Pass, Pointwise, TrainedMLP
from sedac_core.precision import COARSE, FINE, Planes

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
