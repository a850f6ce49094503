"""The encoder on CUDA in float16 and bfloat16, for inference: few launches per layer, or a CUDA graph of all launches.

``kernels.py`` has the Triton kernels between the products; ``launches.py`` calls them on tensors; ``block.py`` computes
a layer, ``graphs.py`` records CUDA graphs, and ``encoder.py`` has what users call,
:func:`nai_t5_core.backends.cuda.encoder.cuda_encoder`.

Nothing here needs a device to be imported. ``kernels.py`` and what calls it need Triton, which torch brings along on
Linux with CUDA; ``refusals.py`` and ``encoder.py`` can be imported without.
"""
