"""Profiles: the servers of a user, by name, in a TOML file.

    [profile.default]
    address = "gpu-box:7070"
    ca = "~/hvpd/ca.pem"

    [profile.lab]
    address = "lab:7070"
    token_file = "~/hvpd/lab.token"
    insecure = true

The file is `~/.config/hvpd/config.toml`, or $HVPD_PROFILES. Arguments win over
environment variables, and these over the file. A profile's token and certificate go to
the address of the profile only.
"""

import functools
import os
import stat
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from hvpd._errors import InvalidArgumentError

DEFAULT = "default"
"""The profile that counts if none is chosen."""

_TEXTS = ("address", "token", "token_file", "ca", "cert", "key")
_FLAGS = ("tls", "insecure")


class Profile(NamedTuple):
    """The settings of a profile; None for those that it lacks."""

    address: str | None = None
    token: str | None = None
    read_token: Callable[[], str] | None = None
    """Reads the token's file again; None if the token has no file of its own."""
    ca: str | None = None
    cert: str | None = None
    key: str | None = None
    tls: bool | None = None
    insecure: bool = False


def path(environment: Mapping[str, str] = os.environ) -> Path:
    """Return the path of the file."""
    if named := environment.get("HVPD_PROFILES"):
        return Path(named).expanduser()
    base = environment.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(base).expanduser() / "hvpd" / "config.toml"


def load(name: str | None, environment: Mapping[str, str] = os.environ) -> Profile:
    """Return a profile.

    Args:
        name: Its name; None for $HVPD_PROFILE, then for the profile "default" if there
            is one.
        environment: Environment variables.

    Raises:
        InvalidArgumentError: There is no such profile, or the file is wrong.
    """
    wanted = name or environment.get("HVPD_PROFILE")
    file = path(environment)
    if environment.get("HVPD_PROFILES") and not file.exists():
        raise InvalidArgumentError(f"there is no file {file}, which $HVPD_PROFILES names", reason="PROFILE")
    profiles = _read(file)
    found = profiles.get(wanted or DEFAULT)
    if found is None:
        if wanted is None:
            return Profile()
        if not file.exists():
            raise InvalidArgumentError(
                f"there is no profile {wanted!r}, because there is no file {file}", reason="PROFILE"
            )
        raise InvalidArgumentError(
            f"{file} has no profile {wanted!r}; it has {', '.join(sorted(profiles)) or 'none'}", reason="PROFILE"
        )
    return _profile(file, wanted or DEFAULT, found)


def _read(file: Path) -> Mapping[str, Any]:
    try:
        with file.open("rb") as content:
            document = tomllib.load(content)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise InvalidArgumentError(f"cannot read the profiles of {file}: {error.strerror}", reason="PROFILE") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidArgumentError(f"the profiles of {file} are no TOML: {error}", reason="PROFILE") from None
    profiles = document.pop("profile", {})
    if document or not isinstance(profiles, dict) or not all(isinstance(each, dict) for each in profiles.values()):
        raise InvalidArgumentError(
            f"{file} must have tables such as [profile.default], and nothing else", reason="PROFILE"
        )
    return profiles


def _profile(file: Path, name: str, entry: Mapping[str, Any]) -> Profile:
    where = f"profile {name!r} of {file}"
    if unknown := sorted(entry.keys() - {*_TEXTS, *_FLAGS}):
        raise InvalidArgumentError(
            f"{where} has unknown keys {', '.join(unknown)}; known are {', '.join((*_TEXTS, *_FLAGS))}",
            reason="PROFILE",
        )
    for key, value in entry.items():
        wanted = str if key in _TEXTS else bool
        if not isinstance(value, wanted):
            raise InvalidArgumentError(
                f"{where}: {key} must be a {'text' if wanted is str else 'boolean'}, got {value!r}", reason="PROFILE"
            )
    values = dict(entry)
    for key in ("ca", "cert", "key"):
        if key in values:
            values[key] = str(Path(values[key]).expanduser())
    if "token" in values:
        _check_private(file)
    if "token_file" in values:
        if "token" in values:
            raise InvalidArgumentError(f"{where} has both token and token_file: keep one", reason="PROFILE")
        values["read_token"] = functools.partial(_token, Path(values.pop("token_file")).expanduser(), where)
        values["token"] = values["read_token"]()
    return Profile(**values)


def _token(file: Path, where: str) -> str:
    try:
        token = file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgumentError(f"{where}: cannot read token_file {file}: {error}", reason="PROFILE") from None
    _check_private(file)
    return token


def _check_private(file: Path) -> None:
    """Raise InvalidArgumentError if other users can read a file."""
    if file.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
        raise InvalidArgumentError(
            f"{file} has a token, and other users can read the file: chmod 600 {file}", reason="PROFILE"
        )
