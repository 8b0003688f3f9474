"""The diffusers pipeline and its parts."""
