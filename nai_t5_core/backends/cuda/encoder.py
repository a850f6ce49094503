"""An encoder run by the kernels for CUDA: ids and mask in, hidden states out."""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from nai_t5_core.backends.cuda.attention_shapes import USUAL, AttentionShapes
from nai_t5_core.backends.cuda.card import card_of
from nai_t5_core.backends.cuda.card_choice import choice_for
from nai_t5_core.backends.cuda.device_refusals import missing_to_overlap
from nai_t5_core.backends.cuda.documents import document_table, has_holes
from nai_t5_core.backends.cuda.refusals import refuses_for_good, refuses_now
from nai_t5_core.model.encoder import T5EncoderStack
from nai_t5_core.model.inputs import check_ids, moved
from nai_t5_core.model.packing import Packing, PaddingPolicy, pack_batch

if TYPE_CHECKING:
    from nai_t5_core.backends.cuda.card import Card
    from nai_t5_core.backends.cuda.examined import ExaminedStack
    from nai_t5_core.backends.cuda.torch_products import Products

ProductsChoice = Literal["auto", "torch", "torch-float32", "triton", "triton-overlapping", "8-bit"]
PRODUCTS_CHOICES: tuple[ProductsChoice, ...] = get_args(ProductsChoice)


@dataclass(frozen=True)
class Encoded:
    """Hidden states [batch, length, d_model], and whether all of them are finite: int32 [1], 1 or 0, on the device.

    Reading ``finite`` waits for the device; encoding does not.
    """

    hidden: Tensor
    finite: Tensor


def cuda_encoder(
    stack: T5EncoderStack, eager: bool = False, products: ProductsChoice = "auto", record_at: int = 1
) -> CudaEncoder:
    """An encoder that computes what ``stack`` does, from the same weights, in fewer launches.

    Args:
        stack: in the fused layout, in float16 or bfloat16 on CUDA.
        eager: launch every kernel in every call. Otherwise packed rows of up to 1024 tokens run from CUDA graphs, one
            for each of a few sizes, recorded at the first use of a size.
        products: ``"torch"``; ``"torch-float32"``, whose outputs are not rounded before they are added to the residual;
            ``"triton"``, which multiplies few rows by our own kernel where it was measured, or is estimated, to be
            as fast or faster; ``"triton-overlapping"``, whose launches overlap as well, for compute capability 9.0 and
            later; or ``"auto"``: what ``nai-t5 doctor`` measured on this card, else a table, see
            :mod:`nai_t5_core.backends.cuda.card_choice`.
        record_at: the call of a size at which its graph is recorded. By default it is the first, which takes some
            hundredths of a second longer; with 2, sizes that are met once are launched kernel by kernel.

    Raises:
        ValueError: the kernels cannot run this stack, see :func:`nai_t5_core.backends.cuda.refusals.refuses`; unknown
            products, a torch before 2.8 with ``"torch-float32"``, or a Triton before 3.5 with
            ``"triton-overlapping"``; ``"auto"`` on a card of AMD's on which nothing was measured; graphs on the CPU;
            ``record_at`` below 1.
    """
    encoder = encoder_beside(stack, eager, products, record_at)
    encoder.kept = stack
    return encoder


def encoder_beside(stack: T5EncoderStack, eager: bool, products: ProductsChoice, record_at: int = 1) -> CudaEncoder:
    """:func:`cuda_encoder` for a stack that holds the result, which keeps no reference back: a cycle is freed late."""
    if products not in PRODUCTS_CHOICES:
        raise ValueError(f"unknown products {products!r}; allowed: {', '.join(PRODUCTS_CHOICES)}")
    if products == "torch-float32" and not hasattr(torch.ops.aten.mm, "dtype"):
        raise ValueError(f"products='torch-float32' needs torch 2.8, this is {torch.__version__}; take 'torch'")
    if reason := refuses_for_good(stack):
        raise ValueError(f"the kernels for CUDA cannot run this encoder: {reason}; call the encoder itself")
    if record_at < 1:
        raise ValueError(f"record_at={record_at}; allowed: from 1 on, the first call of a size")
    card = card_of(stack.device)
    if products == "auto" and (reason := unproven_on(stack.device)):
        raise ValueError(f"the kernels for CUDA are not taken here: {reason}")
    if products == "triton-overlapping":
        if not (card and card.can_overlap):
            raise ValueError(
                "products='triton-overlapping' needs an NVIDIA GPU of compute capability 9.0; take 'triton'"
            )
        if missing := missing_to_overlap():
            raise ValueError(f"products='triton-overlapping' cannot be taken here: {missing}; take 'triton'")
    if not eager and stack.device.type != "cuda":
        raise ValueError(f"the model is on {stack.device}; CUDA graphs need CUDA, elsewhere give eager=True")
    shapes = shapes_for(card, stack.config.d_kv)
    return CudaEncoder(stack, eager, products_for(products, card), shapes, record_at)


