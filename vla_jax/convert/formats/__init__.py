"""Files that hold tensors, read and written without torch."""
