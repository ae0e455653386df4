"""Compressed checkpoints on disk: written atomically and resumably, read with suspicion."""
