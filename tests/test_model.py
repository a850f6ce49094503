"""The whole T5 against transformers in float64, and step by step against itself, on toys of every kind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import TOY_CONFIGS, padding_mask, random_state
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nai_t5_core.backends.choose import prepack, why_not_prepack
from nai_t5_core.backends.held import HeldLinear
from nai_t5_core.bench.peers import exact_norms, own_t5, transformers_t5
from nai_t5_core.facts.config import T5Config
from nai_t5_core.facts.scales import LayerScales, StackScales, published_scales, unscaled
from nai_t5_core.generation.decoding import Decoding
from nai_t5_core.generation.t5 import T5
from nai_t5_core.model.attention import logit_scale
from nai_t5_core.model.encoder import LAYOUTS, Layout
from nai_t5_core.model.packing import PADDING_POLICIES, PaddingPolicy
from nai_t5_core.weights.fuse import fused_recipes, separate_recipes

LENGTH = 13
# Beyond the largest distance that has a bias of its own.
TEXT_LENGTH = 150
TOLERANCE = 1e-12


def float64_state(config: T5Config, seed: int = 0) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in random_state(config, seed).items()}


def transformers_model(config: T5Config, state: dict[str, Tensor]) -> Any:
    """The oracle in float64. Its norms compute in float32 even there, so they are replaced."""
    pytest.importorskip("transformers", reason="transformers is the oracle")
    return exact_norms(transformers_t5(config, state, torch.float64))


def masks() -> dict[str, Tensor | None]:
    holes = padding_mask([13, 9, 6], LENGTH)
    holes[0, [3, 4]] = 0
    holes[2, 0] = 0
    return {
        "none": None,
        "right": padding_mask([13, 1, 7], LENGTH),
        "left": padding_mask([4, 13, 7], LENGTH).flip(1),
        "holes": holes,
        "a fully masked row": padding_mask([5, 0, 13], LENGTH),
    }


def prompts(config: T5Config) -> Tensor:
    return torch.randint(0, config.vocab_size, (3, LENGTH), generator=torch.Generator().manual_seed(1))


def labels_for(config: T5Config) -> Tensor:
    """Three texts, two of them shorter, with a hole that is not to be learned."""
    labels = torch.randint(0, config.vocab_size, (3, TEXT_LENGTH), generator=torch.Generator().manual_seed(2))
    labels[1, 60:] = labels[2, 3:] = -100
    labels[0, 7:9] = -100
    return labels


def relative_difference(ours: Tensor, expected: Tensor) -> float:
    return float((ours - expected).abs().max() / expected.abs().max())


# ---------------------------------------------------------------------------------------------------------------------
# A known text
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pattern", masks())
@torch.no_grad()
def test_logits_and_loss(config: T5Config, layout: Layout, pattern: str) -> None:
    state, mask = float64_state(config), masks()[pattern]
    ids, labels = prompts(config), labels_for(config)
    expected = transformers_model(config, state)(input_ids=ids, attention_mask=mask, labels=labels)
    found = own_t5(config, state, torch.float64, layout)(ids, mask, labels=labels)
    assert relative_difference(found.logits, expected.logits) <= TOLERANCE
    assert found.loss is not None and abs(float(found.loss) / float(expected.loss) - 1) <= TOLERANCE


@pytest.mark.parametrize("padding", PADDING_POLICIES)
@torch.no_grad()
def test_cross_attention_reads_packed_and_padded_states(config: T5Config, padding: PaddingPolicy) -> None:
    """Whether pad rows were computed, and whatever they hold, only real tokens are read."""
    model, mask, ids = own_t5(config, float64_state(config), torch.float64), masks()["holes"], prompts(config)
    assert mask is not None
    texts = labels_for(config)[:, :9].clamp(min=0)
    expected = model.decode(texts, model.read(ids, mask))
    # The policy decides on the layout alone: the states of real tokens are the same, and those of pads are enormous.
    _, _, packing = model.encoder_stack.prepare(ids, mask.bool(), padding=padding)
    real = model.encoder_stack(ids, mask.bool(), padding="exact")
    states = packing.pack(torch.where(mask.bool()[:, :, None], real, 1e6))
    memory = model.decoder.read(states, packing, mask.bool()[:, : packing.output_length], logit_scale(config))
    assert relative_difference(model.decode(texts, memory), expected) <= TOLERANCE


@torch.no_grad()
def test_labels_are_shifted_right(config: T5Config) -> None:
    model, labels = own_t5(config, random_state(config), torch.float32), labels_for(config)
    shifted = model.shift_right(labels)
    assert shifted[:, 0].tolist() == [config.decoder_start_token_id] * 3
    assert shifted[2].tolist() == [config.decoder_start_token_id, *labels[2, :3], *[config.pad_token_id] * 146]
    given = model(prompts(config), decoder_input_ids=shifted)
    assert given.loss is None
    assert torch.equal(given.logits, model(prompts(config), labels=labels).logits)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients(config: T5Config, layout: Layout) -> None:
    """Of every weight. A folded norm multiplies the columns of what follows, and so divides their gradients."""
    state, mask = float64_state(config), masks()["right"]
    ids, labels = prompts(config), labels_for(config)
    reference = transformers_model(config, state).requires_grad_(True)
    reference(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
    expected = {name: weight.grad for name, weight in reference.named_parameters()}
    model = own_t5(config, state, torch.float64, layout)
    loss = model(ids, mask, labels=labels).loss
    assert loss is not None
    loss.backward()
    recipes = fused_recipes(config) if layout == "fused" else separate_recipes(config)
    weights = {recipe.target: recipe for recipe in recipes if "folded_weight" not in recipe.target}
    found = {name: weight.grad for name, weight in model.named_parameters()}
    assert found.keys() == weights.keys()
    for name, recipe in weights.items():
        of_originals = torch.cat([expected[part] for part in recipe.parts])
        norm = 1 if recipe.norm is None else state[recipe.norm]
        # Norm weights are float32 in every model, and so are their gradients.
        tolerance = 1e-6 if found[name].dtype == torch.float32 else 1e-10
        assert relative_difference(found[name], of_originals / norm) <= tolerance, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_lower_precision(config: T5Config, dtype: torch.dtype) -> None:
    state, mask, ids, labels = random_state(config), masks()["right"], prompts(config), labels_for(config)
    expected = own_t5(config, state, torch.float64)(ids, mask, labels=labels).logits
    found = own_t5(config, state, dtype)(ids, mask, labels=labels)
    assert found.logits.dtype == dtype and found.loss is not None and found.loss.dtype == torch.float32
    assert relative_difference(found.logits.double(), expected) <= (1e-5 if dtype == torch.float32 else 0.1)


def test_a_tied_head_is_the_embedding(config: T5Config) -> None:
    model = own_t5(config, random_state(config), torch.float32)
    assert (model.lm_head.weight is model.shared.weight) == config.tie_word_embeddings
    parameters = dict(model.named_parameters())
    assert ("lm_head.weight" in parameters) != config.tie_word_embeddings
    assert config.head_scale == (config.d_model**-0.5 if config.tie_word_embeddings else 1)


def test_a_copy_stands_alone(config: T5Config) -> None:
    """Its encoder is its own, and a tied head is still tied."""
    model = own_t5(config, random_state(config), torch.float32)
    clone = copy.deepcopy(model)
    assert clone.encoder_stack.encoder is clone.encoder is not model.encoder
    assert clone.encoder_stack.shared is clone.shared is not model.shared
    assert (clone.lm_head.weight is clone.shared.weight) == config.tie_word_embeddings
    assert clone.to(torch.float64).encoder_stack.dtype == torch.float64 != model.dtype


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("kind", ["v1.1", "umt5"])
@torch.no_grad()
def test_tied_and_scaled_are_two_things(kind: str, scaled: bool) -> None:
    """transformers 5 ties a v1.1 that was made without a head, and does not scale it; since 5.24, a UMT5 as well."""
    tied = TOY_CONFIGS[kind].model_copy(update={"tie_word_embeddings": True, "scale_decoder_outputs": scaled})
    state, ids, labels = float64_state(tied), prompts(tied), labels_for(tied)
    reference = transformers_model(tied, state)
    assert reference.config.scale_decoder_outputs == scaled
    expected = reference(input_ids=ids, labels=labels).logits
    found = own_t5(tied, state, torch.float64)(ids, labels=labels).logits
    assert relative_difference(found, expected) <= TOLERANCE


# ---------------------------------------------------------------------------------------------------------------------
# Step by step
# ---------------------------------------------------------------------------------------------------------------------


def decoding(model: T5, ids: Tensor, mask: Tensor | None, beams: int, length: int, fixed_shapes: bool) -> Decoding:
    memory = model.read(ids, mask, keep_length=fixed_shapes)
    return Decoding(model, memory, model.new_cache(len(ids), beams, length), fixed_shapes)


@pytest.mark.parametrize("fixed_shapes", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_a_cached_step_is_the_last_row_of_the_whole(config: T5Config, layout: Layout, fixed_shapes: bool) -> None:
    model = own_t5(config, float64_state(config), torch.float64, layout)
    ids, mask = prompts(config), masks()["right"]
    texts = model.shift_right(labels_for(config)).clamp(min=0)
    expected = model(ids, mask, decoder_input_ids=texts).logits
    steps = decoding(model, ids, mask, 1, TEXT_LENGTH, fixed_shapes)
    for position in range(TEXT_LENGTH):
        found = steps.step(texts[:, position : position + 1])[:, 0]
        # Steps give float32.
        assert relative_difference(found.double(), expected[:, position]) <= 1e-6, position


@pytest.mark.parametrize("fixed_shapes", [False, True])
@torch.no_grad()
def test_reordered_beams_read_their_own_ancestors(config: T5Config, fixed_shapes: bool) -> None:
    """Random tokens and random reordering: every step as if each beam's text were read anew."""
    model, beams, length = own_t5(config, float64_state(config), torch.float64), 4, 9
    ids, mask = prompts(config), masks()["right"]
    generator = torch.Generator().manual_seed(4)
    steps = decoding(model, ids, mask, beams, length, fixed_shapes)
    texts = torch.zeros(3, beams, 0, dtype=torch.long)
    repeated_ids, repeated_mask = ids.repeat_interleave(beams, 0), mask.repeat_interleave(beams, 0)
    for _ in range(length):
        tokens = torch.randint(0, config.vocab_size, (3, beams), generator=generator)
        texts = torch.cat([texts, tokens[:, :, None]], dim=2)
        expected = model(repeated_ids, repeated_mask, decoder_input_ids=texts.flatten(0, 1)).logits[:, -1]
        found = steps.step(tokens).flatten(0, 1)
        assert relative_difference(found.double(), expected) <= 1e-6
        parents = torch.randint(0, beams, (3, beams), generator=generator)
        texts = texts.gather(1, parents[:, :, None].expand_as(texts))
        steps.reorder(parents)


