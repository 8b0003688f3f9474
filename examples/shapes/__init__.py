"""How the default checkpoint, Omni-Video Shapes, is made."""
