"""Passes that keep keys and values from call to call."""
