"""A pipeline whose T5 is kept in blocks of a GGUF file by transformers or diffusers: ours has the very bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_quantised_files import CONFIG, IDS, file_of
from torch import nn
from toy_gguf import gguf, packed

transformers = pytest.importorskip("transformers")
pytest.importorskip("diffusers")

from toy_pipelines import make  # noqa: E402

from nai_t5_core.backends.quantised.projections import QuantisedLinear, stays_quantised  # noqa: E402
from nai_t5_core.diffusers.adapter import replace_text_encoder, restore_text_encoder  # noqa: E402
from nai_t5_core.diffusers.drop_in import NAIT5EncoderModel  # noqa: E402


def can_be_kept(name: str, linear: nn.Linear, kind: str) -> bool:
    """T5 of transformers casts to the dtype of this weight's bytes what it multiplies by them."""
    block, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return name != "wo" and linear.in_features % block == 0


def in_blocks_of_diffusers(model: nn.Module, kind: str) -> nn.Module:
    """With its projections in blocks, as diffusers loads them."""
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and can_be_kept(name, child, kind):
                number = gguf.GGMLQuantizationType[kind]
                content = torch.from_numpy(packed(child.weight.detach().float().numpy(), kind).copy())
                linear = GGUFLinear(child.in_features, child.out_features, compute_dtype=torch.float32, device="meta")
                linear.weight = GGUFParameter(content, quant_type=number)
                setattr(parent, name, linear)
    return model


def in_blocks_of_transformers(model: nn.Module, kind: str) -> nn.Module:
    from transformers.integrations.gguf.utils import GgufLinear

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and can_be_kept(name, child, kind):
                linear = GgufLinear(child.in_features, child.out_features, int(gguf.GGMLQuantizationType[kind]))
                content = torch.from_numpy(packed(child.weight.detach().float().numpy(), kind).copy())
                linear.weight = nn.Parameter(content, requires_grad=False)
                setattr(parent, name, linear)
    return model


def theirs(config: Any = CONFIG) -> Any:
    torch.manual_seed(0)
    sizes = {name: getattr(config, name) for name in ("vocab_size", "d_model", "d_kv", "d_ff", "num_heads")}
    hf = transformers.T5Config(**sizes, num_layers=config.num_layers, feed_forward_proj="gated-gelu")
    return transformers.T5EncoderModel(hf).eval()


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K"])
@pytest.mark.parametrize("layout", ["fused", "separate"])
def test_blocks_of_diffusers(kind: str, layout: Any) -> None:
    model = in_blocks_of_diffusers(theirs(), kind)
    with torch.no_grad():
        expected = model(IDS).last_hidden_state
        ours = NAIT5EncoderModel.from_hf(model, layout=layout, release=True)
        found = ours(IDS).last_hidden_state
    # diffusers multiplies by the scales of blocks in float16.
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-3)
    bytes_of_ours = {
        form.weight.parts["weight"].data_ptr()
        for module in ours.modules()
        if isinstance(module, QuantisedLinear)
        for form in module.forms
    }
    linears = [module for module in model.modules() if type(module).__name__ == "GGUFLinear"]
    assert bytes_of_ours == {linear.weight.data_ptr() for linear in linears}


def test_a_pipeline_with_blocks() -> None:
    toy = make("pixart-sigma")
    old = in_blocks_of_diffusers(toy.encoder, "Q8_0")
    toy.encoder = old
    image = toy.run()
    replace_text_encoder(toy.pipe)
    assert stays_quantised(toy.encoder)
    assert (toy.run() - image).abs().max() < 1e-2 * image.abs().max()
    restore_text_encoder(toy.pipe)
    assert toy.encoder is old and torch.equal(toy.run(), image)


def test_blocks_of_transformers() -> None:
    """Which it cannot compute without a package from its hub: compared with the same bytes of diffusers."""
    pytest.importorskip("transformers.integrations.gguf.utils", reason="transformers keeps no blocks")
    found, expected = (
        NAIT5EncoderModel.from_hf(keep(theirs(), "Q4_K"))(IDS).last_hidden_state
        for keep in (in_blocks_of_transformers, in_blocks_of_diffusers)
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("save_format", ["native", "transformers"])
def test_what_is_saved_is_unpacked(tmp_path: Path, save_format: Any) -> None:
    ours = NAIT5EncoderModel.from_pretrained(file_of("Q5_K", tmp_path), dtype=torch.float32)
    assert stays_quantised(ours)
    ours.save_pretrained(tmp_path / "saved", save_format=save_format)
    again = NAIT5EncoderModel.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert not stays_quantised(again)
    with torch.no_grad():
        found, expected = (model(IDS).last_hidden_state for model in (again, ours))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
