"""Omni-Video (arXiv 2507.06119) for transformers and diffusers."""

__version__ = "0.1.0"
