"""What the pipelines of both versions share: steps, output, loading and saving."""
