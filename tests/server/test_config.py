"""Each setting is a flag and a variable. A flag wins over the variable, and the
variable over the default.
"""

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvpd_server.config import Config, in_group, load, parse, parse_bytes, vector_port

# Each setting with two values as they are written, and their meanings.
VALUES = {
    "host": ("127.0.0.2", "127.0.0.2", "::1", "::1"),
    "port": ("0", 0, "65535", 65535),
    "store": ("/srv/a", Path("/srv/a"), "s3://bucket/prefix/", "s3://bucket/prefix"),
    "store_cache": ("/srv/a", Path("/srv/a"), "b", Path("b")),
    "store_cache_size": ("1G", 1 << 30, "2M", 2 << 20),
    "metrics_host": ("0.0.0.0", "0.0.0.0", "::1", "::1"),
    "metrics_port": ("0", 0, "9090", 9090),
    "memory_budget": ("16G", 16 << 30, "512M", 512 << 20),
    "program_memory": ("8G", 8 << 30, "64M", 64 << 20),
    "max_block_width": ("1", 1, "128", 128),
    "max_pending": ("128", 128, "100000", 100000),
    "max_queue_delay": ("0.005", 0.005, "1", 1.0),
    "max_launches": ("3", 3, "1", 1),
    "cache_size": ("1G", 1 << 30, "2M", 2 << 20),
    "max_calls": ("8", 8, "9", 9),
    "drain": ("0", 0.0, "2.5", 2.5),
    "launch_timeout": ("0", 0.0, "2.5", 2.5),
    "compile_timeout": ("0", 0.0, "2.5", 2.5),
    "quarantine_after": ("1", 1, "9", 9),
    "tls_cert": ("a.pem", Path("a.pem"), "/srv/b.pem", Path("/srv/b.pem")),
    "tls_key": ("a.key", Path("a.key"), "/srv/b.key", Path("/srv/b.key")),
    "tls_client_ca": ("a.pem", Path("a.pem"), "/srv/b.pem", Path("/srv/b.pem")),
    "tokens": ("a.json", Path("a.json"), "/srv/b.json", Path("/srv/b.json")),
    "vector_port": ("7071", "7071", "OFF", "off"),
    "leader": ("a:7071", "a:7071", "[::1]:1", "[::1]:1"),
    "rank": ("0", 0, "3", 3),
    "size": ("4", 4, "10", 10),
    "log_level": ("debug", "DEBUG", "ERROR", "ERROR"),
    "log_format": ("JSON", "json", "text", "text"),
}

# The settings that a setting needs.
WITH = {
    "tls_cert": {"tls_key": "key"},
    "tls_key": {"tls_cert": "cert"},
    "tls_client_ca": {"tls_cert": "cert", "tls_key": "key"},
    "leader": {"rank": "0", "size": "4"},
    "rank": {"leader": "a:1", "size": "4"},
    "size": {"leader": "a:1", "rank": "3"},
}

BAD = {
    "store": ["http://bucket/prefix", "s3://", "://bucket"],
    "store_cache_size": ["0", "much"],
    "port": ["-1", "65536", "http", "7070.0", "0x10"],
    "vector_port": ["-1", "65536", "on", "7071.0"],
    "metrics_host": [" "],
    "metrics_port": ["-1", "99999"],
    "memory_budget": ["0", "-1G", "16X", "lots", "G", "nan", "inf"],
    "program_memory": ["0", "much"],
    "max_block_width": ["0", "3", "-4", "1.5", "wide"],
    "max_pending": ["0", "-1", "1e3"],
    "max_queue_delay": ["-0.1", "inf", "a moment"],
    "max_launches": ["0", "-1", "two"],
    "cache_size": ["0", "much"],
    "max_calls": ["0", "many"],
    "drain": ["-1", "inf", "nan", "soon"],
    "launch_timeout": ["-1", "inf", "soon"],
    "compile_timeout": ["-1", "inf", "soon"],
    "quarantine_after": ["0", "-1", "often"],
    "leader": ["a", "a:", ":1", "a:0", "a:70000", "7071"],
    "rank": ["-1", "one", "1.0"],
    "size": ["0", "-2", "two"],
    "log_level": ["loud", "5"],
    "log_format": ["xml", "js on"],
}