@torch.no_grad()
def test_scaled_logits(config: T5Config) -> None:
    """Dividing q·k by √d_kv is what queries that are so much larger take back, in all of the three attentions."""
    scaled, state = config.model_copy(update={"scale_qk": True}), float64_state(config)
    larger = {name: weight * config.d_kv**0.5 if ".q." in name else weight for name, weight in state.items()}
    ids, texts = prompts(config), labels_for(config).clamp(min=0)
    expected = own_t5(config, state, torch.float64)(ids, decoder_input_ids=texts).logits
    model = own_t5(scaled, larger, torch.float64)
    assert relative_difference(model(ids, decoder_input_ids=texts).logits, expected) <= TOLERANCE
    found = decoding(model, ids, None, 1, 2, False).begin(texts[0, :1].tolist())[0, 0]
    assert relative_difference(found.double(), expected[0, 0]) <= 1e-6


class LargestResult(TorchDispatchMode):
    """Notes the largest memory, in bytes, that an operation newly allocates for its result."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, Tensor)}
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.nbytes = max(self.nbytes, tensor.untyped_storage().nbytes())
        return result


@torch.no_grad()
def test_the_cache_is_written_in_place_and_never_copied(config: T5Config) -> None:
    """Not by steps, which copy no layer's keys, nor by reordering, which moves a mask of bits."""
    model, beams, length = own_t5(config, random_state(config), torch.float32), 4, 200
    cache = model.new_cache(3, beams, length)
    expected = config.num_decoder_layers * 2 * 3 * beams * length * config.inner_dim * 4
    assert cache.nbytes == expected
    address = cache.keys_values.data_ptr()
    steps = Decoding(model, model.read(prompts(config)), cache)
    tokens = torch.ones(3, beams, dtype=torch.long)
    for _ in range(length - 1):
        steps.step(tokens)
    with LargestResult() as reordering:
        steps.reorder(torch.zeros(3, beams, dtype=torch.long))
    with LargestResult() as stepping:
        steps.step(tokens)
    one_layers_keys = expected // config.num_decoder_layers // 2
    assert cache.keys_values.data_ptr() == address
    assert 0 < reordering.nbytes <= one_layers_keys // 64
    assert 0 < stepping.nbytes <= one_layers_keys // 4
    with pytest.raises(ValueError, match="the cache holds 200 tokens and is full"):
        steps.step(tokens)


