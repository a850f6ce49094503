"""LoRA and textual inversion in real pipelines whose T5 is ours, by our means and by those of diffusers and peft."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import peft
from conftest import TOY_CONFIGS
from hf_toys import MASK, V1_1_IDS, assert_near, hf_model
from safetensors.torch import save_file
from test_diffusers_families import assert_same
from toy_loras import dotted, toy_lora, with_loras
from toy_offloading import OFFLOADS, cpu_has_one_name, hooks_of
from toy_pipelines import T5, UMT5, Toy, make

from nai_t5_core.diffusers.adapter import replace_text_encoder, restore_text_encoder
from nai_t5_core.diffusers.drop_in import NAIT5EncoderModel
from nai_t5_core.facts.scales import LayerScales, StackScales
from nai_t5_core.lora.files import Lora
from nai_t5_core.lora.live import LiveLoras
from nai_t5_core.lora.loras import Loras

pytestmark = pytest.mark.filterwarnings("ignore")
__all__ = ["cpu_has_one_name"]  # a fixture for every test here

CONFIGS = {"flux": T5, "pixart-sigma": T5, "wan": UMT5}


@pytest.fixture(params=CONFIGS)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def images(toy: Toy, *loras: tuple[Lora, float]) -> tuple[torch.Tensor, torch.Tensor]:
    """What the pipeline makes with transformers' encoder, without and with LoRAs in its weights."""
    plain, state = toy.run(), copy.deepcopy(toy.encoder.state_dict())
    toy.encoder.load_state_dict(with_loras(state, *loras), strict=False)
    changed = toy.run()
    toy.encoder.load_state_dict(state)
    assert (changed - plain).abs().max() > 0.01 * plain.abs().max(), "the LoRA makes no difference"
    return plain, changed


@pytest.mark.parametrize("layout", ["fused", "separate"])
def test_live_and_merged_in_a_pipeline(family: str, layout: Any) -> None:
    toy = make(family)
    first, second = toy_lora(CONFIGS[family], 1, name="first"), toy_lora(CONFIGS[family], 2, name="second")
    plain, changed = images(toy, (first, 0.8), (second, -0.3))
    replace_text_encoder(toy.pipe, layout=layout)
    for kind in (LiveLoras, Loras):
        loras = kind(toy.encoder)
        loras.add(first, 0.8)
        loras.add(second, -0.3)
        assert_same(toy.run(), changed, 1e-4)
        loras.clear()
        assert_same(toy.run(), plain, 1e-4)


@pytest.mark.parametrize("offload", OFFLOADS)
def test_live_under_offloading(family: str, offload: Any) -> None:
    """Added before it and under it; taken away under it, with the hooks left as they were."""
    toy = make(family)
    lora = toy_lora(CONFIGS[family])
    plain, changed = images(toy, (lora, 0.8))
    replace_text_encoder(toy.pipe)
    early = copy.deepcopy(toy)
    LiveLoras(early.encoder).add(lora, 0.8)
    offload(early.pipe)
    assert_same(early.run(), changed, 1e-4)
    assert_same(early.run(), changed, 1e-4)
    offload(toy.pipe)
    before = hooks_of(toy.encoder)
    assert_same(toy.run(), plain, 1e-4)
    loras = LiveLoras(toy.encoder)
    loras.add(lora, 0.1)
    loras.set_strength("toy", 0.8)
    assert_same(toy.run(), changed, 1e-4)
    loras.clear()
    assert hooks_of(toy.encoder) == before
    assert_same(toy.run(), plain, 1e-4)


def test_live_beside_a_compiled_component() -> None:
    toy = make("pixart-sigma")
    lora = toy_lora(T5)
    plain, changed = images(toy, (lora, 0.8))
    replace_text_encoder(toy.pipe)
    toy.encoder = torch.compile(toy.encoder, backend="eager")
    assert_same(toy.run(), plain, 1e-4)
    loras = LiveLoras(toy.encoder)
    loras.add(lora, 0.8)
    assert_same(toy.run(), changed, 1e-4)
    loras.clear()
    assert_same(toy.run(), plain, 1e-4)


