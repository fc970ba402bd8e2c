"""The server's settings. Each is a flag of `hvpd serve` and an environment variable."""

import argparse
import dataclasses
import difflib
import ipaddress
import os
import socket
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

AUTO, OFF = "auto", "off"
"""Values of --vector-port: a free port on loopback, else none; no port."""

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_bytes(text: str) -> int:
    """Parse a number of bytes: `512M`, `16G`, `1073741824`."""
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


def _host_port(text: str) -> str:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) <= 65535:
        raise argparse.ArgumentTypeError(f"expected HOST:PORT with a port from 1, got {text!r}")
    return text


def _number(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number from 0, got {text!r}")
    return int(text)


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


def _default_store_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hvpd"


def parse_store(text: str) -> Path | str:
    """Parse a directory, or the URL of an object store."""
    scheme, separator, rest = text.partition("://")
    if not separator:
        return Path(text)
    if scheme not in ("s3", "gs", "az") or not rest.strip("/"):
        raise argparse.ArgumentTypeError(
            f"expected a directory, or s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or az://CONTAINER/PREFIX, got {text!r}"
        )
    return text.rstrip("/")


def _setting(parse: Callable[[str], Any], default: Any, meaning: str, metavar: str) -> Any:
    fill = {"default_factory": default} if callable(default) else {"default": default}
    return dataclasses.field(**fill, metadata={"parse": parse, "help": meaning, "metavar": metavar})


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings. A field `some_name` is the flag `--some-name` and
    `$HVPD_SOME_NAME`.
    """

    host: str = _setting(str, "127.0.0.1", "address to listen on", "HOST")
    port: int = _setting(_port, 7070, "port to listen on; 0 picks a free one", "PORT")
    vector_port: str = _setting(
        _vector_port,
        AUTO,
        "port for products past gRPC, in a fraction of the time; 0 picks a free one; off: none; auto: 0 if --host is "
        "loopback, else off",
        "PORT",
    )
    store: Path | str = _setting(
        parse_store,
        _default_store,
        "directory for objectives, data and compiled programs, or s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, az://CONTAINER/PREFIX; "
        "several servers can share it",
        "DIR",
    )
    store_cache: Path = _setting(
        Path,
        _default_store_cache,
        "with a --store in an object store: directory of this machine for copies of its data and for compiled programs",
        "DIR",
    )
    store_cache_size: int = _setting(
        parse_bytes,
        64 << 30,
        "with a --store in an object store: most bytes of these copies; those that were not used for longest go first",
        "BYTES",
    )
    metrics_host: str = _setting(
        _host, "127.0.0.1", "address for the metrics and the status page, plain HTTP without tokens", "HOST"
    )
    cache_size: int = _setting(
        parse_bytes,
        16 << 30,
        "most bytes of compiled programs in the store; the least recently read of the tenant that has most go first, and are "
        "compiled again if needed",
        "BYTES",
    )
    metrics_port: int | None = _setting(
        _port, None, "port for Prometheus metrics and the status page; 0 picks a free one; not set: no port", "PORT"
    )
    memory_budget: int | None = _setting(
        parse_bytes,
        None,
        "memory for data, points and residuals on each device, such as 16G; not set: three quarters of the device's memory, or, "
        "on a CPU, a quarter of the machine's or container's. Vectors in transit and running programs come on top. With several devices, half of it is for objectives that are split "
        "over all",
        "BYTES",
    )
    program_memory: int | None = _setting(
        parse_bytes,
        None,
        "memory for compiled programs, such as 8G; not set: a quarter of the machine's or container's. If it is full, objectives that "
        "are not in use leave it, and come back from the cache",
        "BYTES",
    )
    max_block_width: int = _setting(_width, 64, "most vectors in one launch, a power of two", "WIDTH")
    max_pending: int = _setting(
        _positive,
        4096,
        "most vectors that wait for the device before products are refused; not less than --max-block-width",
        "N",
    )
    max_queue_delay: float = _setting(
        _seconds,
        0.0,
        "seconds that a block waits for more products while the device is free",
        "SECONDS",
    )
    max_launches: int | None = _setting(
        _positive,
        None,
        "most launches in flight on each device; not set: 2 on an accelerator, which computes while results are copied out, and "
        "1 on a CPU",
        "N",
    )
    max_calls: int = _setting(
        _positive,
        1024,
        "most calls and streams at once, half of them for one tenant; probes have room of their own",
        "N",
    )
    drain: float = _setting(_seconds, 30.0, "seconds that running products have to finish after SIGTERM", "SECONDS")
    launch_timeout: float = _setting(
        _seconds,
        600.0,
        "seconds without an answer of the device after which the server is replaced; 0: no limit",
        "SECONDS",
    )
    compile_timeout: float = _setting(
        _seconds,
        3600.0,
        "most seconds of one compile; 0: no limit",
        "SECONDS",
    )
    quarantine_after: int = _setting(_positive, 3, "crashes of one objective after which the server refuses it", "N")
    tls_cert: Path | None = _setting(
        Path,
        None,
        "PEM file of the server's certificate and the intermediate ones; read again when it changes",
        "FILE",
    )
    tls_key: Path | None = _setting(Path, None, "PEM file of its private key, unencrypted", "FILE")
    tls_client_ca: Path | None = _setting(
        Path, None, "PEM file of CAs; each client must have a certificate of one of them", "FILE"
    )
    tokens: Path | None = _setting(
        Path,
        None,
        "file of `hvpd token`; each call must have one of its tokens; read again when it changes",
        "FILE",
    )
    insecure: bool = _setting(
        _flag, False, "allow a host other than loopback without TLS, or without tokens and client certificates", ""
    )
    group: bool = _setting(
        _flag,
        False,
        "be a rank of a group of processes that are one server; Slurm, Open MPI or an indexed Job of Kubernetes tells the rank",
        "",
    )
    leader: str | None = _setting(
        _host_port,
        None,
        "be a rank of a group: where rank 0 listens for the others; with --rank and --size",
        "HOST:PORT",
    )
    rank: int | None = _setting(_number, None, "with --leader: number of this process, from 0", "R")
    size: int | None = _setting(_positive, None, "with --leader: number of processes in the group", "P")
    log_level: str = _setting(_level, "INFO", "DEBUG, INFO, WARNING or ERROR", "LEVEL")
    log_format: str = _setting(_format, "text", "text or json: one object a line on stderr", "FORMAT")


def vector_port(config: Config) -> int | None:
    """Return the port for products past gRPC; 0 for a free one, None for no port."""
    if config.vector_port == AUTO:
        return 0 if _is_loopback(config.host) else None
    return None if config.vector_port == OFF else int(config.vector_port)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a flag for every setting, and for the file of settings."""
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help='TOML file of these settings, such as: memory_budget = "16G". Flags and variables win over it [$HVPD_CONFIG]',
    )
    for field in dataclasses.fields(Config):
        flag = f"--{field.name.replace('_', '-')}"
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        note = "" if default in (None, False) else f" (default: {default})".replace("%", "%%")
        text = f"{field.metadata['help']}{note} [$HVPD_{field.name.upper()}]"
        if field.metadata["parse"] is _flag:
            parser.add_argument(flag, action="store_const", const=True, default=None, help=text)
        else:
            parser.add_argument(
                flag, type=field.metadata["parse"], metavar=field.metadata["metavar"], default=None, help=text
            )


