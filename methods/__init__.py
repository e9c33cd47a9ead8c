"""One paper a file, pure functions of tensors."""
