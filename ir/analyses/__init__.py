"""Analyses: each a pure function of a graph."""
