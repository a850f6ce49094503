"""Caption sets: the embeddings of many prompts, computed once and kept in one folder.

A plan (:mod:`.plan`) reads captions, finds which prompts are unique, and cuts them into shards. Workers
(:mod:`.worker`) make one file of each shard; what hands the shards out (:mod:`.processes`, :mod:`.on_ray`) only knows
their numbers. :class:`.reading.EmbeddingDataset` reads a set, and :mod:`.exports` writes it in the forms of trainers.
"""
