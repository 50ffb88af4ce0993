"""graphwright.ir."""
