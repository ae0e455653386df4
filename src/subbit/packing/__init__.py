"""Compressed linears as the bytes of a file, and back, exactly."""
