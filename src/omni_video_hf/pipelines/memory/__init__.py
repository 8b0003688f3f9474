"""Memory profiles of the pipeline, and tables of the memory that they need."""
