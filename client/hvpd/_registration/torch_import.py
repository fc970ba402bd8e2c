"""Imports torchax, which has a jax function for each operator of PyTorch. Needs jax.

torchax 0.0.13 does not import under torch 2.13 by itself: two of its tables name
overloads for named tensors, which torch has removed. It also changes settings of torch,
jax and the environment. This file supplies names in place of the removed overloads, and
puts the settings back.
"""

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import Any

import jax
import torch

from hvpd._errors import MissingExtraError

_TELEMETRY = "ENABLE_RUNTIME_UPTIME_TELEMETRY"

_OPTIONS = "jax_pjrt_client_create_options"

_lock = threading.Lock()


def operators() -> Any:
    """Return torchax's table of operators, by overload or by packet of overloads.

    Raises:
        MissingExtraError: torchax is not installed.
    """
    with _lock:
        try:
            with _removed_overloads(), _settings():
                import torchax
                import torchax.ops.jaten
                import torchax.ops.ops_registry
        except ImportError as error:
            raise MissingExtraError(
                f"registering a module needs torchax here: pip install 'hvpd[torch]' ({error})"
            ) from error
    return torchax.ops.ops_registry.all_aten_ops


@contextlib.contextmanager
def _removed_overloads() -> Iterator[None]:
    """Give a new object for each overload for named tensors that torch does not have.

    An object that is no operator has no effect in torchax's tables.
    """
    packet: Any = torch._ops.OpOverloadPacket  # noqa: SLF001 - torch has no public name for it
    found = packet.__getattr__

    def getattr_(self: Any, key: str) -> Any:
        try:
            return found(self, key)
        except AttributeError:
            if "name" not in key.lower():
                raise
            return object()

    packet.__getattr__ = getattr_
    try:
        yield
    finally:
        packet.__getattr__ = found


@contextlib.contextmanager
def _settings() -> Iterator[None]:
    """Restore what an import of torchax changes: settings of torch, jax and the
    environment.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    telemetry = os.environ.get(_TELEMETRY)
    options = getattr(jax.config, _OPTIONS, None)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        if telemetry is None:
            os.environ.pop(_TELEMETRY, None)
        if hasattr(jax.config, _OPTIONS):
            jax.config.update(_OPTIONS, options)