def flag(name):
    return f"--{name.replace('_', '-')}"


def variable(name):
    return f"HVPD_{name.upper()}"


def config(*argv, **environment):
    return load(parse(argv), environment)


def test_the_defaults_listen_on_loopback_only():
    assert config() == Config()
    assert (Config().host, Config().port, Config().insecure) == ("127.0.0.1", 7070, False)
    assert (Config().metrics_host, Config().metrics_port) == ("127.0.0.1", None)
    assert config("--host", "0.0.0.0", "--insecure").metrics_host == "127.0.0.1"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], 0),
        (["--host", "localhost"], 0),
        (["--host", "0.0.0.0", "--insecure"], None),
        (["--host", "0.0.0.0", "--insecure", "--vector-port", "7071"], 7071),
        (["--host", "0.0.0.0", "--insecure", "--vector-port", "0"], 0),
        (["--vector-port", "off"], None),
    ],
)
def test_a_vector_port_beyond_loopback_must_be_asked_for(flags, expected):
    assert vector_port(config(*flags)) == expected


def test_the_default_store_is_where_users_data_belongs(monkeypatch, tmp_path):
    """https://specifications.freedesktop.org/basedir-spec/latest/"""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert config().store == tmp_path / "hvpd"
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert config().store == tmp_path / ".local" / "share" / "hvpd"


def test_these_tests_know_every_setting():
    assert {*VALUES, "insecure", "group"} == {field.name for field in dataclasses.fields(Config)}


@pytest.mark.parametrize("name", VALUES)
def test_flags_win_over_variables_and_variables_over_defaults(name):
    written, meant, other_written, other_meant = VALUES[name]
    needed = {variable(other): value for other, value in WITH.get(name, {}).items()}
    assert getattr(config(flag(name), written, **needed), name) == meant
    assert getattr(config(**{variable(name): written}, **needed), name) == meant
    both = config(flag(name), other_written, **{variable(name): written}, **needed)
    parse_of = {field.name: field.metadata["parse"] for field in dataclasses.fields(Config)}
    others = {other: parse_of[other](value) for other, value in WITH.get(name, {}).items()}
    assert both == dataclasses.replace(config(), **others, **{name: other_meant})
    assert getattr(config(**{variable(name): ""}), name) == getattr(Config(), name)


def test_insecure_is_a_flag_without_a_value():
    assert config("--insecure").insecure
    assert config("--insecure", HVPD_INSECURE="0").insecure


@pytest.mark.parametrize(
    ("written", "meant"),
    [("1", True), ("true", True), ("YES", True), ("on", True), ("0", False), ("False", False), ("no", False)],
)
def test_a_variable_says_insecure_in_words(written, meant):
    assert config(HVPD_INSECURE=written).insecure is meant


def test_a_variable_that_says_neither_is_refused():
    with pytest.raises(ValueError, match=r"\$HVPD_INSECURE: expected 1 or 0, got 'perhaps'"):
        config(HVPD_INSECURE="perhaps")


@pytest.mark.parametrize(("name", "written"), [(name, written) for name in BAD for written in BAD[name]])
def test_a_bad_value_is_refused_by_the_name_of_its_flag(name, written, capsys):
    with pytest.raises((SystemExit, ValueError)) as refused:
        config(f"{flag(name)}={written}")
    said = capsys.readouterr().err + str(refused.value)
    assert flag(name) in said
    assert written.upper() in said.upper()


@pytest.mark.parametrize(("name", "written"), [(name, written) for name in BAD for written in BAD[name]])
def test_a_bad_value_is_refused_by_the_name_of_its_variable(name, written):
    with pytest.raises(ValueError, match=rf"(?i)\${variable(name)}\b.*{written}"):
        config(**{variable(name): written})


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost"])
def test_loopback_needs_no_permission(host):
    assert config("--host", host).host == host


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "[::]", "10.0.0.1", "192.168.1.2", "0", "", "no-such-host.invalid"])
def test_any_other_host_needs_insecure(host):
    with pytest.raises(ValueError, match=r"--host .*--insecure"):
        config("--host", host)
    with pytest.raises(ValueError, match=r"--host .*--insecure"):
        config("--host", host, HVPD_INSECURE="0")
    assert config("--host", host, "--insecure").host == host
    assert config("--host", host, HVPD_INSECURE="1").host == host


