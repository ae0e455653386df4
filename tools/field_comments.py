"""An extension of griffe, which reads the source for the API pages: the comment behind a field is its docstring."""

from __future__ import annotations

import re
from typing import Any

import griffe


class FieldComments(griffe.Extension):
    """``samples: int = 32  # windows`` in a class is shown with "windows"."""

    def on_attribute(self, *, attr: griffe.Attribute, loader: griffe.GriffeLoader, **_: Any) -> None:
        """Give a field the comment at the end of its last line."""
        in_class = attr.parent is not None and attr.parent.is_class
        found = re.search(r"  # (.+)$", attr.lines[-1]) if in_class and attr.lines and attr.docstring is None else None
        if found:
            attr.docstring = griffe.Docstring(found.group(1), parent=attr)
