"""Training of every part and stage of Omni-Video Shapes."""
