"""Programs that use the package. They are not installed with it."""