# ---------------------------------------------------------------------------------------------------------------------
# Scales, packing, initial weights, mistakes
# ---------------------------------------------------------------------------------------------------------------------

power = st.integers(-12, 0).map(lambda exponent: 2.0**exponent)


@settings(max_examples=15, deadline=None)
@given(data=st.data(), name=st.sampled_from(list(TOY_CONFIGS)), layout=st.sampled_from(LAYOUTS))
@torch.no_grad()
def test_any_scales_give_the_same_in_float64(data: st.DataObject, name: str, layout: Layout) -> None:
    config = TOY_CONFIGS[name]
    encoder, decoder = (
        [LayerScales(*data.draw(st.tuples(power, power, power, power))) for _ in range(layers)]
        for layers in (config.num_layers, config.num_decoder_layers)
    )
    scales, decoder_scales = StackScales(tuple(encoder), data.draw(power)), StackScales(tuple(decoder))
    state, ids, labels = float64_state(config), prompts(config), labels_for(config)
    expected = own_t5(config, state, torch.float64)(ids, labels=labels).logits
    found = own_t5(config, state, torch.float64, layout, scales, decoder_scales)(ids, labels=labels).logits
    assert relative_difference(found, expected) <= TOLERANCE


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("where", ["attention_out", "cross_attention_out", "feed_forward_out"])
@torch.no_grad()
def test_scales_keep_float16_in_range(where: str, layout: Layout) -> None:
    config = TOY_CONFIGS["v1.1"]
    state, ids = random_state(config), prompts(config)
    block = "decoder.block.1.layer"
    if where == "feed_forward_out":
        state[f"{block}.2.DenseReluDense.wo.weight"] *= 5e4
    else:
        attention = f"{block}.0.SelfAttention" if where == "attention_out" else f"{block}.1.EncDecAttention"
        state[f"{attention}.v.weight"] *= 300
        state[f"{attention}.o.weight"] *= 1000
    texts = torch.randint(0, 96, (3, 9), generator=torch.Generator().manual_seed(5))
    expected = own_t5(config, state, torch.float64)(ids, decoder_input_ids=texts).logits
    scales = unscaled(3).with_layer(1, LayerScales(**{where: 2.0**-10}))
    plain = own_t5(config, state, torch.float16, layout)
    scaled = own_t5(config, state, torch.float16, layout, decoder_scales=scales)
    assert not plain(ids, decoder_input_ids=texts).logits.isfinite().all()
    with pytest.raises(ValueError, match=r"the decoder gives values that are not finite in torch.float16.*scales"):
        plain.generate(ids, max_new_tokens=3)
    assert relative_difference(scaled(ids, decoder_input_ids=texts).logits.double(), expected) <= 0.02
    assert scaled.generate(ids, max_new_tokens=3, min_new_tokens=3).shape == (3, 3)


