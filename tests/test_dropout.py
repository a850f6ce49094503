"""Dropout in training: where transformers has it, by the asked share, and nothing where it is not asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import TOY_CONFIGS, padding_mask, random_state
from toy_training import config_in, curve, run_of, write_data

from nai_t5_core.bench.peers import own_t5, transformers_t5
from nai_t5_core.facts.config import T5Config
from nai_t5_core.generation.t5 import T5
from nai_t5_core.training.dropout import add_dropout, drawn_for

IDS = torch.randint(3, 96, (3, 9), generator=torch.Generator().manual_seed(1))
MASK = padding_mask([9, 4, 6], 9)
TEXTS = torch.randint(3, 96, (3, 6), generator=torch.Generator().manual_seed(2))
CPU = torch.device("cpu")


def training_model(config: T5Config, rate: float) -> T5:
    model = own_t5(config, random_state(config), torch.float32, "separate").train()
    add_dropout(model, rate)
    return model


def logits(model: T5, draw: int) -> torch.Tensor:
    with drawn_for(0, draw, 0, CPU), torch.no_grad():
        return model(IDS, MASK, TEXTS).logits


def test_the_asked_share_is_dropped_and_the_rest_makes_up_for_it() -> None:
    model, rate = training_model(TOY_CONFIGS["v1.1"], 0.3), 0.3
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    plain = own_t5(TOY_CONFIGS["v1.1"], random_state(TOY_CONFIGS["v1.1"]), torch.float32, "separate").train()
    attention, dense = model.encoder.block[0].layer[0].SelfAttention, model.decoder.block[0].layer[2].DenseReluDense
    hidden = torch.rand(400, 64) + 1
    before = plain.decoder.block[0].layer[2].DenseReluDense.wi_0(hidden)
    seen["hidden"] = (before, torch.nn.functional.dropout(before, rate))
    entered: list[torch.Tensor] = []
    dense.wo.register_forward_hook(lambda _, inputs, __: entered.append(inputs[0]))
    added = dense(hidden)
    inner = plain.decoder.block[0].layer[2].DenseReluDense
    whole = torch.nn.functional.gelu(inner.wi_0(hidden), approximate="tanh") * inner.wi_1(hidden)
    for name, found, expected in (
        ("hidden", entered[0], whole),
        ("feed-forward", added, inner.wo(entered[0])),
        (
            "attention",
            attention(hidden, lambda q, k, v: v),
            plain.encoder.block[0].layer[0].SelfAttention(hidden, lambda q, k, v: v),
        ),
    ):
        kept = found != 0
        assert float((~kept).float().mean()) == pytest.approx(rate, abs=0.02), name
        torch.testing.assert_close(found[kept], expected[kept] / (1 - rate), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["v1.0", "umt5"])
def test_outputs_vary_as_much_as_those_of_transformers(kind: str) -> None:
    """Every place adds to the variance: the outputs most, what enters the last product least."""
    pytest.importorskip("transformers", reason="transformers is the oracle")
    config, rate, draws = TOY_CONFIGS[kind], 0.2, 200
    torch.manual_seed(0)
    reference = transformers_t5(config, random_state(config), torch.float32).train()
    for module in reference.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = rate
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = rate
    # Rows of one batch are dropped from independently.
    ids, mask, texts = (tensor.repeat(draws, 1) for tensor in (IDS, MASK, TEXTS))
    with torch.no_grad():
        theirs = reference(input_ids=ids, attention_mask=mask, decoder_input_ids=texts).logits
        mine = training_model(config, rate)(ids, mask, texts).logits
    spread, wanted = (found.unflatten(0, (draws, -1)).var(dim=0).mean() for found in (mine, theirs))
    assert float(spread / wanted) == pytest.approx(1, abs=0.04)


def test_attention_weights_are_dropped() -> None:
    """Values of one: an output is the sum of the weights that were kept, over the share that is kept."""
    model = training_model(TOY_CONFIGS["v1.1"], 0.25)
    sums: list[torch.Tensor] = []
    for block in model.encoder.block[:1]:
        block.register_forward_pre_hook(
            lambda _, inputs: sums.append(inputs[1](*(torch.ones(19, 4, 16) * size for size in (0, 0, 1)))[..., 0])
        )
    for draw in range(40):
        logits(model, draw)
    found = torch.stack(sums)
    assert float(found.mean()) == pytest.approx(1, abs=0.02)
    assert float(found.std()) > 0.1
    sums.clear()
    logits(model.eval(), 0)
    torch.testing.assert_close(sums[0], torch.ones(19, 4))


def test_rate_zero_and_evaluation_are_the_plain_model(config: T5Config) -> None:
    plain = own_t5(config, random_state(config), torch.float32, "separate").train()
    wanted = logits(plain, 0)
    assert torch.equal(logits(training_model(config, 0.0), 0), wanted)
    dropping = training_model(config, 0.5)
    assert not torch.equal(logits(dropping, 0), wanted)
    assert torch.equal(logits(dropping.eval(), 0), wanted)


def test_draws_follow_from_the_number_and_leave_torchs_own_alone() -> None:
    model = training_model(TOY_CONFIGS["v1.1"], 0.2)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    first, second = logits(model, 1), logits(model, 2)
    assert torch.equal(torch.rand(4), expected)
    assert torch.equal(logits(model, 1), first) and not torch.equal(first, second)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_runs_with_dropout_resume_to_the_same_curve(tmp_path: Path, precision: str) -> None:
    config = config_in(write_data(tmp_path), dropout=0.1, precision=precision)
    unbroken = run_of(config)
    expected = curve(unbroken, 6)
    broken = run_of(config)
    assert curve(broken, 3) == expected[:3]
    broken.save(tmp_path / "checkpoint.pt")
    resumed = run_of(config)
    resumed.resume(tmp_path / "checkpoint.pt")
    assert curve(resumed, 3) == expected[3:]
    assert curve(run_of(config.model_copy(update={"dropout": 0.0})), 1) != expected[:1]


def test_checkpointed_blocks_drop_the_same_again(tmp_path: Path) -> None:
    config = config_in(write_data(tmp_path), dropout=0.3)
    kept = run_of(config)
    computed_again = run_of(config.model_copy(update={"gradient_checkpointing": True}))
    assert curve(computed_again, 3) == curve(kept, 3)
    for a, b in zip(kept.model.parameters(), computed_again.model.parameters(), strict=True):
        assert torch.equal(a, b)
