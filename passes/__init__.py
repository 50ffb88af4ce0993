"""graphwright.passes."""
