"""Passes that join products which read the same input."""
