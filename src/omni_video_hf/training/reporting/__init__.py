"""What a run tells: losses by task, previews, metrics, its summary and push."""
