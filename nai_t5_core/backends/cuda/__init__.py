"""The encoder on CUDA in float16 and bfloat16, for inference: few launches a layer, or a recorded graph of them all.

``kernels.py`` has what lies between the products, in Triton; ``launches.py`` calls it on tensors; ``block.py`` is a
layer, ``graphs.py`` the recordings, ``encoder.py`` what users call:
:func:`nai_t5_core.backends.cuda.encoder.cuda_encoder`.

Nothing here needs a device to be imported. ``kernels.py`` and what calls it need Triton, which torch brings along on
Linux with CUDA; ``refusals.py`` and ``encoder.py`` can be imported without.
"""
