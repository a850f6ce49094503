"""Other T5s built from the same weights as ours, to compare with: transformers and nai-t5.

Both packages are optional and imported on first use. Tensors that a peer uses unchanged are shared with the given
state, so that several implementations fit in memory side by side.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nai_t5_core.backends.choose import run_in_place
from nai_t5_core.facts.config import Shape, T5Config, config_to_hf, decoder_tensors, encoder_tensors
from nai_t5_core.facts.scales import StackScales
from nai_t5_core.generation.t5 import T5
from nai_t5_core.model.encoder import Layout, T5EncoderStack
from nai_t5_core.model.layers import NoInit
from nai_t5_core.weights.examine import Examination
from nai_t5_core.weights.fuse import cook, fused_recipes, separate_recipes

State = Mapping[str, Tensor]

# For random_state(outliers=True): channels per large channel; its factor; and its mean in the embeddings, in
# standard deviations (an offset, as in trained models, so that the norm does not depend on a value near zero).
_CHANNELS_PER_OUTLIER = 64
_OUTLIER_GAIN = 100.0
_OUTLIER_OFFSET = 8.0


# ---------------------------------------------------------------------------------------------------------------------
# Weights
# ---------------------------------------------------------------------------------------------------------------------


def random_state(
    config: T5Config,
    seed: int = 0,
    outliers: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """Random weights under Hugging Face names that exercise every part of the model; the decoder's if it has one.

    Projections have variance 1 / fan-in, and queries less, so that attention logits have a standard deviation of about
    1.4. Bias tables and embeddings have variance 1, norm weights lie in 0.5 … 1.5. So attention, bias and both
    sublayers matter, and outputs are of order one.

    Args:
        seed: the same seed gives the same weights.
        outliers: make one channel in 64 of the residual stream several hundred times larger than the others, and the
            norm weights smaller by as much, as in trained T5 models.
        dtype: drawn in float32 and cast tensor by tensor.
        device: where the weights are drawn; the same seed gives other weights on another type of device.
    """
    generator = torch.Generator(device).manual_seed(seed)
    gains = _channel_gains(config.d_model, outliers, generator)
    state = {}
    for name, shape in (encoder_tensors(config) | decoder_tensors(config)).items():
        tensor = _random_tensor(name, shape, config, generator)
        if name == "shared.weight":
            tensor = (tensor + _OUTLIER_OFFSET * (gains > 1)) * gains
        elif name.endswith((".o.weight", ".wo.weight")):
            # The large channels dominate the norm's divisor, so it no longer limits the sum of the layers' outputs.
            tensor *= gains[:, None] * (0.5 * config.num_layers**-0.5 if outliers else 1.0)
        elif "layer_norm" in name:
            # The norm divides by the root mean square, which the large channels dominate.
            sizes = torch.where(gains > 1, gains * _OUTLIER_OFFSET, gains)
            tensor *= sizes.square().mean().sqrt() / sizes
        state[name] = tensor.to(dtype)
    return state


def _channel_gains(d_model: int, outliers: bool, generator: torch.Generator) -> Tensor:
    """The factor of every channel of the residual stream: [d_model]."""
    device = generator.device
    gains = torch.ones(d_model, device=device)
    if outliers:
        count = max(1, d_model // _CHANNELS_PER_OUTLIER)
        gains[torch.randperm(d_model, generator=generator, device=device)[:count]] = _OUTLIER_GAIN
    return gains


def _random_tensor(name: str, shape: Shape, config: T5Config, generator: torch.Generator) -> Tensor:
    device = generator.device
    if "layer_norm" in name:
        return torch.rand(shape, generator=generator, device=device) + 0.5
    tensor = torch.randn(shape, generator=generator, device=device)
    if name == "shared.weight" or "relative_attention_bias" in name:
        return tensor
    tensor *= shape[1] ** -0.5
    # q·k sums d_kv products.
    return tensor * (1.3 * config.d_kv**-0.5) if name.endswith(".q.weight") and not config.scale_qk else tensor


def hf_state(examination: Examination) -> dict[str, Tensor]:
    """The tensors of an examined checkpoint under their Hugging Face names, in the file's precision.

    Fused tensors of a file from ``nai-t5 convert`` are separated again, in float32 and exact to a rounding or two.
    """
    names = encoder_tensors(examination.config) | decoder_tensors(examination.config)
    return {name: examination.read(name) for name in names}


def own_encoder(
    config: T5Config,
    state: State,
    dtype: torch.dtype,
    layout: Layout = "fused",
    scales: StackScales | None = None,
) -> T5EncoderStack:
    """Our encoder from tensors in memory, built as by loading a file; in evaluation mode on the CPU.

    ``scales`` are for float16, see :mod:`nai_t5_core.facts.scales`.
    """
    config = config.encoder_only()
    recipes = (fused_recipes if layout == "fused" else separate_recipes)(config, scales)
    stack = T5EncoderStack(config, layout, NoInit, scales, device="meta", dtype=dtype)
    stack.load_state_dict({recipe.target: cook(recipe, state.__getitem__, dtype) for recipe in recipes}, assign=True)
    return run_in_place(stack.eval().requires_grad_(False))


def own_t5(
    config: T5Config,
    state: State,
    dtype: torch.dtype,
    layout: Layout = "fused",
    scales: StackScales | None = None,
    decoder_scales: StackScales | None = None,
) -> T5:
    """Our whole T5 from tensors in memory, made as :func:`own_encoder` is."""
    fused = layout == "fused"
    recipes = fused_recipes(config, scales, decoder_scales) if fused else separate_recipes(config, scales)
    model = T5(config, layout, NoInit, scales, decoder_scales, device="meta", dtype=dtype)
    model.assign({recipe.target: cook(recipe, state.__getitem__, dtype) for recipe in recipes})
    return run_in_place(model.eval())


# ---------------------------------------------------------------------------------------------------------------------
# transformers and nai-t5
# ---------------------------------------------------------------------------------------------------------------------


def transformers_encoder(config: T5Config, state: State, dtype: torch.dtype) -> nn.Module:
    """transformers' encoder for this config, in evaluation mode, with SDPA where transformers has it.

    It is built on the meta device and shares the tensors of ``state`` that have the right dtype already. As with its
    ``from_pretrained``, a float16 model keeps ``wo`` in float32. Its norms compute the variance in float32 even in a
    float64 model, which alone makes an error of about 4e-7 of the largest value; see :func:`exact_norms`.

    Raises:
        ValueError: transformers is absent, or lacks what the config has (``scale_qk``, a gate with exact GELU).
    """
    model = _transformers_model(config.encoder_only())
    tensors = _transformers_tensors(model, state, encoder_tensors(config), dtype)
    model.load_state_dict({**tensors, "encoder.embed_tokens.weight": tensors["shared.weight"]}, assign=True)
    return model.eval().requires_grad_(False)


def transformers_t5(config: T5Config, state: State, dtype: torch.dtype) -> nn.Module:
    """transformers' T5 with decoder and output head, built as by :func:`transformers_encoder`.

    Hidden states are divided by √d_model before the head only where the config says so. By itself, transformers 5.0 to
    5.23 divides those of every UMT5, since its config loses whether the head is tied; the published models were trained
    without the division, and neither transformers 4 nor 5.24 divides theirs.

    Raises:
        ValueError: as :func:`transformers_encoder`.
    """
    model: Any = _transformers_model(config)
    tensors = _transformers_tensors(model, state, encoder_tensors(config) | decoder_tensors(config), dtype)
    embedding = tensors["shared.weight"]
    copies = {"encoder.embed_tokens.weight": embedding, "decoder.embed_tokens.weight": embedding}
    model.load_state_dict({"lm_head.weight": embedding, **copies, **tensors}, assign=True)
    # Assigning the weights has untied the shared embedding; tie it again.
    model.set_input_embeddings(model.shared)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.shared.weight
    # Which of them decides whether hidden states are divided depends on the kind and on the version.
    model.config.tie_word_embeddings = model.config.scale_decoder_outputs = config.head_scale != 1
    return model.eval().requires_grad_(False)


def _transformers_model(config: T5Config) -> nn.Module:
    """The class for a config, with or without decoder, on the meta device."""
    transformers = require("transformers")
    if config.scale_qk:
        raise ValueError("transformers has no scale_qk=True: its T5 never divides the logits by √d_kv")
    values = config_to_hf(config)
    model_class = getattr(transformers, values.pop("architectures")[0])
    values.pop("model_type")
    hf_config = model_class.config_class(**values)
    # Under SDPA the decoder of transformers 5.17's UMT5 sees tokens that follow; in 5.23 it does not.
    sees_what_follows = config.bias_per_layer and config.num_decoder_layers and _version(transformers) < (5, 23)
    by_sdpa = model_class._supports_sdpa and not sees_what_follows
    hf_config._attn_implementation = "sdpa" if by_sdpa else "eager"
    with torch.device("meta"):
        model: nn.Module = model_class(hf_config)
    return model


def _version(package: Any) -> tuple[int, ...]:
    """The first two numbers of a package's version."""
    return tuple(int(part) for part in package.__version__.split(".")[:2])


