"""The drop-in class against transformers' own, on the same weights: every way to call, load and save it."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import encoder_part, write_file
from conftest import TOY_CONFIGS, padding_mask, random_state, write_hf_folder
from torch import Tensor, nn

from nai_t5_core import load
from nai_t5_core.config import T5Config
from nai_t5_core.conversion import convert
from nai_t5_core.formats import CheckpointError
from nai_t5_core.guard import NotFiniteError, ScaleTightenedWarning
from nai_t5_core.load import load_encoder
from nai_t5_core.peers import transformers_encoder
from nai_t5_core.stress import stress_state

pytest.importorskip("transformers")

from nai_t5_core.hf import NAIT5EncoderModel
from nai_t5_core.row_memory import RowMemory

LENGTHS = [5, 12, 1, 8]


def hf_model(config: T5Config, state: dict[str, Tensor] | None = None, dtype: torch.dtype = torch.float32) -> nn.Module:
    model: Any = transformers_encoder(config.encoder_only(), encoder_part(state or random_state(config)), dtype)
    model.tie_weights()
    return model


def ids_for(config: T5Config) -> Tensor:
    return torch.randint(2, config.vocab_size, (4, 12), generator=torch.Generator().manual_seed(1))


def assert_near(ours: Tensor, reference: Tensor, relative: float = 1e-5) -> None:
    """Equal up to a share of the largest value."""
    assert ours.shape == reference.shape
    assert ours.dtype == reference.dtype
    assert (ours - reference).abs().max() <= relative * reference.abs().max()


@pytest.fixture
def reference(config: T5Config) -> nn.Module:
    return hf_model(config)


@pytest.fixture
def v1_1() -> NAIT5EncoderModel:
    return NAIT5EncoderModel.from_hf(hf_model(TOY_CONFIGS["v1.1"]))


V1_1_IDS = ids_for(TOY_CONFIGS["v1.1"])
MASK = padding_mask(LENGTHS, 12)

# ---------------------------------------------------------------------------------------------------------------------
# The call
# ---------------------------------------------------------------------------------------------------------------------

MASKS: dict[str, Tensor | None] = {
    "none": None,
    "int64": MASK,
    "bool": MASK.bool(),
    "float": MASK.float(),
    "left": MASK.flip(1),
    "holes": MASK * (torch.arange(12) != 3),
    "a row of nothing": MASK * torch.tensor([1, 0, 1, 1])[:, None],
    "nothing": torch.zeros_like(MASK).bool(),
}


@pytest.mark.parametrize("layout", ["fused", "separate"])
@pytest.mark.parametrize("mask", MASKS)
def test_every_row_is_that_of_transformers(config: T5Config, reference: nn.Module, mask: str, layout: Any) -> None:
    ids = ids_for(config)
    ours = NAIT5EncoderModel.from_hf(reference, layout=layout)
    assert_near(ours(ids, MASKS[mask])[0], reference(ids, attention_mask=MASKS[mask])[0])


def test_every_way_to_call(config: T5Config, reference: nn.Module) -> None:
    ids = ids_for(config)
    ours = NAIT5EncoderModel.from_hf(reference)
    expected = reference(ids, MASK)
    assert_near(ours(ids)[0], reference(ids)[0])
    for out in (
        ours(ids, MASK),
        ours(ids, attention_mask=MASK, output_hidden_states=False),
        ours(input_ids=ids, attention_mask=MASK, token_type_ids=torch.zeros_like(ids)),
        ours(inputs_embeds=reference.get_input_embeddings()(ids), attention_mask=MASK),  # type: ignore[operator]
        ours(None, MASK, ours.get_input_embeddings()(ids)),
    ):
        assert out[0] is out.last_hidden_state is out["last_hidden_state"]
        assert_near(out.last_hidden_state, expected.last_hidden_state)
    as_tuple = ours(ids, MASK, return_dict=False)
    assert isinstance(as_tuple, tuple) and len(as_tuple) == 1
    assert_near(as_tuple[0], expected[0])


def test_hidden_states_come_in_transformers_order(config: T5Config, reference: nn.Module) -> None:
    ids = ids_for(config)
    expected = reference(ids, MASK, output_hidden_states=True)
    ours = NAIT5EncoderModel.from_hf(reference)
    out = ours(ids, MASK, output_hidden_states=True)
    assert len(out.hidden_states) == config.num_layers + 1
    for state, other in zip(out.hidden_states, expected.hidden_states, strict=True):
        assert_near(state, other)
    assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
    ours.config.output_hidden_states = True
    assert len(ours(ids, MASK, return_dict=False)[1]) == config.num_layers + 1


def test_hidden_states_have_the_dtype_of_the_model() -> None:
    """Pipelines add the first to the last."""
    ours = NAIT5EncoderModel.from_hf(hf_model(TOY_CONFIGS["v1.1"]), torch.bfloat16)
    assert {state.dtype for state in ours(V1_1_IDS, output_hidden_states=True).hidden_states} == {torch.bfloat16}
    large = NAIT5EncoderModel.from_hf(
        hf_model(TOY_CONFIGS["v1.1"], stress_state(TOY_CONFIGS["v1.1"], "feed_forward_out")), torch.float16
    )
    with pytest.warns(ScaleTightenedWarning):
        large(V1_1_IDS)
    states = large(V1_1_IDS, output_hidden_states=True).hidden_states
    assert all(state.dtype == torch.float16 and state.isfinite().all() for state in states)


def test_outputs_belong_to_the_caller(v1_1: NAIT5EncoderModel) -> None:
    """Cosmos and Kandinsky write into them."""
    for padding in ("exact", "skip", "attend"):
        v1_1.padding = padding  # type: ignore[assignment]
        with torch.no_grad():
            out = v1_1(V1_1_IDS, MASK)[0]
        assert not out.is_inference() and not out.requires_grad
        kept = out.clone()
        out[0, 3:] = 0
        assert_near(v1_1(V1_1_IDS, MASK)[0], kept)
    with torch.inference_mode():
        v1_1(V1_1_IDS, MASK)[0].zero_()
    assert_near(v1_1(V1_1_IDS, MASK)[0], kept)


def test_gradients_are_those_of_transformers() -> None:
    reference = hf_model(TOY_CONFIGS["v1.1"])
    ours = NAIT5EncoderModel.from_hf(reference, layout="separate")
    for model in (reference, ours):
        model.requires_grad_(True)
        model(V1_1_IDS, MASK)[0].square().mean().backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        if model is reference:
            expected = grads
    assert grads.keys() >= {"shared.weight", "encoder.block.2.layer.1.DenseReluDense.wo.weight"}
    for name, grad in grads.items():
        assert_near(grad, expected[name], 1e-4)


def test_what_cannot_be_done_is_said(v1_1: NAIT5EncoderModel) -> None:
    with pytest.raises(ValueError, match="never formed"):
        v1_1(V1_1_IDS, output_attentions=True)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        v1_1()
    with pytest.raises(ValueError, match="outside the vocabulary"):
        v1_1(V1_1_IDS + 96)
    with pytest.raises(ValueError, match="allowed: attend, exact, skip, trim"):
        v1_1.padding = "none"  # type: ignore[assignment]
    with pytest.raises(ValueError, match="extra_pad=-1"):
        v1_1.extra_pad = -1


def test_padding_policy_is_set_by_hand_and_seen(v1_1: NAIT5EncoderModel) -> None:
    exact = v1_1(V1_1_IDS, MASK)[0]
    assert "T5 v1.1, fused, torch.float32, padding=exact" in repr(v1_1)
    v1_1.padding, v1_1.extra_pad = "skip", 1
    assert "padding=skip, extra_pad=1" in repr(v1_1)
    read = padding_mask([6, 12, 2, 9], 12).bool()
    out = v1_1(V1_1_IDS, MASK)[0]
    assert_near(out[read], exact[read])
    assert not out[~read].any()
    v1_1.padding, v1_1.extra_pad = "trim", 0
    assert v1_1(V1_1_IDS[:1], MASK[:1])[0].shape == (1, 5, 64)


# ---------------------------------------------------------------------------------------------------------------------
# dtype
# ---------------------------------------------------------------------------------------------------------------------


# What transformers itself makes of these in float16 is NaN. The last has a layer whose rounding alone is this large.
@pytest.mark.parametrize(("outlier", "relative"), [("hidden", 2e-2), ("embedding", 1e-3), ("attention_out", 5e-2)])
def test_float16_stays_finite_where_transformers_does_not(outlier: Any, relative: float) -> None:
    config = TOY_CONFIGS["v1.1"]
    state = stress_state(config, outlier)
    assert not hf_model(config, state, torch.float16)(V1_1_IDS, MASK)[0].isfinite().all()
    ours = NAIT5EncoderModel.from_hf(hf_model(config, state), torch.float16)
    if outlier == "embedding":  # known before the first call
        out = ours(V1_1_IDS, MASK)[0]
    else:
        with pytest.warns(ScaleTightenedWarning):
            out = ours(V1_1_IDS, MASK)[0]
    assert out.dtype == torch.float16 and ours.dtype == torch.float16
    assert_near(out.float(), hf_model(config, state)(V1_1_IDS, MASK)[0], relative)


def test_casts_of_a_loaded_model(v1_1: NAIT5EncoderModel) -> None:
    expected = v1_1(V1_1_IDS, MASK)[0]
    for dtype, relative in ((torch.float16, 1e-2), (torch.bfloat16, 1e-1), (torch.float64, 1e-5)):
        cast = copy.deepcopy(v1_1).to(dtype)
        assert cast.dtype == cast(V1_1_IDS, MASK)[0].dtype == dtype
        assert_near(cast(V1_1_IDS, MASK)[0].float(), expected, relative)
    assert v1_1.to("meta").device.type == "meta"


def test_a_release_that_fails_on_the_way_is_told() -> None:
    """The fault is seen when its weight is made, and those before it are gone by then."""
    model = hf_model(TOY_CONFIGS["v1.1"])
    with torch.no_grad():
        model.encoder.block[1].layer[0].SelfAttention.q.weight[0, 0] = 1e6  # type: ignore[union-attr,index]
    with pytest.raises(CheckpointError, match=r"(?s)qkv\.weight has values .* load T5EncoderModel again"):
        NAIT5EncoderModel.from_hf(model, torch.float16, release=True)


@pytest.mark.parametrize("layout", ["fused", "separate"])
def test_single_projections_can_be_kept_in_float32(layout: Any) -> None:
    """A recipe that users are told: cast the encoder to bfloat16, then every wo back."""
    model = NAIT5EncoderModel.from_hf(hf_model(TOY_CONFIGS["v1.1"]), layout=layout)
    expected = model(V1_1_IDS, MASK)[0]
    model.to(torch.bfloat16)
    for block in model.encoder.block:
        block.layer[-1].DenseReluDense.wo.to(torch.float32)
    out = model(V1_1_IDS, MASK)[0]
    assert out.dtype == torch.bfloat16
    assert_near(out.float(), expected, 1e-1)


def test_damaged_weights_are_told_in_float16(v1_1: NAIT5EncoderModel) -> None:
    v1_1.half()
    with torch.no_grad():
        v1_1.encoder.block[1].layer[0].SelfAttention.o.weight[0, 0] = torch.nan
    with pytest.raises(NotFiniteError, match=r"block\.1\.layer\.0\.SelfAttention\.o\.weight"):
        v1_1(V1_1_IDS)


# ---------------------------------------------------------------------------------------------------------------------
# From a loaded model, and back
# ---------------------------------------------------------------------------------------------------------------------


def test_release_and_give_back(config: T5Config, reference: nn.Module) -> None:
    ids = ids_for(config)
    expected = reference(ids, MASK)[0].detach()
    ours = NAIT5EncoderModel.from_hf(reference, release=True)
    assert {parameter.device.type for parameter in reference.parameters()} == {"meta"}
    assert_near(ours(ids, MASK)[0], expected)
    ours.give_back(reference)
    assert_near(reference(ids, MASK)[0], expected)
    assert reference.encoder.embed_tokens.weight is reference.shared.weight  # type: ignore[union-attr]


def test_separate_layout_gives_the_very_tensors_back() -> None:
    reference = hf_model(TOY_CONFIGS["v1.1"], dtype=torch.bfloat16)
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in reference.state_dict().items()}
    ours = NAIT5EncoderModel.from_hf(reference, layout="separate", release=True)
    assert ours.dtype == torch.bfloat16
    for name in ("shared.weight", "encoder.block.1.layer.1.DenseReluDense.wi_0.weight"):
        assert ours.state_dict()[name].data_ptr() == before[name][0], "shared, not copied"
    ours.give_back(reference)
    for name, tensor in reference.state_dict().items():
        assert torch.equal(tensor, before[name][1])


def test_weights_are_never_held_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """While ours are made, theirs go: at no time are there more than the weights and what is being made."""
    reference = hf_model(TOY_CONFIGS["v1.1"])
    alive = {id(p): p.nbytes for p in reference.parameters()}
    for parameter in reference.parameters():
        weakref.finalize(parameter, alive.pop, id(parameter))
    del parameter
    total = sum(alive.values())
    made, peak = 0, 0
    real = load.cook

    def counting(*arguments: Any) -> Tensor:
        nonlocal made, peak
        tensor = real(*arguments)
        made += tensor.nbytes
        peak = max(peak, made + sum(alive.values()))
        return tensor

    monkeypatch.setattr(load, "cook", counting)
    ours = NAIT5EncoderModel.from_hf(reference, torch.float64, release=True)
    largest = max(tensor.nbytes for tensor in ours.state_dict().values())
    # In twice the precision, so that nothing is shared: half of what was made has replaced as many numbers of theirs.
    assert made > 1.8 * total and not alive
    assert peak <= made + largest


def test_the_source_keeps_its_config_and_weights(config: T5Config, reference: nn.Module) -> None:
    before, weights = reference.config.to_dict(), {k: v.clone() for k, v in reference.state_dict().items()}
    ours = NAIT5EncoderModel.from_hf(reference)
    ours.config.vocab_size = 5
    assert reference.config.to_dict() == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in reference.state_dict().items())
    assert ours.config.model_type == reference.config.model_type and ours.config.d_model == config.d_model
    assert not ours.training


def test_models_that_are_no_loaded_t5_are_refused() -> None:
    meta = hf_model(TOY_CONFIGS["v1.1"]).to("meta")
    with pytest.raises(CheckpointError, match=r"weights on the meta device, such as shared\.weight"):
        NAIT5EncoderModel.from_hf(meta)
    damaged = hf_model(TOY_CONFIGS["v1.1"])
    damaged.encoder.block[1].layer[0].SelfAttention.q.weight = nn.Parameter(torch.zeros(3, 3))  # type: ignore
    damaged.encoder.block[0].layer[0].SelfAttention.adapter = nn.Linear(2, 2)  # type: ignore
    with pytest.raises(CheckpointError, match="2 faults") as error:
        NAIT5EncoderModel.from_hf(damaged)
    assert "block.1.layer.0.SelfAttention.q.weight has shape [3, 3]" in str(error.value)
    assert "tensors that no T5 has: encoder.block.0.layer.0.SelfAttention.adapter.weight" in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# From files, and into them
# ---------------------------------------------------------------------------------------------------------------------


def test_from_a_folder_a_subfolder_and_a_file(config: T5Config, kind: str, tmp_path: Path) -> None:
    state = random_state(config)
    expected = hf_model(config)(ids_for(config), MASK)[0]
    write_hf_folder(tmp_path / "pipe" / "text_encoder_2", config, state)
    native = tmp_path / "native.safetensors"
    convert(tmp_path / "pipe" / "text_encoder_2", native)
    models = [
        NAIT5EncoderModel.from_pretrained(tmp_path / "pipe" / "text_encoder_2"),
        NAIT5EncoderModel.from_pretrained(str(tmp_path / "pipe"), subfolder="text_encoder_2", layout="separate"),
        NAIT5EncoderModel.from_pretrained(native, torch_dtype=torch.float32),
    ]
    if kind != "ul2":  # its activation is in config.json alone
        file = write_file(tmp_path / "alone.safetensors", encoder_part(state))
        models.append(NAIT5EncoderModel.from_pretrained(file, device_map={"": "cpu"}))
    for model in models:
        assert not model.training
        assert_near(model(ids_for(config), MASK)[0], expected)
        assert model.config.model_type == ("umt5" if kind == "umt5" else "t5")


def test_dtype_argument(v1_1_folder: Path, tmp_path: Path) -> None:
    half = tmp_path / "half.safetensors"
    convert(v1_1_folder, half, dtype="bfloat16")
    assert NAIT5EncoderModel.from_pretrained(half).dtype == torch.bfloat16
    assert NAIT5EncoderModel.from_pretrained(half, dtype=None).dtype == torch.float32
    assert NAIT5EncoderModel.from_pretrained(half, dtype="float16").dtype == torch.float16
    assert NAIT5EncoderModel.from_pretrained(v1_1_folder, torch_dtype=torch.float16).dtype == torch.float16


def test_what_cannot_be_loaded_is_said(v1_1_folder: Path) -> None:
    load_it = NAIT5EncoderModel.from_pretrained
    with pytest.raises(CheckpointError, match=r"has no model\.fp16\.safetensors; leave out variant"):
        load_it(v1_1_folder, variant="fp16")
    with pytest.raises(ValueError, match="one device, such as"):
        load_it(v1_1_folder, device_map="auto")
    with pytest.raises(ValueError, match="quantise the loaded model"):
        load_it(v1_1_folder, quantization_config={"bits": 8})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown dtype 'int8'"):
        load_it(v1_1_folder, dtype="int8")
    state = random_state(TOY_CONFIGS["v1.1"])
    del state["encoder.block.1.layer.0.SelfAttention.k.weight"]
    with pytest.raises(CheckpointError, match=r"SelfAttention\.k\.weight is missing"):
        load_it(write_hf_folder(v1_1_folder / "bad", TOY_CONFIGS["v1.1"], state))


@pytest.mark.parametrize("layout", ["fused", "separate"])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_save_and_load(
    config: T5Config, reference: nn.Module, layout: Any, variant: str | None, tmp_path: Path
) -> None:
    ids = ids_for(config)
    ours = NAIT5EncoderModel.from_hf(reference, layout=layout)
    ours.save_pretrained(tmp_path / "native", variant=variant)
    again = NAIT5EncoderModel.from_pretrained(tmp_path / "native", variant=variant)
    assert_near(again(ids, MASK)[0], ours(ids, MASK)[0])
    assert again.config.model_type == ours.config.model_type
    assert_near(load_encoder(tmp_path / "native", "float32")(ids, MASK), ours(ids, MASK)[0])

    ours.save_pretrained(tmp_path / "theirs", save_format="transformers", variant=variant)
    theirs = type(reference).from_pretrained(tmp_path / "theirs", variant=variant)  # type: ignore[attr-defined]
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(tensor, reference.state_dict()[name], rtol=1e-6, atol=1e-7)
    assert_near(NAIT5EncoderModel.from_pretrained(tmp_path / "theirs", variant=variant)(ids)[0], reference(ids)[0])


def test_scales_survive_saving(tmp_path: Path) -> None:
    config = TOY_CONFIGS["v1.1"]
    ours = NAIT5EncoderModel.from_hf(hf_model(config, stress_state(config, "feed_forward_out")), torch.float16)
    with pytest.warns(ScaleTightenedWarning):
        expected = ours(V1_1_IDS, MASK)[0]
    ours.save_pretrained(tmp_path / "native")
    again = NAIT5EncoderModel.from_pretrained(tmp_path / "native")
    assert again.stack.scales == ours.stack.scales and not again.stack.scales.is_one
    assert torch.equal(again(V1_1_IDS, MASK)[0], expected)


def test_what_cannot_be_saved_is_said(v1_1: NAIT5EncoderModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="allowed: native, transformers"):
        v1_1.save_pretrained(tmp_path, save_format="gguf")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="only safetensors"):
        v1_1.save_pretrained(tmp_path, safe_serialization=False)
    v1_1.save_pretrained(tmp_path / "nothing", is_main_process=False)
    assert not (tmp_path / "nothing").exists()


# ---------------------------------------------------------------------------------------------------------------------
# What other software does with a model
# ---------------------------------------------------------------------------------------------------------------------


def test_embeddings_can_be_read_resized_and_replaced(v1_1: NAIT5EncoderModel, tmp_path: Path) -> None:
    before = v1_1(V1_1_IDS)[0]
    v1_1.resize_token_embeddings(98, mean_resizing=False)
    assert v1_1.config.vocab_size == v1_1.get_input_embeddings().weight.shape[0] == 98
    assert torch.equal(v1_1(V1_1_IDS)[0], before)
    with torch.no_grad():
        v1_1.get_input_embeddings().weight[97] = v1_1.get_input_embeddings().weight[5]
    assert torch.equal(v1_1(torch.tensor([[97, 7, 1]]))[0], v1_1(torch.tensor([[5, 7, 1]]))[0])
    v1_1.save_pretrained(tmp_path)
    assert torch.equal(
        NAIT5EncoderModel.from_pretrained(tmp_path)(torch.tensor([[97]]))[0], v1_1(torch.tensor([[97]]))[0]
    )


def test_copies_are_independent(v1_1: NAIT5EncoderModel) -> None:
    v1_1.padding = "skip"
    expected = v1_1(V1_1_IDS, MASK)[0]
    for other in (copy.deepcopy(v1_1), pickle.loads(pickle.dumps(v1_1))):
        assert torch.equal(other(V1_1_IDS, MASK)[0], expected)
        assert other.padding == "skip"
        with torch.no_grad():
            other.shared.weight.zero_()
        assert not other(V1_1_IDS, MASK)[0].any()
        assert torch.equal(v1_1(V1_1_IDS, MASK)[0], expected)


def test_compiled(v1_1: NAIT5EncoderModel) -> None:
    """With the backend that only traces: what is checked is that the model can be traced, piece by piece."""
    compiled = torch.compile(v1_1, backend="eager")
    with torch.no_grad():
        assert_near(compiled(V1_1_IDS, MASK)[0], v1_1(V1_1_IDS, MASK)[0])
        assert_near(compiled(V1_1_IDS[:2])[0], v1_1(V1_1_IDS[:2])[0])


def test_random_model_from_a_config() -> None:
    config = hf_model(TOY_CONFIGS["v1.1"]).config
    torch.manual_seed(0)
    model = NAIT5EncoderModel(config)
    torch.manual_seed(0)
    again = NAIT5EncoderModel(config)
    assert torch.equal(model(V1_1_IDS)[0], again(V1_1_IDS)[0])
    assert 0.1 < model(V1_1_IDS)[0].std() < 10
    with torch.device("meta"):
        assert NAIT5EncoderModel(config).device.type == "meta"


def test_peft_adapters() -> None:
    """In the separate layout, where every projection is a module under the name that adapters know."""
    peft = pytest.importorskip("peft")
    reference = hf_model(TOY_CONFIGS["v1.1"])
    ours = NAIT5EncoderModel.from_hf(reference, layout="separate")
    for model in (reference, ours):
        torch.manual_seed(0)
        targets = ["q", "v", "wi_0", "wo"]
        model.add_adapter(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))  # type: ignore[operator]
    assert_near(ours(V1_1_IDS, MASK)[0], reference(V1_1_IDS, MASK)[0])
    ours.disable_adapters()
    assert_near(ours(V1_1_IDS, MASK)[0], hf_model(TOY_CONFIGS["v1.1"])(V1_1_IDS, MASK)[0])


def test_rows_can_be_remembered(v1_1: NAIT5EncoderModel) -> None:
    memory = RowMemory()
    out = v1_1(V1_1_IDS, MASK)[0]
    memory.add(V1_1_IDS, MASK, out)
    marked = RowMemory()
    marked.add(V1_1_IDS, MASK, out + 1)
    with v1_1.remembering(marked):
        assert torch.equal(v1_1(V1_1_IDS[[2, 0]], MASK[[2, 0]].bool())[0], out[[2, 0]] + 1)
        assert_near(v1_1(V1_1_IDS)[0], v1_1.stack(V1_1_IDS))
        assert not torch.equal(v1_1(V1_1_IDS, MASK.flip(0))[0], out + 1)
    assert torch.equal(v1_1(V1_1_IDS, MASK)[0], out)
    assert len(memory) == 4 and memory.find(V1_1_IDS, None) is None


def test_absent_transformers_is_told() -> None:
    code = "import sys; sys.modules['transformers'] = None; import nai_t5_core.hf"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert "pip install 'comfy-nai-t5[transformers]'" in done.stderr
