"""Passes that leave layers out."""
