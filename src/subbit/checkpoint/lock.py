"""One process at a time writes a checkpoint: a lock that ends with the process, however it ends."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO

from subbit.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["LOCK_FILE", "lock_directory"]

LOCK_FILE = "lock"


def lock_directory(directory: Path, work: Path) -> IO[str] | None:
    """Take the lock of an output directory for this process, until the file that is returned is closed.

    Args:
        work: the existing folder in ``directory`` that the lock's file is in.

    Returns:
        None where the file system has no locks.

    Raises:
        UserError: another process has it.
    """
    if fcntl is None:
        return None
    file = (work / LOCK_FILE).open("a+", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        holder = file.read().strip()
        file.close()
        raise UserError(
            f"{directory} is being written by another process ({holder or 'unknown'}); wait for it, or stop it first"
        ) from None
    except OSError:  # not on this file system
        file.close()
        return None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file
