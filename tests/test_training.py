"""Training: the objective against its definition, gradients against transformers, and runs that resume exactly."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import spiece_model
from conftest import TOY_CONFIGS, padding_mask, random_state
from hypothesis import given, settings
from hypothesis import strategies as st

from nai_t5_core.cli import main
from nai_t5_core.config import T5Config
from nai_t5_core.load import load_whole
from nai_t5_core.peers import exact_norms, own_t5, transformers_t5
from nai_t5_core.tokenizer import ByteTokenizer, Tokenizer, tokenizer_from_bytes
from nai_t5_core.training import checkpoints, losses
from nai_t5_core.training.batches import Batch, Batches, sentinel_ids
from nai_t5_core.training.config import DataSection, OptimizerSection, TrainConfig, read_config
from nai_t5_core.training.loop import Run, TrainingError, train
from nai_t5_core.training.optimizers import learning_rate, make_optimizer
from nai_t5_core.training.span_corruption import corrupt, span_lengths
from nai_t5_core.training.start import first_model
from nai_t5_core.training.weights import MasterWeights, checkpoint_blocks

SIZES = {"vocab_size": 4096, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 2}
SIZES |= {"num_decoder_layers": 2, "tie_word_embeddings": True}
CAPTIONS = [f"a {colour} {thing} on a table" for colour in ("red", "blue", "green") for thing in ("cup", "cat", "book")]
PAIRS = [(f"colour of the {colour} cup", colour) for colour in ("red", "blue", "green", "black", "white")]
SENTINELS = np.arange(9_999, 9_899, -1)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tokenizer_from_bytes("sentencepiece", spiece_model())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with texts, pairs and a tokenizer."""
    (tmp_path / "captions.txt").write_text("\n".join(CAPTIONS) + "\n")
    lines = [json.dumps({"input": question, "target": answer}) for question, answer in PAIRS]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "spiece.model").write_bytes(spiece_model())
    return tmp_path


def toml(**values: Any) -> str:
    """The text of a small run's config; ``values`` replace or add single ones at the top."""
    top = {"out": "run", "steps": 6, "seed": 3, "device": "cpu", "log_every": 1, "checkpoint_every": 3, **values}
    sizes = "\n".join(f"{name} = {json.dumps(value)}" for name, value in SIZES.items())
    return "\n".join(
        [
            *(f"{name} = {json.dumps(value)}" for name, value in top.items()),
            '[model]\ntokenizer = "spiece.model"',
            f"[model.sizes]\n{sizes}",
            '[optimizer]\nlearning_rate = 0.01\nwarmup = 2\nschedule = "constant"',
            '[[data]]\nobjective = "span-corruption"\nfile = "captions.txt"\nrows = 3',
            '[[data]]\nobjective = "prefix"\nfile = "captions.txt"\nrows = 2',
            '[[data]]\nobjective = "pairs"\nfile = "pairs.jsonl"\nrows = 4',
        ]
    )


def config_in(folder: Path, **values: Any) -> TrainConfig:
    (folder / "train.toml").write_text(toml(**values))
    return read_config(folder / "train.toml")


def run_of(config: TrainConfig) -> Run:
    model, tokenizer = first_model(config)
    return Run(config, model, Batches(config.data, tokenizer, config.seed))


def curve(run: Run, steps: int) -> list[float]:
    return [run.advance().loss for _ in range(steps)]


# ---------------------------------------------------------------------------------------------------------------------
# Span corruption
# ---------------------------------------------------------------------------------------------------------------------


@given(
    length=st.integers(2, 600),
    density=st.floats(0.02, 0.9),
    mean_span=st.floats(1, 10),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=200, deadline=None)
