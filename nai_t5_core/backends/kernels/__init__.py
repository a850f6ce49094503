"""A block of a T5 encoder on processors with AVX512-BF16, in bfloat16 or float32, written in C++.

``tiles.h`` has the product that everything is made of; ``products.cpp`` and ``attention.cpp``, what a block computes
with it; ``block.cpp``, a block. ``kernels.h`` says what each function does.
:mod:`nai_t5_core.backends.kernels.build` compiles them on first use, or when asked to (``nai-t5 kernels build``);
:mod:`nai_t5_core.backends.kernels.calls` calls them, and
:mod:`nai_t5_core.backends.kernels.runners` has blocks computed by them.
"""
