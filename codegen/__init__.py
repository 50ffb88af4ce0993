"""graphwright.codegen."""
