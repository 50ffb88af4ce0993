"""graphwright.runtime."""
