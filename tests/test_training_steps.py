"""One step of training: gradients against transformers, precision, and the optimizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TOY_CONFIGS, padding_mask, random_state
from toy_training import config_in, curve, run_of, write_data

from nai_t5_core.bench.peers import exact_norms, own_t5, transformers_t5
from nai_t5_core.facts.config import T5Config
from nai_t5_core.training.batches import Batch
from nai_t5_core.training.config import OptimizerSection
from nai_t5_core.training.loop import TrainingError
from nai_t5_core.training.optimizers import learning_rate, make_optimizer
from nai_t5_core.training.weights import MasterWeights, checkpoint_blocks


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with texts, pairs and a tokenizer."""
    return write_data(tmp_path)


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


def test_flex_attention_cannot_train_on_a_cpu(folder: Path) -> None:
    """torch says so itself from 2.6 on; the day it does not, this choice can go."""
    from torch.nn.attention.flex_attention import flex_attention

    with pytest.raises(ValueError, match="flex attention has no backward on the CPU; use attention 'auto' or 'sdpa'"):
        run_of(config_in(folder, attention="flex"))
    q = torch.zeros(1, 1, 128, 16, requires_grad=True)
    if torch.__version__ >= "2.6":
        with pytest.raises(NotImplementedError, match="does not support backward on CPU"):
            flex_attention(q, q, q)
    assert run_of(config_in(folder, attention="sdpa")).advance().loss == run_of(config_in(folder)).advance().loss


def test_a_loss_that_is_not_finite_stops_the_run(folder: Path) -> None:
    run = run_of(config_in(folder))
    run.advance()
    with torch.no_grad():
        run.model.decoder.final_layer_norm.weight[0] = torch.inf
    with pytest.raises(TrainingError, match=r"step 2: the loss is nan .* lower optimizer.learning_rate"):
        run.advance()
    assert run.step == 1


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
