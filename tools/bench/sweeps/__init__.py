"""Sweeps: quality against cost over the settings of passes, on real weights."""