def _transformers_tensors(model: Any, state: State, names: Iterable[str], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors in the dtypes that transformers' own loading would give them."""
    kept = model._keep_in_fp32_modules or () if dtype == torch.float16 else ()
    return {
        name: state[name].to(torch.float32 if any(f".{part}." in name for part in kept) else dtype) for name in names
    }


def exact_norms(model: nn.Module) -> nn.Module:
    """Replaces the norms of a transformers T5 by :class:`torch.nn.RMSNorm` with the same weight and epsilon.

    transformers computes the variance in float32 whatever the model's dtype, and before its version 5 the softmax as
    well, so even its float64 model is only as exact as float32. After this, a float64 model is exact to float64, and
    serves as the reference. Changes and returns ``model``.

    Raises:
        ValueError: there is no such norm in the model.
    """
    places: list[tuple[nn.Module, str, Any]] = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if hasattr(child, "variance_epsilon") and isinstance(getattr(child, "weight", None), Tensor)
    ]
    if not places:
        raise ValueError(f"{type(model).__name__} has no norm with a variance_epsilon; it is no T5 of transformers")
    for parent, name, child in places:
        norm = nn.RMSNorm(child.weight.shape[0], eps=child.variance_epsilon, device="meta")
        norm.weight = child.weight
        setattr(parent, name, norm)
    for module in model.modules():
        if hasattr(module, "has_relative_attention_bias"):
            _SoftmaxInFloat64().around(module)
    return model


