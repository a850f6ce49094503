"""LoRAs of what is no projection (norms, position bias, embedding) and whole differences, against transformers' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import encoder_part
from conftest import TOY_CONFIGS, build_stack, needs_kernels, random_state
from lora_oracle import (
    KINDS,
    MASK,
    V1_1,
    assert_near,
    assert_same_weights,
    ids_for,
    ours,
    reference,
    scaled_stack,
    snapshot,
    v1_1_stack,
)
from safetensors.torch import save_file
from toy_loras import kohya, projections, toy_differences, toy_lora, toy_tables, with_loras

from nai_t5_core.backends.choose import prepack, quantize_int8
from nai_t5_core.backends.kernels.calls import counted
from nai_t5_core.bench.peers import transformers_encoder
from nai_t5_core.diffusers.drop_in_weights import original_tensors, refuse_wrapped
from nai_t5_core.facts.config import encoder_tensors
from nai_t5_core.float16.guard import encode_guarded
from nai_t5_core.lora.changes import WholeChange
from nai_t5_core.lora.files import Lora, read_lora
from nai_t5_core.lora.live import LiveLoras
from nai_t5_core.lora.loras import Loras
from nai_t5_core.lora.set import LoraSet
from nai_t5_core.model.encoder import LAYOUTS, Layout
from nai_t5_core.prompts.text_encoder import TextEncoder
from nai_t5_core.weights.formats import CheckpointError

PARTS = ("layer.0.layer_norm", "layer.1.layer_norm", "final_layer_norm", "relative_attention_bias", "shared", "")


@pytest.fixture(params=[Loras, LiveLoras])
def loras_of(request: pytest.FixtureRequest) -> type[LoraSet]:
    kind: type[LoraSet] = request.param
    return kind


# ---------------------------------------------------------------------------------------------------------------------
# The same as on the unfused reference
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_tables_and_norms(kind: str, layout: Layout, part: str, loras_of: type[LoraSet]) -> None:
    config = TOY_CONFIGS[kind]
    stack, lora = build_stack(config, random_state(config), layout=layout), toy_tables(config, only=part)
    loras_of(stack).add(lora, 0.7)
    expected, plain = reference(config, (lora, 0.7)), reference(config)
    assert_near(ours(stack), expected)
    assert (expected - plain).abs().max() > 0.02 * plain.abs().max(), "the LoRA makes no difference"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_together_with_others(kind: str, layout: Layout, loras_of: type[LoraSet]) -> None:
    """A projection is changed by its own LoRA under a norm that another has changed, whatever comes first."""
    config = TOY_CONFIGS[kind]
    low, tables, whole = toy_lora(config), toy_tables(config), toy_differences(config)
    stack = build_stack(config, random_state(config), layout=layout)
    loras = loras_of(stack)
    for lora, strength in ((low, 0.7), (tables, 0.5), (whole, -0.4)):
        loras.add(lora, strength)
    assert_near(ours(stack), reference(config, (low, 0.7), (tables, 0.5), (whole, -0.4)))
    loras.set_strength("tables", -0.3)
    assert_near(ours(stack), reference(config, (low, 0.7), (tables, -0.3), (whole, -0.4)))
    loras.remove("toy")
    loras.add(toy_tables(config, seed=8, name="more"), 0.2)
    assert_near(ours(stack), reference(config, (tables, -0.3), (whole, -0.4), (toy_tables(config, seed=8), 0.2)), 2e-5)
    loras.remove("tables")
    loras.remove("more")
    assert_near(ours(stack), reference(config, (whole, -0.4)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_float16_scales(kind: str, layout: Layout, loras_of: type[LoraSet]) -> None:
    config = TOY_CONFIGS[kind]
    tables, whole = toy_tables(config), toy_differences(config)
    expected = reference(config, (tables, 0.6), (whole, 0.3))
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 2e-2)):
        stack = scaled_stack(config, dtype, layout)
        loras = loras_of(stack)
        loras.add(tables, 0.6)
        loras.add(whole, 0.3)
        assert_near(encode_guarded(stack, ids_for(config), MASK), expected, tolerance)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_out_again_without_a_trace(layout: Layout, loras_of: type[LoraSet]) -> None:
    stack = scaled_stack(V1_1, torch.bfloat16, layout)
    before, modules = snapshot(stack), dict(stack.named_modules())
    loras = loras_of(stack)
    loras.add(toy_tables(V1_1), 0.3)
    loras.add(toy_lora(V1_1), 0.3)
    loras.set_strength("tables", 1.7)
    loras.clear()
    assert_same_weights(stack, before)
    assert dict(stack.named_modules()) == modules
    assert loras.strengths == {}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_merged_weights_are_saved_and_live_ones_are_not(layout: Layout) -> None:
    stack, tables = v1_1_stack(layout), toy_tables(V1_1)
    Loras(stack).add(tables, 0.5)
    expected = with_loras(encoder_part(random_state(V1_1)), (tables, 0.5))
    saved = dict(original_tensors(stack))
    assert saved.keys() == expected.keys()
    for name, tensor in saved.items():
        assert_near(tensor, expected[name], 1e-5)
    for part in ("layer_norm", "relative_attention_bias", "shared"):
        live = v1_1_stack(layout)
        LiveLoras(live).add(toy_tables(V1_1, only=part))
        with pytest.raises(ValueError, match="live LoRA beside it"):
            refuse_wrapped(live)


@pytest.mark.parametrize("options", [{}, {"quantize": "int8"}])
def test_on_weights_that_are_packed(options: dict[str, str]) -> None:
    """The forms that a processor computes fastest: norms and tables are changed beside them."""
    plain = TextEncoder.from_pretrained(dtype="float32", device="cpu", optimize=False)
    fast = TextEncoder.from_pretrained(dtype="float32", device="cpu", **options)  # type: ignore[arg-type]
    tables, low = toy_tables(plain.stack.config), toy_lora(plain.stack.config)
    merged, live = Loras(plain), LiveLoras(fast)
    tolerance = 1e-5 if not options else 0.1
    for lora in (tables, low):
        merged.add(lora, 0.3)
        live.add(lora, 0.3)
        for _ in range(3):  # weights are packed by the second call
            out = fast.encode(["a cat", "a dog on a mat"]).hidden_states
            assert_near(out, plain.encode(["a cat", "a dog on a mat"]).hidden_states, tolerance)
    live.clear()
    merged.clear()
    out = fast.encode(["a cat"]).hidden_states
    assert_near(out, plain.encode(["a cat"]).hidden_states, tolerance)


@needs_kernels
@pytest.mark.parametrize(("change", "tolerance"), [(prepack, 1e-5), (quantize_int8, 0.1)])
def test_beside_the_kernels(change: Any, tolerance: float) -> None:
    stack, tables = change(v1_1_stack(), "kernels"), toy_tables(V1_1)
    LiveLoras(stack).add(tables, 0.5)
    expected = reference(V1_1, (tables, 0.5))
    for _ in range(3):
        with counted() as by_kernels:
            found = ours(stack)
        assert by_kernels.flops > 0
        assert_near(found, expected, tolerance)


@needs_kernels
def test_kernels_on_plain_weights_leave_a_changed_norm_to_torch() -> None:
    stack, tables = v1_1_stack(), toy_tables(V1_1, only="layer_norm")
    LiveLoras(stack).add(tables)
    assert_near(ours(stack), reference(V1_1, (tables, 1.0)))


def test_at_load() -> None:
    plain = TextEncoder.from_pretrained(dtype="float32", device="cpu", optimize=False)
    tables = toy_tables(plain.stack.config)
    loaded = TextEncoder.from_pretrained(dtype="float32", device="cpu", loras=[(tables, 0.4)])
    Loras(plain).add(tables, 0.4)
    assert_near(loaded.encode(["a cat"]).hidden_states, plain.encode(["a cat"]).hidden_states)


def test_a_norm_of_zeros(loras_of: type[LoraSet]) -> None:
    """What it has wiped out of a fused weight cannot come back; the separate layout has it still."""
    state = random_state(V1_1)
    norm = "encoder.block.1.layer.0.layer_norm.weight"
    state[norm][:7] = 0
    lora = toy_tables(V1_1, only="block.1.layer.0.layer_norm")
    fused, separate = build_stack(V1_1, state), build_stack(V1_1, state, layout="separate")
    before = snapshot(fused)
    loras = loras_of(fused)
    with pytest.raises(ValueError, match=f"changes {norm}, which has zeros.*load the model with layout='separate'"):
        loras.add(lora)
    assert_same_weights(fused, before)
    assert loras.strengths == {}
    loras_of(separate).add(lora)
    meant = build_stack(V1_1, with_loras(state, (lora, 1.0)), layout="separate")
    assert_near(ours(separate), ours(meant))
    delta = torch.zeros(64)
    delta[7:] = 0.5
    untouched = Lora("untouched", {norm: WholeChange(delta)})
    loras.add(untouched)
    assert_near(ours(fused), ours(build_stack(V1_1, with_loras(state, (untouched, 1.0)))))


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def differences(lora: Lora, prefix: str, separator: str, norm_end: str = "diff") -> dict[str, torch.Tensor]:
    """Whole differences under the names of a trainer; narrow ones are multiplied out."""
    out = {}
    for name, change in lora.changes.items():
        module = name.removesuffix(".weight").replace(".", separator)
        end = norm_end if "norm" in name else "diff"
        if isinstance(change, WholeChange):
            out[f"{prefix}{module}.{end}"] = change.delta
        else:
            out[f"{prefix}{module}.diff"] = change.scale * change.up @ change.down
    return {name: tensor.contiguous() for name, tensor in out.items()}


FILES = {
    "ComfyUI": lambda lora: differences(lora, "text_encoders.t5xxl.transformer.", "."),
    "kohya": lambda lora: differences(lora, "lora_te3_", "_"),
    "LyCORIS": lambda lora: differences(lora, "lora_te1_", "_", "w_norm"),
    "the encoder alone": lambda lora: differences(lora, "", "."),
}


@pytest.mark.parametrize("style", FILES)
@pytest.mark.parametrize("kind", KINDS)
def test_files_with_differences(kind: str, style: str, tmp_path: Path) -> None:
    config = TOY_CONFIGS[kind]
    both = Lora("both", {**toy_tables(config).changes, **toy_differences(config).changes})
    others = {"lora_unet_x.diff": torch.ones(2), "decoder.final_layer_norm.diff": torch.ones(2)}
    save_file(FILES[style](both) | others, tmp_path / "style.safetensors")
    lora = read_lora(tmp_path / "style.safetensors")
    assert lora.changes.keys() == encoder_tensors(config.encoder_only()).keys()
    assert lora.others == {
        "lora_unet_x.diff": "the UNet or transformer",
        "decoder.final_layer_norm.diff": "the T5's decoder",
    }
    stack = build_stack(config, random_state(config))
    Loras(stack).add(lora, 0.7)
    assert_near(ours(stack), reference(config, (both, 0.7)), 2e-5)


@pytest.mark.parametrize("target", ["embed_tokens", "relative_attention_bias"])
def test_what_peft_saves_of_a_table(target: str, tmp_path: Path) -> None:
    """Its factors are those of the transposed table."""
    peft = pytest.importorskip("peft")
    model = transformers_encoder(V1_1.encoder_only(), encoder_part(random_state(V1_1)), torch.float32)
    if target == "embed_tokens" and model.encoder.embed_tokens is model.shared:
        pytest.skip("transformers 4 lists the table as `shared` alone; its encoder does not see what peft puts there")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=[target, "q"], init_lora_weights=False)
    live = peft.get_peft_model(model, config).eval()
    live.save_pretrained(tmp_path, save_embedding_layers=False)
    lora = read_lora(tmp_path)
    assert any(("shared" if target == "embed_tokens" else target) in name for name in lora.changes)
    assert {change.scale for change in lora.changes.values()} == {5 / 3}
    stack = v1_1_stack()
    Loras(stack).add(lora)
    with torch.no_grad():
        assert_near(ours(stack), live(ids_for(V1_1), MASK)[0])


def test_narrow_factors_of_tables_in_the_style_of_kohya(tmp_path: Path) -> None:
    tables = toy_tables(V1_1)
    narrow = Lora("narrow", {name: change for name, change in tables.changes.items() if "norm" not in name})
    save_file(kohya(narrow), tmp_path / "narrow.safetensors")
    stack = v1_1_stack()
    Loras(stack).add(tmp_path / "narrow.safetensors", 0.5)
    assert_near(ours(stack), reference(V1_1, (narrow, 0.5)))


Q = "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q"
ZEROS = {
    "a difference of a bias": {f"{Q}.diff_b": (64,)},
    "a bias beside factors": {f"{Q}.lora_B.bias": (64,)},
    "a bias of a norm": {"lora_te3_encoder_block_0_layer_0_layer_norm.b_norm": (64,)},
    "a difference of something unknown": {"text_encoders.t5xxl.transformer.something.diff": (3, 3)},
    "a difference of a norm": {"lora_te3_encoder_block_1_layer_1_layer_norm.diff": (64,)},
    "a difference of the bias table": {f"{Q[:-1]}relative_attention_bias.diff": (32, 4)},
    "factors of something unknown": {
        "text_encoders.t5xxl.transformer.logits.lora_up.weight": (3, 2),
        "text_encoders.t5xxl.transformer.logits.lora_down.weight": (2, 3),
        "text_encoders.t5xxl.transformer.logits.alpha": (),
    },
    "factors of peft of something unknown": {
        "base_model.model.x.lora_B.weight": (3, 2),
        "base_model.model.x.lora_A.weight": (2, 3),
    },
}


@pytest.mark.parametrize("case", ZEROS)
def test_zeros_are_passed_over(case: str, tmp_path: Path) -> None:
    low = toy_lora(V1_1)
    prefix = "lora_te3" if any(name.startswith("lora_te3") for name in ZEROS[case]) else Q.split("encoder.block")[0]
    known = (
        kohya(low)
        if prefix == "lora_te3"
        else {
            f"{prefix}{name.removesuffix('.weight')}.diff": change.up @ change.down * change.scale
            for name, change in low.changes.items()
        }
    )
    # The first factor of a pair is drawn at random in training, and only the second begins as zeros.
    zeros = {
        name: torch.ones(shape) if name.endswith(("lora_down.weight", "lora_A.weight", "alpha")) else torch.zeros(shape)
        for name, shape in ZEROS[case].items()
    }
    save_file(known | zeros, tmp_path / "style.safetensors")
    lora = read_lora(tmp_path / "style.safetensors")
    assert sorted(lora.zeros) == sorted(zeros)
    assert lora.changes.keys() == projections(V1_1).keys()
    with_one = {name: tensor + 1 for name, tensor in zeros.items()}
    save_file(known | with_one, tmp_path / "style.safetensors")
    if "norm.diff" in str(zeros) or "bias.diff" in str(zeros):
        assert len(read_lora(tmp_path / "style.safetensors").changes) == len(projections(V1_1)) + 1
    else:
        with pytest.raises(CheckpointError, match="can't be used as a LoRA of a T5 encoder"):
            read_lora(tmp_path / "style.safetensors")


def test_a_lora_of_zeros_alone(tmp_path: Path) -> None:
    """As it is before the first step of its training."""
    new = {name: torch.zeros_like(t) if "up" in name else t for name, t in kohya(toy_lora(V1_1)).items()}
    save_file(new, tmp_path / "new.safetensors")
    lora = read_lora(tmp_path / "new.safetensors")
    assert (lora.changes, sorted(lora.zeros)) == ({}, sorted(new))
    assert repr(lora) == "Lora(new: 0 weights of the T5; 63 tensors that change nothing)"
    stack = v1_1_stack()
    loras = Loras(stack)
    assert loras.add(lora) == "new"
    assert_near(ours(stack), reference(V1_1))


FAULTS = {
    "another weight": ({f"{Q}.set_weight": (64, 64)}, "q.set_weight: a weight in place of the model's own"),
    "a difference beside factors": (
        {f"{Q}.diff": (64, 64), f"{Q}.lora_up.weight": (64, 2)},
        "lora_up.weight: factors beside a whole difference, text_enc",
    ),
    "half of a table": (
        {"base_model.model.shared.lora_embedding_A": (2, 96)},
        "lora_embedding_A: no factor down beside it",
    ),
    "ranks of a table": (
        {"base_model.model.shared.lora_embedding_A": (2, 96), "base_model.model.shared.lora_embedding_B": (64, 3)},
        r"shared.weight: factors of shapes \[96, 2\] and \[3, 64\] have no common rank",
    ),
    "DoRA of a table": ({"base_model.model.shared.lora_magnitude_vector": (96,)}, "DoRA"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_files(fault: str, tmp_path: Path) -> None:
    shapes, message = FAULTS[fault]
    save_file({name: torch.ones(shape) for name, shape in shapes.items()}, tmp_path / "faulty.safetensors")
    with pytest.raises(CheckpointError, match=message):
        read_lora(tmp_path / "faulty.safetensors")


def test_differences_of_other_sizes(loras_of: type[LoraSet]) -> None:
    stack = v1_1_stack()
    before = snapshot(stack)
    odd = Lora("odd", {"shared.weight": WholeChange(torch.ones(95, 64))})
    with pytest.raises(ValueError, match=r"a change of shape \[95, 64\] for a weight of shape \[96, 64\]"):
        loras_of(stack).add(odd)
    assert_same_weights(stack, before)
