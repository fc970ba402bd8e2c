"""Commands that take the addresses of several servers."""

import collections
import json

import pytest

import hvpd
from hvpd._cli import main
from tests.support.fleet import addresses


def test_commands_take_a_list(three, capsys, monkeypatch, tmp_path):
    assert main.main(["health", "--address", addresses(three)]) == 0
    monkeypatch.setenv("HVPD_ADDRESS", addresses(three))
    assert main.main(["objectives"]) == 0
    assert "fleet" in capsys.readouterr().out
    monkeypatch.delenv("HVPD_ADDRESS")
    profiles = tmp_path / "config.toml"
    profiles.write_text(f'[profile.many]\naddress = "{addresses(three)}"\n')
    monkeypatch.setenv("HVPD_PROFILES", str(profiles))
    with hvpd.connect(profile="many") as client:
        assert client.address == addresses(three)


def test_top_shows_a_row_for_each_server(three, capsys):
    assert main.main(["top", "--address", addresses(three), "--count", "1", "--interval", "0.1"]) == 0
    shown = capsys.readouterr().out
    for server in three:
        assert f"{server.address} " in shown
    assert shown.count("serving") == 3
    assert main.main(["top", "--address", addresses(three), "--count", "1", "--interval", "0.1", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert collections.Counter(row["address"] for row in rows) == {server.address: 1 for server in three}


def test_top_shows_a_server_that_is_away(serve, capsys):
    there, away = serve(), serve()
    away.kill()
    with pytest.warns(UserWarning, match="1 of 2 servers cannot be used"):
        assert main.main(["top", "--address", addresses([there, away]), "--count", "1", "--interval", "0.1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert next(line for line in lines if line.startswith(away.address)).split()[1] == "away"


def test_doctor_looks_at_each_server(serve, capsys):
    there, away = serve(), serve()
    assert main.main(["doctor", "--address", there.address]) == 0
    capsys.readouterr()
    away.kill()
    assert main.main(["doctor", "--address", addresses([there, away])]) == 1
    shown = capsys.readouterr().out
    assert f"ok    port         {there.port} accepts connections" in shown
    assert f"FAIL  port         {away.port} refuses connections" in shown
    assert main.main(["doctor", "--address", "a:7070,"]) == 1
    assert "number 2 of 'a:7070,' is empty" in capsys.readouterr().out
