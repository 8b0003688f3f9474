"""LoRA of the pipeline: reading and checking files of all common namings, loading, saving and scaling."""
