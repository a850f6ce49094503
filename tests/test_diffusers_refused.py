"""What cannot be replaced or restored is refused before anything is changed: the result is the same to the last bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers")

from toy_offloading import OFFLOADS, cpu_has_one_name, hooks_of
from toy_pipelines import T5, Toy, make, text_encoder

from nai_t5_core.backends.quantised.projections import stays_quantised
from nai_t5_core.diffusers.adapter import replace_text_encoder, restore_text_encoder
from nai_t5_core.diffusers.drop_in import NAIT5EncoderModel
from nai_t5_core.facts.scales import unscaled
from nai_t5_core.weights.formats import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore")
__all__ = ["cpu_has_one_name"]  # a fixture for every test here


# ---------------------------------------------------------------------------------------------------------------------
# Quantised encoders
# ---------------------------------------------------------------------------------------------------------------------


class Int8(Tensor):
    """A weight as the newer libraries keep it: a tensor in name, that knows only what a Linear does with it."""

    def __new__(cls, numbers: Tensor, scale: Tensor) -> Int8:
        made: Int8 = Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=scale.dtype)  # type: ignore[attr-defined]
        made.numbers, made.scale = numbers, scale
        return made

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if function is nn.functional.linear:
            rows, weight = arguments[:2]
            return nn.functional.linear(rows, weight.numbers * weight.scale)
        return super().__torch_function__(function, types, arguments, options or {})

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return cls(arguments[0].numbers, arguments[0].scale)
        raise NotImplementedError(function)


def _linears(model: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    """Every projection with its place."""
    return [
        (parent, name, child)
        for parent in list(model.modules())
        for name, child in list(parent.named_children())
        if type(child) is nn.Linear
    ]


def with_a_tensor_subclass(model: nn.Module, _: Path) -> nn.Module:
    for _parent, _name, linear in _linears(model):
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        numbers = (linear.weight.detach() / scale).round().to(torch.int8)
        linear.weight = nn.Parameter(Int8(numbers, scale), requires_grad=False)
    return model


def with_torch(model: nn.Module, _: Path) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)  # type: ignore[no-any-return]


def with_torchao(model: nn.Module, _: Path) -> nn.Module:
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    return model


def with_torchao_in_float8(model: nn.Module, _: Path) -> nn.Module:
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    torchao.quantize_(model, torchao.Float8WeightOnlyConfig())
    return model


def with_quanto(model: nn.Module, _: Path) -> nn.Module:
    quanto = pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)
    return model


def with_quanto_before_freezing(model: nn.Module, _: Path) -> nn.Module:
    quanto = pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    quanto.quantize(model, weights=quanto.qint8)
    return model


def with_hqq(model: nn.Module, _: Path) -> nn.Module:
    hqq = pytest.importorskip("hqq.core.quantize", reason="hqq is not installed")
    for parent, name, linear in _linears(model):
        if name != "wo":  # T5 asks for its weight
            config = hqq.BaseQuantizeConfig(nbits=8, group_size=16)
            setattr(parent, name, hqq.HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu"))
    return model


def with_bitsandbytes(model: nn.Module, folder: Path, bits: int = 8) -> nn.Module:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import BitsAndBytesConfig, T5EncoderModel

    model.save_pretrained(folder)  # type: ignore[operator]
    options: dict[str, Any] = {"quantization_config": BitsAndBytesConfig(**{f"load_in_{bits}bit": True})}
    return T5EncoderModel.from_pretrained(folder, device_map={"": "cpu"}, **options)  # type: ignore[no-any-return]


# How it is quantised, and how that is told.
QUANTISERS: list[tuple[Callable[[nn.Module, Path], nn.Module], str]] = [
    (
        with_a_tensor_subclass,
        r"quantised or spread out with \w+ \(encoder\.block\.0\.layer\.0\.SelfAttention\.q\.weight is a Int8\)",
    ),
    (with_torch, r"quantised with torch\.ao\.nn\.quantized.*q is a Linear\)"),
    (
        with_torchao,
        r"quantised or spread out with torchao \(encoder\.block\.0\.layer\.0\..*\.q\.weight is a Int8Tensor\)",
    ),
    (with_torchao_in_float8, r"quantised or spread out with torchao \(.*SelfAttention\.q\.weight is a Float8Tensor\)"),
    (with_quanto, r"quantised with optimum-quanto \(encoder\.block\.0\.layer\.0\.SelfAttention\.q is a QLinear\)"),
    (with_quanto_before_freezing, r"quantised with optimum-quanto \(.*SelfAttention\.q is a QLinear\)"),
    (with_hqq, r"quantised with HQQ \(encoder\.block\.0\.layer\.0\.SelfAttention\.q is a HQQLinear\)"),
]


@pytest.mark.parametrize("layout", ["fused", "separate"])
@pytest.mark.parametrize(("quantise", "told"), QUANTISERS)
def test_a_quantised_encoder_is_refused_by_name(quantise: Any, told: str, layout: Any, tmp_path: Path) -> None:
    toy = make("pixart-sigma")
    toy.encoder = quantise(toy.encoder, tmp_path)
    old, image = toy.encoder, toy.run()
    with pytest.raises(CheckpointError, match=rf"T5EncoderModel is {told}.*load it unquantised"):
        replace_text_encoder(toy.pipe, layout=layout)
    with pytest.raises(CheckpointError, match="load it unquantised"):
        NAIT5EncoderModel.from_hf(toy.encoder)
    assert toy.encoder is old
    assert torch.equal(toy.run(), image)
    with pytest.raises(ValueError, match="has no encoder of ours"):
        restore_text_encoder(toy.pipe)


def test_eight_bits_of_bitsandbytes_are_taken_as_they_lie(tmp_path: Path) -> None:
    toy = make("pixart-sigma")
    plain = toy.encoder
    toy.encoder = with_bitsandbytes(plain, tmp_path).dequantize()  # type: ignore[operator]
    meant = toy.run()  # bitsandbytes itself would round activations to 8 bits, too
    toy.encoder = old = with_bitsandbytes(plain, tmp_path)
    image = toy.run()
    replace_text_encoder(toy.pipe)
    assert stays_quantised(toy.encoder)
    assert (toy.run() - meant).abs().max() < 1e-2 * meant.abs().max()
    restore_text_encoder(toy.pipe)
    assert toy.encoder is old and torch.equal(toy.run(), image)


def test_four_bits_of_bitsandbytes_are_taken_as_they_lie(tmp_path: Path) -> None:
    """Or told, where the toy's rows are no whole blocks; on a CPU bitsandbytes cannot run a model as small."""
    toy = make("pixart-sigma")
    toy.encoder = old = with_bitsandbytes(toy.encoder, tmp_path, bits=4)
    before = {name: tensor.clone() for name, tensor in old.state_dict().items()}
    widths = [old.config.d_model, old.config.d_ff, old.config.num_heads * old.config.d_kv]
    if any(width % 64 for width in widths):
        with pytest.raises(CheckpointError, match=r"bitsandbytes: rows of .* numbers are no whole blocks of 64"):
            replace_text_encoder(toy.pipe)
        assert toy.encoder is old
    else:
        replace_text_encoder(toy.pipe)
        assert stays_quantised(toy.encoder)
        restore_text_encoder(toy.pipe)
    assert all(torch.equal(tensor, before[name]) for name, tensor in old.state_dict().items())


