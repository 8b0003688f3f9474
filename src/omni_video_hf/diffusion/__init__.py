"""Flow matching and the losses, as pure functions: no model, no files."""
