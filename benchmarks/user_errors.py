"""What all scripts here do with a mistake of the user."""

from __future__ import annotations

import sys
from collections.abc import Callable


def run(main: Callable[[], object]) -> None:
    """Call ``main``; a UserError is one line and exit code 2, as in ``subbit``."""
    from subbit.errors import UserError  # not above: transformers would take kernels.py for a package

    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