def test_published_decoder_scales_reach_every_sublayer() -> None:
    from nai_t5_core.facts.config import named_config

    scales = published_scales(named_config("t5-v1_1-small"), "decoder")
    assert scales is not None
    assert [layer.feed_forward_out for layer in scales.layers] == [1, 1, *[0.5] * 6]
    assert [layer.attention_out for layer in scales.layers] == [1, 1, 1, *[0.5] * 5]
    assert [layer.cross_attention_out for layer in scales.layers] == [1, 1, 1, *[0.5] * 5]
    shallow = named_config("t5-v1_1-small").model_copy(update={"num_decoder_layers": 4})
    assert published_scales(shallow, "decoder") is None


def test_scales_of_files_without_a_decoder_can_be_read() -> None:
    old = '{"layers": [{"attention_out": 0.5, "feed_forward_out": 0.25, "hidden": 1.0}], "embedding": 1.0}'
    assert StackScales.from_json(old) == StackScales((LayerScales(0.5, 0.25, 1.0, cross_attention_out=1.0),))


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_packed_weights(config: T5Config, layout: Layout) -> None:
    plain, packed = (own_t5(config, random_state(config), torch.float32, layout) for _ in range(2))
    if why_not_prepack(packed) is not None:
        pytest.skip("this machine's torch has no oneDNN")
    assert prepack(packed) is packed
    assert not any(type(module) is torch.nn.Linear for module in packed.modules())
    assert isinstance(packed.lm_head, HeldLinear)
    ids, labels = prompts(config), labels_for(config)
    expected = plain(ids, labels=labels).logits
    for _ in range(3):
        assert relative_difference(packed(ids, labels=labels).logits, expected) <= 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_initial_weights(config: T5Config, layout: Layout) -> None:
    """The same generator gives the same weights, every weight gets some, and the first loss is that of guessing."""
    models = [T5(config, layout, device="meta").to_empty(device="cpu") for _ in range(2)]
    for model in models:
        model.assign(dict(model.state_dict()))
        for weight in (*model.parameters(), *model.buffers()):
            weight.detach().fill_(torch.nan)
        model.init_weights(torch.Generator().manual_seed(3))
    first, second = (dict(model.state_dict()) for model in models)
    assert all(torch.equal(first[name], second[name]) and first[name].isfinite().all() for name in first)
    with torch.no_grad():
        loss = models[0](prompts(config), labels=labels_for(config)).loss
    assert abs(float(loss) - torch.tensor(config.vocab_size).log()) < 1.5


