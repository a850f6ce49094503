"""The drop-in class for transformers' encoders, under the name by which saved pipelines know it."""

from nai_t5_core.diffusers.drop_in import NAIT5EncoderModel as NAIT5EncoderModel

# Diffusers looks beside a class for the base that says how it is loaded.
from nai_t5_core.diffusers.drop_in import PreTrainedModel as PreTrainedModel
