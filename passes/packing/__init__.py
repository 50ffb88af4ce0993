"""Passes that leave out tokens which are not there."""
