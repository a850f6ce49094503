"""Training: batches from text files, the loop, checkpoints from which a run resumes with the same losses, and export.

``config`` imports no torch; start with :func:`nai_t5_core.training.config.read_config` and
:func:`nai_t5_core.training.loop.train`.
"""
