"""ComfyUI's CLIP object with our encoder in the place of its T5."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import comfy.sd
import torch
from torch import Tensor, nn

from comfy_nai_t5.choices import Settings
from comfy_nai_t5.clip_cache import ClipCache, store_for, weights_in_memory
from comfy_nai_t5.encode import embedding_widths, refuse_endless
from comfy_nai_t5.idle_hooks import tell_of_idle_hooks
from comfy_nai_t5.pages import lay_side_by_side
from comfy_nai_t5.quantised import stays_quantised, unpacked_state
from comfy_nai_t5.stack import SharedStack
from comfy_nai_t5.steady_patcher import SteadyPatcher, become_steady
from comfy_nai_t5.telling import out_of_memory, warn
from nai_t5_core.backends.auto_dtype import resolve_dtype
from nai_t5_core.backends.products import INT8_ONEDNN, ONEDNN
from nai_t5_core.float16.guard import encode_guarded
from nai_t5_core.model.attention_choice import FlexUnavailableError, missing_for_flex, refuse_unsupported
from nai_t5_core.model.packing import PaddingPolicy
from nai_t5_core.model.precision import is_finite
from nai_t5_core.prompts.cache.store import Store


class EncoderModel(nn.Module):
    """What ComfyUI's ``SDClipModel`` expects of a text encoder, on a :class:`SharedStack`.

    Names and modules are those of the T5 it stands for, so LoRA keys and saved files stay what they were.

    Args:
        t5: ComfyUI's T5, or an encoder of this class.
        stack: our encoder on the modules of ``t5``.
        padding: what is done with masked positions; ``"skip"`` where the caller puts zeros there.
    """

    def __init__(self, t5: Any, stack: SharedStack, padding: PaddingPolicy = "exact") -> None:
        super().__init__()
        self.shared, self.encoder = stack.shared, stack.encoder
        for name, parameter in t5.named_parameters(recurse=False):
            self.register_parameter(name, parameter)  # the mark of a scaled float8 model, which saving must keep
        self._stack = (stack,)  # in a tuple: its modules are registered above, under their own names
        self.num_layers: int = t5.num_layers
        self.dtype: torch.dtype = t5.dtype  # of the weights
        self.padding: PaddingPolicy = padding

    @property
    def stack(self) -> SharedStack:
        return self._stack[0]

    def get_input_embeddings(self) -> nn.Module:
        return self.shared

    def set_input_embeddings(self, embeddings: nn.Module) -> None:
        self.shared = self.stack.shared = embeddings

    def forward(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        embeds: Tensor | None = None,
        num_tokens: Any = None,
        intermediate_output: int | None = None,
        final_layer_norm_intermediate: bool = True,
        dtype: torch.dtype = torch.float32,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states [batch, length, d_model], and those of one layer.

        Args:
            input_ids: [batch, length], where ``embeds`` is None.
            attention_mask: [batch, length], non-zero at tokens that may be attended to; None: all may.
            embeds: [batch, length, d_model] in place of ids.
            intermediate_output: the layer whose output is the second result; negative counts from the end.
            final_layer_norm_intermediate: whether that passes the final norm.
            dtype: of the embeddings of ids.

        Raises:
            ValueError: an intermediate output that is no layer, or a prompt of more than 8,192 tokens.
            NotFiniteError: a ValueError; the weights are damaged, or exceed the range of what is computed in.
            MemoryError, torch.cuda.OutOfMemoryError: the prompts are too long or too many for the memory.
        """
        given = input_ids if embeds is None else embeds
        assert given is not None
        refuse_endless(given.shape[1])
        inputs = self.shared(input_ids, out_dtype=dtype) if embeds is None else embeds
        if self.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            inputs = torch.nan_to_num(inputs)  # as stock: published float8 files hold NaN in embeddings nobody uses
        stack = self.stack
        stack.device = inputs.device
        call: dict[str, Any] = {"attention_mask": attention_mask, "inputs_embeds": inputs, "padding": self.padding}
        with out_of_memory(f"{inputs.shape[0]} × {inputs.shape[1]} tokens on {inputs.device}"):
            if intermediate_output is None:
                return encode_guarded(stack, **call), None
            return self._with_middle(self._layer(intermediate_output), final_layer_norm_intermediate, call)

    def _with_middle(self, layer: int, is_normed: bool, call: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """The last hidden states and those of a layer, which comes through the final norm if ``is_normed``."""
        stack = self.stack
        states = stack.hidden_states(**call, final_norm=False)
        if not is_finite(states[-1]):
            encode_guarded(stack, **call)  # tightens the float16 scales, or tells why none can help
            states = stack.hidden_states(**call, final_norm=False)
        middle = states[layer + 1]
        if is_normed:
            middle = stack.encoder.final_layer_norm(middle)
        return stack.encoder.finish(states[-1], stack.dtype), middle

    def _layer(self, index: Any) -> int:
        layer = index + self.num_layers if isinstance(index, int) and index < 0 else index
        if not isinstance(layer, int) or not 0 <= layer < self.num_layers:
            raise ValueError(
                f"the output of layer {index!r} was asked of a T5 of {self.num_layers} layers; give a number from "
                f"{-self.num_layers} to {self.num_layers - 1}"
            )
        return layer


class T5Clip(comfy.sd.CLIP):
    """ComfyUI's CLIP, which tells what ComfyUI itself leaves out: LoRAs and embeddings that do not fit.

    Attributes:
        cache: keeps embeddings, and loads the weights where they are needed; None where that is not chosen.
    """

    cache: ClipCache | None = None

    def clone(self, *arguments: Any, **options: Any) -> T5Clip:
        clone = _as_ours(super().clone(*arguments, **options))
        clone.cache = self.cache
        return clone

    def encode_from_tokens(self, tokens: dict[str, Any], return_pooled: Any = False, return_dict: bool = False) -> Any:
        compute = self._encode_and_say
        if self.cache is None:
            return compute(tokens, return_pooled=return_pooled, return_dict=return_dict)
        out = self.cache.encode(self, t5_models(self.cond_stage_model), compute, tokens, return_pooled)
        if return_dict:
            return out
        return (out["cond"], out["pooled_output"]) if return_pooled else out["cond"]

    def _encode_and_say(self, *arguments: Any, **options: Any) -> Any:
        """ComfyUI's encode; its patcher is told when it has ended well, and is then ready for the next."""
        encoded = super().encode_from_tokens(*arguments, **options)
        if isinstance(self.patcher, SteadyPatcher):
            self.patcher.has_served()
        return encoded

    def _fill(self) -> None:
        if self.cache is not None:
            self.cache.fill(self)

    def get_sd(self, *arguments: Any, **options: Any) -> Any:
        self._fill()
        return unpacked_state(self.cond_stage_model, super().get_sd(*arguments, **options))

    def state_dict_for_saving(self, *arguments: Any, **options: Any) -> Any:
        self._fill()
        return unpacked_state(self.cond_stage_model, super().state_dict_for_saving(*arguments, **options))

    def get_key_patches(self, *arguments: Any, **options: Any) -> Any:
        self._fill()
        return super().get_key_patches(*arguments, **options)

    def load_model(self, *arguments: Any, **options: Any) -> Any:
        """Has the weights where they are needed, before every encode."""
        self._fill()
        stacks = [owner.transformer.stack for owner in t5_models(self.cond_stage_model).values()]
        for stack in stacks:
            stack.is_hooked = bool(self.patcher.hook_patches)
        if is_streamed(self) and not getattr(self.patcher, "is_prepared", False):
            lay_side_by_side(self.patcher, [group for stack in stacks for group in stack.groups_to_be_joined])
        return super().load_model(*arguments, **options)

    def tokenize(self, text: str, *arguments: Any, **options: Any) -> dict[str, Any]:
        tokens: dict[str, Any] = super().tokenize(text, *arguments, **options)
        (owner, *_) = t5_models(self.cond_stage_model).values()
        expected = owner.transformer.shared.embedding_dim
        widths = embedding_widths(tokens) - {expected}
        if widths:
            warn(
                f"An embedding in the prompt is {min(widths)} numbers wide, and the T5 takes {expected}: the T5 leaves "
                "it out; choose one that was trained for this T5."
            )
        return tokens

    def add_patches(self, patches: Mapping[Any, Any], *strengths: Any, **options: Any) -> list[Any]:
        """Patches the weights, and gives the keys that were found.

        A LoRA loader passes on what it found in the diffusion model as well; one that found nothing at all was given a
        LoRA of another model, of which ComfyUI itself writes a line for each key into its log and no more.
        """
        if not patches:
            warn(
                "This LoRA changes nothing: none of its keys belongs to the connected model or to its text encoders "
                f"({', '.join(_encoders(self.cond_stage_model))}); choose one that was trained for this model."
            )
        found: list[Any] = super().add_patches(patches, *strengths, **options)
        return found


def _as_ours(clip: Any) -> T5Clip:
    ours = T5Clip(no_init=True)
    ours.__dict__.update(vars(clip))
    return ours


def _owners(module: nn.Module, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every ``SDClipModel`` in a CLIP's model, by its name there (``t5xxl`` and the like). Nothing is within one."""
    from comfy.sd1_clip import SDClipModel

    if isinstance(module, SDClipModel):
        yield name, module
        return
    for child_name, child in module.named_children():
        yield from _owners(child, child_name)


def _encoders(model: nn.Module) -> list[str]:
    """The names of the text encoders in a CLIP's model."""
    return [name for name, _ in _owners(model)]


def is_t5(model: Any) -> bool:
    """Whether a text encoder is a T5, ComfyUI's or ours."""
    from comfy.text_encoders.t5 import T5

    return isinstance(model, T5 | EncoderModel)


def t5_models(model: nn.Module) -> dict[str, Any]:
    """The ``SDClipModel`` of every T5 in a CLIP's model, by its name there."""
    return {name: owner for name, owner in _owners(model) if is_t5(owner.transformer)}


def with_our_t5(clip: Any, settings: Settings | None = None) -> T5Clip:
    """A clone of a CLIP whose T5 is ours. The weights, the patcher that manages them and all other encoders are shared.

    Args:
        clip: ComfyUI's ``CLIP``, from any loader.
        settings: what is computed in, and how; ``weights`` and ``device`` are those of the given CLIP.

    Raises:
        ValueError: there is no T5 in this CLIP, or the settings are not possible with it.
        FlexUnavailableError: they need flex attention, and it cannot be compiled here.
    """
    settings = settings or Settings()
    if not t5_models(clip.cond_stage_model):
        names = ", ".join(_encoders(clip.cond_stage_model)) or "nothing"
        raise ValueError(f"this CLIP holds no T5 but {names}; connect one that was loaded for a model with a T5")
    device = clip.patcher.load_device
    compute_dtype = resolve_dtype(settings.dtype, device)

    def ours(owner: Any) -> EncoderModel:
        attention: Any = settings.attention
        stack = SharedStack(
            owner.transformer, compute_dtype, attention=attention, wish=settings.layout, compiled=settings.compile
        )
        stack.device = device
        if settings.compile or settings.attention == "flex":
            _refuse_without_flex(device, compute_dtype, stack.config.d_kv)
        if settings.layout == "packed":
            _refuse_packing(device, compute_dtype)
        if settings.layout == "int8":
            _refuse_8_bits(device, compute_dtype)
        if settings.layout in ("packed", "int8") and stays_quantised(owner.transformer):
            raise ValueError(
                f"the {settings.layout} layout keeps a second copy of the weights, which stay quantised as they are in "
                "this file: choose the layout auto, or have the loader unpack the weights"
            )
        # Where the owner multiplies masked rows by zero, they need not be computed.
        return EncoderModel(owner.transformer, stack, "skip" if owner.zero_out_masked else "exact")

    clone = _as_ours(clip.clone())
    become_steady(clone.patcher)
    clone.cond_stage_model = _rebuilt(clip.cond_stage_model, ours)
    clone.cache = _cache_for(clip, settings)
    tell_of_idle_hooks(clone.patcher, _encoders(clone.cond_stage_model))
    return clone


def _cache_for(clip: Any, settings: Settings) -> ClipCache | None:
    """What keeps the embeddings of a CLIP with our T5, and has its weights if they are late."""
    before: ClipCache | None = getattr(clip, "cache", None)
    if settings.cache == "off":
        # A CLIP whose weights are late has to have them all the same.
        return None if before is None or before.is_loaded else before.with_store(Store(None, memory=0))
    store = store_for(settings.cache)
    if before is not None:
        return before.with_store(store)
    base = weights_in_memory(clip.patcher)
    if base is None:
        warn(
            "The embeddings of this CLIP are not kept, since its weights are not in memory; use Load T5 with its cache."
        )
        return None
    return ClipCache(store, base)


def is_streamed(clip: Any) -> bool:
    """Whether newer ComfyUI's dynamic memory brings a CLIP's weights in as they are used."""
    return bool(getattr(clip.patcher, "is_dynamic", bool)())


def _refuse_without_flex(device: torch.device, dtype: torch.dtype, d_kv: int) -> None:
    refuse_unsupported(device, dtype, d_kv)
    if missing := missing_for_flex(device):
        raise FlexUnavailableError(f"flex attention and compilation are not possible here: {missing}; switch them off")


def _refuse_packing(device: torch.device, dtype: torch.dtype) -> None:
    if ONEDNN.missing(device, dtype):
        name = str(dtype).removeprefix("torch.")
        raise ValueError(
            f"the packed layout is for a T5 on the CPU in float32, or in bfloat16 where the processor computes in it; "
            f"this one computes in {name} on {device}: choose the layout auto"
        )


def _refuse_8_bits(device: torch.device, dtype: torch.dtype) -> None:
    if reason := INT8_ONEDNN.missing(device, dtype):
        raise ValueError(f"the int8 layout is not possible: {reason}; choose the layout auto")


def describe(clip: T5Clip) -> str:
    """What each T5 of a CLIP is, how it computes, and why so: a line for each.

    Raises:
        ValueError: the fused layout was asked for and is not possible.
    """
    lines = []
    for name, owner in t5_models(clip.cond_stage_model).items():
        stack = owner.transformer.stack
        dtype = str(stack.dtype).removeprefix("torch.")
        layout = stack.expected_layout(is_streamed(clip))
        if clip.cache is not None and not clip.cache.is_loaded:
            layout = "to be loaded at the first prompt whose embedding is not kept"
        lines.append(f"{name}: {stack.config.kind} of {stack.config.num_layers} layers, {dtype}, {layout}")
    return "\n".join(lines)


def _rebuilt(module: nn.Module, ours: Callable[[Any], EncoderModel]) -> nn.Module:
    """The module with every T5 in it exchanged. What holds one is copied, without its weights; the rest is shared."""
    from comfy.sd1_clip import SDClipModel

    if isinstance(module, SDClipModel):
        return _with_children(module, transformer=ours(module)) if is_t5(module.transformer) else module
    children = {name: _rebuilt(child, ours) for name, child in module.named_children()}
    changed = {name: child for name, child in children.items() if child is not getattr(module, name)}
    return _with_children(module, **changed) if changed else module


def _with_children(module: nn.Module, **children: nn.Module) -> nn.Module:
    clone = copy.copy(module)
    clone._modules = {**module._modules, **children}
    return clone
