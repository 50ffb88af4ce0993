"""The operations of the `graphwright` namespace, one file a family: reference, shape rule and cost side by side."""
