"""The chat at /, and the stream of what happens to experts that it draws."""
