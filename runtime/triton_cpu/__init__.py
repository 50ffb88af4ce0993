"""A CPU backend for upstream Triton: TTIR in, machine code out."""