def test_pipelines_with_live_loras_are_neither_saved_nor_restored(tmp_path: Path) -> None:
    toy = make("pixart-sigma")
    plain = toy.run()
    replace_text_encoder(toy.pipe)
    loras = LiveLoras(toy.encoder)
    loras.add(toy_lora(T5))
    for refused in (toy.pipe.save_pretrained, lambda _: restore_text_encoder(toy.pipe)):
        with pytest.raises(ValueError, match=r"has an adapter or live LoRA beside it.*call clear\(\) of the LiveLoras"):
            refused(tmp_path / "saved")
    loras.clear()
    restore_text_encoder(toy.pipe)
    assert_same(toy.run(), plain, 1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# By the pipelines' own means
# ---------------------------------------------------------------------------------------------------------------------


def test_a_file_for_transformer_and_t5(tmp_path: Path) -> None:
    """diffusers takes the transformer's part of it, and passes over the T5's, with their encoder as with ours."""
    toy = make("flux")
    lora = toy_lora(T5, name="both")
    generator = torch.Generator().manual_seed(0)
    name = "transformer.transformer_blocks.0.attn.to_q"
    down, up = torch.randn(2, 32, generator=generator), torch.randn(32, 2, generator=generator)
    factors = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    file = tmp_path / "both.safetensors"
    save_file(dotted(lora, "text_encoder_2.", "lora_A", "lora_B") | factors, file)
    toy.pipe.load_lora_weights(file)
    plain, changed = images(toy, (lora, 1.0))
    replace_text_encoder(toy.pipe)
    assert_same(toy.run(), plain, 1e-4)
    loras = LiveLoras(toy.encoder)
    assert loras.add(file) == "both"
    assert_same(toy.run(), changed, 1e-4)


def test_a_file_for_a_pipeline_that_has_only_a_t5(tmp_path: Path) -> None:
    """diffusers says that it has no LoRA for a T5, whichever it is."""
    file = tmp_path / "t5.safetensors"
    save_file(dotted(toy_lora(T5), "text_encoder.", "lora_A", "lora_B"), file)
    toy = make("deepfloyd-if")
    for _ in range(2):
        with pytest.raises(ValueError, match="Could not automatically infer state dict type"):
            toy.pipe.load_lora_weights(file)
        replace_text_encoder(toy.pipe)
    before = toy.encoder(V1_1_IDS)[0]
    LiveLoras(toy.encoder).add(file)
    assert (toy.encoder(V1_1_IDS)[0] - before).abs().max() > 0.1


def adapter(*targets: str) -> Any:
    return peft.LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False)


ATTACH: dict[str, Any] = {
    "add_adapter": lambda model, config: model.add_adapter(config),
    "get_peft_model": lambda model, config: peft.get_peft_model(model, config),
    "inject_adapter": lambda model, config: peft.inject_adapter_in_model(config, model),
}


@pytest.mark.parametrize("attach", ATTACH)
def test_adapters_of_peft(attach: str) -> None:
    """Beside separate weights as beside transformers'; beside fused ones nothing is what peft takes it for."""
    v1_1 = TOY_CONFIGS["v1.1"]
    outputs = []
    for model in (hf_model(v1_1), NAIT5EncoderModel.from_hf(hf_model(v1_1), layout="separate")):
        torch.manual_seed(0)
        ATTACH[attach](model, adapter("q", "v", "o", "wi_0", "wo"))
        with torch.no_grad():
            outputs.append(model.eval()(V1_1_IDS, attention_mask=MASK)[0])
    assert_near(outputs[1], outputs[0])
    for targets in (["o"], ["o", "wo"]):
        fused = NAIT5EncoderModel.from_hf(hf_model(v1_1))
        with pytest.raises(ValueError, match=r"adapters belong beside the original .*LiveLoras.*layout='separate'"):
            ATTACH[attach](fused, adapter(*targets))
    if attach != "add_adapter":  # which is ours, and speaks before peft looks
        with pytest.raises(ValueError, match=r"Target modules .* not found"):
            ATTACH[attach](NAIT5EncoderModel.from_hf(hf_model(v1_1)), adapter("q"))


