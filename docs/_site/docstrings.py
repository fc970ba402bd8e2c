"""An extension of griffe for hvpd's docstrings: their section `Example` holds doctests,
which griffe knows by the name `Examples` only.
"""

from typing import Any

import griffe


class Examples(griffe.Extension):
    """Rename the section."""

    def on_instance(self, *, obj: griffe.Object, **others: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
