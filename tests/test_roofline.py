"""The paper estimate: its operations are those that the encoder executes, and its arithmetic is right."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import build_stack, padding_mask, random_state
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from nai_t5_core.bench.roofline import (
    DEVICES,
    Device,
    PaperTime,
    Work,
    encoder_flops,
    encoder_work,
    estimate,
    projection_shapes,
)
from nai_t5_core.bench.speed.flops import count_flops
from nai_t5_core.cli import app
from nai_t5_core.facts.config import T5Config, encoder_tensors, named_config

XXL = named_config("t5-v1_1-xxl").encoder_only()


def test_operations_are_those_that_the_encoder_executes(config: T5Config) -> None:
    stack = build_stack(config, random_state(config))
    lengths = [7, 31, 7]
    ids, mask = torch.ones(3, 40, dtype=torch.long), padding_mask(lengths, 40)
    with torch.no_grad():
        assert count_flops(lambda: stack(ids, mask, padding="skip")) == encoder_flops(config, lengths)
        assert count_flops(lambda: stack(ids)) == encoder_flops(config, [40] * 3)
        with FlopCounterMode(display=False) as torch_alone:
            stack(ids)
    # torch's own counter knows the products, and this processor's attention kernel only in some versions.
    assert 0 < torch_alone.get_total_flops() <= encoder_flops(config, [40] * 3)


def test_shapes_hold_every_projection(config: T5Config) -> None:
    tensors = encoder_tensors(config.encoder_only())
    matrices = {name: shape for name, shape in tensors.items() if "block.0." in name and len(shape) == 2}
    wanted = sum(rows * columns for name, (rows, columns) in matrices.items() if "bias" not in name)
    assert sum(rows * columns for rows, columns in projection_shapes(config)) == wanted


def test_bytes_are_weights_once_and_activations_by_token() -> None:
    one, two = encoder_work(XXL, [1]).nbytes, encoder_work(XXL, [1, 1]).nbytes
    weights = 2 * sum(rows * columns for rows, columns in projection_shapes(XXL)) * XXL.num_layers
    assert one - (two - one) == weights
    assert encoder_work(XXL, [2]).nbytes == two
    # Known from the published model: 4.76 billion parameters, 0.13 billion of them embeddings.
    assert weights / 2 == pytest.approx(4.76e9 - 0.13e9, rel=0.01)


def test_the_slower_of_the_two_decides() -> None:
    device = Device("round numbers", flops_per_second=100.0, bytes_per_second=10.0)
    assert PaperTime.of(Work(flops=300, nbytes=20), device) == PaperTime(3.0, "arithmetic")
    assert PaperTime.of(Work(flops=300, nbytes=40), device) == PaperTime(4.0, "memory")


def test_estimates_compare_pads_computed_with_pads_left_out() -> None:
    found = estimate(XXL, "t5-v1_1-xxl", [32])
    assert [item.device for item in found.devices] == list(DEVICES)
    assert found.padded == encoder_work(XXL, [512])
    assert found.ours == encoder_work(XXL, [32])
    for item in found.devices:
        assert item.padded == PaperTime.of(found.padded, item.device)
        assert item.ours == PaperTime.of(found.ours, item.device)
        assert item.ratio == item.padded.seconds / item.ours.seconds > 1
    full = estimate(XXL, "t5-v1_1-xxl", [512, 512])
    assert {item.ratio for item in full.devices} == {1.0}


@pytest.mark.parametrize("lengths", [[], [0], [600]])
def test_lengths_are_checked(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match=r"padded to 512; each must be 1 … 512"):
        estimate(XXL, "t5-v1_1-xxl", lengths)


def test_the_command_says_that_nothing_was_measured() -> None:
    page = CliRunner().invoke(app, ["estimate", "t5-v1_1-xxl", "--tokens", "12,77"])
    assert page.exit_code == 0, page.output
    assert "an estimate on paper, not measured" in page.output
    assert all(device.name in page.output for device in DEVICES)
    found = CliRunner().invoke(app, ["estimate", "t5-v1_1-xxl", "--tokens", "12,77", "--padded-to", "256", "--json"])
    values = json.loads(found.stdout)
    assert values["measured"] is False
    assert (values["prompt_lengths"], values["padded_to"]) == ([12, 77], 256)
    assert values["devices"][0]["padded"]["seconds"] > values["devices"][0]["ours"]["seconds"]


def test_the_command_refuses_what_is_no_number() -> None:
    found = CliRunner().invoke(app, ["estimate", "t5-v1_1-xxl", "--tokens", "many"])
    assert "give whole numbers joined by commas" in str(found.exception)
