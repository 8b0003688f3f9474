"""Files of a training run: checkpoints, random generators, the lock of `output_dir`, the result, the export."""
