"""A benchmark of decoding: tokens that follow a prompt, one at a time."""
