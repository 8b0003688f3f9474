"""Feature cache: encoders that compute features once, the cache and its files, its builder, imports."""