def test_nothing_is_lost_and_sentinels_are_in_order(length: int, density: float, mean_span: float, seed: int) -> None:
    tokens = np.arange(length)
    marks = np.arange(10_000, 9_000, -1)
    inputs, targets = corrupt(tokens, marks, density, mean_span, np.random.default_rng(seed))
    in_inputs, in_targets = inputs[inputs > length], targets[targets > length]
    noise = min(max(round(length * density), 1), length - 1)
    spans = min(max(round(noise / mean_span), 1), noise, length - noise + 1)
    assert in_inputs.tolist() == in_targets.tolist() == marks[:spans].tolist()
    assert len(targets) == noise + spans and len(inputs) == length - noise + spans
    # Each span back in the place of its sentinel gives the text; none is empty, and none touches another.
    starts = np.flatnonzero(targets > length)
    contents = dict(zip(in_targets.tolist(), np.split(targets, starts)[1:], strict=True))
    assert min(len(content) for content in contents.values()) > 1
    restored = [token for mark in inputs.tolist() for token in (contents[mark][1:] if mark in contents else [mark])]
    assert restored == tokens.tolist()
    places = np.flatnonzero(inputs > length)
    assert (np.diff(places) > 1).all()


def test_fifteen_percent_in_spans_of_three() -> None:
    kept, noise = span_lengths(512, 0.15, 3.0, np.random.default_rng(0))
    assert (noise.sum(), kept.sum(), len(noise), len(kept)) == (77, 435, 26, 27)


def test_every_division_into_spans_is_equally_likely() -> None:
    random = np.random.default_rng(0)
    # 5 noise tokens in 2 spans: four ways.
    counts = Counter(tuple(span_lengths(10, 0.5, 2.5, random)[1].tolist()) for _ in range(4000))
    assert set(counts) == {(1, 4), (2, 3), (3, 2), (4, 1)}
    # Beyond five standard deviations.
    assert all(abs(count - 1000) < 140 for count in counts.values())


def test_a_span_of_a_short_text_lies_anywhere() -> None:
    random = np.random.default_rng(0)
    # One span of 2 in 8 tokens: seven places.
    counts = Counter(int(span_lengths(8, 0.25, 2.0, random)[0][0]) for _ in range(7000))
    assert set(counts) == set(range(7)) and all(abs(count - 1000) < 150 for count in counts.values())


def test_texts_that_cannot_be_corrupted() -> None:
    random = np.random.default_rng(0)
    with pytest.raises(ValueError, match="a text of 1 tokens cannot be corrupted"):
        corrupt(np.arange(1), SENTINELS, 0.15, 3.0, random)
    with pytest.raises(ValueError, match="has 150 noise spans, and the vocabulary 100 sentinels"):
        corrupt(np.arange(1000), SENTINELS, 0.15, 1.0, random)


def test_sentinels_of_the_vocabulary(tokenizer: Tokenizer) -> None:
    assert sentinel_ids(tokenizer).tolist() == list(range(4095, 3995, -1))
    assert sentinel_ids(ByteTokenizer()).tolist() == list(range(259, 384))


def test_a_vocabulary_without_sentinels(folder: Path) -> None:
    class PlainBytes(ByteTokenizer):
        _pattern = re.compile("</s>")

    with pytest.raises(ValueError, match="the vocabulary has no sentinels"):
        Batches(sections(folder, span_corruption=1), PlainBytes(), 0)
    assert rows_of(Batches(sections(folder, prefix=1), PlainBytes(), 0)(0))


# ---------------------------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------------------------


def sections(folder: Path, **rows: int) -> list[DataSection]:
    files = {"span_corruption": "captions.txt", "prefix": "captions.txt", "pairs": "pairs.jsonl"}
    return [
        DataSection(objective=name.replace("_", "-"), file=folder / files[name], rows=number)
        for name, number in rows.items()
    ]


