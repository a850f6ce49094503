"""Our encoder around the modules of a ComfyUI T5, which stay where they are.

ComfyUI loads, offloads, patches (LoRA) and dequantises the weights of the modules it built. Those very modules take the
places of ours here, so all of that holds for us too, and no weight is in memory twice.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comfy_nai_t5.fused import (
    FusedProducts,
    FusedWeights,
    JoinedKernels,
    JoinedProducts,
    fuse,
    groups,
    has_plain_norms,
    is_plain_table,
    is_streamed,
    kernels_on,
    norm_weights,
    refuses,
    refuses_streamed,
    takes_kernels,
)
from comfy_nai_t5.grouped import ModuleProducts, StreamedProducts
from comfy_nai_t5.int8 import Int8Kernels, Int8Products
from comfy_nai_t5.packed import Kept, KeptKernels, KeptProducts
from comfy_nai_t5.quantised_layers import QuantisedLayer, has_quantised, refuses_bytes
from nai_t5_core.backends.compiled import compile_stack
from nai_t5_core.backends.cuda.device_refusals import obstacles_of
from nai_t5_core.backends.cuda.encoder import unproven_on
from nai_t5_core.backends.kernels.build import prepare_kernels
from nai_t5_core.backends.kernels.runners import INT8_KERNELS, KERNELS, KernelsBackend, best, refuses_mathematics
from nai_t5_core.backends.kernels.sets import InstructionSet
from nai_t5_core.backends.kernels.weights import WEIGHT_FORMATS
from nai_t5_core.facts.config import T5Config
from nai_t5_core.facts.scales import StackScales, published_scales
from nai_t5_core.model.attention import distance_table
from nai_t5_core.model.attention_choice import AttentionChoice
from nai_t5_core.model.block import Block, torch_is_needed
from nai_t5_core.model.encoder import Encoder, StackRunner, T5EncoderStack
from nai_t5_core.model.layers import NoInit

log = logging.getLogger(__name__)

# What is kept of a layer in the layouts that keep something: where the kernels run, and elsewhere.
KEPT: dict[str, tuple[type[Kept], type[Kept]]] = {
    "packed": (KeptKernels, KeptProducts),
    "int8": (Int8Kernels, Int8Products),
}

# Of weights that can be cast to what is computed in, once.
_CASTABLE = (*WEIGHT_FORMATS, torch.float64)


def dtypes_cast(is_kept: bool, by_kernels: bool) -> Collection[torch.dtype]:
    """Of weights that need not be kept in what is computed in to be joined."""
    return _CASTABLE if is_kept else WEIGHT_FORMATS if by_kernels else ()


def config_of(t5: Any) -> T5Config:
    """The sizes of a T5 of ComfyUI's or of ours, read from its modules: weights may not be there yet, or quantised."""
    blocks = t5.encoder.block
    attention, dense = blocks[0].layer[0].SelfAttention, blocks[0].layer[-1].DenseReluDense
    bias = attention.relative_attention_bias
    gated = hasattr(dense, "wi_0")
    return T5Config(
        vocab_size=t5.shared.num_embeddings,
        d_model=t5.shared.embedding_dim,
        d_kv=attention.q.out_features // bias.embedding_dim,
        d_ff=dense.wo.in_features,
        num_heads=bias.embedding_dim,
        num_layers=len(blocks),
        gated=gated,
        activation="gelu_new" if gated else "relu",
        bias_per_layer=all(
            getattr(block.layer[0].SelfAttention, "relative_attention_bias", None) is not None for block in blocks
        ),
        relative_attention_num_buckets=bias.num_embeddings,
    )


def refuses_cuda_layers(device: torch.device, dtype: torch.dtype, d_kv: int) -> str | None:
    """Why layers are not computed by the kernels for CUDA, as a sentence; None if they are."""
    if device.type != "cuda":
        return f"the model is on {device}; allowed: cuda"
    return next(obstacles_of(device, dtype, d_kv), None) or unproven_on(device)


