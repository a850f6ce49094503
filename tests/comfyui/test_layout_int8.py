"""The layout int8: near what is exact, kept while the weights stay, and made of the very numbers of the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_file
from comfy_toys import (
    FAMILY_CONFIGS,
    INT8,
    KERNELS,
    NEAR_IN_8_BITS,
    V1_1,
    assert_equal_conditioning,
    conditioning,
    error,
    knows,
    needs_8_bits,
    require_comfyui,
    stock,
    toy_family,
    toy_file,
    toy_lora,
    toy_state,
)
from test_layouts import ForeignLinear, bytes_of, kept_products, ours_of, t5_of

from comfy_nai_t5.choices import DTYPES, Settings
from nai_t5_core.backends.int8_weight import Int8Weight
from nai_t5_core.backends.kernels.calls import counted

require_comfyui()


@pytest.fixture(params=["kernels", "oneDNN"])
def by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What computes in 8 bits: the kernels, or oneDNN as on a processor that does it better."""
    if request.param == "oneDNN":
        monkeypatch.setattr("comfy_nai_t5.fused.better_than_kernels", lambda: "this test")
    elif not KERNELS:
        pytest.skip("no kernels here")
    return str(request.param)


def assert_kept_in_8_bits(clip: Any, by: str) -> None:
    from comfy_nai_t5.int8 import Int8Kernels, Int8Products

    kind = Int8Kernels if by == "kernels" else Int8Products
    assert kept_products(clip) and {type(kept) for kept in kept_products(clip)} == {kind}
    with counted() as by_kernels:
        conditioning(clip, "a cat")
    assert (by_kernels.flops > 0) == (by == "kernels")


def values_kept(kept: Any) -> list[torch.Tensor]:
    """The bytes of qkv, o, inner and wo."""
    if hasattr(kept, "kernels"):
        return [weight.original() for weight in kept.kernels.weights]
    return [product.original().values for product in (kept.qkv, kept.o, kept.wi, kept.wo)]


@needs_8_bits
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_8_bits_are_near_and_leave_the_weights(family: str, dtype: str, by: str, tmp_path: Path) -> None:
    from comfy_nai_t5.clip import describe

    if not knows(family):
        pytest.skip(f"this ComfyUI is older than {family}")
    theirs = stock(toy_file(tmp_path, FAMILY_CONFIGS[family]), family)
    exact = conditioning(theirs, "a (photo:1.3) of a cat")["cond"]
    before = {name: tensor.clone() for name, tensor in theirs.cond_stage_model.state_dict().items()}
    size = bytes_of(theirs.cond_stage_model)
    clip = ours_of(theirs, "int8", dtype)
    told = f"int8 layout{KERNELS if by == 'kernels' else ''}"
    assert describe(clip).endswith(f"{dtype}, {told}")
    found = [conditioning(clip, "a (photo:1.3) of a cat")["cond"] for _ in range(3)]
    assert 1e-3 < error(found[0], exact) < NEAR_IN_8_BITS and all(torch.equal(found[0], other) for other in found)
    assert t5_of(clip).stack.told == told
    assert_kept_in_8_bits(clip, by)
    after = theirs.cond_stage_model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert bytes_of(theirs.cond_stage_model) == size == bytes_of(clip.cond_stage_model)


@needs_8_bits
def test_8_bits_are_kept_while_the_weights_stay(by: str, tmp_path: Path) -> None:
    import comfy.sd

    theirs = stock(toy_file(tmp_path, V1_1), "mochi")
    clip = ours_of(theirs, "int8")
    expected = conditioning(clip, "a cat")
    first = kept_products(clip)
    conditioning(clip, "a dog")
    assert len(first) == 3 and all(now is before for now, before in zip(kept_products(clip), first, strict=True))
    # Where the weights are others, so are the bytes; and where they are as before, they come out as before.
    lora = toy_lora(t5_of(theirs), ("encoder.block.1.layer.0.SelfAttention.q",), "t5xxl")
    with_lora = conditioning(comfy.sd.load_lora_for_models(None, clip, lora, 0, 1.0)[1], "a cat")
    patched = comfy.sd.load_lora_for_models(None, theirs, lora, 0, 1.0)[1]
    assert error(with_lora["cond"], conditioning(patched, "a cat")["cond"]) < NEAR_IN_8_BITS
    assert_equal_conditioning(with_lora, conditioning(ours_of(patched, "int8"), "a cat"), 1e-6)
    assert error(with_lora["cond"], expected["cond"]) > 1e-3
    assert kept_products(clip)[1] is not first[1]
    assert_equal_conditioning(conditioning(clip, "a cat"), expected, 1e-6)
    # In place, in a way that torch sees.
    with torch.no_grad():
        t5_of(clip).encoder.block[0].layer[1].DenseReluDense.wo.weight.mul_(1.5)
    changed = conditioning(clip, "a cat")
    assert error(changed["cond"], conditioning(theirs, "a cat")["cond"]) < NEAR_IN_8_BITS
    assert_equal_conditioning(changed, conditioning(ours_of(theirs, "int8"), "a cat"), 1e-6)


