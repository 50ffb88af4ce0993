"""Passes that take out what changes no value."""
