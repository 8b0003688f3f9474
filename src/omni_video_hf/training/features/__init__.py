"""Features that are computed once: encoders, the cache, its builder."""
