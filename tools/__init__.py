"""The `graphwright` command and what stands behind it."""
