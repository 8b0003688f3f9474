"""Reports of a training run: callbacks, losses by task, previews, metrics, model card and push."""
