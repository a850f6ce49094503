"""Joined products: one tensor in memory, and only where nothing else has a hand in a module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_file
from comfy_toys import (
    FAMILY_CONFIGS,
    FUSED,
    KERNELS,
    NEAR_IN_8_BITS,
    PACKED,
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

from comfy_nai_t5.choices import Settings

require_comfyui()


def ours_of(theirs: Any, layout: str = "auto", dtype: str = "float32") -> Any:
    from comfy_nai_t5.clip import with_our_t5

    return with_our_t5(theirs, Settings(dtype, layout=layout))


def t5_of(clip: Any) -> Any:
    (owner,) = (module for module in clip.cond_stage_model.children() if hasattr(module, "transformer"))
    return owner.transformer


def bytes_of(model: torch.nn.Module) -> int:
    """Of all storages that hold weights, each counted once."""
    storages = {weight.untyped_storage().data_ptr(): weight.untyped_storage() for weight in model.parameters()}
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_all_layouts_give_what_stock_gives(family: str, tmp_path: Path) -> None:
    if not knows(family):
        pytest.skip(f"this ComfyUI is older than {family}")
    theirs = stock(toy_file(tmp_path, FAMILY_CONFIGS[family]), family)
    expected = conditioning(theirs, "a (photo:1.3) of a cat")
    for layout in ("fused", "packed", "packed", "separate"):
        assert_equal_conditioning(conditioning(ours_of(theirs, layout), "a (photo:1.3) of a cat"), expected)


def test_norms_in_float8_are_read_as_float32(tmp_path: Path) -> None:
    """Not every card reads float8; a joined layer's norms go to its kernels as they are given."""
    from comfy_nai_t5.fused import fuse

    block = t5_of(ours_of(stock(toy_file(tmp_path, V1_1), "mochi"))).encoder.block[0]
    norms = [block.layer[index].layer_norm for index in (0, -1)]
    for norm in norms:
        norm.weight = torch.nn.Parameter(norm.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    for found, norm in zip(fuse(block).norms, norms, strict=True):
        assert found.dtype == torch.float32
        assert torch.equal(found, norm.weight.float())


def test_joined_weights_are_in_memory_once(tmp_path: Path) -> None:
    theirs = stock(toy_file(tmp_path, V1_1), "mochi")
    before = {name: tensor.clone() for name, tensor in theirs.cond_stage_model.state_dict().items()}
    size = bytes_of(theirs.cond_stage_model)
    clip = ours_of(theirs, "fused")
    conditioning(clip, "a cat")
    attention = t5_of(clip).encoder.block[0].layer[0].SelfAttention
    start = attention.q.weight.data_ptr()
    assert attention.k.weight.data_ptr() == start + attention.q.weight.nbytes
    assert attention.v.weight.untyped_storage().data_ptr() == attention.q.weight.untyped_storage().data_ptr()
    assert bytes_of(theirs.cond_stage_model) == size == bytes_of(clip.cond_stage_model)
    after = theirs.cond_stage_model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    conditioning(clip, "a dog")
    assert attention.q.weight.data_ptr() == start  # joined once, not at every call


def kept_products(clip: Any) -> list[Any]:
    return list(t5_of(clip).stack.encoder.kept.values())


def test_packed_products_are_kept_while_the_weights_stay(tmp_path: Path) -> None:
    import comfy.sd

    theirs = stock(toy_file(tmp_path, V1_1), "mochi")
    clip = ours_of(theirs, "packed")
    expected = [conditioning(clip, "a cat") for _ in range(2)][-1]
    assert t5_of(clip).stack.told == PACKED
    first = kept_products(clip)
    assert len(first) == 3
    assert all(kept.kernels.is_in_panels if KERNELS else kept.qkv.is_blocked for kept in first)
    conditioning(clip, "a dog")
    assert all(now is before for now, before in zip(kept_products(clip), first, strict=True))
    # Where the weights are others, so are the products; and where they are as before, they come out as before.
    lora = toy_lora(t5_of(theirs), ("encoder.block.1.layer.0.SelfAttention.q",), "t5xxl")
    patched = comfy.sd.load_lora_for_models(None, clip, lora, 0, 1.0)[1]
    with_lora = [conditioning(patched, "a cat") for _ in range(3)]
    reference = conditioning(comfy.sd.load_lora_for_models(None, theirs, lora, 0, 1.0)[1], "a cat")
    for found in with_lora:
        assert_equal_conditioning(found, reference)
    assert kept_products(clip)[1] is not first[1]
    for _ in range(3):
        assert_equal_conditioning(conditioning(clip, "a cat"), expected, 1e-6)
    # In place, in a way that torch sees.
    with torch.no_grad():
        t5_of(clip).encoder.block[0].layer[1].DenseReluDense.wo.weight.mul_(1.5)
    for _ in range(3):
        assert_equal_conditioning(conditioning(clip, "a cat"), conditioning(theirs, "a cat"))


@pytest.mark.parametrize("layout", ["packed", pytest.param("int8", marks=needs_8_bits)])
def test_nothing_is_kept_of_weights_that_hooks_change(layout: str, tmp_path: Path) -> None:
    """They do so where torch does not see it."""
    import comfy.hooks
    import nodes
    from comfy_extras.nodes_hooks import SetClipHooks

    theirs = stock(toy_file(tmp_path, V1_1), "mochi")
    clip = ours_of(theirs, layout)
    lora = toy_lora(t5_of(theirs), ("encoder.block.1.layer.0.SelfAttention.q",), "t5xxl")

    def encoded(model: Any, strength: float | None) -> torch.Tensor:
        if strength is not None:
            hooks = comfy.hooks.create_hook_lora(lora, 0, strength)
            model = SetClipHooks().apply_hooks(model, schedule_clip=False, apply_to_conds=True, hooks=hooks)[0]
        with torch.inference_mode():
            ((tensor, _),) = nodes.CLIPTextEncode().encode(model, "a cat")[0]
        return tensor

    strengths = (None, 1.0, None, 0.3, 1.0, 1.0, None, None)
    found = [encoded(clip, strength) for strength in strengths]
    for tensor, strength in zip(found, strengths, strict=True):
        limit = NEAR_IN_8_BITS if layout == "int8" and strength is None else 1e-4
        assert error(tensor, encoded(theirs, strength)) < limit
    assert error(found[0], found[1]) > 1e-3
    encoded(clip, 1.0)
    assert t5_of(clip).stack.told == FUSED


def test_where_nothing_can_be_packed_is_said(tmp_path: Path) -> None:
    theirs = stock(toy_file(tmp_path, V1_1), "mochi")
    with pytest.raises(ValueError, match=r"packed layout is for a T5 on the CPU.*computes in float16 on cpu: choose"):
        ours_of(theirs, "packed", "float16")
    with pytest.raises(ValueError, match="packed weights are not compiled"):
        Settings(layout="packed", compile=True)


class ForeignLinear(torch.nn.Module):
    """Another pack's Linear, whose weight is not what it multiplies with."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight.clone() / 2, requires_grad=False)
        self.in_features, self.out_features = weight.shape[1], weight.shape[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight * 2)


def test_foreign_modules_are_called(tmp_path: Path) -> None:
    theirs = stock(toy_file(tmp_path, V1_1), "mochi")
    expected = conditioning(theirs, "a cat")
    for block in t5_of(theirs).encoder.block[:2]:
        block.layer[0].SelfAttention.k = ForeignLinear(block.layer[0].SelfAttention.k.weight)
    clip = ours_of(theirs)
    assert_equal_conditioning(conditioning(clip, "a cat"), expected)
    told = f"{FUSED} but for 2 of 3 layers: its weights are in modules of another kind (ForeignLinear)"
    assert t5_of(clip).stack.told == told
    with pytest.raises(ValueError, match=r"cannot run in the fused layout: its weights are in modules of another kind"):
        conditioning(ours_of(theirs, "fused"), "a cat")


def test_replaced_calls_are_made(tmp_path: Path) -> None:
    """As other packs add a LoRA without touching the weight: by exchanging the call of one module."""
    theirs = stock(toy_file(tmp_path, V1_1), "mochi")
    clip = ours_of(theirs)
    plain = conditioning(clip, "a cat")
    linear = t5_of(theirs).encoder.block[1].layer[1].DenseReluDense.wi_0
    original = linear.forward
    linear.forward = lambda x: original(x) + 0.3 * x[..., :1]
    assert_equal_conditioning(conditioning(clip, "a cat"), conditioning(theirs, "a cat"))
    assert error(conditioning(clip, "a cat")["cond"], plain["cond"]) > 1e-3
    assert "1 of 3 layers: other software has hooked into its modules" in t5_of(clip).stack.told
    del linear.forward
    handle = linear.register_forward_hook(lambda module, inputs, output: output * 1.5)
    assert_equal_conditioning(conditioning(clip, "a cat"), conditioning(theirs, "a cat"))
    handle.remove()
    assert_equal_conditioning(conditioning(clip, "a cat"), plain, 1e-9)


@pytest.mark.parametrize("weights", ["file", "float8_e4m3fn"])
def test_weights_in_another_dtype_are_cast_at_every_call(
    weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the kernels where they run, and else module by module."""
    from comfy_nai_t5 import families
    from comfy_nai_t5.clip import describe
    from comfy_nai_t5.loaders import load_t5

    monkeypatch.setitem(families.FAMILIES, "mochi", toy_family("mochi"))
    path = write_file(tmp_path / "half.safetensors", {name: x.half() for name, x in toy_state(V1_1).items()})
    kept = weights.replace("file", "float16")
    reason = f"separate layout: its weights are kept in {kept} and cast to float32 at every call"
    told = FUSED if KERNELS else reason
    clip = load_t5(path, "mochi", Settings("float32", weights))
    assert describe(clip).endswith(told)
    apart = load_t5(path, "mochi", Settings("float32", weights, layout="separate"))
    assert_equal_conditioning(conditioning(clip, "a cat"), conditioning(apart, "a cat"), 1e-5)
    assert t5_of(clip).stack.told == told
    assert t5_of(clip).encoder.block[0].layer[-1].DenseReluDense.wo.weight.dtype == getattr(torch, kept)
    if told == reason:
        with pytest.raises(ValueError, match="cannot run in the fused layout: its weights are kept in"):
            describe(load_t5(path, "mochi", Settings("float32", weights, layout="fused")))


@pytest.mark.skipif(not KERNELS, reason="no kernels here")
@pytest.mark.parametrize("layout", ["auto", "packed"])
@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_kernels_in_bfloat16_are_as_exact_as_stocks_modules(family: str, layout: str, tmp_path: Path) -> None:
    """Of weights that bfloat16 holds, so that all that differs is what is computed in."""
    if not knows(family):
        pytest.skip(f"this ComfyUI is older than {family}")
    state = toy_state(FAMILY_CONFIGS[family])
    rounded = {name: x.bfloat16() if x.is_floating_point() else x for name, x in state.items()}
    theirs = stock(write_file(tmp_path / "rounded.safetensors", rounded), family)
    exact = conditioning(theirs, "a (photo:1.3) of a cat")["cond"]
    apart = conditioning(ours_of(theirs, "separate", "bfloat16"), "a (photo:1.3) of a cat")["cond"]
    clip = ours_of(theirs, layout, "bfloat16")
    for _ in range(2):
        found = conditioning(clip, "a (photo:1.3) of a cat")["cond"]
    assert t5_of(clip).stack.told == (PACKED if layout == "packed" else FUSED)
    assert (found - exact).abs().mean() <= 1.1 * (apart - exact).abs().mean()
    assert not torch.equal(found, apart)


@pytest.mark.parametrize("family", ["mochi", "cosmos", "wan"])
def test_packed_weights_of_another_dtype_are_cast_once(family: str, tmp_path: Path) -> None:
    state = toy_state(FAMILY_CONFIGS[family])
    half = {name: x.half() if x.is_floating_point() else x for name, x in state.items()}
    theirs = stock(write_file(tmp_path / "half.safetensors", half), family)
    expected = conditioning(theirs, "a cat")
    clip = ours_of(theirs, "packed")
    for _ in range(3):
        assert_equal_conditioning(conditioning(clip, "a cat"), expected)
    assert t5_of(clip).stack.told == PACKED
    assert {weight.dtype for weight in t5_of(clip).encoder.block[0].layer[-1].parameters()} == {torch.float16}


def test_what_a_loaded_t5_is_in_words(tmp_path: Path) -> None:
    from comfy_nai_t5.clip import describe

    theirs = stock(toy_file(tmp_path, V1_1), "mochi")
    assert describe(ours_of(theirs)) == f"t5xxl: T5 v1.1 of 3 layers, float32, {FUSED}"
    assert describe(ours_of(theirs, "separate")).endswith("separate layout, as chosen")
    with pytest.raises(ValueError, match="compile needs joined products"):
        Settings(layout="separate", compile=True)
    with pytest.raises(ValueError, match="'both' for layout; allowed: auto, fused, packed, int8, separate"):
        Settings(layout="both")