def unproven_on(device: torch.device) -> str | None:
    """See :attr:`nai_t5_core.backends.cuda.card_choice.Choice.unproven`."""
    card = card_of(device)
    return None if card is None else choice_for(card).unproven


class CudaEncoder:
    """See :func:`cuda_encoder`. Weights may be changed or replaced at any time.

    Attributes:
        kept: the stack, to keep it alive; None where the stack holds this object.
        graphs: the CUDA graphs; None if every kernel is launched in every call.
    """

    def __init__(
        self,
        stack: T5EncoderStack,
        eager: bool,
        products: Products,
        shapes: AttentionShapes = USUAL,
        record_at: int = 1,
    ) -> None:
        from nai_t5_core.backends.cuda.block import BiasTables
        from nai_t5_core.backends.cuda.graphs import GraphRunner

        self.kept: T5EncoderStack | None = None
        self._stack = weakref.ref(stack)
        self.graphs = None if eager else GraphRunner(stack.device, shapes=shapes, record_at=record_at)
        self._shapes = shapes
        self._products = products
        self._biases = BiasTables(stack)
        self._examined = self._read()

    def _read(self) -> ExaminedStack:
        from nai_t5_core.backends.cuda.examined import ExaminedStack

        return ExaminedStack(self.stack, self._biases.tables)

    @property
    def device(self) -> torch.device:
        """The device that this encoder was made for."""
        return self._biases.tables.device

    @property
    def stack(self) -> T5EncoderStack:
        """The stack that this encoder computes."""
        stack = self._stack()
        assert stack is not None
        return stack

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        padding: PaddingPolicy = "exact",
        extra_pad: int = 0,
    ) -> Tensor:
        """Hidden states [batch, length, d_model], as :meth:`nai_t5_core.model.encoder.T5EncoderStack.forward` gives
        them.

        Prompts whose mask has holes, and masks of 3 and 4 dimensions, are computed by the stack itself.

        Raises:
            ValueError: inputs that the stack refuses; or the kernels cannot run the stack now (gradients, hooks, other
                weights).
        """
        return self.encode(input_ids, attention_mask, padding, extra_pad).hidden

    def encode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        padding: PaddingPolicy = "exact",
        extra_pad: int = 0,
    ) -> Encoded:
        """As a call, and also tells whether the result is finite."""
        from nai_t5_core.backends.cuda.examined import refuse

        refuse(self._examine())
        encoded = self._encode(input_ids, attention_mask, padding, extra_pad)
        return self._by_stack(input_ids, attention_mask, padding, extra_pad) if encoded is None else encoded

    def encode_unless_refused(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        padding: PaddingPolicy = "exact",
        extra_pad: int = 0,
    ) -> Encoded | None:
        """As :meth:`encode`; None where the kernels cannot run the stack now, see :meth:`refusal`, or this mask."""
        return None if self._examine() else self._encode(input_ids, attention_mask, padding, extra_pad)

    def _encode(
        self, input_ids: Tensor, attention_mask: Tensor | None, padding: PaddingPolicy, extra_pad: int
    ) -> Encoded | None:
        stack = self.stack
        if attention_mask is not None and attention_mask.ndim != 2:
            return None
        if input_ids.ndim != 2:
            raise ValueError(f"input_ids must be [batch, length]; got shape {list(input_ids.shape)}")
        check_ids(input_ids, stack.config.vocab_size)
        mask = None if attention_mask is None else attention_mask != 0
        batch, length = input_ids.shape
        packing = pack_batch(mask, batch, length, padding, extra_pad)
        if has_holes(packing.groups):
            return None
        index = packing.index
        packing = replace(packing, index=None if index is None else moved(index, stack.device))
        ids = _packed_ids(packing, index, input_ids)
        if packing.tokens == 0:
            empty = torch.zeros(0, stack.config.d_model, dtype=stack.dtype, device=stack.device)
            return Encoded(packing.unpack(empty), torch.ones(1, dtype=torch.int32, device=stack.device))
        with _current(stack.device):
            hidden, finite = self._run(ids, packing)
        return Encoded(packing.unpack(hidden), finite)

    def refusal(self) -> str | None:
        """Why the kernels cannot run the stack now; None if they can."""
        return refuses_now() or (None if self._examined.is_unchanged else self._refusal_of_the_changed())

    def _refusal_of_the_changed(self) -> str | None:
        before, now = self._biases.tables.device, self.stack.device
        has_moved = f"it was on {before} and is on {now} now; make another with cuda_encoder()"
        return refuses_for_good(self.stack) or (None if before == now else has_moved)

    def _examine(self) -> str | None:
        """Reads the stack again if it has changed; returns why the kernels cannot run it, None if they can."""
        if reason := refuses_now():
            return reason
        if self._examined.is_unchanged:
            return None
        if (reason := self._refusal_of_the_changed()) is None:
            self._examined = self._read()
        return reason

    def _run(self, ids: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
        """Packed ids to hidden states [tokens, d_model] and whether they are finite."""
        from nai_t5_core.backends.cuda.launches import Documents, Watch

        self._biases.refresh(self.stack)
        encode = partial(self._examined.encode, self._products)
        bucket = self.graphs.bucket(packing.tokens) if self.graphs else None
        shape = self._shapes(bucket or packing.tokens)
        table = document_table(packing.groups, shape.queries)
        if self.graphs and bucket:
            return self.graphs.run(encode, self._examined, bucket, ids, table)
        device = self.stack.device
        count = moved(torch.tensor([packing.tokens], dtype=torch.int32), device)
        finite = torch.ones_like(count)
        documents = Documents(moved(table, device), shape)
        return encode(moved(ids, device), documents, Watch(finite, count)), finite

    def _by_stack(
        self, input_ids: Tensor, attention_mask: Tensor | None, padding: PaddingPolicy, extra_pad: int
    ) -> Encoded:
        hidden = self.stack(input_ids, attention_mask, padding=padding, extra_pad=extra_pad)
        return Encoded(hidden, hidden.sum(dtype=torch.float32).isfinite().int().reshape(1))


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a device the one that Triton launches on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _packed_ids(packing: Packing, index: Tensor | None, input_ids: Tensor) -> Tensor:
    """Packed ids [tokens], on the device of ``input_ids``; ``index`` is the packing's index on the CPU."""
    if input_ids.is_cuda:
        return packing.pack(input_ids)
    return replace(packing, index=index).pack(input_ids)


def shapes_for(card: Card | None, d_kv: int) -> AttentionShapes:
    """How attention over heads of this size is divided on a card; None is a device that is none."""
    return USUAL if card is None else choice_for(card).attention_for(d_kv)


def products_for(choice: ProductsChoice, card: Card | None, may_overlap: bool = True) -> Products:
    """What a choice of products means on a card; None is a device that is none.

    Where launches overlap in an automatic choice, they do only if they ``may_overlap``.
    """
    from nai_t5_core.backends.cuda.byte_products import ByteProducts, byte_configurations_on
    from nai_t5_core.backends.cuda.chosen_products import products_of
    from nai_t5_core.backends.cuda.eight_bit_products import EightBitProducts

    if choice == "auto" and card is not None:
        return products_of(choice_for(card), may_overlap)
    configurations = None if choice.startswith("torch") else byte_configurations_on(card)
    how = (_half_products(choice, card, may_overlap), configurations, card is not None and card.converts_float8)
    if choice == "8-bit":
        return EightBitProducts(*how)
    return ByteProducts(*how, has_overlaps=choice == "triton-overlapping")


def _half_products(choice: ProductsChoice, card: Card | None, may_overlap: bool) -> Products:
    """What computes products with weights in 16 bits."""
    from nai_t5_core.backends.cuda.chosen_products import configurations_on, plain_products_of
    from nai_t5_core.backends.cuda.products import MOST_ROWS, TritonProducts
    from nai_t5_core.backends.cuda.torch_products import TorchProducts, UnroundedTorchProducts

    if choice == "8-bit" and card is not None:
        return plain_products_of(choice_for(card), may_overlap)
    if choice.startswith("triton"):
        return TritonProducts(configurations_on(card), MOST_ROWS if choice == "triton-overlapping" else 0)
    return UnroundedTorchProducts() if choice == "torch-float32" else TorchProducts()
