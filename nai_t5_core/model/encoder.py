"""The encoder: ids and mask in, hidden states out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from nai_t5_core.facts.config import T5Config
from nai_t5_core.facts.scales import StackScales, unscaled
from nai_t5_core.model.alterations import Alterations
from nai_t5_core.model.attention import Attend, AttentionPlan, DenseAttention, LateAttend, distance_table, logit_scale
from nai_t5_core.model.attention_choice import (
    ATTENTION_CHOICES,
    FLEX_FROM_LENGTHS,
    AttentionChoice,
    describe_attention,
    document_plan,
)
from nai_t5_core.model.block import is_watched
from nai_t5_core.model.encoder_block import EncoderBlock
from nai_t5_core.model.fixed_weights import refuse_change
from nai_t5_core.model.inputs import check_ids, dense_mask, for_every_query, moved
from nai_t5_core.model.layers import FoldedRMSNorm, RMSNorm, residual_dtype, scaled
from nai_t5_core.model.offloading import Offloading
from nai_t5_core.model.packing import Packing, PaddingPolicy, bucket_for, pack_batch
from nai_t5_core.model.stack_runner import StackRunner
from nai_t5_core.model.turns import Turns

Layout = Literal["fused", "separate"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)

# Called with a stack, a function and its arguments; returns the function's result if it is finite, or raises an error.
Guard = Callable[..., Any]


class Encoder(nn.Module):
    """The stack of blocks on a packed row: embeddings in, hidden states out."""

    def __init__(self, config: T5Config, layout: Layout, scales: StackScales, ops: Any = nn, **factory: Any) -> None:
        super().__init__()
        self.num_buckets = config.relative_attention_num_buckets
        self.max_distance = config.relative_attention_max_distance
        self.bias_per_layer = config.bias_per_layer
        make_block = EncoderBlock.fused if layout == "fused" else EncoderBlock.separate
        self.block = nn.ModuleList(
            make_block(config, config.bias_per_layer or index == 0, layer_scales, ops, **factory)
            for index, layer_scales in enumerate(scales.layers)
        )
        self.final_layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon, factory.get("device"))

    def forward(self, embeddings: Tensor, plan: AttentionPlan, dtype: torch.dtype) -> Tensor:
        """[tokens, d_model] in any float dtype to [tokens, d_model] in ``dtype``, after the final norm."""
        residual = self._own_residual(embeddings, dtype)
        for block, attend in self._layers(plan, dtype, residual.device):
            residual = block(residual, attend, dtype)
        return self.finish(residual, dtype)

    def residuals(self, embeddings: Tensor, plan: AttentionPlan, dtype: torch.dtype) -> Iterator[Tensor]:
        """The residual stream before the first block and after each: layers + 1 tensors [tokens, d_model]."""
        residual = self._own_residual(embeddings, dtype)
        yield residual.clone()
        for block, attend in self._layers(plan, dtype, residual.device):
            residual = block(residual, attend, dtype)
            yield residual.clone()

    @staticmethod
    def _own_residual(embeddings: Tensor, dtype: torch.dtype) -> Tensor:
        """A copy in the residual's precision, since blocks change the residual in place."""
        return embeddings.to(residual_dtype(dtype), copy=True)

    def _layers(
        self, plan: AttentionPlan, dtype: torch.dtype, device: torch.device
    ) -> Iterator[tuple[nn.Module, Attend]]:
        """Every block with its attention function."""
        attend: Attend | None = None
        for index, block in enumerate(self.block):
            if attend is None or self.bias_per_layer:
                make = partial(self._attend, plan, index, dtype, device)
                # Who hooks into a block may bring its weights, and its table among them, when it is called.
                # With gradients it is made here: checkpointing may run the block's forward twice.
                is_free = not torch.compiler.is_compiling() and not torch.is_grad_enabled()
                is_late = is_free and is_watched((block,))
                attend = LateAttend(make) if is_late else make()
            yield block, attend

    def _attend(self, plan: AttentionPlan, index: int, dtype: torch.dtype, device: torch.device) -> Attend:
        return plan.layer(self.bias_table(index, device).to(dtype))

    def bias_table(self, index: int, device: torch.device | None = None) -> Tensor:
        """The bias by distance that a layer uses, its own or the first layer's: [heads, 2 · max_distance + 1].

        ``device`` is where the result is needed, by default where the weight is. The weight is read by calling its
        module, since offloading fetches weights for a module's call only.
        """
        block: Any = self.block[index if self.bias_per_layer else 0]
        embedding = block.layer[0].SelfAttention.relative_attention_bias
        buckets = torch.arange(self.num_buckets, device=device or embedding.weight.device)
        return distance_table(embedding(buckets), self.max_distance)

    def finish(self, residual: Tensor, dtype: torch.dtype) -> Tensor:
        """The final norm: residual to hidden states in ``dtype``."""
        hidden: Tensor = self.final_layer_norm(residual)
        return hidden.to(dtype)