@pytest.mark.parametrize(
    "who", [("--tokens", "t"), ("--tls-client-ca", "c"), ("--tokens", "t", "--tls-client-ca", "c")]
)
def test_any_other_host_needs_tls_and_credentials(who):
    encrypted = ("--tls-cert", "cert", "--tls-key", "key")
    assert not config("--host", "0.0.0.0", *encrypted, *who).insecure
    with pytest.raises(ValueError, match=r"--host 0.0.0.0 .*: give --tokens \(or --tls-client-ca\).*--insecure"):
        config("--host", "0.0.0.0", *encrypted)


def test_the_error_lists_the_settings_that_a_public_host_needs():
    with pytest.raises(
        ValueError, match=r"give --tls-cert and --tls-key, .*and --tokens \(or --tls-client-ca\).*--insecure"
    ):
        config("--host", "0.0.0.0")
    with pytest.raises(ValueError, match=r"give --tls-cert and --tls-key, to encrypt the traffic; or") as error:
        config("--host", "0.0.0.0", "--tokens", "t")
    assert "--tls-client-ca" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"tls_cert"}, "--tls-cert and --tls-key need each other"),
        ({"tls_key"}, "--tls-cert and --tls-key need each other"),
        ({"tls_client_ca"}, "--tls-client-ca needs --tls-cert and --tls-key"),
        ({"tls_client_ca", "tls_key"}, "--tls-cert and --tls-key need each other"),
    ],
)
def test_half_of_tls_is_refused_also_where_everything_is_allowed(given, says):
    flags = [part for name in given for part in (flag(name), "file")]
    for permission in ([], ["--insecure"]):
        with pytest.raises(ValueError, match=says):
            config(*flags, *permission)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("1073741824", 1 << 30),
        ("512M", 512 << 20),
        ("512m", 512 << 20),
        ("16GB", 16 << 30),
        ("16GiB", 16 << 30),
        ("1.5K", 1536),
        ("2T", 2 << 40),
        (" 7 k ", 7 << 10),
        ("100B", 100),
    ],
)
def test_sizes(text, size):
    assert parse_bytes(text) == size


@settings(deadline=None)
@given(size=st.integers(1, 1 << 20), unit=st.sampled_from(list(enumerate(["", "K", "M", "G", "T"]))))
def test_whole_sizes_are_exact(size, unit):
    power, letter = unit
    assert parse_bytes(f"{size}{letter}") == size * 1024**power


def test_help_names_every_flag_and_variable(capsys):
    with pytest.raises(SystemExit) as ended:
        parse(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for field in dataclasses.fields(Config):
        assert flag(field.name) in shown
        assert f"${variable(field.name)}" in shown


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--leader", "a:1"], "--rank and --size missing"),
        (["--leader", "a:1", "--rank", "0"], "--size missing"),
        (["--rank", "0", "--size", "2"], "--leader missing"),
        (["--leader", "a:1", "--rank", "2", "--size", "2"], "--rank 2 is not below --size 2"),
        (["--group", "--leader", "a:1", "--rank", "0", "--size", "2"], "give either"),
        (["--group", "--size", "2"], "give either"),
    ],
)
def test_settings_of_a_group_that_contradict_each_other_are_refused(flags, says):
    with pytest.raises(ValueError, match=says):
        config(*flags)


def test_a_rank_is_in_a_group():
    assert not in_group(config())
    assert in_group(config("--group"))
    assert in_group(config("--leader", "a:1", "--rank", "0", "--size", "2"))


def test_a_queue_that_no_block_fits_into_is_refused():
    with pytest.raises(ValueError, match=r"--max-pending 32 has no room for one block of --max-block-width 64"):
        load(parse(["--max-pending", "32"]), {})