def rows_of(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """Inputs and targets of every row without padding."""
    return [
        (ids[mask.bool()].tolist(), labels[labels != -100].tolist())
        for ids, mask, labels in zip(batch.input_ids, batch.attention_mask, batch.labels, strict=True)
    ]


def equal(a: Batch, b: Batch) -> bool:
    return rows_of(a) == rows_of(b)


def test_a_batch_is_a_function_of_its_number(folder: Path, tokenizer: Tokenizer) -> None:
    chosen = sections(folder, span_corruption=2, prefix=2, pairs=3)
    whole = Batches(chosen, tokenizer, seed=1)
    expected = [whole(number) for number in range(12)]
    later = Batches(chosen, tokenizer, seed=1)
    assert all(equal(later(number), expected[number]) for number in (11, 4, 7))
    assert not any(equal(Batches(chosen, tokenizer, seed=2)(number), expected[number]) for number in range(12))


def test_rows_and_padding(folder: Path, tokenizer: Tokenizer) -> None:
    batch = Batches(sections(folder, span_corruption=2, prefix=2, pairs=3), tokenizer, 0)(0)
    assert batch.input_ids.shape == batch.attention_mask.shape and len(batch.labels) == 7
    rows = rows_of(batch)
    assert all(inputs[-1] == targets[-1] == tokenizer.eos_token_id for inputs, targets in rows)
    assert not batch.input_ids[batch.attention_mask == 0].any()
    assert batch.targets == sum(len(targets) for _, targets in rows)
    texts = [tuple(tokenizer.decode(ids) for ids in row) for row in rows]
    assert all(f"{first} {second}" in CAPTIONS for first, second in texts[2:4])
    assert all(pair in PAIRS for pair in texts[4:])


def test_an_epoch_has_every_pair_once(folder: Path, tokenizer: Tokenizer) -> None:
    batches = Batches(sections(folder, pairs=1), tokenizer, 0)
    epochs = [[tokenizer.decode(rows_of(batches(5 * epoch + i))[0][0]) for i in range(5)] for epoch in range(4)]
    assert all(sorted(epoch) == sorted(question for question, _ in PAIRS) for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1


def test_noise_is_drawn_anew(folder: Path, tokenizer: Tokenizer) -> None:
    (folder / "captions.txt").write_text("a red cup and a blue cat on top of the wooden table")
    batches = Batches(sections(folder, span_corruption=1), tokenizer, 0)
    assert len({tuple(rows_of(batches(number))[0][0]) for number in range(20)}) > 5


def test_long_texts_are_cut_into_pieces(folder: Path, tokenizer: Tokenizer) -> None:
    text = " ".join(CAPTIONS)
    (folder / "captions.txt").write_text(text)
    section = sections(folder, prefix=1)[0].model_copy(update={"max_length": 8})
    batches = Batches([section], tokenizer, 0)
    ids = tokenizer.encode(text, add_eos=False)
    pieces = [ids[start : start + 7] for start in range(0, len(ids), 7)]
    found = [[*a[:-1], *b[:-1]] for number in range(len(pieces)) for a, b in rows_of(batches(number))]
    assert sorted(found) == sorted(pieces)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("captions.txt", "a red cup\ncup\n", "captions.txt, line 2: 'cup' is a single token"),
        ("captions.txt", "\n \n", "captions.txt is empty"),
        ("captions.txt", None, "captions.txt cannot be read as UTF-8 text"),
        ("pairs.jsonl", '{"input": "a"}', 'pairs.jsonl, line 1: no object {"input"'),
        ("pairs.jsonl", '{"input": "a", "target": 3}', 'pairs.jsonl, line 1: no object {"input"'),
        ("pairs.jsonl", json.dumps({"input": "red " * 600, "target": "x"}), "line 1: 601 tokens, more than max_length"),
    ],
)
def test_bad_data(folder: Path, tokenizer: Tokenizer, name: str, content: str | None, message: str) -> None:
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        Batches(sections(folder, span_corruption=1, pairs=1), tokenizer, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Config
# ---------------------------------------------------------------------------------------------------------------------


def test_config_paths_start_at_its_folder(folder: Path) -> None:
    config = config_in(folder)
    assert config.out == folder / "run" and config.model.tokenizer == folder / "spiece.model"
    assert [section.file.parent for section in config.data] == [folder] * 3
    assert config.model.sizes == T5Config(**SIZES)
    text = "\n".join(line for line in toml().split("\n") if line.split(" = ")[0] not in {*SIZES, "[model.sizes]"})
    for source, expected in (("spiece.model", str(folder / "spiece.model")), ("google/t5", "google/t5")):
        (folder / "train.toml").write_text(text.replace('tokenizer = "spiece.model"', f'source = "{source}"'))
        assert read_config(folder / "train.toml").model.source == expected


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("steps = 6", "stepps = 6", "stepps: Extra inputs are not permitted"),
        ("steps = 6", "", "steps: Field required"),
        ("steps = 6", "steps = 0", r"steps: Input should be greater than 0 \(given: 0\)"),
        ('schedule = "constant"', 'schedule = "step"', "optimizer.schedule: Input should be 'constant'"),
        ('tokenizer = "spiece.model"', "", "model: sizes without a tokenizer"),
        ('tokenizer = "spiece.model"', 'source = "a/b"', "model: give either source"),
        ("num_decoder_layers = 2", "num_decoder_layers = 0", "model: sizes.num_decoder_layers is 0"),
        ("rows = 4", "rows = 4\nmean_span = 2", "data.2: only span-corruption has mean_span"),
        ('schedule = "constant"', 'kind = "adafactor"\nbetas = [0.9, 0.9]', "optimizer: betas are AdamW's"),
        ("warmup = 2", "warmup = 2\nbetas = [0.9, 1.0]", "optimizer: betas="),
        ("rows = 4", "rows = 0", "data.2.rows: Input should be greater than 0"),
        ("steps = 6", "steps = ", "cannot be read as TOML"),
    ],
)
def test_mistakes_in_a_config(folder: Path, old: str, new: str, message: str) -> None:
    text = toml()
    assert old in text
    (folder / "train.toml").write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=message):
        read_config(folder / "train.toml")


