"""Our encoder for software that expects transformers' T5EncoderModel or UMT5EncoderModel; needs ``[transformers]``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

try:
    from transformers import PretrainedConfig, PreTrainedModel, T5Config
    from transformers.modeling_outputs import BaseModelOutput
except ImportError as error:
    raise ImportError("this needs transformers; install it with: pip install 'comfy-nai-t5[transformers]'") from error

from nai_t5_core.backends.auto_dtype import resolve_dtype
from nai_t5_core.backends.choices import ProductsChoice, Quantisation
from nai_t5_core.backends.choose import encode_on_cuda, run_in_place
from nai_t5_core.backends.held import is_in_8_bits
from nai_t5_core.backends.offload.offload import offload_layers
from nai_t5_core.diffusers.drop_in_adapters import RefusesAdaptersWhenFused
from nai_t5_core.diffusers.drop_in_config import ENCODER_CLASSES, config_beside, own_config
from nai_t5_core.diffusers.drop_in_embeddings import HasOneTable
from nai_t5_core.diffusers.drop_in_folders import (
    open_source,
    single_device,
    weights_name,
    write_config,
    write_native,
    write_originals,
)
from nai_t5_core.diffusers.drop_in_keywords import loading_options, refuse_for_saving
from nai_t5_core.diffusers.drop_in_offload import OffloadsLayers
from nai_t5_core.diffusers.drop_in_products import computed_as_chosen, refuse_impossible, refuse_products_for
from nai_t5_core.diffusers.drop_in_weights import (
    encoder_from_model,
    give_back,
    refuse_8_bits,
    refuse_wrapped,
)
from nai_t5_core.diffusers.row_memory import RowMemory
from nai_t5_core.facts.config import config_from_hf
from nai_t5_core.facts.padding import PaddingPolicy
from nai_t5_core.float16.guard import guard
from nai_t5_core.model.encoder import Layout, T5EncoderStack
from nai_t5_core.model.fixed_weights import refuse_change
from nai_t5_core.model.layers import CastingOps
from nai_t5_core.model.packing import check_policy
from nai_t5_core.model.precision import COMPUTED_IN, resolve_device, within_range
from nai_t5_core.prompts.choices import Choices
from nai_t5_core.prompts.stack_encoding import computed_by
from nai_t5_core.weights.chosen import ScalesChoice
from nai_t5_core.weights.convert import main_dtype
from nai_t5_core.weights.examine import examine_checkpoint
from nai_t5_core.weights.load import assemble

SaveFormat = Literal["native", "transformers"]
SAVE_FORMATS: tuple[SaveFormat, ...] = get_args(SaveFormat)


class NAIT5EncoderModel(RefusesAdaptersWhenFused, OffloadsLayers, HasOneTable, PreTrainedModel):
    """Call and outputs of transformers' T5EncoderModel and UMT5EncoderModel, computed by our encoder.

    >>> model = NAIT5EncoderModel.from_pretrained("google/t5-v1_1-xxl", dtype=torch.float16)
    >>> model(input_ids, attention_mask).last_hidden_state            # [batch, length, d_model]

    ``padding`` and ``extra_pad`` say what is done with the positions that a mask hides, see
    :func:`nai_t5_core.model.packing.pack_batch`. The default ``"exact"`` computes every row as transformers does. Both
    may be changed at any time.

    There is no dropout: training mode gives what evaluation mode gives.
    """

    # Saved pipelines name the class by this, and it stays where they look for it.
    __module__ = "nai_t5_core.hf"
    base_model_prefix = "transformer"
    main_input_name = "input_ids"
    config_class = T5Config
    _supports_sdpa = True
    _no_split_modules = ("EncoderBlock",)
    # Diffusers' offloading in groups of blocks looks for blocks here, and takes a T5 as a whole otherwise. The norm is
    # a group by itself: as the rest of its encoder it would have diffusers track the order of blocks twice, which is
    # an error where it copies on a stream.
    _group_offload_block_modules = ("encoder", "final_layer_norm")
    _tied_weights_keys: dict[str, str] = {}  # noqa: RUF012 - transformers looks for it on the class

    def __init__(self, config: PretrainedConfig, stack: T5EncoderStack | None = None) -> None:
        """A model around a finished encoder, or, without one, a random model of the sizes in ``config``."""
        super().__init__(own_config(config))
        if stack is None:
            stack = T5EncoderStack(config_from_hf(config.to_dict()).encoder_only(), "fused", CastingOps)
            if not stack.shared.weight.is_meta:
                stack.init_weights()
        self._hold(stack)
        self._padding: PaddingPolicy = "exact"
        self._extra_pad = 0
        self._memory: RowMemory | None = None
        # What was named to compute it on a CPU.
        self.products: ProductsChoice = "auto"
        self.post_init()

    def _hold(self, stack: T5EncoderStack) -> None:
        encode_on_cuda(run_in_place(stack)).guard = guard
        # In a tuple, so that the modules are registered once, under the names that Hugging Face checkpoints have.
        self._holder: tuple[T5EncoderStack, ...] = (stack,)
        self.shared, self.encoder = stack.shared, stack.encoder

    # -----------------------------------------------------------------------------------------------------------------
    # Where models come from
    # -----------------------------------------------------------------------------------------------------------------

    @classmethod
    def from_hf(
        cls,
        model: nn.Module,
        dtype: torch.dtype | str | None = None,
        layout: Layout = "fused",
        scales: ScalesChoice = "auto",
        release: bool = False,
        quantize: Quantisation | None = None,
        offload: bool = False,
        products: ProductsChoice = "auto",
    ) -> NAIT5EncoderModel:
        """From a loaded transformers T5, mT5 or UMT5 (encoder or whole model), on its device, in evaluation mode.

        Weights in 4 or 8 bits of bitsandbytes stay so: ours has the very bytes.

        Args:
            dtype: by default that of the model. float16 gets scales that keep it in range.
            layout: ``"fused"`` is the fastest; ``"separate"`` shares the model's tensors where the dtype is the same.
            scales: see :func:`nai_t5_core.weights.load.load_encoder`.
            release: take each weight away from ``model`` when it has been used, so that memory never holds both. The
                model is left without values; :meth:`give_back` fills it again.
            quantize: ``"int8"`` computes the projections in 8 bits on the CPU, in float32 or bfloat16, see
                :func:`nai_t5_core.backends.choose.quantize_int8`. Ours is then no more moved, cast, saved or given
                back. On a GPU it is refused.
            offload: see :meth:`enable_layerwise_offload`.
            products: what computes on a CPU, see :func:`nai_t5_core.backends.choose.prepack`. Kernels that are named
                compute in place, in the fused layout; after ``"onednn"`` the model is no more moved or cast.

        Raises:
            CheckpointError: the model is no T5, has adapters or quantised weights, is offloaded, or exceeds float16.
            ValueError: a dtype that is no T5's, an unknown layout, scales for another number of layers, or an unknown
                quantisation or products, or some that are not possible here. The model is as it was then.
        """
        how = Choices(layout=layout, scales=scales, quantize=quantize, products=products, offload=offload)
        stack = encoder_from_model(model, dtype, how, release)
        source: Any = model
        if offload:
            offload_layers(stack)
        ours = cls(source.config, computed_as_chosen(stack, how)).eval()
        ours.products = products
        return ours

    def give_back(self, model: nn.Module, release: bool = False) -> None:
        """Fills a model released by :meth:`from_hf`, see :func:`nai_t5_core.diffusers.drop_in_weights.give_back`.

        Args:
            release: ours loses its weights meanwhile, so that memory never holds both, and is of no use afterwards.
        """
        give_back(self.stack, model, release)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path | None,
        *,
        dtype: torch.dtype | str | None = "auto",
        torch_dtype: torch.dtype | str | None = None,
        subfolder: str = "",
        revision: str | None = None,
        variant: str | None = None,
        device_map: Any = None,
        layout: Layout = "fused",
        scales: ScalesChoice = "auto",
        quantize: Quantisation | None = None,
        unpack: bool = False,
        offload: bool = False,
        products: ProductsChoice = "auto",
        **others: Any,
    ) -> NAIT5EncoderModel:
        """Loads a T5 encoder in evaluation mode from a hub id, a folder or a file.

        Args:
            pretrained_model_name_or_path, layout, scales: as for :func:`nai_t5_core.weights.load.load_encoder`.
            dtype: ``"auto"`` is that of the checkpoint, None is float32.
            torch_dtype: the older name of ``dtype``.
            subfolder: the text encoder's folder in a pipeline.
            revision: of a hub id; so are ``cache_dir``, ``token``, ``force_download`` and ``local_files_only``.
            variant: ``"fp16"`` reads ``model.fp16.safetensors``.
            device_map: one device for the whole model, also as ``{"": device}``; ``"auto"`` is the accelerator, or the
                CPU where there is none.
            quantize, products: as for :meth:`from_hf`; the weights as they were are let go one by one.
            unpack: as for :func:`nai_t5_core.weights.load.load_encoder`: quantised weights else stay as they lie.
            offload: see :meth:`enable_layerwise_offload`.
            others: ``output_hidden_states`` and ``return_dict`` are put into the config. What transformers takes
                beyond that is accepted where it changes nothing here, and else refused by name, see
                :mod:`nai_t5_core.diffusers.drop_in_keywords`.

        Raises:
            CheckpointError: the checkpoint is unusable; all its faults are listed.
            ValueError: an unknown dtype or device, several devices, a quantisation or products that are not possible
                here, or what is not done, such as those of other libraries.
            TypeError: an unknown keyword.
        """
        hub, settings = loading_options(others, revision)
        how = Choices(
            layout=layout, scales=scales, quantize=quantize, products=products, unpack=unpack, offload=offload
        )
        device = resolve_device(single_device(device_map))
        wanted = torch_dtype if torch_dtype is not None else dtype
        given = None if wanted == "auto" else resolve_dtype(wanted or torch.float32, device)
        refuse_impossible(how, device, given or torch.float32)  # before anything is fetched
        examination = examine_checkpoint(open_source(pretrained_model_name_or_path, subfolder, hub, variant))
        model_dtype = given or resolve_dtype(main_dtype(examination), device)
        refuse_impossible(how, device, model_dtype)
        refuse_products_for(examination, how, device, model_dtype)
        where = torch.device("cpu") if offload else device
        stack, _ = assemble(examination, model_dtype, where, layout, scales, CastingOps, unpack=unpack)
        if offload:
            offload_layers(stack, device)
        model = cls(config_beside(examination), computed_as_chosen(stack, how))
        model.products = products
        model.name_or_path = model.config.name_or_path = str(pretrained_model_name_or_path or "")
        model.config.update(settings)
        return model.eval()

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        *,
        save_format: SaveFormat = "native",
        variant: str | None = None,
        **others: Any,
    ) -> None:
        """Writes config.json and one safetensors file.

        Args:
            is_main_process: False writes nothing, for all but one of several processes.
            save_format: ``"native"`` keeps the tensors as they are (fused and scaled), which everything of ours reads;
                ``"transformers"`` writes the original tensors for its own classes, exact to rounding.
            variant: ``"fp16"`` names the file ``model.fp16.safetensors``.
            others: what transformers takes beyond that is accepted where it changes nothing here, such as
                ``max_shard_size`` and ``safe_serialization`` (which transformers itself knows no more), and else
                refused by name.

        Raises:
            ValueError: an unknown format, what is not done here (``push_to_hub``), or weights that are in 8 bits, or
                have adapters or live LoRAs beside them.
            TypeError: an unknown keyword.
            CheckpointError: the file cannot be written.
        """
        if save_format not in SAVE_FORMATS:
            raise ValueError(f"unknown save_format {save_format!r}; allowed: {', '.join(SAVE_FORMATS)}")
        folder = Path(save_directory)
        refuse_for_saving(others, folder)
        refuse_8_bits(self.stack)
        refuse_wrapped(self.stack)
        if not is_main_process:
            return
        class_name = type(self).__name__ if save_format == "native" else ENCODER_CLASSES[self.config.model_type]
        dtype = str(self.dtype).removeprefix("torch.")
        write_config(folder, {**self.config.to_dict(), "dtype": dtype}, class_name)
        file = folder / weights_name(variant)
        if save_format == "native":
            write_native(self.stack, file, self.name_or_path or class_name)
        else:
            write_originals(self.stack, file)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        *,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> BaseModelOutput | tuple[Any, ...]:
        """Encodes a padded batch.

        Args:
            input_ids: [batch, length] integers.
            attention_mask: None or [batch, length] of any dtype, non-zero at real tokens; masks of 3 and 4 dimensions
                as for :class:`nai_t5_core.model.encoder.T5EncoderStack`.
            inputs_embeds: [batch, length, d_model] in place of ids.
            output_hidden_states: also give the layers + 1 hidden states: embeddings first, the last after the norm.
            return_dict: False gives a tuple.

        Other keywords are taken and not used, as in transformers, since pipelines pass all that a tokenizer gave them.

        Returns:
            ``last_hidden_state`` [batch, length, d_model] (and ``hidden_states``, each of that shape) in the model's
            dtype: a tensor of its own in every call, which the caller may change.

        Raises:
            ValueError: attention weights are asked for, which are never formed here; the embedding table is stored in
                8 bits; or see the encoder's own call.
            NotFiniteError: the result is not finite, and no scale can mend that.
        """
        if output_attentions:
            raise ValueError("output_attentions=True: attention weights are never formed; use transformers' own class")
        wants_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        if wants_states:
            options: dict[str, Any] = {"padding": self._padding, "extra_pad": self._extra_pad}
            options |= {"inputs_embeds": inputs_embeds}
            states = self._checked_stack().hidden_states(input_ids, attention_mask, **options)
            hidden_states = tuple(within_range(state, self.dtype) for state in states)
            output = BaseModelOutput(last_hidden_state=hidden_states[-1], hidden_states=hidden_states)
        else:
            hidden = self._remembered(input_ids, attention_mask)
            if hidden is None:
                hidden = self._computed(input_ids, attention_mask, inputs_embeds)
            output = BaseModelOutput(last_hidden_state=hidden)
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    def _computed(
        self, input_ids: Tensor | None, attention_mask: Tensor | None, inputs_embeds: Tensor | None = None
    ) -> Tensor:
        """[batch, length, d_model]; a subclass may know another way."""
        options: dict[str, Any] = {"padding": self._padding, "extra_pad": self._extra_pad}
        return self._checked_stack()(input_ids, attention_mask, inputs_embeds=inputs_embeds, **options)

    def _checked_stack(self) -> T5EncoderStack:
        """The embedding table tells what is computed in; layerwise casting puts a dtype there that nothing can be."""
        if self.stack.dtype not in COMPUTED_IN:
            raise ValueError(
                f"the embedding table is stored in {self.stack.dtype}, and tells no dtype to compute in: give "
                "skip_modules_classes=(torch.nn.Embedding,) to apply_layerwise_casting, and load the model again"
            )
        return self.stack

    def _remembered(self, input_ids: Tensor | None, attention_mask: Tensor | None) -> Tensor | None:
        return None if self._memory is None or input_ids is None else self._memory.find(input_ids, attention_mask)

    @contextmanager
    def remembering(self, memory: RowMemory) -> Iterator[None]:
        """Calls inside this context take their rows from the memory where it has all of them."""
        before, self._memory = self._memory, memory
        try:
            yield
        finally:
            self._memory = before

    def _apply(self, fn: Any, recurse: bool = True) -> NAIT5EncoderModel:
        refuse_change(self, fn)
        if self._holder and self.stack.offload is not None:
            self.stack._apply(fn)
            return self
        super()._apply(fn, recurse)
        for stack in self._holder:  # which may be on another device now
            encode_on_cuda(stack)
        return self

    # -----------------------------------------------------------------------------------------------------------------
    # What transformers' classes have
    # -----------------------------------------------------------------------------------------------------------------

    @property
    def stack(self) -> T5EncoderStack:
        """The encoder that does the work."""
        return self._holder[0]

    @property
    def padding(self) -> PaddingPolicy:
        """What is done with masked positions: ``"exact"`` (the default), ``"skip"``, ``"trim"`` or ``"attend"``."""
        return self._padding

    @padding.setter
    def padding(self, policy: PaddingPolicy) -> None:
        check_policy(policy, self._extra_pad)
        self._padding = policy

    @property
    def extra_pad(self) -> int:
        """Masked positions after the text that ``"skip"`` and ``"trim"`` compute all the same."""
        return self._extra_pad

    @extra_pad.setter
    def extra_pad(self, positions: int) -> None:
        check_policy(self._padding, positions)
        self._extra_pad = positions

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: weights are there when the model is made."""

    def extra_repr(self) -> str:
        runner, pad = self.stack.runner, self._extra_pad
        facts = [self.stack.config.kind, self.stack.layout, self.dtype, is_in_8_bits(self.stack) and "8 bits"]
        facts += [self.stack.offload and "offloaded layer by layer"]
        facts += [runner and runner.name, f"padding={self._padding}", pad and f"extra_pad={pad}"]
        facts += [computed_by(self.stack)]
        return ", ".join(str(fact) for fact in facts if fact)
