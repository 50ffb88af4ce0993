"""graphwright.tools."""
