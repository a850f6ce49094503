"""See :mod:`nai_t5_core.diffusers.encode_prompt`."""

from nai_t5_core.diffusers.encode_prompt import encode_prompt as encode_prompt
