"""The encoder on CUDA in float16 and bfloat16, for inference: few launches per layer, or a CUDA graph of all launches.

``kernels.py`` has the Triton kernels between the products; ``launches.py`` calls them on tensors; ``block.py`` computes
a layer, ``graphs.py`` records CUDA graphs, and ``encoder.py`` has what users call,
:func:`nai_t5_core.backends.cuda.encoder.cuda_encoder`.

Weights in 8 bits: ``byte_weight.py`` lays them out, ``byte_product_kernel.py`` reads them, ``byte_products.py``
multiplies by them, ``int8.py`` makes them; ``eight_bit_products.py`` has products with both sides in 8 bits, those of
few rows by ``int8_products.py`` and ``int8_product_kernel.py``, and ``byte_kernels.py`` has what lies between them.

Nothing here needs a device to be imported. ``kernels.py`` and what calls it need Triton, which torch brings along on
Linux with CUDA; ``refusals.py`` and ``encoder.py`` can be imported without.
"""
