"""Values that records of several files share: checkpoints, reasons for a padding policy, outputs of `encode_prompt`."""

V1_1_XXL = "google/t5-v1_1-xxl"
UMT5_XXL = "google/umt5-xxl"

NO_MASK = "no mask goes in, so text attends to pads, and the transformer reads every row"
ALL_READ = "pads are masked in the encoder, but no mask comes out: the transformer reads the rows of the pads"
MASKED = "the returned mask keeps the transformer's attention off pad rows"
ZEROED = "the pipeline itself puts zeros in the pad rows"

WITH_MASKS = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