def test_adapters_are_loaded_but_not_saved_as_weights(tmp_path: Path) -> None:
    v1_1 = TOY_CONFIGS["v1.1"]
    theirs = peft.get_peft_model(hf_model(v1_1), adapter("q", "wi_1")).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    ours = NAIT5EncoderModel.from_hf(hf_model(v1_1), layout="separate")
    before = ours(V1_1_IDS, MASK)[0]
    ours.load_adapter(tmp_path / "adapter")
    with torch.no_grad():
        assert_near(ours(V1_1_IDS, MASK)[0], theirs(V1_1_IDS, attention_mask=MASK)[0])
    with pytest.raises(ValueError, match=r"SelfAttention\.q\.weight has an adapter .*or peft's unload"):
        ours.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="LiveLoras"):
        NAIT5EncoderModel.from_hf(hf_model(v1_1)).load_adapter(tmp_path / "adapter")
    fused = NAIT5EncoderModel.from_hf(hf_model(v1_1))
    LiveLoras(fused).add(tmp_path / "adapter")
    with torch.no_grad():
        assert_near(fused(V1_1_IDS, MASK)[0], theirs(V1_1_IDS, attention_mask=MASK)[0])
    ours.disable_adapters()
    assert_near(ours(V1_1_IDS, MASK)[0], before)


# ---------------------------------------------------------------------------------------------------------------------
# Tokens of one's own
# ---------------------------------------------------------------------------------------------------------------------

VECTORS = torch.randn(3, T5.d_model, generator=torch.Generator().manual_seed(0))


def learn_by_pipeline(toy: Toy, folder: Path) -> str:
    save_file({"<cat>": VECTORS}, folder / "cat.safetensors")
    toy.pipe.load_textual_inversion(
        folder / "cat.safetensors", token="<cat>", text_encoder=toy.encoder, tokenizer=toy.tokenizer
    )
    return "a photo of <cat>"


def learn_by_hand(toy: Toy, folder: Path) -> str:
    words = [f"<cat{number}>" for number in range(3)]
    assert toy.tokenizer.add_tokens(words) == 3
    toy.encoder.resize_token_embeddings(len(toy.tokenizer), mean_resizing=False)
    with torch.no_grad():
        toy.encoder.get_input_embeddings().weight[-3:] = VECTORS
    return f"a photo of {' '.join(words)}"


@pytest.mark.parametrize("learn", [learn_by_pipeline, learn_by_hand])
@pytest.mark.parametrize("layout", ["fused", "separate"])
def test_tokens_are_added(learn: Any, layout: Any, tmp_path: Path) -> None:
    theirs = make("flux")
    ours = copy.deepcopy(theirs)
    replace_text_encoder(ours.pipe, layout=layout)
    plain = theirs.run(prompt_2="a photo of a cat")
    pictures = []
    for toy in (theirs, ours):
        prompt = learn(toy, tmp_path)
        pictures.append(toy.run(prompt_2=prompt))
        assert {4096, 4097} <= set(toy.tokenizer(toy.pipe.maybe_convert_prompt(prompt, toy.tokenizer)).input_ids)
    assert_same(pictures[1], pictures[0], 1e-4)
    assert (pictures[0] - plain).abs().max() > 0.01 * plain.abs().max()


def test_a_scaled_embedding_table_is_not_handed_out() -> None:
    """It holds other numbers than a caller would take them for."""
    scales = StackScales((LayerScales(),) * 3, 0.5)
    model = NAIT5EncoderModel.from_hf(hf_model(TOY_CONFIGS["v1.1"]), scales=scales)
    assert_near(model(V1_1_IDS)[0], hf_model(TOY_CONFIGS["v1.1"])(V1_1_IDS)[0])
    for use in (model.get_input_embeddings, lambda: model.resize_token_embeddings(99)):
        with pytest.raises(ValueError, match=r"the embedding table .*is kept times 0\.5; load the model in bfloat16"):
            use()