def test_a_dequantised_encoder_is_taken(tmp_path: Path) -> None:
    """As the error says."""
    toy = make("pixart-sigma")
    toy.encoder = with_bitsandbytes(toy.encoder, tmp_path).dequantize()  # type: ignore[operator]
    image = toy.run()
    replace_text_encoder(toy.pipe)
    assert (toy.run() - image).abs().max() < 1e-2 * image.abs().max()


def test_ours_can_be_quantised_afterwards() -> None:
    """As the error says."""
    toy = make("pixart-sigma")
    theirs = with_torchao(copy.deepcopy(toy.encoder), Path())
    replace_text_encoder(toy.pipe, layout="separate", padding="exact")
    ours = with_torchao(toy.encoder, Path())
    ids = torch.arange(2, 20)[None]
    assert type(ours.encoder.block[0].layer[0].SelfAttention.q.weight).__name__ == "Int8Tensor"  # type: ignore[union-attr]
    torch.testing.assert_close(ours(ids)[0], theirs(ids)[0], rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Everything else that is refused
# ---------------------------------------------------------------------------------------------------------------------


def _nothing(encoder: nn.Module) -> None:
    pass


def _overflow(encoder: Any) -> None:
    """Seen only when the joined weight is made, the last of the model's attention."""
    with torch.no_grad():
        encoder.encoder.block[-1].layer[0].SelfAttention.v.weight[0, 0] = 1e6


def _extra_tensor(encoder: Any) -> None:
    encoder.shared.bias = nn.Parameter(torch.zeros(1))


def _wrong_shape(encoder: Any) -> None:
    encoder.encoder.block[-1].layer[1].layer_norm.weight = nn.Parameter(torch.ones(1))


# What is done to the encoder, what replace_text_encoder is told, and what it says.
REFUSED: dict[str, tuple[Callable[[Any], None], dict[str, Any], str]] = {
    "padding": (_nothing, {"padding": "none"}, "unknown padding policy 'none'; allowed: attend, exact"),
    "extra_pad": (_nothing, {"extra_pad": -1}, "extra_pad=-1; it must be 0 or more"),
    "layout": (_nothing, {"layout": "tight"}, "unknown layout 'tight'; allowed: fused, separate"),
    "dtype": (_nothing, {"dtype": torch.int8}, r"cannot compute in torch\.int8; give dtype, one of float64"),
    "name of a dtype": (_nothing, {"dtype": "half"}, "cannot compute in half; give dtype, one of float64"),
    "scales": (_nothing, {"scales": unscaled(7)}, "scales of 7 layers for a model of 2 layers"),
    "overflow": (_overflow, {"dtype": torch.float16}, r"qkv\.weight has values that are not finite"),
    "a tensor too many": (_extra_tensor, {}, r"tensors that no T5 has: shared\.bias$"),
    "shape": (_wrong_shape, {}, r"layer_norm\.weight has shape \[1\]"),
}


@pytest.mark.parametrize("offload", [None, *OFFLOADS])
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_changes_nothing(case: str, offload: Any) -> None:
    spoil, told, message = REFUSED[case]
    toy = make("pixart-sigma")
    image = toy.run() if spoil is not _wrong_shape else None
    spoil(toy.encoder)
    before = copy.deepcopy(toy.encoder.state_dict())
    if offload is not None:
        offload(toy.pipe)
    old, hooks = toy.encoder, hooks_of(toy.encoder)
    if spoil is _overflow:
        image = toy.run()
    with pytest.raises(ValueError, match=message):
        replace_text_encoder(toy.pipe, **told)
    assert toy.encoder is old and hooks_of(old) == hooks
    if image is not None:
        assert torch.equal(toy.run(), image)
    if offload is None:
        assert all(torch.equal(tensor, before[name]) for name, tensor in old.state_dict().items())
    with pytest.raises(ValueError, match="has no encoder of ours"):
        restore_text_encoder(toy.pipe)


def _with_two(first: nn.Module, second: nn.Module) -> Any:
    """A pipeline with a T5 in the place of its CLIP too."""
    toy = make("flux")
    toy.pipe.text_encoder, toy.pipe.text_encoder_2 = first, second
    return toy.pipe


@pytest.mark.parametrize("spoil", [_overflow, _extra_tensor, lambda encoder: with_a_tensor_subclass(encoder, Path())])
def test_one_of_two_that_is_refused_keeps_the_other(spoil: Any) -> None:
    first, second = text_encoder(), text_encoder()
    spoil(second)
    pipe = _with_two(first, second)
    before = copy.deepcopy(first.state_dict())
    with pytest.raises(CheckpointError):
        replace_text_encoder(pipe, dtype=torch.float16)
    assert pipe.text_encoder is first and pipe.text_encoder_2 is second
    assert all(torch.equal(tensor, before[name]) for name, tensor in first.state_dict().items())


def test_one_encoder_in_two_places_stays_one() -> None:
    old = text_encoder()
    pipe = _with_two(old, old)
    replace_text_encoder(pipe)
    assert isinstance(pipe.text_encoder, NAIT5EncoderModel) and pipe.text_encoder is pipe.text_encoder_2
    restore_text_encoder(pipe)
    assert pipe.text_encoder is pipe.text_encoder_2 is old
    assert not any(parameter.is_meta for parameter in old.parameters())


def _live_lora(ours: Any) -> None:
    from toy_loras import toy_lora

    from nai_t5_core.lora.live import LiveLoras

    LiveLoras(ours).add(toy_lora(T5))


def _more_tokens(ours: Any) -> None:
    ours.resize_token_embeddings(T5.vocab_size + 8, mean_resizing=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_live_lora, r"has an adapter or live LoRA beside it"),
        (_more_tokens, r"has 4104 rows, and that of the T5EncoderModel has 4096: call resize_token_embeddings\(4096\)"),
    ],
)
@pytest.mark.parametrize("offload", [None, *OFFLOADS])
def test_a_restoration_that_is_refused_changes_nothing(change: Any, message: str, offload: Any) -> None:
    toy: Toy = make("pixart-sigma")
    replace_text_encoder(toy.pipe)
    ours = toy.encoder
    change(ours)
    if offload is not None:
        offload(toy.pipe)
    image = toy.run()
    with pytest.raises(ValueError, match=message):
        restore_text_encoder(toy.pipe)
    assert toy.encoder is ours
    assert torch.equal(toy.run(), image)


def test_one_of_two_that_cannot_be_restored_keeps_the_other() -> None:
    pipe = _with_two(text_encoder(), text_encoder())
    replace_text_encoder(pipe)
    first, second = pipe.text_encoder, pipe.text_encoder_2
    _more_tokens(second)
    with pytest.raises(ValueError, match="resize_token_embeddings"):
        restore_text_encoder(pipe)
    assert pipe.text_encoder is first and pipe.text_encoder_2 is second
    second.resize_token_embeddings(T5.vocab_size, mean_resizing=False)
    restore_text_encoder(pipe)
    assert not isinstance(pipe.text_encoder, NAIT5EncoderModel)
    assert not isinstance(pipe.text_encoder_2, NAIT5EncoderModel)
