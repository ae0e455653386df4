"""The two errors that subbit raises on purpose."""

__all__ = ["CheckpointError", "UserError"]


class UserError(Exception):
    """A mistake of the user: one line that says what is wrong, where, and what to do (exit code 2)."""


class CheckpointError(UserError):
    """A compressed checkpoint that is incomplete, altered or from another format version."""