@needs_8_bits
@pytest.mark.parametrize("stored", [torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_8_bits_are_made_of_the_very_numbers_of_the_file(
    dtype: str, stored: torch.dtype, by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the node that loads: nothing is rounded to what is computed in before."""
    from comfy_nai_t5 import families
    from comfy_nai_t5.loaders import load_t5

    monkeypatch.setitem(families.FAMILIES, "mochi", toy_family("mochi"))
    state = {name: tensor.to(stored) if tensor.ndim > 1 else tensor for name, tensor in toy_state(V1_1).items()}
    path = write_file(tmp_path / "small.safetensors", state)
    clip = load_t5(path, "mochi", Settings(dtype, layout="int8"))
    found = conditioning(clip, "a cat")["cond"]
    assert error(found, conditioning(stock(path, "mochi"), "a cat")["cond"]) < NEAR_IN_8_BITS
    assert_kept_in_8_bits(clip, by)
    for index, kept in enumerate(kept_products(clip)):
        block = f"encoder.block.{index}.layer"
        names = [f"{block}.0.SelfAttention.{name}.weight" for name in "qkvo"]
        names += [f"{block}.1.DenseReluDense.{name}.weight" for name in ("wi_0", "wi_1", "wo")]
        q, k, v, o, gate, up, wo = (state[name].float() for name in names)
        exact = [torch.cat([q, k, v]), o, torch.cat([gate, up]), wo]
        for bytes_kept, weight in zip(values_kept(kept), exact, strict=True):
            assert torch.equal(bytes_kept, Int8Weight.of(weight).values)
        assert torch.equal(t5_of(clip).encoder.block[index].layer[1].DenseReluDense.wo.weight.float(), wo)


@needs_8_bits
def test_a_layer_that_cannot_be_joined_is_not_in_8_bits(tmp_path: Path) -> None:
    theirs = stock(toy_file(tmp_path, V1_1), "mochi")
    exact = conditioning(theirs, "a cat")
    for block in t5_of(theirs).encoder.block[:2]:
        block.layer[0].SelfAttention.k = ForeignLinear(block.layer[0].SelfAttention.k.weight)
    clip = ours_of(theirs, "int8")
    assert 1e-4 < error(conditioning(clip, "a cat")["cond"], exact["cond"]) < NEAR_IN_8_BITS
    told = f"{INT8} but for 2 of 3 layers: its weights are in modules of another kind (ForeignLinear)"
    assert t5_of(clip).stack.told == told and len(kept_products(clip)) == 1


@needs_8_bits
@pytest.mark.parametrize("config", [{"d_ff": 82}, {"num_heads": 3, "d_kv": 14}])
def test_sizes_that_the_kernels_cannot_take_go_without_them(config: dict[str, int], tmp_path: Path) -> None:
    """In 8 bits they take four numbers at a time."""
    theirs = stock(toy_file(tmp_path, V1_1.model_copy(update=config)), "mochi")
    clip = ours_of(theirs, "int8")
    assert error(conditioning(clip, "a cat")["cond"], conditioning(theirs, "a cat")["cond"]) < NEAR_IN_8_BITS
    assert t5_of(clip).stack.told == "int8 layout"
    assert_kept_in_8_bits(clip, "oneDNN")


@needs_8_bits
def test_the_nodes_take_8_bits(tmp_path: Path) -> None:
    from comfy_nai_t5 import nodes

    theirs = stock(toy_file(tmp_path, V1_1), "mochi")
    (choices,) = (entry for entry in nodes.ReplaceT5.define_schema().inputs if entry.id == "layout")
    assert choices.options == ["auto", "fused", "packed", "int8", "separate"] and "8 bits" in choices.tooltip
    done = nodes.ReplaceT5.execute(theirs, dtype="float32", attention="auto", layout="int8", compile=False)
    assert done.ui.as_dict()["text"] == (f"t5xxl: T5 v1.1 of 3 layers, float32, {INT8}",)
    assert error(conditioning(done.args[0], "a cat")["cond"], conditioning(theirs, "a cat")["cond"]) < NEAR_IN_8_BITS


def test_where_8_bits_cannot_be_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = stock(toy_file(tmp_path, V1_1), "mochi")
    refused = (
        r"the int8 layout is not possible: the model is in torch\.{} on {}; 8 bits are for .*; choose the layout auto"
    )
    for dtype in ("float16", "float64"):
        if dtype in DTYPES:
            with pytest.raises(ValueError, match=refused.format(dtype, "cpu")):
                ours_of(theirs, "int8", dtype)
    elsewhere = theirs.clone()
    elsewhere.patcher.load_device = torch.device("meta")
    with pytest.raises(ValueError, match=refused.format("float32", "meta")):
        ours_of(elsewhere, "int8")
    with pytest.raises(ValueError, match="weights in 8 bits are not compiled; choose the layout auto or fused"):
        Settings(layout="int8", compile=True)
    for check in ("_is_vnni_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, check, lambda: False)
    with pytest.raises(ValueError, match=r"not possible: this processor has no fast products of bytes .*; choose the"):
        ours_of(theirs, "int8")
    assert_equal_conditioning(conditioning(ours_of(theirs), "a cat"), conditioning(theirs, "a cat"))
