"""Clients and servers refuse unsafe settings before they send anything."""

import re

import pytest

import hvpd


@pytest.mark.parametrize("address", ["gpu-box.invalid:7070", "10.0.0.1:7070", "[2001:db8::1]:7070"])
def test_a_token_does_not_leave_the_machine_as_plain_text(address):
    with pytest.raises(hvpd.InvalidArgumentError, match=r"as plain text.*ca=FILE.*insecure=True") as error:
        hvpd.connect(address, token="hvpd_secret", connect_timeout=0.1)
    assert "hvpd_secret" not in str(error.value)


def test_insecure_lets_a_token_leave_as_plain_text():
    with pytest.raises(hvpd.UnavailableError, match="no hvpd server answers"):
        hvpd.connect("gpu-box.invalid:7070", token="hvpd_secret", connect_timeout=0.1, insecure=True)


def test_settings_of_tls_that_do_not_fit(tmp_path, place, monkeypatch):
    personal, other = place.personal("one"), place.personal("two")
    missing, empty = tmp_path / "none.pem", tmp_path / "empty.pem"
    empty.write_bytes(b"")
    for settings, says in [
        ({"tls": False, "ca": place.trust}, "tls=False says that there is to be none"),
        ({"tls": "yes"}, "tls must be True, False or None"),
        ({"cert": personal["cert"]}, "cert and key .* go together"),
        ({"key": personal["key"]}, "cert and key .* go together"),
        ({"cert": personal["cert"], "key": other["key"]}, "no PEM certificate and its unencrypted key .*mismatch"),
        ({"ca": missing}, "ca='.*none.pem' has no PEM certificates .*No such file"),
        ({"ca": empty}, "ca='.*empty.pem' has no PEM certificates"),
        ({"ca": ""}, "ca must be the path of a PEM file, got ''"),
        ({"ca": 5}, "ca must be the path of a PEM file, got 5"),
    ]:
        with pytest.raises(hvpd.InvalidArgumentError, match=says):
            hvpd.connect("127.0.0.1:1", **settings)
    monkeypatch.setenv("HVPD_CA", str(missing))
    with pytest.raises(hvpd.InvalidArgumentError, match=r"ca='.*none.pem'"):
        hvpd.connect("127.0.0.1:1")
    with pytest.raises(hvpd.UnavailableError, match="no hvpd server answers"):
        hvpd.connect("127.0.0.1:1", tls=False, connect_timeout=0.1)


def test_an_embedded_server_ignores_tokens_and_tls_of_the_environment(monkeypatch, tmp_path):
    for variable in ("HVPD_TOKENS", "HVPD_TLS_CERT", "HVPD_TLS_KEY", "HVPD_TLS_CLIENT_CA", "HVPD_CA", "HVPD_TOKEN"):
        monkeypatch.setenv(variable, str(tmp_path / "none"))
    with hvpd.local() as client:
        assert client.objectives() == []
    with pytest.raises(hvpd.InvalidArgumentError, match="no setting tokens"):
        hvpd.local(tokens=tmp_path / "none")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--tokens", "{root}/none.json"), r"cannot start: cannot read the tokens of .*none.json"),
        (("--tls-cert", "{root}/server.pem", "--tls-key", "{root}/none.key"), "cannot start: cannot read .*none.key"),
        (("--tls-cert", "{root}/server.key", "--tls-key", "{root}/server.key"), "cannot start: .*no PEM certificate"),
        (
            (
                "--tls-cert",
                "{root}/server.pem",
                "--tls-key",
                "{root}/server.key",
                "--tls-client-ca",
                "{root}/server.key",
            ),
            "cannot start: .*has no PEM certificates",
        ),
    ],
)
def test_a_server_does_not_start_with_unusable_files(place, tmp_path, flags, says, capfd):
    from hvpd_server import app
    from hvpd_server import config as _config

    settings = [flag.format(root=place.root) for flag in flags]
    config = _config.load(_config.parse([*settings, "--port", "0", "--store", str(tmp_path / "store")]), {})
    with pytest.raises((ValueError, OSError)) as error:
        app.App(config)
    assert re.search(says, f"cannot start: {error.value}")
