"""See :mod:`nai_t5_core.diffusers.adapter`."""

from nai_t5_core import hf as hf  # what saved pipelines name, and diffusers finds only if it was imported
from nai_t5_core.diffusers.adapter import replace_text_encoder as replace_text_encoder
from nai_t5_core.diffusers.adapter import restore_text_encoder as restore_text_encoder
from nai_t5_core.diffusers.cached_drop_in import lazy_text_encoder as lazy_text_encoder