def test_a_tokenizer_of_another_model_is_refused(folder: Path) -> None:
    config = config_in(folder)
    assert config.model.sizes is not None
    sizes = config.model.sizes.model_copy(update={"vocab_size": 100})
    small = config.model_copy(update={"model": config.model.model_copy(update={"sizes": sizes})})
    with pytest.raises(ValueError, match="the tokenizer has 4096 tokens, the model 100"):
        first_model(small)


# ---------------------------------------------------------------------------------------------------------------------
# Gradients and weights
# ---------------------------------------------------------------------------------------------------------------------


def toy_batch(config: T5Config) -> Batch:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, config.vocab_size, (3, 9), generator=generator)
    labels = torch.randint(3, config.vocab_size, (3, 6), generator=generator)
    labels[1, 4:] = labels[2, 1:] = -100
    return Batch(ids, padding_mask([9, 4, 6], 9), labels)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_gradients_are_those_of_transformers(config: T5Config, gradient_checkpointing: bool) -> None:
    pytest.importorskip("transformers", reason="transformers is the oracle")
    state = {name: tensor.double() for name, tensor in random_state(config).items()}
    batch = toy_batch(config)
    reference = exact_norms(transformers_t5(config, state, torch.float64)).double().requires_grad_(True)
    reference(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss.backward()
    expected = {name: weight.grad for name, weight in reference.named_parameters()}
    # Norm weights, float32 in a model as it is loaded, are float64 too.
    weights = MasterWeights(
        own_t5(config, state, torch.float64, "separate").double(), torch.float64, gradient_checkpointing
    )
    weights.add_gradients(batch, share=1)
    found = dict(weights.model.named_parameters())
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        assert weight.grad is not None and weight.dtype == torch.float64
        largest = float(expected[name].abs().max())
        assert float((weight.grad - expected[name]).abs().max()) <= 1e-8 * largest, name


def test_checkpointed_blocks_keep_less_and_compute_the_same(config: T5Config) -> None:
    batch, kept, gradients = toy_batch(config), [], []
    for wanted in (False, True):
        model = own_t5(config, random_state(config), torch.float32, "separate").requires_grad_(True)
        names = list(model.state_dict())
        if wanted:
            checkpoint_blocks(model)
        assert list(model.state_dict()) == names
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=sizes: s.append(x.nbytes) or x, lambda x: x):
            loss = model(batch.input_ids, batch.attention_mask, labels=batch.labels).loss
        assert loss is not None
        loss.backward()
        kept.append(sum(sizes))
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert kept[1] < kept[0] / 2
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_accumulated_batches_count_as_one(folder: Path) -> None:
    config = config_in(folder)
    whole = config.model_copy(update={"data": tuple(s.model_copy(update={"rows": 6}) for s in config.data)})
    parts = config.model_copy(
        update={"data": tuple(s.model_copy(update={"rows": 2}) for s in config.data), "accumulation": 3}
    )
    one, three = run_of(whole), run_of(parts)
    first, second = one.advance(), three.advance()
    assert first.targets == second.targets
    assert second.loss == pytest.approx(first.loss, rel=1e-6)
    assert second.gradient_norm == pytest.approx(first.gradient_norm, rel=1e-5)