def test_mistakes() -> None:
    config = TOY_CONFIGS["v1.1"]
    model = own_t5(config, random_state(config), torch.float32)
    ids = prompts(config)
    with pytest.raises(ValueError, match="give decoder_input_ids or labels; to generate text, call generate"):
        model(ids)
    with pytest.raises(ValueError, match=r"decoder_input_ids have shape \[2, 4\]; \[3, length\] is needed"):
        model(ids, decoder_input_ids=torch.ones(2, 4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"labels have shape \[3, 5\], decoder_input_ids \[3, 4\]"):
        model(ids, None, torch.ones(3, 4, dtype=torch.long), torch.ones(3, 5, dtype=torch.long))
    for shape in ((4,), (3, 0)):
        with pytest.raises(ValueError, match=r"labels have shape \[.*\]; \[prompts, length\] with a label"):
            model(ids, labels=torch.zeros(shape, dtype=torch.long))
    with pytest.raises(ValueError, match=r"the mask has shape \[3, 12\], the ids \[3, 13\]"):
        model.read(ids, torch.ones(3, 12))
    with pytest.raises(ValueError, match="token id 96 is outside the vocabulary"):
        model.read(ids.clone().fill_(96))
    for texts in (torch.full((3, 2), 96), torch.full((3, 2), -1)):
        with pytest.raises(ValueError, match=r"token id (96|-1) is outside the vocabulary"):
            model(ids, decoder_input_ids=texts)
        with pytest.raises(ValueError, match=r"token id (96|-1) is outside the vocabulary"):
            model(ids, labels=texts)
    with pytest.raises(ValueError, match="num_decoder_layers=0"):
        T5(config.encoder_only(), device="meta")
    with pytest.raises(ValueError, match="decoder_scales of 2 layers for a decoder of 3"):
        T5(config, decoder_scales=unscaled(2), device="meta")
    with pytest.raises(ValueError, match="a cache of 0 prompts"):
        model.new_cache(0, 1, 4)
