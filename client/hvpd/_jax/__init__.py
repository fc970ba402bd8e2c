"""Products, values and gradients of a server as operations of jax.

Other modules call `load`, because all modules here but this one need jax.
"""

import importlib
from typing import Any

from hvpd._errors import MissingExtraError


def load(call: str) -> Any:
    """Return `hvpd._jax.functions`.

    Args:
        call: The caller's call, for the message.

    Raises:
        MissingExtraError: jax is not installed.
    """
    try:
        return importlib.import_module("hvpd._jax.functions")
    except ImportError as error:
        raise MissingExtraError(f"{call} needs jax here: pip install 'hvpd[jax]' ({error})") from error
