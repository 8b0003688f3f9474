"""The `omni-video` command."""
