"""A block of a T5 encoder, written in C++ for several instruction sets of processors.

``kernels.h`` says what each function does. ``tiles.h`` has the product that everything is made of; ``rows.h`` and
``weight.h``, what goes into it; ``reading.h`` and ``blocks.h``, how the numbers of a weight are read as they lie in a
file, quantised or not; ``products.cpp`` and ``attention.cpp``, what a block computes with it; ``block.cpp``, a block.
All this is one source for all instruction sets: the folder of each has the registers that it computes with
(``vectors.h``), and what products are computed in (``kinds.h``).

:mod:`nai_t5_core.backends.kernels.sets` lists the sets; :mod:`nai_t5_core.backends.kernels.build` compiles them on
first use, or when asked to (``nai-t5 kernels build``); :mod:`nai_t5_core.backends.kernels.calls` calls them, and
:mod:`nai_t5_core.backends.kernels.runners` has blocks computed by them.
"""