def test_bfloat16_beside_float32_weights(folder: Path) -> None:
    run = run_of(config_in(folder, precision="bfloat16", accumulation=2))
    reports = [run.advance() for _ in range(12)]
    compute = run.weights.compute
    assert run.model.dtype == torch.float32 and compute.dtype == torch.bfloat16
    for (name, master), copy in zip(run.model.named_parameters(), compute.parameters(), strict=True):
        assert master.dtype == torch.float32, name
        assert copy.dtype == (torch.float32 if "layer_norm" in name else torch.bfloat16), name
        assert torch.equal(copy, master.to(copy.dtype)) and copy.grad is None
    # Steps below bfloat16's resolution are kept.
    assert any(not torch.equal(master, master.bfloat16().float()) for master in run.model.parameters())
    exact = curve(run_of(config_in(folder, accumulation=2)), 12)
    assert reports[0].loss == pytest.approx(exact[0], rel=0.02)
    assert reports[-1].loss < 0.8 * reports[0].loss


def test_a_loss_that_is_not_finite_stops_the_run(folder: Path) -> None:
    run = run_of(config_in(folder))
    run.advance()
    with torch.no_grad():
        run.model.decoder.final_layer_norm.weight[0] = torch.inf
    with pytest.raises(TrainingError, match=r"step 2: the loss is nan .* lower optimizer.learning_rate"):
        run.advance()
    assert run.step == 1


# ---------------------------------------------------------------------------------------------------------------------
# Optimizers
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1, 1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2]),
        ("inverse-sqrt", [0.5, 1, 1, (2 / 3) ** 0.5, 0.5**0.5, 0.4**0.5]),
    ],
)
def test_learning_rate(schedule: Any, expected: list[float]) -> None:
    section = OptimizerSection(schedule=schedule, warmup=2, learning_rate=1)
    assert [learning_rate(section, step, 6) for step in range(6)] == pytest.approx(expected)
    assert all(learning_rate(section.model_copy(update={"warmup": 0}), step, 6) > 0 for step in range(6))


