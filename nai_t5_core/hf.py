"""The drop-in classes for transformers' encoders, under the names by which saved pipelines know them."""

from nai_t5_core.diffusers.cached_drop_in import CachedT5EncoderModel as CachedT5EncoderModel
from nai_t5_core.diffusers.drop_in import NAIT5EncoderModel as NAIT5EncoderModel

# Diffusers looks beside a class for the base that says how it is loaded.
from nai_t5_core.diffusers.drop_in import PreTrainedModel as PreTrainedModel
