"""The drop-in encoder with a cache: it may be in a pipeline long before its weights are in memory, or without them.

pipe = FluxPipeline.from_pretrained(repo, text_encoder_2=lazy_text_encoder(repo, subfolder="text_encoder_2"))
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn

from nai_t5_core.backends.auto_dtype import resolve_dtype
from nai_t5_core.backends.choices import ProductsChoice, Quantisation
from nai_t5_core.backends.offload.offload import offload_layers
from nai_t5_core.diffusers.drop_in import NAIT5EncoderModel, PretrainedConfig
from nai_t5_core.diffusers.drop_in_config import config_beside
from nai_t5_core.diffusers.drop_in_folders import open_source
from nai_t5_core.diffusers.drop_in_keywords import loading_options
from nai_t5_core.diffusers.drop_in_products import computed_as_chosen, refuse_impossible, refuse_products_for
from nai_t5_core.diffusers.drop_in_weights import examine_model
from nai_t5_core.model.encoder import Layout, T5EncoderStack
from nai_t5_core.model.layers import CastingOps
from nai_t5_core.prompts.cache.batch import through_cache
from nai_t5_core.prompts.cache.contents import contents_by_reading, identities, refuse_changed
from nai_t5_core.prompts.cache.key import Settings
from nai_t5_core.prompts.cache.loaded_settings import SettingsOfStack
from nai_t5_core.prompts.cache.settings import settings_for
from nai_t5_core.prompts.cache.store import Store, open_store
from nai_t5_core.prompts.choices import Choices
from nai_t5_core.weights.chosen import ScalesChoice, SlowDtypeWarning
from nai_t5_core.weights.convert import main_dtype
from nai_t5_core.weights.examine import Examination, examine_checkpoint
from nai_t5_core.weights.load import assemble

# Where an encoder goes when it is loaded, and what its settings will be there.
Load = Callable[[torch.dtype, torch.device], T5EncoderStack]
SettingsAt = Callable[[torch.dtype, torch.device], Settings]

# One encoder at a time. It is no attribute, since locks cannot be copied.
_LOADING = RLock()


class CachedT5EncoderModel(NAIT5EncoderModel):
    """:class:`NAIT5EncoderModel` that keeps embeddings, and reads its weights at the first prompt that is not kept.

    Until then it has no weights, nor are there any in its ``state_dict()``; it moves and casts at no cost, and tells
    dtype and device as if it were loaded.

    What is kept has no gradients. Where gradients are enabled and a parameter requires them, nothing is taken from the
    cache: call it under ``torch.no_grad()``, as pipelines do, or have ``requires_grad_(False)``.
    """

    # Saved pipelines name the class by this, and it stays where they look for it.
    __module__ = "nai_t5_core.hf"

    def __init__(self, config: PretrainedConfig, stack: T5EncoderStack | None = None, load: Load | None = None) -> None:
        """Around a finished encoder or one that is loaded later; without either, a random one."""
        self._load, self._is_brought = load, False
        self._store: Store | None = None
        self._settings_now: Callable[[], Settings | None] | None = None
        # Where the last call has computed.
        self._computed_on: torch.device | None = None
        super().__init__(config, stack)
        if load is not None:
            # It goes where weights would go, and tells where they are to be loaded, and whether they require gradients.
            # Without a parameter, offloading would not know where a model is.
            self._place = nn.Parameter(torch.empty(0))

    @property
    def is_loaded(self) -> bool:
        """Whether the weights are in memory."""
        return bool(self._holder)

    def keep_in(self, store: Store, settings_at: SettingsAt) -> None:
        """Has the embeddings of this encoder kept, under the settings that it has in a dtype on a device."""
        known: dict[tuple[torch.dtype, str], Settings] = {}

        def at_load() -> Settings:
            device = self._computed_on or self.device
            place = (self.dtype, device.type)
            if place not in known:
                known[place] = settings_at(self.dtype, device)
            return known[place]

        self._store, self._at_load = store, at_load
        self._settings_now = SettingsOfStack(self.stack, at_load) if self.is_loaded else at_load

    @property
    def can_keep(self) -> bool:
        """Whether it is known what its embeddings are kept under."""
        return self._settings_now is not None

    def use_store(self, store: Store) -> None:
        """Has its embeddings kept in another store from now on.

        Raises:
            ValueError: it is a copy, or was not made for a cache: nothing tells what its weights are.
        """
        if not self.can_keep:
            raise ValueError(
                f"this {type(self).__name__} has no cache: it is a copy, or was loaded without one, and nothing tells "
                "what its weights are; make it by lazy_text_encoder(…)"
            )
        self._store = store

    @property
    def stack(self) -> T5EncoderStack:
        """The encoder that does the work; it is loaded for this, if it was not yet."""
        self._be_loaded()
        return self._holder[0]

    def _be_loaded(self) -> None:
        with _LOADING:
            if self._holder or self._load is None:
                return
            stack = self._load(self._place.dtype, self._place.device)
            if not self._place.requires_grad:
                stack.requires_grad_(False)
            super()._hold(stack)
            del self._place
            self._is_brought = _is_offloaded_by_parts(self)
            if self._store is not None:
                self._settings_now = SettingsOfStack(stack, self._at_load)

    def _hold(self, stack: T5EncoderStack) -> None:
        if self._load is None:
            super()._hold(stack)
        else:
            self._holder = ()

    def _computed(
        self, input_ids: Tensor | None, attention_mask: Tensor | None, inputs_embeds: Tensor | None = None
    ) -> Tensor:
        compute = self._brought if self._is_brought or not self.is_loaded else super()._computed
        is_plain = attention_mask is None or attention_mask.ndim == 2
        if self._store is None or not self.can_keep or self._records_gradients():
            return compute(input_ids, attention_mask, inputs_embeds)
        if input_ids is None or input_ids.ndim != 2 or inputs_embeds is not None or not is_plain:
            return compute(input_ids, attention_mask, inputs_embeds)
        mask = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask != 0
        if mask.shape != input_ids.shape:
            return compute(input_ids, attention_mask)  # which says what is wrong
        # Weights that are brought for the call rest elsewhere.
        is_brought = self._is_brought or (not self.is_loaded and _is_offloaded_by_parts(self))
        self._computed_on = input_ids.device if is_brought else None
        return through_cache(
            self._store,
            self._settings_at_this_moment,
            lambda ids, shown: compute(ids, None if attention_mask is None else shown),
            input_ids,
            mask.to(input_ids.device),
            "attend" if attention_mask is None else self.padding,
            self.extra_pad,
            self._computed_on or self.device,
        )

    def _settings_at_this_moment(self) -> Settings | None:
        # Asked for anew: loading replaces it.
        return None if self._settings_now is None else self._settings_now()

    def _records_gradients(self) -> bool:
        return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters())

    def _brought(self, input_ids: Tensor | None, *others: Tensor | None) -> Tensor:
        """As :meth:`_computed` without a cache. The weights were not there when offloading by parts was set up, so that
        nothing brings them: they go to the ids' device for the call.
        """
        self._be_loaded()
        if not self._is_brought or input_ids is None:
            return super()._computed(input_ids, *others)
        self.to(input_ids.device)
        try:
            return super()._computed(input_ids, *others)
        finally:
            self.to("cpu")

    # -----------------------------------------------------------------------------------------------------------------
    # What a model without parameters has to tell
    # -----------------------------------------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        return self.stack.dtype if self.is_loaded else self._place.dtype

    @property
    def device(self) -> torch.device:
        return self.stack.device if self.is_loaded else self._place.device

    def __getattr__(self, name: str) -> Any:
        if name in ("shared", "encoder") and not self.is_loaded:
            return getattr(self.stack, name)
        return super().__getattr__(name)

    def _apply(self, fn: Any, recurse: bool = True) -> CachedT5EncoderModel:
        if not (self.is_loaded and _only_moves(fn, self.dtype)):
            super()._apply(fn, recurse)
            return self
        with self.stack.alterations.by("moved", lambda: None):
            super()._apply(fn, recurse)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Copies are of a loaded encoder and have no cache: what is done to one is not seen by the other."""
        self._be_loaded()
        without = dict.fromkeys(("_load", "_store", "_at_load", "_settings_now"))
        return {**self.__dict__, **without}

    def extra_repr(self) -> str:
        if self.is_loaded:
            return super().extra_repr()
        named = "" if self.products == "auto" else f", products={self.products}"
        return f"not loaded, {self.dtype}, padding={self.padding}{named}"


