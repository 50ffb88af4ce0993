"""Lowering: each operation as a function from output indices to a value."""
