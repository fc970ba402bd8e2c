"""Settings of the server: each a flag of `hvpd serve` and an environment variable. No logic of the server's is here."""

import argparse
import dataclasses
import ipaddress
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

AUTO, OFF = "auto", "off"
"""Of --vector-port: where all are on this machine, a free one; none."""

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_bytes(text: str) -> int:
    """A number of bytes: `512M`, `16G`, `1073741824`."""
    number, unit = text.strip().upper().removesuffix("B").removesuffix("I"), ""
    if number and number[-1] in _UNITS:
        number, unit = number[:-1], number[-1]
    try:
        size = int(float(number) * _UNITS[unit])
    except (ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise argparse.ArgumentTypeError(f"expected a size such as 512M or 16G, got {text!r}")
    return size


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"expected a port from 0 to 65535, got {text!r}")
    return int(text)


def _vector_port(text: str) -> str:
    if text.lower() in (AUTO, OFF):
        return text.lower()
    try:
        return str(_port(text))
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"expected a port from 0 to 65535, {AUTO} or {OFF}, got {text!r}") from None


def _host(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError(f"expected a name or an address, got {text!r}: 0.0.0.0 is all of IPv4")
    return text.strip()


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of seconds, got {text!r}")
    return value


def _width(text: str) -> int:
    value = _positive(text)
    if value & (value - 1):
        raise argparse.ArgumentTypeError(f"expected a power of two, got {text!r}")
    return value


def _level(text: str) -> str:
    if text.upper() not in ("DEBUG", "INFO", "WARNING", "ERROR"):
        raise argparse.ArgumentTypeError(f"expected DEBUG, INFO, WARNING or ERROR, got {text!r}")
    return text.upper()


def _format(text: str) -> str:
    if text.lower() not in ("text", "json"):
        raise argparse.ArgumentTypeError(f"expected text or json, got {text!r}")
    return text.lower()


def _flag(text: str) -> bool:
    values = {
        "1": True,
        "true": True,
        "yes": True,
        "on": True,
        "0": False,
        "false": False,
        "no": False,
        "off": False,
        "": False,
    }
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"expected 1 or 0, got {text!r}")
    return values[text.lower()]


def _default_store() -> Path:
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "hvpd"


def _setting(parse: Callable[[str], Any], default: Any, meaning: str, metavar: str) -> Any:
    fill = {"default_factory": default} if callable(default) else {"default": default}
    return dataclasses.field(**fill, metadata={"parse": parse, "help": meaning, "metavar": metavar})


@dataclasses.dataclass(frozen=True)
class Config:
    """What can be set. A field `some_name` is the flag `--some-name` and the variable `$HVPD_SOME_NAME`."""

    host: str = _setting(str, "127.0.0.1", "address to listen on", "HOST")
    port: int = _setting(_port, 7070, "port to listen on; 0 picks a free one", "PORT")
    vector_port: str = _setting(
        _vector_port,
        AUTO,
        "port on which products go past gRPC, in a fraction of the time; 0 picks a free one; off: none. auto is 0 where --host is "
        "loopback, and else off",
        "PORT",
    )
    store: Path = _setting(Path, _default_store, "directory for objectives, data and compiled programs", "DIR")
    metrics_host: str = _setting(
        _host, "127.0.0.1", "address for the metrics and the status page, plain HTTP without tokens", "HOST"
    )
    cache_size: int = _setting(
        parse_bytes,
        16 << 30,
        "most bytes of compiled programs in the store; those that were read longest ago go first, and are compiled again when wanted",
        "BYTES",
    )
    metrics_port: int | None = _setting(
        _port, None, "port for Prometheus metrics and the status page; 0 picks a free one; none without", "PORT"
    )
    memory_budget: int | None = _setting(
        parse_bytes,
        None,
        "memory for data, points and residuals, such as 16G, on each device; three quarters of the device's memory, or a "
        "quarter of the machine's, or the container's, on a CPU, without. Of several devices half of it is for what is split over all",
        "BYTES",
    )
    max_block_width: int = _setting(_width, 64, "most vectors in one launch, a power of two", "WIDTH")
    max_pending: int = _setting(
        _positive, 4096, "most vectors that wait for the device before products are refused", "N"
    )
    max_queue_delay: float = _setting(
        _seconds,
        0.0,
        "seconds for which a block that could be wider waits for more products while the device is free",
        "SECONDS",
    )
    max_launches: int | None = _setting(
        _positive,
        None,
        "most launches in flight on each device; without, 2 on an accelerator, which computes while results are copied out, and 1 on a CPU",
        "N",
    )
    max_calls: int = _setting(_positive, 1024, "most calls and streams at once", "N")
    drain: float = _setting(_seconds, 30.0, "seconds that running products have to finish after SIGTERM", "SECONDS")
    launch_timeout: float = _setting(
        _seconds,
        600.0,
        "seconds without an answer of the device after which the server is replaced; 0 for ever",
        "SECONDS",
    )
    compile_timeout: float = _setting(
        _seconds,
        3600.0,
        "seconds that one compile may take before it is given up; 0 for ever",
        "SECONDS",
    )
    quarantine_after: int = _setting(
        _positive, 3, "how many times an objective may end the server before it is not served any more", "N"
    )
    tls_cert: Path | None = _setting(
        Path,
        None,
        "PEM file of the server's certificate and those between it and its CA; read again when it changes",
        "FILE",
    )
    tls_key: Path | None = _setting(Path, None, "PEM file of its private key, unencrypted", "FILE")
    tls_client_ca: Path | None = _setting(
        Path, None, "PEM file of CAs; whoever connects must have a certificate of one of them", "FILE"
    )
    tokens: Path | None = _setting(
        Path,
        None,
        "file of `hvpd token`: whoever calls must have one of its tokens; read again when it changes",
        "FILE",
    )
    insecure: bool = _setting(
        _flag, False, "allow a host other than loopback although not both is done: encrypting, and asking who calls", ""
    )
    log_level: str = _setting(_level, "INFO", "DEBUG, INFO, WARNING or ERROR", "LEVEL")
    log_format: str = _setting(_format, "text", "text or json: an object a line on stderr", "FORMAT")