def _is_offloaded_by_parts(model: nn.Module) -> bool:
    """Whether accelerate or diffusers moves the parts of a model one by one, which it does by hooks on each."""
    return getattr(getattr(model, "_hf_hook", None), "offload", False) or hasattr(model, "_diffusers_hook")


def _only_moves(fn: Callable[[Tensor], Tensor], dtype: torch.dtype) -> bool:
    """Whether what is done to every weight leaves its numbers as they are."""
    probe = torch.tensor([1.5, -0.375], dtype=dtype)
    moved = fn(probe)
    return moved.dtype == dtype and (moved.is_meta or torch.equal(moved.cpu(), probe))


def lazy_text_encoder(
    source: str | Path | None,
    *,
    cache: bool | str | Path | Store = True,
    dtype: torch.dtype | str | None = "auto",
    subfolder: str = "",
    revision: str | None = None,
    variant: str | None = None,
    layout: Layout = "fused",
    scales: ScalesChoice = "auto",
    quantize: Quantisation | None = None,
    offload: bool = False,
    products: ProductsChoice = "auto",
    **others: Any,
) -> CachedT5EncoderModel:
    """A T5 for a pipeline's ``from_pretrained`` that is loaded at the first prompt whose embedding is not kept.

    Only names, sizes and the contents' hash are read before, the latter once per file. Pipelines move, cast and offload
    it as a whole as ever. Under offloading by parts (sequential or in groups), which is set up with the pipeline's
    other models, it is on the device as a whole while it encodes.

    Args:
        source, dtype, subfolder, revision, variant, layout, scales, quantize, offload, products, others: as
            for :meth:`NAIT5EncoderModel.from_pretrained`.
        cache: True for the default folder, a folder, or a :class:`nai_t5_core.Store`.

    Raises:
        CheckpointError, ValueError, TypeError: as :meth:`NAIT5EncoderModel.from_pretrained`.
    """
    store = open_store(cache)
    how = Choices(layout=layout, scales=scales, quantize=quantize, products=products, offload=offload)
    hub, config_settings = loading_options(others, revision)
    cpu = torch.device("cpu")
    given = None if dtype == "auto" else resolve_dtype(dtype or torch.float32, cpu)
    refuse_impossible(how, cpu, given or torch.float32)
    examination = examine_checkpoint(open_source(source, subfolder, hub, variant))
    examination.refuse_faults()
    computed_in = given or resolve_dtype(main_dtype(examination), cpu)
    refuse_impossible(how, cpu, computed_in)
    settings_at = partial(_settings_at, examination, how)
    # Before the hash, which is of these files or of none.
    files = identities(examination)
    settings_at(computed_in, cpu)

    def load(dtype: torch.dtype, device: torch.device) -> T5EncoderStack:
        refuse_impossible(how, device, dtype)
        refuse_products_for(examination, how, device, dtype)
        refuse_changed(examination, files)
        stack, _ = assemble(examination, dtype, cpu if offload else device, layout, scales, CastingOps)
        refuse_changed(examination, files)
        if offload:
            offload_layers(stack, device)
        return computed_as_chosen(stack, how)

    model = CachedT5EncoderModel(config_beside(examination), load=load).to(computed_in)
    model.products = products
    model.name_or_path = model.config.name_or_path = str(source or "")
    model.config.update(config_settings)
    model.keep_in(store, settings_at)
    return model.eval()


def _settings_at(
    examination: Examination,
    how: Choices,
    dtype: torch.dtype,
    device: torch.device,
    weights: str | None = None,
) -> Settings:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SlowDtypeWarning)  # of the dtype that a pipeline has chosen
        # On CUDA the class encodes by the kernels; on a CPU oneDNN alone is given weights in an order of its own.
        is_ready = device.type == "cuda" or how.products == "onednn"
        return settings_for(examination, replace(how, dtype=dtype, device=device, optimize=is_ready), weights)


def settings_of_model(model: nn.Module, how: Choices) -> SettingsAt:
    """The settings, by dtype and device, of an encoder that is made of a transformers model in memory.

    Its weights are hashed now, and may be let go afterwards.
    """
    examination = examine_model(model)
    weights = contents_by_reading(examination)
    examination.checkpoint.read_only_by(_is_gone)
    return partial(_settings_at, examination, how, weights=weights)


def _is_gone(name: str) -> Tensor:
    raise AssertionError(f"{name} was let go")