class _SoftmaxInFloat64(TorchFunctionMode):
    """Leaves scores in float64 as they are where an attention of transformers casts them to float32 for its softmax."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is Tensor.float and args[0].dtype == torch.float64:
            return args[0]
        return function(*args, **(kwargs or {}))

    def around(self, attention: nn.Module) -> None:
        """Enters at every call of a module, and leaves at its end, also by an error."""
        attention.register_forward_pre_hook(lambda *_: self._enter())
        attention.register_forward_hook(lambda *_: self._leave(), always_call=True)

    def _enter(self) -> None:
        self.__enter__()

    def _leave(self) -> None:
        self.__exit__(None, None, None)


def nai_t5_encoder(config: T5Config, state: State, dtype: torch.dtype, flex_length: int | None = None) -> nn.Module:
    """The encoder of the nai-t5 package with SDPA attention and fused norms, as its README recommends and measures.

    Weights go through that package's own conversion, and through its norm fusion in float32. It keeps norms and
    residual in float32; everything else is in ``dtype``.

    Args:
        flex_length: attention by flex, for rows of this length; to be compiled.

    Raises:
        ValueError: nai-t5 or einops is not installed, or nai-t5 does not support the config or dtype: no float64, ReLU
            or gated tanh-GELU only, and always a largest distance of 128.
    """
    refuse_for_nai_t5(config, dtype)
    encoder, hf, fusing = (require(f"nai_t5.{part}") for part in ("t5_encoder", "t5_hf", "fuse_norm_scales"))
    based = nai_t5_config(config, dtype, "SDPA" if flex_length is None else "Flex")
    with torch.device("meta"):
        model: nn.Module = encoder.T5EncoderStack(based)
    model.load_state_dict(dict(_nai_t5_tensors(hf, based, state, model.state_dict())), assign=True)
    model.eval().requires_grad_(False)
    fusing.fuse_norm_scales_enc(model, fuse_via_f32=True)
    if flex_length is not None:
        model.bind_score_mods(flex_length)  # type: ignore[operator]
    return model


def nai_t5_config(config: T5Config, dtype: torch.dtype, attention: str = "SDPA") -> Any:
    """nai-t5's config object; ``attention`` is its name for it."""
    common = require("nai_t5.t5_common")
    return common.T5Config(
        vocab_size=config.vocab_size,
        hidden_dim=config.d_model,
        num_layers=config.num_layers,
        n_head=config.num_heads,
        kv_heads=config.num_heads,
        head_dim=config.d_kv,
        ff_dim=config.d_ff,
        dropout=config.dropout_rate,
        eps=config.layer_norm_epsilon,
        emb_weight_dtype=dtype,
        linear_weight_dtype=dtype,
        ffn_type=common.T5FFNType.GEGLU if config.gated else common.T5FFNType.ReLU,
        gelu_approx=common.GELUApprox.Tanh,
        attn_impl=common.T5AttnImpl[attention],
        relative_attention_num_buckets=config.relative_attention_num_buckets,
        relative_attention_max_distance=config.relative_attention_max_distance,
        scale_qk=config.scale_qk,
        pad_token_id=config.pad_token_id,
        pos_emb_per_layer=config.bias_per_layer,
    )


def _nai_t5_tensors(hf: Any, based: Any, state: State, wanted: State) -> Iterator[tuple[str, Tensor]]:
    """The converted tensors in the dtypes of the ``wanted`` ones."""
    for name, tensor in hf.hf_to_based_t5_enc_state(state, based).items():
        cast = tensor.to(wanted[name].dtype)
        # The norm fusion writes into projections, which must not be tensors of the given state.
        is_given = name.endswith("ff_in.weight") and cast is tensor
        yield name, cast.clone() if is_given else cast


def refuse_for_nai_t5(config: T5Config, dtype: torch.dtype) -> None:
    """Raises a ValueError that says what nai-t5 does not support of a config or dtype."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"nai-t5 has no {str(dtype).removeprefix('torch.')}: its norms and residual are float32")
    if (config.gated, config.activation) not in ((False, "relu"), (True, "gelu_new")):
        kind = f"{'gated ' if config.gated else ''}{config.activation}"
        raise ValueError(f"nai-t5 has no {kind} feed-forward; it has relu and gated gelu_new")
    if config.relative_attention_max_distance != 128:
        raise ValueError(
            f"nai-t5 ignores relative_attention_max_distance={config.relative_attention_max_distance}: it is always 128"
        )


def require(module: str, extra: str = "bench") -> Any:
    """A module of an optional package; raises a ValueError that names the extra where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"{module.partition('.')[0].replace('_', '-')} cannot be imported ({error}); "
            f'this comparison needs: pip install "comfy-nai-t5[{extra}]"'
        ) from error
