"""Passes that recognise what a model spells out: attention, norms, rotary embeddings, gated feed-forwards."""
