"""Training data: tables of media, what is refused, batches of every task."""