class SharedEncoder(Encoder):
    """The blocks, where a bias table is asked of its module, which may be patched, quantised or on another device.

    Attributes:
        device: where the next call computes.
        tables: the bias tables of the running call while every layer is joined, when no norm is called any more.
    """

    device: torch.device = torch.device("cpu")
    tables: Sequence[Tensor] | None = None

    def __init__(self, *arguments: Any, **factory: Any) -> None:
        super().__init__(*arguments, **factory)
        self.kept: dict[Block, Kept] = {}
        self.streamed: dict[Block, StreamedProducts] = {}
        self.quantised: dict[Block, QuantisedLayer] = {}

    def bias_table(self, index: int, device: torch.device | None = None) -> Tensor:
        if self.tables is not None:
            return self.tables[index if self.bias_per_layer else 0]
        block: Any = self.block[index if self.bias_per_layer else 0]
        embedding = block.layer[0].SelfAttention.relative_attention_bias
        buckets = torch.arange(self.num_buckets, device=device or self.device)
        return distance_table(embedding(buckets, out_dtype=torch.float32), self.max_distance)

    def finish(self, residual: Tensor, dtype: torch.dtype) -> Tensor:
        if self.tables is None:
            return super().finish(residual, dtype)
        norm: Any = self.final_layer_norm
        weight = norm.weight.to(residual)
        return F.rms_norm(residual, residual.shape[-1:], weight, norm.variance_epsilon).to(dtype)

    def join(
        self, dtype: torch.dtype, kind: type[Kept] | None, by: InstructionSet | None, by_cuda: bool
    ) -> Counter[str]:
        """Joins the products of every layer where that changes nothing; returns why other layers are as they are.

        Those of a ``kind`` are kept for later calls, as long as the layer's weights stay the same. Without kernels for
        the CPU, ``by`` is None. With ``by_cuda`` the kernels for CUDA compute what is between products, of layers that
        are not joined as well.
        """
        reasons: Counter[str] = Counter()
        quantised: dict[Block, QuantisedLayer] = {}
        shared = _shared_on_cuda() if by_cuda else None
        finished = JoinedProducts if shared is None else shared.runner
        block: Any
        for block in self.block:
            if reason := self.refuses(block, dtype, kind is not None, by is not None, self.device):
                reasons[reason] += 1
                if by_cuda and has_plain_norms(block, self.device):
                    block.runner = finished(norm_weights(block), ModuleProducts(block))
                continue
            if is_streamed(block):
                block.runner = finished(norm_weights(block), self._streamed_products(block))
                continue
            if by is not None and has_quantised(block):
                quantised[block] = self._told_of(block, dtype, by)
                block.runner = quantised[block].runner(block)
                continue
            weights = fuse(block)
            if kind is not None:
                block.runner = self._keep(block, weights, kind, dtype).runner(weights)
            elif by is not None:
                block.runner = JoinedKernels(weights.norms, kernels_on(block, weights.products, dtype))
            else:
                block.runner = finished(weights.norms, FusedProducts(weights))
        self.quantised = quantised
        if not reasons:
            self.tables = self._tables(dtype, shared)
        return reasons

    def _streamed_products(self, block: Block) -> StreamedProducts:
        """Those of before, where the layer's weights have their places still."""
        products = self.streamed.get(block)
        if products is None or not products.are_of(block, self.device):
            self.streamed[block] = products = StreamedProducts(block, self.device)
        return products

    def _tables(self, dtype: torch.dtype, shared: Any) -> Sequence[Tensor]:
        """The bias tables of all layers that have one, at once where nothing is to be done to their weights.

        Then ``shared``, what layers on CUDA share unless it is None, is told of all as well.
        """
        count = len(self.block) if self.bias_per_layer else 1
        blocks: Any = self.block
        embeddings = [blocks[index].layer[0].SelfAttention.relative_attention_bias for index in range(count)]
        if count == 1 or not all(is_plain_table(embedding, self.device) for embedding in embeddings):
            return [self.bias_table(index) for index in range(count)]
        weights = torch.cat([embedding.weight for embedding in embeddings], dim=1).float()
        biases = distance_table(weights, self.max_distance).contiguous()
        if shared is not None:
            shared.take_biases(blocks, biases)
            biases = biases.to(dtype)
        return biases.chunk(count)

    @staticmethod
    def refuses(
        block: Any, dtype: torch.dtype, is_kept: bool, by_kernels: bool, device: torch.device | None = None
    ) -> str | None:
        """Why a layer cannot be joined at this moment; see :func:`comfy_nai_t5.fused.refuses`."""
        if is_streamed(block):
            return refuses_streamed(block, device)
        if by_kernels and has_quantised(block):
            return refuses_bytes(block, device)
        return refuses(block, dtype, dtypes_cast(is_kept, by_kernels), device)

    def _told_of(self, block: Block, dtype: torch.dtype, by: InstructionSet) -> QuantisedLayer:
        """What the kernels are told of a layer, once for as long as its weights are the same."""
        told = self.quantised.get(block)
        return told if told is not None and told.is_made_of(block, dtype) else QuantisedLayer(block, dtype, by)

    def _keep(self, block: Block, weights: FusedWeights, kind: type[Kept], dtype: torch.dtype) -> Kept:
        """What is kept of a layer, made anew where it is of another kind or of other weights."""
        kept = self.kept.get(block)
        if not isinstance(kept, kind) or not kept.is_made_of(block):
            self.kept[block] = kept = kind(block, weights, dtype)
        return kept

    def release(self) -> None:
        """Ends what :meth:`join` began: between calls the modules are the only owners of their weights."""
        self.tables = None
        block: Any
        for block in self.block:
            block.runner = None


