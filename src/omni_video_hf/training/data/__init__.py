"""Training data: tables of media, checks of samples, buckets, collator, batch sampler, streaming."""
