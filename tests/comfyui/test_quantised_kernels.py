"""Layers of a quantised file in ComfyUI by our CPU kernels: values, what changes the weights, and what is kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_toys import FUSED, KERNELS, assert_equal_conditioning, conditioning, error, require_comfyui, toy_lora
from test_patches import ATTENTION, t5_of, with_lora
from test_quantised import (
    EVERYWHERE,
    GGUF_KINDS,
    PROMPT,
    load,
    quantised_bytes,
    stock_of,
    toy_lora_of,
    write_kind,
    write_mixed,
)
from torch import Tensor

from comfy_nai_t5.choices import Settings
from nai_t5_core.backends.kernels.calls import counted
from nai_t5_core.backends.quantised.kinds import WEIGHT
from nai_t5_core.weights.load import load_encoder

require_comfyui()
pytestmark = pytest.mark.skipif(not KERNELS, reason="this processor has no kernels")

READ = [*GGUF_KINDS, "float8, by rows", "int8", "LLM.int8", "mixed"]
NEAR = {"float32": 1e-5, "bfloat16": 3e-2}
LAYERS = f"{FUSED}, quantised weights"


def written(folder: Path, kind: str) -> Path:
    return write_mixed(folder) if kind == "mixed" else write_kind(folder, kind)


@contextmanager
def products() -> Iterator[dict[str, int]]:
    """Counts operations of the kernels, and the modules of quantised projections that are called."""
    from comfy_nai_t5.quantised import QuantisedLinear

    called = {"kernels": 0, "modules": 0}
    forward = QuantisedLinear.forward

    def counting(module: Any, x: Tensor) -> Tensor:
        called["modules"] += 1
        return forward(module, x)

    with pytest.MonkeyPatch.context() as patch, counted() as ours:
        patch.setattr(QuantisedLinear, "forward", counting)
        yield called
    called["kernels"] = ours.flops


def described(clip: Any) -> str:
    from comfy_nai_t5.clip import describe

    return describe(clip).partition(", ")[2].partition(", ")[2]


@pytest.mark.parametrize("kind", READ)
@pytest.mark.parametrize("dtype", NEAR)
def test_layers_are_those_of_the_unpacked_weights(
    kind: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No module is called; and the same comes of a prompt by itself and among others."""
    path = written(tmp_path, kind)
    clip = load(path, monkeypatch, Settings(dtype))
    assert described(clip).endswith(LAYERS)
    before = quantised_bytes(clip)
    with products() as called:
        mine = conditioning(clip, PROMPT)["cond"]
    assert called["kernels"] > 0 and called["modules"] == 0
    exact = conditioning(stock_of(tmp_path, path), PROMPT)["cond"]
    assert error(mine, exact) < NEAR[dtype]
    # Module by module it is the same but for the order of sums.
    apart = load(path, monkeypatch, Settings(dtype, layout="separate"))
    with products() as called:
        separate = conditioning(apart, PROMPT)["cond"]
    assert called["kernels"] > 0 and called["modules"] == (7 if kind == "mixed" else 2 * 7)
    assert error(separate, mine) < NEAR[dtype]
    assert quantised_bytes(clip) == before
    fused = load(path, monkeypatch, Settings(dtype, layout="fused"))
    assert torch.equal(conditioning(fused, PROMPT)["cond"], mine)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K", "int8"])
