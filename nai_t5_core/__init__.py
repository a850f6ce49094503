"""The T5 text encoder for image and video diffusion models: faster, more exact and easier."""