class T5EncoderStack(nn.Module):
    """A T5 encoder with its embedding; the padding policy is chosen by the call.

    Module and tensor names are those of Hugging Face checkpoints. ``layout="separate"`` has exactly their tensors;
    ``layout="fused"`` joins q, k, v and gate, up, with the norm weights multiplied in.

    Args:
        config: the sizes.
        layout: ``"fused"`` (the fastest) or ``"separate"``.
        ops: a namespace with ``Linear`` and ``Embedding`` classes, ``torch.nn`` by default.
        scales: powers of two that keep a float16 model in range; by default nothing is scaled. In the fused layout the
            scales are multiplied into the weights, so they must be those of the weights that will be loaded.
        device, dtype: of the parameters; ``device="meta"`` allocates nothing.
        attention: ``"flex"``, ``"sdpa"``, or ``"auto"``, which chooses for every batch, see
            :func:`nai_t5_core.model.attention_choice.choose_attention`. Masks of 3 and 4 dimensions take SDPA, and are
            an error with ``"flex"``. Flex has no backward on the CPU: where gradients are recorded there, SDPA is used.
        kernel_options: passed on to torch's ``flex_attention``, in place of our own. This and ``attention`` may be
            changed at any time.

    Attributes:
        guard: what makes sure that results are finite, as :func:`nai_t5_core.float16.guard.guard` does; None, the
            default, returns results unchecked. It may be changed at any time.
        runner: what encodes in place of the modules, where it can.
        offload: set where the weights rest elsewhere than where it computes.
        flex_from_lengths: from how many lengths of documents in a batch on ``attention="auto"`` takes flex on CUDA.
        turns: threads may call it at once, and what changes it (a LoRA, the guard) waits for its turn.
        alterations: the changes of its weights that were told.
    """

    encoder_class: type[Encoder] = Encoder
    guard: Guard | None = None
    runner: StackRunner | None = None
    offload: Offloading | None = None
    flex_from_lengths: int = FLEX_FROM_LENGTHS

    def __init__(
        self,
        config: T5Config,
        layout: Layout = "fused",
        ops: Any = nn,
        scales: StackScales | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        attention: AttentionChoice = "auto",
        kernel_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if layout not in LAYOUTS:
            raise ValueError(f"unknown layout {layout!r}; allowed: {', '.join(LAYOUTS)}")
        if attention not in ATTENTION_CHOICES:
            raise ValueError(f"unknown attention {attention!r}; allowed: {', '.join(ATTENTION_CHOICES)}")
        self.config = config
        self.turns = Turns()
        self.alterations = Alterations()
        self.layout = layout
        self.attention = attention
        self.kernel_options = kernel_options
        self.scales = scales or unscaled(config.num_layers)
        if len(self.scales.layers) != config.num_layers:
            raise ValueError(f"scales of {len(self.scales.layers)} layers for a model of {config.num_layers} layers")
        self.shared = ops.Embedding(config.vocab_size, config.d_model, device=device, dtype=dtype)
        self.encoder = self.encoder_class(config, layout, self.scales, ops, device=device, dtype=dtype)

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype: that of the embedding table."""
        dtype: torch.dtype = self.shared.weight.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        device: torch.device = self.shared.weight.device
        return (self.offload and self.offload.device) or device

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> T5EncoderStack:
        refuse_change(self, fn)
        if self.offload is not None:
            self.offload.move(self, fn)
        else:
            super()._apply(fn, recurse)
        return self

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        padding: PaddingPolicy = "exact",
        extra_pad: int = 0,
    ) -> Tensor:
        """Hidden states after the final norm.

        Args:
            input_ids: [batch, length] integers below ``config.vocab_size``.
            attention_mask: None, [batch, length] (non-zero at real tokens), [batch, query, key], or 4-dim and
                broadcastable to [batch, heads, query, key]; the latter two are bool or integer, non-zero where a query
                may see a key, and the padding policy has no effect on them.
            inputs_embeds: [batch, length, d_model] in place of ``input_ids``.
            padding, extra_pad: see :func:`nai_t5_core.model.packing.pack_batch`.

        Returns:
            [batch, length, d_model] in the compute dtype; with ``padding="trim"`` the longest prompt gives the length.

        Raises:
            ValueError: ids outside the vocabulary, both or neither of ids and embeddings, a mask of the wrong shape, an
                unknown padding policy, ``attention="flex"`` with a mask of 3 or 4 dimensions or a model that flex
                cannot compute.
            FlexUnavailableError: ``attention="flex"`` where it cannot be compiled.
            NotFiniteError: the result is not finite, and there is a guard; a ValueError.
        """
        options: dict[str, Any] = {"inputs_embeds": inputs_embeds, "padding": padding, "extra_pad": extra_pad}
        if self.runner is not None and not torch.compiler.is_compiling():
            with self.turns.call():
                runner = self.runner  # another thread may have moved the model while this one waited
                hidden = None if runner is None else runner(self, input_ids, attention_mask, **options)
            if hidden is not None:
                return hidden
        out: Tensor = self._guarded(self._encode, input_ids, attention_mask, **options)
        return out

    def _guarded(self, call: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
        # To look at a number, or to wait for a turn, would break a graph that is being compiled.
        if torch.compiler.is_compiling():
            return call(*inputs, **options)

        def in_turn(*inputs: Any, **options: Any) -> Any:
            with self.turns.call():
                return call(*inputs, **options)

        return in_turn(*inputs, **options) if self.guard is None else self.guard(self, in_turn, *inputs, **options)

    def _encode(self, *inputs: Any, **options: Any) -> Tensor:
        embeddings, plan, packing = self.prepare(*inputs, **options)
        return packing.unpack(self.encoder(embeddings, plan, self.dtype))

    def hidden_states(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        padding: PaddingPolicy = "exact",
        extra_pad: int = 0,
        final_norm: bool = True,
    ) -> list[Tensor]:
        """Hidden states of every layer: layers + 1 tensors, the embeddings first. Arguments as for a call.

        The last one has passed the final norm unless ``final_norm=False``. All others are the residual stream, in its
        precision (float32, or float64 in a float64 model), since their range exceeds float16's.
        """
        out: list[Tensor] = self._guarded(
            self._hidden_states,
            input_ids,
            attention_mask,
            inputs_embeds=inputs_embeds,
            padding=padding,
            extra_pad=extra_pad,
            final_norm=final_norm,
        )
        return out

    def _hidden_states(self, *inputs: Any, final_norm: bool, **options: Any) -> list[Tensor]:
        embeddings, plan, packing = self.prepare(*inputs, **options)
        states = list(self.encoder.residuals(embeddings, plan, self.dtype))
        if final_norm:
            states[-1] = self.encoder.finish(states[-1], self.dtype)
        return [packing.unpack(state) for state in states]

    def prepare(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        padding: PaddingPolicy = "exact",
        extra_pad: int = 0,
        buckets: tuple[int, ...] | None = None,
    ) -> tuple[Tensor, AttentionPlan, Packing]:
        """What the blocks need for a batch: packed embeddings, the attention plan, and how the result is unpacked.

        Given ``buckets``, the plan is flex attention for a row that is filled up to the next of these token counts.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds, and not both")
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        assert inputs is not None
        batch, length = self._check_inputs(inputs, is_ids=inputs_embeds is None)
        if inputs_embeds is None and self.offload is not None and self.offload.device is not None:
            inputs = inputs_embeds = self.embed(inputs)  # whose rows are gathered on the host
        device = self._device_for(inputs)
        scale = logit_scale(self.config)
        plan: AttentionPlan
        if padding == "exact" and attention_mask is not None and torch.compiler.is_compiling():
            attention_mask = for_every_query(attention_mask, batch, length)
        if attention_mask is None or attention_mask.ndim == 2:
            mask = None if attention_mask is None else attention_mask != 0
            packed, packing = pack_batch(mask, batch, length, padding, extra_pad).pack_onto(device, inputs)
            bucket = None if buckets is None else bucket_for(packing.tokens, buckets)
            plan = document_plan(
                self.attention,
                packing,
                scale,
                device,
                self.dtype,
                self.config.d_kv,
                self.kernel_options,
                bucket,
                self.flex_from_lengths,
            )
        else:
            if self.attention == "flex":
                raise ValueError(
                    f"the mask has {attention_mask.ndim} dimensions; attention='flex' takes [batch, length] masks, "
                    "others need attention='sdpa' or 'auto'"
                )
            mask = dense_mask(attention_mask, batch, self.config.num_heads, length)
            packed, packing = pack_batch(None, batch, length).pack_onto(device, inputs)
            plan = DenseAttention(moved(mask, device), scale)
        return (packed if inputs_embeds is not None else self.embed(packed)), plan, packing

    def _device_for(self, inputs: Tensor) -> torch.device:
        """The weights' device for inputs on the CPU; else the inputs' device, where offloading brings the weights."""
        offloaded = self.device.type == "meta"
        return inputs.device if offloaded or inputs.device.type != "cpu" else self.device

    def embed(self, input_ids: Tensor) -> Tensor:
        """Ids of any shape to embeddings [..., d_model] in the residual's precision."""
        rows = self.shared(input_ids) if self.offload is None else self.offload.rows(self.shared, input_ids)
        embeddings: Tensor = rows.to(residual_dtype(self.dtype))
        return scaled(embeddings, 1 / self.scales.embedding)

    def _check_inputs(self, inputs: Tensor, is_ids: bool) -> tuple[int, int]:
        expected = "input_ids must be [batch, length]" if is_ids else "inputs_embeds must be [batch, length, d_model]"
        if inputs.ndim != (2 if is_ids else 3):
            raise ValueError(f"{expected}; got shape {list(inputs.shape)}")
        if not is_ids and inputs.shape[-1] != self.config.d_model:
            raise ValueError(f"{expected} with d_model={self.config.d_model}; got shape {list(inputs.shape)}")
        if is_ids:
            check_ids(inputs, self.config.vocab_size)
        return inputs.shape[0], inputs.shape[1]

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Random weights for training from scratch, drawn by T5's own scheme (mesh-tensorflow's initialisers).

        Every projection has variance 1 / fan-in, the queries another factor of 1 / d_kv unless ``scale_qk``; embeddings
        have variance 1 and norms are ones. The same generator state gives the same weights.
        """
        nn.init.normal_(self.shared.weight, std=1.0, generator=generator)
        init_modules(self.encoder, self.config, generator)

    def extra_repr(self) -> str:
        return f"{self.config.kind}, {self.layout}, {self.dtype}, attention={self.describe_attention()}"

    def describe_attention(self) -> str:
        """How attention is computed in inference, in words: ``"auto: sdpa"``, ``"flex, compiled"``."""
        if self.runner is not None and (reason := self.runner.refusal(self)) is None:
            return f"auto: {self.runner.describe(self)}"
        if self.runner is not None:
            return f"{self._describe_modules()} (not the {self.runner.name}: {reason})"
        return self._describe_modules()

    def _describe_modules(self) -> str:
        blocks: Any = self.encoder.block
        by_kernels = sum(block.attends_by_itself(self.dtype) for block in blocks)
        return describe_attention(self.attention, self.device.type, by_kernels, len(blocks), self.flex_from_lengths)


def init_modules(stack: nn.Module, config: T5Config, generator: torch.Generator | None = None) -> None:
    """Random weights for every layer of an encoder or decoder; see :meth:`T5EncoderStack.init_weights`."""
    module: Any
    for module in stack.modules():
        if hasattr(module, "init_weights"):
            module.init_weights(generator)
        if hasattr(module, "relative_attention_bias"):
            nn.init.normal_(module.relative_attention_bias.weight, std=config.d_model**-0.5, generator=generator)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, FoldedRMSNorm):
            nn.init.ones_(module.folded_weight)
