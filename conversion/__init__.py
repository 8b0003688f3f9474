"""Converts upstream's checkpoint to a repository: `python -m conversion --original omni_ckpts --output DIR`."""