class SharedStack(T5EncoderStack):
    """The encoder on the modules of ``t5``, computing in ``dtype``.

    The weights' own dtype is theirs: a module casts its weight to that of its input. ``scales`` keep float16 in range;
    by default those published for a model of this size.

    Args:
        wish: ``"auto"`` joins products wherever that changes nothing, ``"fused"`` makes anything else an error,
            ``"packed"`` keeps those that are joined in an order of their own, ``"int8"`` in 8 bits, ``"separate"``
            joins none.
        compiled: have torch compile the encoder, on its first call with all products joined.

    Attributes:
        is_hooked: whether ComfyUI may change weights in place now, by hooks, so that nothing made of them can be kept.
    """

    encoder: SharedEncoder
    encoder_class = SharedEncoder

    def __init__(
        self,
        t5: nn.Module,
        dtype: torch.dtype,
        scales: StackScales | None = None,
        attention: AttentionChoice = "auto",
        wish: str = "auto",
        compiled: bool = False,
    ) -> None:
        config = config_of(t5)
        if scales is None and dtype == torch.float16:
            scales = published_scales(config)
        super().__init__(config, "separate", NoInit, scales, device="meta", attention=attention)
        self.compute_dtype = dtype
        self.wish, self.compiled = wish, compiled
        self._compiled_runner: StackRunner | None = None
        self.told = ""
        self.is_hooked = False
        _take_modules(self, t5)

    @property
    def dtype(self) -> torch.dtype:
        return self.compute_dtype

    @property
    def device(self) -> torch.device:
        """Where the next call computes; weights that are elsewhere come there layer by layer."""
        return self.encoder.device

    @device.setter
    def device(self, device: torch.device) -> None:
        self.encoder.device = device

    @property
    def is_kept(self) -> bool:
        """Whether the next call's products are kept ones where they can be joined."""
        return self.wish in KEPT and not self.is_hooked

    @property
    def _kernels(self) -> KernelsBackend:
        return best(INT8_KERNELS if self.wish == "int8" and self.is_kept else KERNELS)

    @property
    def takes_kernels(self) -> bool:
        """Whether joined products are computed by the kernels."""
        kernels = self._kernels
        if self.compiled or not takes_kernels(self.device, self.dtype, kernels):
            return False
        inputs = (self.config.d_model, self.config.num_heads * self.config.d_kv, self.config.d_ff)
        blocks: Any = self.encoder.block
        return not any(size % kernels.unit for size in inputs) and all(
            refuses_mathematics(block) is None for block in blocks
        )

    @property
    def groups_to_be_joined(self) -> list[list[Any]]:
        """The modules of each group whose weights are to lie side by side in ComfyUI's dynamic memory."""
        if self.wish == "separate":
            return []
        return [group for block in self.encoder.block if refuses_streamed(block) is None for group in groups(block)]

    @property
    def takes_cuda_layers(self) -> bool:
        """Whether what is between products is computed by the kernels for CUDA."""
        is_free = not self.compiled and self.wish != "separate"
        return is_free and refuses_cuda_layers(self.device, self.dtype, self.config.d_kv) is None

    def forward(self, *inputs: Any, **options: Any) -> Tensor:
        """See :class:`T5EncoderStack`.

        Raises:
            ValueError: the fused layout was asked for, and is impossible with the weights as they are.
        """
        if self.wish == "separate":
            return super().forward(*inputs, **options)
        # What is joined belongs to one call, so that threads go one after the other.
        with self.turns.change():
            try:
                by_kernels = self.takes_kernels and not torch_is_needed() and prepare_kernels() is None
                kind = KEPT[self.wish][0 if by_kernels else 1] if self.is_kept else None
                by = self._kernels.instructions if by_kernels else None
                by_cuda = self.takes_cuda_layers and not torch_is_needed()
                reasons = self.encoder.join(self.dtype, kind, by, by_cuda)
                streamed = any(map(is_streamed, self.encoder.block))
                self._tell(reasons, streamed)
                self._compile_if(self.compiled and not reasons and not streamed)
                with torch.cuda.device(self.device) if by_cuda and self.device.type == "cuda" else nullcontext():
                    return super().forward(*inputs, **options)
            finally:
                self.encoder.release()

    def _tell(self, reasons: Counter[str], streamed: bool) -> None:
        text = self._described(reasons, streamed)
        if text != self.told:
            log.info("T5 (NAI): %s", text)
        self.told = text

    def _compile_if(self, wanted: bool) -> None:
        """A compiled encoder sees rows of few lengths; while a layer is not joined, it runs uncompiled."""
        if wanted and self._compiled_runner is None:
            self._compiled_runner = compile_stack(self).runner
        self.runner = self._compiled_runner if wanted else None

    def expected_layout(self, streamed: bool = False) -> str:
        """What the layout will be, as far as it can be known before the weights are on their device.

        ``streamed`` is whether they will be in ComfyUI's dynamic memory.
        """
        if self.wish == "separate":
            return "separate layout, as chosen"
        blocks: Any = self.encoder.block
        how = (self.dtype, self.is_kept, self.takes_kernels)
        found = [refuses_streamed(block) if streamed else self.encoder.refuses(block, *how) for block in blocks]
        return self._described(Counter(filter(None, found)), streamed)

    def _described(self, reasons: Counter[str], streamed: bool) -> str:
        """The layout in words; an error where the fused one was asked for and a layer cannot be joined."""
        if reasons and self.wish == "fused":
            raise ValueError(f"the T5 cannot run in the fused layout: {next(iter(reasons))}; choose the layout auto")
        joined = f"{self.wish if self.is_kept else 'fused'} layout"
        if streamed:
            joined += " in ComfyUI's dynamic memory"
        elif self.takes_kernels:
            joined += f" with {self._kernels.instructions.title} kernels"
            blocks: Any = self.encoder.block
            joined += ", quantised weights" if any(map(has_quantised, blocks)) else ""
        text = describe_layout(reasons, len(self.encoder.block), joined)
        if self.takes_cuda_layers:
            text += "; norms, gates and attention by kernels for CUDA"
        if not self.compiled or not (reasons or streamed):
            return text
        return f"{text}; not compiled, which needs every layer joined, and its weights to stay where they are"


def describe_layout(reasons: Counter[str], layers: int, joined: str) -> str:
    """Which layout so many layers run in, ``joined`` if they can, and why those that are not joined are not."""
    if not reasons:
        return joined
    why = "; ".join(reasons)
    apart = reasons.total()
    return f"separate layout: {why}" if apart == layers else f"{joined} but for {apart} of {layers} layers: {why}"


def _shared_on_cuda() -> Any:
    """What the layers of a call share that the kernels for CUDA compute; imported where there is Triton."""
    from comfy_nai_t5.cuda_layer import OfTheCall

    return OfTheCall()


def _take_modules(stack: nn.Module, t5: nn.Module) -> None:
    """Puts every innermost module of ``t5`` into the place of the same name."""
    for name, module in t5.named_modules():
        if name and next(module.children(), None) is None:
            parent, _, place = name.rpartition(".")
            setattr(stack.get_submodule(parent), place, module)