@pytest.mark.parametrize("kind", ["adamw", "adafactor"])
def test_decay_spares_norms_and_biases(kind: Any) -> None:
    config = TOY_CONFIGS["v1.1"]
    model = own_t5(config, random_state(config), torch.float32, "separate").requires_grad_(True)
    optimizer = make_optimizer(model, OptimizerSection(kind=kind, weight_decay=0.1))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        spared = "layer_norm" in name or "relative_attention_bias" in name
        assert decay[id(parameter)] == (0 if spared else 0.1), name


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["adamw", "adafactor"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_resuming_gives_the_same_curve(folder: Path, kind: str, precision: str) -> None:
    (folder / "train.toml").write_text(
        toml(precision=precision).replace("[optimizer]", f'[optimizer]\nkind = "{kind}"')
    )
    config = read_config(folder / "train.toml")
    unbroken = run_of(config)
    expected = curve(unbroken, 6)
    broken = run_of(config)
    assert curve(broken, 3) == expected[:3]
    broken.save(folder / "checkpoint.pt")
    resumed = run_of(config)
    resumed.resume(folder / "checkpoint.pt")
    assert resumed.step == 3
    assert curve(resumed, 3) == expected[3:]
    weights = zip(unbroken.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)


def test_an_interrupted_run_goes_on(folder: Path) -> None:
    whole = train(config_in(folder, out="whole"))

    class StoppedError(Exception):
        pass

    def interrupt(report: losses.StepReport, steps: int) -> None:
        if report.step == 5:
            raise StoppedError

    config = config_in(folder)
    with pytest.raises(StoppedError):
        train(config, progress=interrupt)
    log = config.out / losses.NAME
    # Steps 4 and 5 lie behind the checkpoint, and a line is cut short.
    assert len(losses.read_losses(log)) == 5
    log.write_text(log.read_text() + '{"step"')
    with pytest.raises(ValueError, match="holds a run already; go on with --resume"):
        train(config)
    resumed = train(config, resume=True)
    assert resumed.reports == whole.reports == losses.read_losses(log)
    assert [report.step for report in resumed.reports] == [1, 2, 3, 4, 5, 6]
    assert resumed.file.read_bytes() == whole.file.read_bytes()


def test_a_checkpoint_is_written_whole_or_not_at_all(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(config_in(folder))
    path = folder / "checkpoint.pt"
    run.save(path)
    before = path.read_bytes()
    run.advance()

    def full_disk(state: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(checkpoints.torch, "save", full_disk)
    with pytest.raises(OSError, match="no space left"):
        run.save(path)
    assert path.read_bytes() == before and not path.with_name("checkpoint.pt.part").exists()


def test_checkpoints_that_do_not_fit(folder: Path) -> None:
    run, path = run_of(config_in(folder)), folder / "checkpoint.pt"
    with pytest.raises(ValueError, match="there is no run to go on with"):
        run.resume(path)
    run.save(path)
    with pytest.raises(ValueError, match=r"another config .seed was 3 and is 4"):
        run_of(config_in(folder, seed=4)).resume(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="is no checkpoint of a training run, or is damaged"):
        run.resume(path)


@pytest.mark.parametrize("tied", [True, False])
def test_exports_are_the_trained_model(folder: Path, tokenizer: Tokenizer, tied: bool) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle")
    config = config_in(folder)
    assert config.model.sizes is not None
    sizes = config.model.sizes.model_copy(update={"tie_word_embeddings": tied})
    config = config.model_copy(update={"model": config.model.model_copy(update={"sizes": sizes}), "steps": 4})
    trained = train(config)
    reference = transformers.T5ForConditionalGeneration.from_pretrained(trained.hf_folder).eval()
    ours = load_whole(trained.file, torch.float32, "cpu")
    batch = Batches(config.data, tokenizer, config.seed)(0)
    with torch.no_grad():
        expected = reference(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels)
        found = ours.model(batch.input_ids, batch.attention_mask, labels=batch.labels)
    assert float((found.logits - expected.logits).abs().max() / expected.logits.abs().max()) < 1e-5
    assert ours.tokenizer is not None and ours.tokenizer.encode("a red cup") == tokenizer.encode("a red cup")
    assert transformers.AutoTokenizer.from_pretrained(trained.hf_folder)("a red cup").input_ids == tokenizer.encode(
        "a red cup"
    )
    # The trained weights and not the first ones.
    assert found.loss is not None and float(found.loss) < trained.reports[0].loss


def test_a_run_from_weights_begins_where_they_are(folder: Path) -> None:
    trained = train(config_in(folder))
    before = {file: file.read_bytes() for file in (trained.file, trained.hf_folder / "model.safetensors")}
    for source in before:
        config = config_in(folder, out=f"more-{source.stem}-{source.parent.name}")
        model = config.model.model_copy(update={"sizes": None, "tokenizer": None, "source": str(source)})
        further = train(config.model_copy(update={"model": model, "seed": 3}))
        assert further.reports[0].loss < trained.reports[0].loss
    assert before == {file: file.read_bytes() for file in before}


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["nai-t5", "train", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def test_command(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="it draws the plot")
    (folder / "train.toml").write_text(toml(steps=40, log_every=10))
    picture = folder / "losses.png"
    assert run_command(monkeypatch, folder / "train.toml", "--plot", picture, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["steps"] == 40 and report["loss"] < 0.4 * report["first_loss"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    logged = [json.loads(line) for line in Path(report["log"]).read_text().splitlines()]
    assert [line["step"] for line in logged] == [1, 10, 20, 30, 40]
    assert run_command(monkeypatch, folder / "train.toml") == 2
    assert "holds a run already" in capsys.readouterr().err
    assert run_command(monkeypatch, folder / "train.toml", "--resume") == 0
    assert "40 steps, loss" in capsys.readouterr().out
    assert run_command(monkeypatch, folder / "absent.toml") == 2
    assert "absent.toml cannot be read as TOML" in capsys.readouterr().err
