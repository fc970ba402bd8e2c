"""Where a store is: a directory, or a URL of an object store."""

from pathlib import Path

from hvpd._wire import codec
from hvpd_server.config import Config
from hvpd_server.store.object_store import ObjectStore
from hvpd_server.store.objects import Directory, Objects


def objects_of(config: Config) -> Objects:
    """Return the files of the settings' store.

    Raises:
        ServiceError: The store cannot be used.
    """
    if isinstance(config.store, Path):
        return Directory(config.store)
    return ObjectStore(config.store, local_directory(config), config.store_cache_size)


def local_directory(config: Config) -> Path:
    """Return the directory of this machine for a store: each URL has one of its own."""
    if isinstance(config.store, Path):
        return config.store
    return config.store_cache / codec.digest(config.store.encode())[:16]
