"""LoRA merged into weights: out again to the last bit, in packed models at load only, and on the command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_oracle import V1_1, assert_near, assert_same_weights, ours, reference, scaled_stack, snapshot, v1_1_stack
from safetensors.torch import load_file, save_file
from torch import nn
from torch._dynamo.utils import counters
from toy_loras import kohya, toy_lora, write_style

from nai_t5_core.backends.choose import prepack, why_not_prepack
from nai_t5_core.backends.compiled import compile_stack
from nai_t5_core.cli import main
from nai_t5_core.facts.scales import LayerScales
from nai_t5_core.float16.guard import rescale
from nai_t5_core.lora.loras import Loras
from nai_t5_core.model.attention_choice import missing_for_flex
from nai_t5_core.model.encoder import LAYOUTS, Layout
from nai_t5_core.prompts.text_encoder import TextEncoder

MISSING = missing_for_flex(torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_unloading_is_exact(layout: Layout, dtype: torch.dtype) -> None:
    """The same tensors as before, whatever was done between; and the same merge whatever went before it."""
    stack = scaled_stack(V1_1, dtype, layout)
    before, parameters = snapshot(stack), dict(stack.named_parameters())
    loras = Loras(stack)
    loras.add(toy_lora(V1_1, 1), 0.3, "a")
    only = snapshot(stack)
    loras.add(toy_lora(V1_1, 2), 1.7, "b")
    for strength in (0.1, -4.0, 0.3):
        loras.set_strength("a", strength)
    loras.remove("b")
    assert_same_weights(stack, only)
    loras.set_strength("a", 0)
    assert_same_weights(stack, before)
    loras.set_strength("a", 1)
    loras.clear()
    assert_same_weights(stack, before)
    assert all(parameter is parameters[name] for name, parameter in stack.named_parameters())
    assert loras.strengths == {}


def test_scales_tightened_while_merged() -> None:
    """The originals come back as the tightening would have left them."""
    stack, untouched = scaled_stack(V1_1, torch.float16, "fused"), scaled_stack(V1_1, torch.float16, "fused")
    lora = toy_lora(V1_1)
    loras = Loras(stack)
    loras.add(lora, 0.7)
    tighter = LayerScales(2.0**-4, 2.0**-5, 2.0**-3)
    for changed in (stack, untouched):
        rescale(changed, 1, tighter)
    assert_near(ours(stack), reference(V1_1, (lora, 0.7)), 2e-2)
    loras.set_strength("toy", 0.2)
    assert_near(ours(stack), reference(V1_1, (lora, 0.2)), 2e-2)
    rescale(stack, 0, tighter)
    rescale(untouched, 0, tighter)
    loras.clear()
    assert_same_weights(stack, untouched.state_dict())


def test_cast_while_merged() -> None:
    stack = v1_1_stack()
    loras = Loras(stack)
    loras.add(toy_lora(V1_1))
    stack.to(torch.bfloat16)
    loras.clear()
    assert_same_weights(stack, v1_1_stack().to(torch.bfloat16).state_dict())


@pytest.mark.skipif(MISSING is not None, reason=f"nothing can be compiled here: {MISSING}")
def test_a_compiled_encoder_is_not_compiled_anew() -> None:
    stack, lora = v1_1_stack(), toy_lora(V1_1)
    torch._dynamo.reset()
    counters.clear()
    compile_stack(stack, buckets=(128,), backend="aot_eager")
    assert_near(ours(stack), reference(V1_1))
    loras = Loras(stack)
    loras.add(lora)
    assert_near(ours(stack), reference(V1_1, (lora, 1.0)))
    loras.clear()
    assert_near(ours(stack), reference(V1_1))
    assert counters["stats"]["unique_graphs"] == 1


def test_packed_weights_take_no_lora() -> None:
    stack = v1_1_stack()
    if why_not_prepack(stack) is not None:
        pytest.skip("this machine's oneDNN packs no float32 weights")
    with pytest.raises(ValueError, match=r"is packed, quantised or wrapped.*optimize=False"):
        Loras(prepack(stack)).add(toy_lora(V1_1))


def test_offloaded_weights_take_no_lora() -> None:
    with pytest.raises(ValueError, match="is offloaded; use LiveLoras, or remove the offload hooks"):
        Loras(v1_1_stack().to("meta")).add(toy_lora(V1_1))


def test_weights_replaced_by_others() -> None:
    stack = v1_1_stack()
    loras = Loras(stack)
    loras.add(toy_lora(V1_1))
    linear: Any = stack.encoder.block[0].layer[0].SelfAttention.o  # type: ignore[union-attr, index]
    linear.weight = nn.Parameter(torch.ones_like(linear.weight))
    with pytest.raises(ValueError, match="was replaced by others after a LoRA was merged"):
        loras.clear()
    assert loras.strengths == {"toy": 1.0}


# ---------------------------------------------------------------------------------------------------------------------
# TextEncoder
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedded() -> TextEncoder:
    return TextEncoder.from_pretrained(dtype="float32", device="cpu", optimize=False)


def test_text_encoder(embedded: TextEncoder, tmp_path: Path) -> None:
    """Merged at load, before the weights are packed, and merged later: the same."""
    file = write_style("kohya, third", toy_lora(embedded.stack.config), tmp_path)
    before = embedded.encode(["a cat"]).hidden_states
    loras = Loras(embedded)
    loras.add(file, 0.6)
    later = embedded.encode(["a cat"]).hidden_states
    loras.clear()
    assert torch.equal(embedded.encode(["a cat"]).hidden_states, before)
    assert not torch.allclose(later, before, rtol=0.1)
    packed = TextEncoder.from_pretrained(dtype="float32", device="cpu", loras=[(file, 0.2), (file, 0.4)])
    for _ in range(3):  # weights are packed by the second call
        assert_near(packed.encode(["a cat"]).hidden_states, later)
    assert load_file(file).keys() == kohya(toy_lora(embedded.stack.config)).keys()


def test_command_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = TextEncoder.from_pretrained(optimize=False).stack.config
    strong = write_style("kohya, third", toy_lora(config, 1, name="strong"), tmp_path)
    weak = write_style("diffusers", toy_lora(config, 2, name="we:ak"), tmp_path)
    part = tmp_path / "part.safetensors"
    save_file(kohya(toy_lora(config, 3)) | {"lora_unet_x.alpha": torch.ones(())}, part)

    def run(*arguments: object) -> Any:
        options = ("--dtype", "float32", "--device", "cpu", "--json")
        monkeypatch.setattr(sys, "argv", ["nai-t5", "encode", "a cat", *map(str, arguments), *options])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        return json.loads(captured.out) if not caught.value.code else captured.err

    report = run("--lora", f"{strong}:0.5", "--lora", weak, "--lora", f"{part}:-0.1", "--out", tmp_path / "out")
    assert [(row["name"], row["strength"], row["not_for_t5"]) for row in report["loras"]] == [
        ("strong", 0.5, ""),
        ("we:ak", 1.0, ""),
        ("part", -0.1, "the UNet or transformer (1)"),
    ]
    loras: list[tuple[Any, float]] = [(strong, 0.5), (weak, 1.0), (part, -0.1)]
    expected = TextEncoder.from_pretrained(dtype="float32", device="cpu", loras=loras).encode(["a cat"])
    assert_near(load_file(tmp_path / "out")["hidden_states"], expected.hidden_states, 1e-6)
    assert "none.safetensors does not exist; give a LoRA file" in run("--lora", tmp_path / "none.safetensors:0.5")
    assert "strength=nan; it must be a finite number" in run("--lora", f"{strong}:nan")
