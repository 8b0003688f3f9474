"""Reading, checking and loading LoRA files."""
