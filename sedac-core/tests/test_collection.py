"""Step 1 and the hooks under it: what is read from a model, and that files on disk are always whole."""

import json
import shutil

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sedac_core import cascade, collection
from sedac_core.artifacts import Manifest, hidden_path, load_collected
from sedac_core.cli import SedacError
from sedac_core.probe import LREProbe

STEP1 = "collect_multilayer_data.py"


@pytest.fixture(scope="module")
def tiny(tiny_model):
    return collection.load_model(str(tiny_model))


@pytest.fixture
def text(tmp_path):
    """A JSONL dataset of 12 documents of different lengths, the last one long."""
    rows = [{"text": f"Document {i}: " + "some words " * (i + 1)} for i in range(11)] + [{"text": "long " * 60}]
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def options(tiny_model, text, folder, **more):
    given = {"model": tiny_model, "dataset": text, "layers": "1,3", "save-dir": folder, "max-length": 64, **more}
    return [part for name, value in given.items() for part in (f"--{name}", value)]


def test_the_streams_are_what_transformers_calls_hidden_states(tiny):
    model, tokenizer = tiny
    batch = [
        collection.Sample(i, tuple(tokenizer(text)["input_ids"])) for i, text in enumerate(["short", "rather longer"])
    ]
    hooks = len(model.model.layers[1]._forward_hooks)
    streams = collection.residual_streams(model, (1, 3), batch)
    assert len(model.model.layers) == 6 and len(model.model.layers[1]._forward_hooks) == hooks
    for layer in (1, 3):
        alone = []
        for sample in batch:  # one by one: padding of a batch must not matter
            with torch.no_grad():
                alone.append(model(torch.tensor([sample.ids]), output_hidden_states=True).hidden_states[layer + 1][0])
        torch.testing.assert_close(streams[layer], torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_a_llama_decoder_is_read_too():
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    streams = collection.residual_streams(model, (0, 1), [collection.Sample(0, (1, 2, 3))])
    assert {layer: tuple(stream.shape) for layer, stream in streams.items()} == {0: (3, 32), 1: (3, 32)}


def test_a_model_of_another_build_is_refused():
    with pytest.raises(SedacError, match="no decoder that SEDAC can read"):
        collection.decoder(torch.nn.Linear(2, 2))


def test_the_lens_after_the_last_layer_is_the_models_own_entropy_whatever_the_piece(tiny, monkeypatch):
    model, tokenizer = tiny
    ids = tuple(tokenizer("The entropy of the next token.")["input_ids"])
    stream = collection.residual_streams(model, (5,), [collection.Sample(0, ids)])[5]
    with torch.no_grad():
        expected = torch.distributions.Categorical(logits=model(torch.tensor([ids])).logits[0]).entropy()
    torch.testing.assert_close(collection.lens_entropy(model, stream), expected, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(collection, "LENS_BYTES", 4 * 264 * 3)  # three rows at a time
    torch.testing.assert_close(collection.lens_entropy(model, stream), expected, rtol=1e-4, atol=1e-5)


def test_step_1_writes_the_same_token_in_the_same_row_of_every_file(call, tiny_model, text, tmp_path):
    _, summary = call(STEP1, *options(tiny_model, text, tmp_path / "data"))
    model, tokenizer = collection.load_model(str(tiny_model))
    documents = collection.read_documents(str(text))
    lengths = torch.tensor([len(tokenizer(document)["input_ids"]) for document in documents])
    assert summary["tokens"] == int(lengths.sum()) and summary["checkpoints"] == [1, 3]
    for layer in (1, 3):
        data = load_collected(tmp_path / "data", layer)
        assert torch.equal(data.documents.bincount(), lengths)
        chosen = data.documents == 3  # short enough to be one sample
        sample = collection.Sample(3, tuple(tokenizer(documents[3])["input_ids"]))
        expected = collection.residual_streams(model, (layer,), [sample])[layer]
        torch.testing.assert_close(data.hidden[chosen], expected, rtol=1e-4, atol=1e-4)
        entropy = collection.lens_entropy(model, expected)
        torch.testing.assert_close(data.entropy[chosen], entropy, rtol=1e-3, atol=1e-4)
    manifest = Manifest.load(tmp_path / "data")
    assert manifest.fingerprint.hidden_size == 64 and manifest.collection["tokens"] == summary["tokens"]
    assert not (tmp_path / "data" / ".shards").exists()


def test_an_interrupted_run_continues_and_gives_the_same_files(call, tiny_model, text, tmp_path, monkeypatch):
    call(STEP1, *options(tiny_model, text, tmp_path / "whole", **{"batch-size": 2}))

    given = options(tiny_model, text, tmp_path / "resumed", **{"batch-size": 2})
    real, ran = collection.residual_streams, []

    def stop_after(count):
        def run(*args):
            if len(ran) == count:
                raise KeyboardInterrupt
            ran.append(1)
            return real(*args)

        return run

    monkeypatch.setattr(collection, "residual_streams", stop_after(3))
    with pytest.raises(KeyboardInterrupt):
        call(STEP1, *given)
    shard = tmp_path / "resumed" / ".shards" / "hidden_states_layer1"
    shard.write_bytes(shard.read_bytes() + b"torn write")
    assert not hidden_path(tmp_path / "resumed", 1).exists()

    monkeypatch.setattr(collection, "residual_streams", stop_after(1000))
    call(STEP1, *given)
    batches = -(-Manifest.load(tmp_path / "whole").collection["samples"] // 2)
    assert len(ran) == batches, "batches that were done are not run again"
    for layer in (1, 3):
        whole, resumed = load_collected(tmp_path / "whole", layer), load_collected(tmp_path / "resumed", layer)
        assert torch.equal(whole.hidden, resumed.hidden) and torch.equal(whole.entropy, resumed.entropy)


def test_other_options_start_anew_and_leave_no_file_of_another_length(call, tiny_model, text, tmp_path):
    call(STEP1, *options(tiny_model, text, tmp_path / "data"))
    _, summary = call(STEP1, *options(tiny_model, text, tmp_path / "data", layers="2", samples=3))
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == [
        "documents.pt",
        "entropies_layer2.pt",
        "hidden_states_layer2.pt",
        "manifest.json",
    ]
    assert len(load_collected(tmp_path / "data", 2).hidden) == summary["tokens"]


def test_a_full_disk_leaves_the_old_files_as_they_were(call, full_disk, tiny_model, text, tmp_path):
    call(STEP1, *options(tiny_model, text, tmp_path / "data", samples=3))
    before = {p.name: p.read_bytes() for p in (tmp_path / "data").iterdir()}
    for size in (60_000, 200_000):  # while batches are written, and while the final files are
        with full_disk(size), pytest.raises(SedacError, match="cannot write"):
            call(STEP1, *options(tiny_model, text, tmp_path / "data"))
        assert {p.name: p.read_bytes() for p in (tmp_path / "data").iterdir() if p.is_file()} == before
    call(STEP1, *options(tiny_model, text, tmp_path / "data"))
    assert len(load_collected(tmp_path / "data", 1).hidden) > 200


def test_a_disk_that_cannot_hold_the_result_is_refused_before_the_work(call, tiny_model, text, tmp_path, monkeypatch):
    monkeypatch.setattr("os.statvfs", lambda path: type("Full", (), {"f_bavail": 1, "f_frsize": 4096}))
    with pytest.raises(SedacError, match="make room"):
        call(STEP1, *options(tiny_model, text, tmp_path / "data"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"layers": "1,5"}, "checkpoint 5 leaves no layer to skip: the model has layers 0 to 5"),
        ({"dataset": "empty.jsonl"}, "holds no text"),
        ({"dataset": "numbers.jsonl"}, "has the fields a, expected text in one of: text, content, question"),
        ({"dataset": "broken.jsonl"}, "no valid JSONL"),
        ({"dataset": "missing.txt"}, "cannot be read"),
        ({"dataset": "nobody/nothing"}, "use --dataset pydoc or a local"),
        ({"model": "nobody/nothing"}, "model nobody/nothing cannot be loaded"),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence(call, tiny_model, text, tmp_path, monkeypatch, more, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").write_text('{"text": "  "}\n')
    (tmp_path / "numbers.jsonl").write_text('{"a": 1}\n')
    (tmp_path / "broken.jsonl").write_text('{"text": \n')
    with pytest.raises(SedacError, match=message):
        call(STEP1, *options(tiny_model, text, tmp_path / "data", **more))
    assert not (tmp_path / "data").exists()


def test_the_damage_of_an_exit_is_what_it_does_to_that_token_alone(tiny):
    """One pass over copies of the sequence against the definition: every token exits by itself, in a pass of its own."""
    model, tokenizer = tiny
    batch = [
        collection.Sample(i, tuple(tokenizer(text)["input_ids"])) for i, text in enumerate(["short", "rather longer"])
    ]
    damage, agreement = collection.exit_damage(model, (1, 2), batch, keep_last=1)
    assert list(damage) == list(agreement) == [1, 2]
    for checkpoint in (1, 2):
        expected, same = [], []
        for sample in batch:
            ids = torch.tensor([sample.ids])
            with torch.no_grad():
                whole = model(ids).logits[0].log_softmax(-1)
            for place in range(len(sample.ids)):

                def skip(module, args, output, place=place):
                    output[:, place] = 0
                    return output

                handles = [model.model.layers[i].mlp.register_forward_hook(skip) for i in range(checkpoint + 1, 5)]
                with torch.no_grad():
                    exited = model(ids).logits[0, place].log_softmax(-1)
                for handle in handles:
                    handle.remove()
                expected.append((whole[place].exp() * (whole[place] - exited)).sum())
                same.append(whole[place].argmax() == exited.argmax())
        torch.testing.assert_close(damage[checkpoint], torch.stack(expected), rtol=1e-3, atol=1e-5)
        assert torch.equal(agreement[checkpoint], torch.stack(same)) and 0 < sum(same) < len(same)
        assert damage[checkpoint].min() > 1e-3


def test_step_1_collects_damage_and_step_2_learns_it(call, tiny_model, text, tmp_path):
    folder, damage = tmp_path / "data", {"target": "damage", "keep-last": 1}
    out, _ = call(STEP1, *options(tiny_model, text, folder, **damage))
    assert "an exit costs" in out
    manifest = Manifest.load(folder)
    assert manifest.keep_last == 1 and manifest.collection["target"] == "damage" and manifest.target == "entropy"
    model, tokenizer = collection.load_model(str(tiny_model))
    sample = collection.Sample(3, tuple(tokenizer(collection.read_documents(str(text))[3])["input_ids"]))
    expected, agreed = collection.exit_damage(model, (1, 3), [sample], 1)
    for layer in (1, 3):
        data = load_collected(folder, layer, damage=True)
        chosen = data.documents == 3
        torch.testing.assert_close(data.damage[chosen], expected[layer], rtol=1e-3, atol=1e-4)
        assert torch.equal(data.agreement[chosen].bool(), agreed[layer])

    train = ("train_multilayer_probes.py", "--data-dir", folder, "--layers", "1,3", "--rank", 4, "--epochs", 1)
    assert call(*train)[1]["target"] == "damage", "what was collected is what is learned"
    assert Manifest.load(folder).target == "damage"
    assert call(*train, "--target", "entropy")[1]["target"] == "entropy"
    data = json.loads((folder / "manifest.json").read_text()) | {"target": "guesses"}
    (folder / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(SedacError, match="its probes estimate guesses, this SEDAC knows entropy and damage"):
        Manifest.load(folder)

    call(STEP1, *options(tiny_model, text, folder))
    assert not list(folder.glob("damage*")), "no damage of other rows stays behind"
    with pytest.raises(SedacError, match="holds entropies and no damage: run step 1 again with --target damage"):
        call(*train, "--target", "damage")
    with pytest.raises(SedacError, match="its last 2 always run whole, so the last checkpoint is at most 2"):
        call(STEP1, *options(tiny_model, text, folder, target="damage"))


@pytest.mark.parametrize("layers", ["3,1", "1,1", "-1,2", "one"])
def test_layers_that_do_not_rise_are_refused(call, tiny_model, text, tmp_path, layers):
    with pytest.raises(SystemExit):
        call(STEP1, *options(tiny_model, text, tmp_path, layers=layers))


@pytest.mark.skipif(torch.cuda.is_available(), reason="4-bit loading may work here")
def test_4_bits_without_a_gpu_are_refused(call, tiny_model, text, tmp_path):
    with pytest.raises(SedacError, match=r"--load-in-4bit needs"):
        call(STEP1, *options(tiny_model, text, tmp_path), "--load-in-4bit")


@pytest.mark.parametrize(
    ("name", "content", "documents"),
    [
        ("a.jsonl", '{"question": "Why?", "answer": "So.", "id": "7"}\n\n"bare"\n', ["Why?\nSo.", "bare"]),
        ("a.jsonl", '{"text": "one\u2028row\x85"}\n{"text": "b"}\n', ["one\u2028row\x85", "b"]),
        ("a.json", '[{"n": 3, "body": "only text"}]', ["only text"]),
        ("a.txt", "".join(f"line {i}\n" for i in range(40)), None),
    ],
)
def test_local_files_are_read_by_what_they_hold(tmp_path, name, content, documents):
    (tmp_path / name).write_text(content, encoding="utf-8")
    found = collection.read_documents(str(tmp_path / name))
    if documents is None:
        assert len(found) == 20 and "".join(found) == content, "long neighbouring parts, nothing lost"
    else:
        assert found == documents


def test_samples_are_seeded_stay_in_their_document_and_skip_what_they_must(tiny):
    _, tokenizer = tiny
    documents = [chr(97 + i) * 25 for i in range(8)]
    samples = collection.make_samples(documents, tokenizer, 9, 10, seed=3, skip=[2, 5])
    assert samples == collection.make_samples(documents, tokenizer, 9, 10, seed=3, skip=[2, 5])
    assert samples != collection.make_samples(documents, tokenizer, 9, 10, seed=4, skip=[2, 5])
    assert len(samples) == 9 and not {2, 5} & {sample.document for sample in samples}
    for sample in samples:
        assert set(tokenizer.decode(sample.ids)) == {chr(97 + sample.document)} and len(sample.ids) <= 10


# ---------------------------------------------------------------- the cascade, by hooks


def probes_for(*seeds):
    made = []
    for seed in seeds:
        torch.manual_seed(seed)
        made.append(LREProbe(64, 8).eval().requires_grad_(False))
    return made


def test_the_hooks_decide_by_the_rule_and_really_silence_the_mlps(tiny):
    model, tokenizer = tiny
    ids = torch.tensor([tokenizer("The hooks apply the very rule that serving applies.")["input_ids"]])
    probes, layers = probes_for(1, 2), (1, 3)
    settings = {"gamma": 0.6, "weights": (1.0, 2.0), "level": 0.45}
    with torch.no_grad(), collection.cascade_hooks(model, probes, layers, (0.0, 0.0), keep_last=1) as decided:
        stock = model(ids).logits
        first = decided.risks[:, 0].clone()
        assert (decided.exit_checkpoint == 2).all()
    with torch.no_grad():
        assert torch.equal(stock, model(ids).logits), "threshold 0: no exits, nothing changed"

    thresholds = [float(first[0].median()), float(first[1].quantile(0.8))]
    written = {}
    spies = [
        layer.mlp.register_forward_pre_hook(lambda m, a, i=i: written.__setitem__(i, [a[0].clone()]))
        for i, layer in enumerate(model.model.layers)
    ]
    block = collection.cascade_hooks(model, probes, layers, thresholds, keep_last=1, **settings)
    with torch.no_grad(), block as decided:
        spies += [
            layer.mlp.register_forward_hook(lambda m, a, o, i=i: written[i].append(o.clone()))
            for i, layer in enumerate(model.model.layers)
        ]
        out = model(ids).logits
    for spy in spies:
        spy.remove()
    exits = decided.exit_checkpoint[0]
    assert torch.equal(exits, cascade.decide(decided.risks[:, 0], thresholds, **settings).exit_checkpoint)
    assert {0, 1, 2} & set(exits.tolist()) and len(set(exits.tolist())) > 1 and not torch.equal(out, stock)
    for layer in range(6):
        skips = torch.zeros_like(exits, dtype=torch.bool)
        for i, checkpoint in enumerate(layers):
            if checkpoint < layer < 5:  # the last layer is kept whole
                skips |= exits <= i
        silent = (written[layer][1][0] == 0).all(-1)
        assert torch.equal(silent, skips), f"layer {layer}"


def test_a_token_decides_alone_whatever_its_batch(tiny):
    model, tokenizer = tiny
    samples = [
        collection.Sample(i, tuple(tokenizer(t)["input_ids"])) for i, t in enumerate(["one", "another text", "x"])
    ]
    rule = (probes_for(1, 2), (1, 3), (0.6, 0.8))

    def run(batch):
        ids, mask = collection.padded(batch, "cpu")
        with torch.no_grad(), collection.cascade_hooks(model, *rule) as decided:
            model(ids, attention_mask=mask.long())
        return decided.exit_checkpoint[mask]

    assert torch.equal(run(samples), torch.cat([run([sample]) for sample in samples]))


@pytest.mark.slow
def test_steps_work_where_neither_vllm_nor_bitsandbytes_is_installed(script, tiny_artifact, tmp_path):
    """An interpreter that cannot import them runs steps 2, 3 and 8; step 1's imports stand too."""
    shutil.copytree(tiny_artifact, tmp_path / "data")
    blocker = tmp_path / "site"
    blocker.mkdir()
    (blocker / "sitecustomize.py").write_text(
        "import sys\nfor name in ('vllm', 'bitsandbytes', 'triton'):\n    sys.modules[name] = None\n"
    )
    import os

    environment = {**os.environ, "PYTHONPATH": str(blocker)}
    for command in (
        [STEP1, "--help"],
        ["train_multilayer_probes.py", "--data-dir", tmp_path / "data", "--layers", "1,3", "--epochs", 1],
        ["sedac_calibrate.py", "--probe-dir", tmp_path / "data", "--exit-rates", "0.2,0.4"],
        ["test_v6_local.py", "--data-dir", tmp_path / "data"],
    ):
        done = script(*command, env=environment)
        assert done.returncode == 0, done.stderr


def test_a_text_file_of_wikitext_is_split_by_article(tmp_path):
    articles = [f" = Title {i} = \n \n Some text . \n = = Section = = \n More . \n" for i in range(30)]
    path = tmp_path / "wikitext.txt"
    path.write_text(" \n" + "".join(articles))
    assert collection.read_documents(str(path)) == articles


def test_the_sources_of_the_standard_library_are_a_dataset_that_is_always_there():
    documents = collection.read_documents("stdlib")
    assert len(documents) > 100 and any("class Fraction(" in text for text in documents)