@torch.inference_mode()
def test_the_same_bits_whatever_batch(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_kind(tmp_path, kind)
    for layout in ("auto", "separate"):
        stack = t5_of(load(path, monkeypatch, Settings("bfloat16", layout=layout))).stack
        ids = torch.randint(3, 900, (5, 40), generator=torch.Generator().manual_seed(1))
        inputs = torch.randn(900, 256, generator=torch.Generator().manual_seed(2))[ids]
        together = stack(None, torch.ones(5, 40), inputs_embeds=inputs)
        if layout == "auto":
            for row in range(5):
                assert torch.equal(
                    stack(None, torch.ones(1, 40), inputs_embeds=inputs[row : row + 1])[0], together[row]
                )
        linear = stack.encoder.block[0].layer[0].SelfAttention.q
        x = torch.randn(100, 256, dtype=torch.bfloat16)
        assert torch.equal(linear(x)[37:38], linear(x[37:38]))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K", "LLM.int8"])
def test_a_lora_on_some_projections(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its layer runs module by module; the kernels compute all else, and everything once it is gone."""
    path = write_kind(tmp_path, kind)
    clip, theirs = load(path, monkeypatch), stock_of(tmp_path, path)
    plain = conditioning(clip, PROMPT)["cond"]
    for keys, layers in (((ATTENTION.format(1, "v"),), 1), (EVERYWHERE, 2)):
        lora = toy_lora(t5_of(theirs), keys, "t5xxl")
        patched = with_lora(clip, lora, 0.8)
        with products() as called:
            found = conditioning(patched, PROMPT)
        assert called["kernels"] > 0 and called["modules"] == 7 * layers
        told = "its quantised weights are patched at every call"
        assert t5_of(patched).stack.told == (
            f"separate layout: {told}" if layers == 2 else f"{LAYERS} but for 1 of 2 layers: {told}"
        )
        expected = conditioning(with_lora(theirs, lora, 0.8), PROMPT)
        assert_equal_conditioning(found, expected)
        assert error(found["cond"], plain) > 1e-3
        with products() as called:
            assert torch.equal(conditioning(clip, PROMPT)["cond"], plain)
        assert called["modules"] == 0


def test_a_lora_with_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A T5 has none: as for ComfyUI's own, they are left out."""
    path = write_kind(tmp_path, "Q8_0")
    clip, theirs = load(path, monkeypatch), stock_of(tmp_path, path)
    lora = toy_lora_of(theirs)
    key = f"text_encoders.t5xxl.transformer.{ATTENTION.format(1, 'k')}"
    lora[f"{key}.diff_b"] = torch.ones(256)
    assert_equal_conditioning(*(conditioning(with_lora(each, lora, 0.8), PROMPT) for each in (clip, theirs)))


def test_hooks_of_other_software(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They see their layer's modules called, and change what these give."""
    clip = load(write_kind(tmp_path, "Q8_0"), monkeypatch)
    plain = conditioning(clip, PROMPT)["cond"]
    wo = t5_of(clip).encoder.block[0].layer[1].DenseReluDense.wo
    hook = wo.register_forward_hook(lambda module, inputs, out: out * 0)
    with products() as called:
        changed = conditioning(clip, PROMPT)["cond"]
    assert called["kernels"] > 0 and error(changed, plain) > 1e-3
    assert "but for 1 of 2 layers: other software has hooked into its modules" in t5_of(clip).stack.told
    hook.remove()
    assert torch.equal(conditioning(clip, PROMPT)["cond"], plain)


def told(clip: Any) -> dict[Any, Any]:
    found: dict[Any, Any] = t5_of(clip).stack.encoder.quantised
    return found


def test_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the bytes lie, and no copy of them; once for as long as they stay, and anew where they do not."""
    clip = load(write_kind(tmp_path, "LLM.int8"), monkeypatch)
    plain = conditioning(clip, PROMPT)["cond"]
    first = dict(told(clip))
    assert len(first) == 2
    for block, layer in first.items():
        weights = layer._kernels.weights
        assert not any(weight.is_in_panels for weight in weights)
        read = {piece.values.data_ptr() for weight in weights for piece in weight.pieces}
        held = [module for module in block.modules() if hasattr(module, "quantised")]
        assert read == {module.quantised.parts[WEIGHT].data_ptr() for module in held} and len(read) == 7
    assert torch.equal(conditioning(clip, PROMPT)["cond"], plain)
    assert all(told(clip)[block] is layer for block, layer in first.items())
    wo = t5_of(clip).encoder.block[0].layer[1].DenseReluDense.wo
    kept: Tensor = wo.weight_scale
    wo.weight_scale = kept * 2
    assert error(conditioning(clip, PROMPT)["cond"], plain) > 1e-3
    wo.weight_scale = kept
    assert torch.equal(conditioning(clip, PROMPT)["cond"], plain)
    t5_of(clip).stack.encoder.release()
    patched = with_lora(clip, toy_lora(t5_of(clip), (ATTENTION.format(0, "q"),), "t5xxl"), 1.0)
    conditioning(patched, PROMPT)
    assert len(told(clip)) == 1, "of a layer that the kernels no longer compute, nothing is kept"


@pytest.mark.parametrize("kind", ["Q8_0", "float8, by rows"])
def test_as_in_the_library(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole layer by the same kernels from the same bytes: the same bits."""
    path = write_kind(tmp_path, kind)
    stack = t5_of(load(path, monkeypatch, Settings("bfloat16"))).stack
    theirs = load_encoder(path, "bfloat16", "cpu", layout="separate")
    inputs = torch.randn(2, 30, 256, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        found, meant = (
            each(None, torch.ones(2, 30), inputs_embeds=inputs.to(torch.bfloat16)) for each in (stack, theirs)
        )
    assert torch.equal(found, meant)


@pytest.mark.parametrize("shift", [1, 2, 3])
def test_norms_may_begin_anywhere(shift: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they do in a file that is mapped, behind bytes."""
    clip = load(write_kind(tmp_path, "int8"), monkeypatch, Settings("bfloat16"))
    plain = conditioning(clip, PROMPT)["cond"]
    for block in t5_of(clip).encoder.block:
        for layer in block.layer:
            content = bytearray(shift) + bytearray(layer.layer_norm.weight.detach().float().numpy().tobytes())
            norm = torch.frombuffer(content, dtype=torch.uint8)[shift:].numpy().view("float32")
            layer.layer_norm.weight = torch.nn.Parameter(torch.from_numpy(norm), requires_grad=False)
            assert layer.layer_norm.weight.data_ptr() % 4
    assert torch.equal(conditioning(clip, PROMPT)["cond"], plain)