def vector_port(config: Config) -> int | None:
    """The port for products past gRPC; 0: a free one; None: there is none."""
    if config.vector_port == AUTO:
        return 0 if _is_loopback(config.host) else None
    return None if config.vector_port == OFF else int(config.vector_port)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds a flag for every setting."""
    for field in dataclasses.fields(Config):
        flag = f"--{field.name.replace('_', '-')}"
        default = field.default if field.default is not dataclasses.MISSING else _default_store()
        note = "" if default in (None, False) else f" (default: {default})".replace("%", "%%")
        text = f"{field.metadata['help']}{note} [$HVPD_{field.name.upper()}]"
        if field.metadata["parse"] is _flag:
            parser.add_argument(flag, action="store_const", const=True, default=None, help=text)
        else:
            parser.add_argument(
                flag, type=field.metadata["parse"], metavar=field.metadata["metavar"], default=None, help=text
            )


def arguments(config: Config) -> list[str]:
    """The flags that give these settings."""
    found = []
    for field in dataclasses.fields(Config):
        value, flag = getattr(config, field.name), f"--{field.name.replace('_', '-')}"
        if field.metadata["parse"] is _flag:
            found += [flag] if value else []
        elif value is not None:
            found += [flag, str(value)]
    return found


def load(arguments: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> Config:
    """The settings: flags first, then the environment, then defaults.

    Raises:
        ValueError: A variable has a value that its setting cannot have, or settings do not go together: a host that others can
            reach needs TLS, and tokens or certificates of clients.
    """
    values: dict[str, Any] = {}
    for field in dataclasses.fields(Config):
        value, variable = getattr(arguments, field.name), f"HVPD_{field.name.upper()}"
        if value is None and environment.get(variable):
            try:
                value = field.metadata["parse"](environment[variable])
            except argparse.ArgumentTypeError as error:
                raise ValueError(f"${variable}: {error}") from None
        if value is not None:
            values[field.name] = value
    config = Config(**values)
    if config.max_pending < config.max_block_width:
        raise ValueError(
            f"--max-pending {config.max_pending} has no room for one block of --max-block-width {config.max_block_width}"
        )
    _check_security(config)
    return config


def _check_security(config: Config) -> None:
    """Raises ValueError where what is asked for would be less secure than it seems."""
    if (config.tls_cert is None) != (config.tls_key is None):
        raise ValueError(
            "--tls-cert and --tls-key are of no use without each other: give both, the certificate and its key"
        )
    if config.tls_client_ca is not None and config.tls_cert is None:
        raise ValueError(
            "--tls-client-ca is of no use without --tls-cert and --tls-key: only over TLS are there certificates"
        )
    if config.insecure or _is_loopback(config.host):
        return
    missing = [] if config.tls_cert is not None else ["--tls-cert and --tls-key, so that what is sent is encrypted"]
    if config.tokens is None and config.tls_client_ca is None:
        missing.append("--tokens (or --tls-client-ca), so that not everybody may call")
    if missing:
        raise ValueError(
            f"--host {config.host} can be reached from other machines: give {', and '.join(missing)}; or listen on 127.0.0.1 behind "
            "a tunnel or a proxy that does it; or say --insecure, where everybody may do everything"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        pass
    try:
        found = socket.getaddrinfo(host, None)
    except OSError:
        return False
    return all(ipaddress.ip_address(address[4][0]).is_loopback for address in found)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line of `python -m hvpd_server`."""
    parser = argparse.ArgumentParser(prog="hvpd serve", description="Serve Hessian-vector products.")
    add_arguments(parser)
    return parser.parse_args(argv)
