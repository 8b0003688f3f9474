"""What a run keeps: checkpoints, random states, its lock, its result."""
