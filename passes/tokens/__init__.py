"""Fewer tokens: tokens that are alike are merged from layer to layer."""