def arguments(config: Config) -> list[str]:
    """Return the flags for these settings."""
    found = []
    for field in dataclasses.fields(Config):
        value, flag = getattr(config, field.name), f"--{field.name.replace('_', '-')}"
        if field.metadata["parse"] is _flag:
            found += [flag] if value else []
        elif value is not None:
            found += [flag, str(value)]
    return found


def load(arguments: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> Config:
    """Load the settings: flags first, then the environment, then the file, then
    defaults.

    Raises:
        SettingsError: Variables or the file are invalid, or settings contradict each
            other: a host that other machines can reach needs TLS, and tokens or client
            certificates. The error has a line for each fault.
    """
    path = arguments.config or environment.get("HVPD_CONFIG")
    values: dict[str, Any] = {}
    faults: list[str] = []
    file = _read(Path(path), faults) if path else {}
    for field in dataclasses.fields(Config):
        value, variable = getattr(arguments, field.name), f"HVPD_{field.name.upper()}"
        if value is None and environment.get(variable):
            value = _parsed(field, environment[variable], f"${variable}", faults)
        elif value is None and field.name in file:
            value = _parsed(field, file[field.name], f"{field.name} in {path}", faults)
        if value is not None:
            values[field.name] = value
    if not faults:  # Without all settings, a contradiction between them may be none.
        config = Config(**values)
        if config.max_pending < config.max_block_width:
            faults.append(
                f"--max-pending {config.max_pending} has no room for one block of --max-block-width {config.max_block_width}"
            )
        faults += _security_faults(config)
        faults += _group_faults(config)
    if faults:
        raise SettingsError(faults)
    return config


class SettingsError(ValueError):
    """Settings are wrong.

    Attributes:
        faults: A line for each fault.
    """

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__("\nhvpd: ".join(faults))
        self.faults = faults


def _read(path: Path, faults: list[str]) -> Mapping[str, str]:
    """Return the settings of a TOML file as texts, and add its faults."""
    try:
        with path.open("rb") as content:
            document = tomllib.load(content)
    except OSError as error:
        faults.append(f"cannot read the settings of {path}: {error.strerror}")
        return {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        faults.append(f"the settings of {path} are no TOML: {error}")
        return {}
    found = {name.replace("-", "_"): value for name, value in document.items()}
    known = [field.name for field in dataclasses.fields(Config)]
    for name, value in found.items():
        if name not in known:
            similar = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {similar[0]}?" if similar else "see `hvpd serve --help`"
            faults.append(f"{path} has {name!r}, which is no setting: {hint}")
        elif not isinstance(value, str | int | float):
            faults.append(f"{name} in {path} must be a text, a number or a boolean, got {value!r}")
    return {
        name: str(value).lower() if isinstance(value, bool) else str(value)
        for name, value in found.items()
        if isinstance(value, str | int | float)
    }


def _parsed(field: "dataclasses.Field[Any]", text: str, where: str, faults: list[str]) -> Any:
    """Return the value of a setting; without one, add the fault."""
    try:
        return field.metadata["parse"](text)
    except argparse.ArgumentTypeError as error:
        faults.append(f"{where}: {error}")
        return None


def _security_faults(config: Config) -> Iterator[str]:
    """Yield how the settings are less secure than they seem."""
    if (config.tls_cert is None) != (config.tls_key is None):
        yield "--tls-cert and --tls-key need each other: give both, the certificate and its key"
    if config.tls_client_ca is not None and config.tls_cert is None:
        yield "--tls-client-ca needs --tls-cert and --tls-key: clients show certificates over TLS only"
    if config.insecure or _is_loopback(config.host):
        return
    missing = [] if config.tls_cert is not None else ["--tls-cert and --tls-key, to encrypt the traffic"]
    if config.tokens is None and config.tls_client_ca is None:
        missing.append("--tokens (or --tls-client-ca), to require credentials")
    if missing:
        yield (
            f"--host {config.host} can be reached from other machines: give {', and '.join(missing)}; or listen on 127.0.0.1 behind "
            "a tunnel or a proxy that does it; or give --insecure, so that every machine may do everything"
        )


def in_group(config: Config) -> bool:
    """Return whether the process is a rank of a group."""
    return config.group or config.leader is not None


def listening(host: str) -> str:
    """Return the host that a leader listens on: for a name, all addresses (empty),
    because the name of this machine may be an address of its own only, such as
    127.0.1.1.
    """
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return host if host == "localhost" else ""
    return host


def _group_faults(config: Config) -> Iterator[str]:
    """Yield how the settings of a group contradict each other."""
    given = {"--leader": config.leader, "--rank": config.rank, "--size": config.size}
    missing = [flag for flag, value in given.items() if value is None]
    if config.group and len(missing) < len(given):
        yield "--group takes the place of --leader, --rank and --size: give either"
    elif not config.group and 0 < len(missing) < len(given):
        yield f"--leader, --rank and --size need each other: {' and '.join(missing)} missing"
    elif config.rank is not None and config.size is not None and config.rank >= config.size:
        yield f"--rank {config.rank} is not below --size {config.size}: ranks are numbered from 0"


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
    """Parse the command line of `python -m hvpd_server`."""
    parser = argparse.ArgumentParser(prog="hvpd serve", description="Serve Hessian-vector products.")
    add_arguments(parser)
    return parser.parse_args(argv)
