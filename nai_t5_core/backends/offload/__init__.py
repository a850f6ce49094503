"""An encoder whose layers rest in the host's memory and are brought to a GPU one after the other, each for its work.

For a card that has no room for a T5 beside its diffusion model: the card holds two layers, the tables of the position
bias and the last norm. Each layer's weights lie in one piece of locked memory, and come in one copy, as the bytes that
they are kept in, while the layer before computes. An encode takes as long as the bus takes for the weights.

``host_memory.py`` locks memory; ``weights.py`` says what of a block is brought, and lays it together; ``mover.py``
copies on a stream of its own; ``ring.py`` has the order: which layer is where, and who waits for what; ``offload.py``
has what users call, and computes by the block's own modules; ``kernels.py`` computes by our kernels for CUDA.
"""
