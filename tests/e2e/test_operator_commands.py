"""Commands with which people look at a server: doctor, top, objectives, completion; and
the files of settings.
"""

import os
import re
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
import trustme

import hvpd
from hvpd._cli import doctor
from hvpd._cli.main import main
from hvpd.v1 import server_pb2
from hvpd_server.tenancy import token_file
from tests.support.waiting import until


@pytest.fixture
def said(capsys):
    """Run a command in this process; return its code and its output."""

    def run(*arguments):
        code = main(arguments)
        found = capsys.readouterr()
        return code, found.out, found.err

    return run


@pytest.fixture(scope="module")
def place(serve_module, tmp_path_factory):
    tokens = tmp_path_factory.mktemp("tokens") / "tokens.json"
    token = token_file.create(tokens, "ops", ["use", "publish", "administer"])[0]
    return serve_module("--tokens", str(tokens)).address, token, tokens


def test_doctor_finds_nothing_wrong_with_a_good_server(said, place):
    address, token, _ = place
    code, out, _ = said("doctor", "--address", address, "--token", token)
    assert code == 0, out
    assert out.endswith("nothing is wrong\n")
    for part in (
        *(f"{address}, from --address", "DNS", "accepts connections", "clocks differ", "belongs to tenant ops"),
        "over the server's Unix socket",
    ):
        assert part in out


def test_doctor_names_a_wrong_token(said, place):
    code, out, _ = said("doctor", "--address", place[0], "--token", "hvpd_wrong")
    assert code == 1
    assert "FAIL  token        the token is not one of this server's" in out


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("no-such-host.invalid:7070", "FAIL  DNS          no-such-host.invalid has no address"),
        ("localhost", "FAIL  address      it must be host:port"),
    ],
)
def test_doctor_names_a_wrong_address(said, address, says):
    code, out, _ = said("doctor", "--address", address)
    assert code == 1
    assert says in out


def test_doctor_names_a_port_that_refuses_and_a_port_of_another_program(said):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        code, out, _ = said("doctor", "--address", f"127.0.0.1:{port}", "--connect-timeout", "0.5")
    assert code == 1
    assert "FAIL  server" in out
    code, out, _ = said("doctor", "--address", f"127.0.0.1:{port}")
    assert code == 1
    assert f"FAIL  port         {port} refuses connections: is `hvpd serve` running there" in out


def test_doctor_names_a_server_without_tls(said, place, tmp_path):
    ca = tmp_path / "ca.pem"
    ca.write_bytes(trustme.CA().cert_pem.bytes())
    code, out, _ = said("doctor", "--address", place[0], "--ca", str(ca))
    assert code == 1
    assert re.search(r"FAIL  TLS +.*this client speaks TLS and the server does not", out)


def test_doctor_names_versions_that_do_not_fit(said, place, monkeypatch):
    def connect(arguments):
        raise hvpd.IncompatibleError("revisions 1 and 9", reason="PROTOCOL_MISMATCH")

    monkeypatch.setattr(doctor, "connect", connect)
    code, out, _ = said("doctor", "--address", place[0])
    assert code == 1
    assert "FAIL  versions     revisions 1 and 9" in out


@pytest.mark.parametrize(
    ("seconds", "good", "says"),
    [(0, True, "less than 60 s"), (-300, False, "behind this one: set both by NTP"), (300, False, "ahead of this one")],
)
def test_doctor_compares_clocks(seconds, good, says):
    server = server_pb2.GetServerResponse()
    server.time.FromNanoseconds(time.time_ns() + seconds * 10**9)
    found = doctor._clock(SimpleNamespace(server=server))
    assert found.good is good
    assert says in found.text


def test_doctor_names_a_vector_port_that_cannot_be_reached():
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    server = server_pb2.GetServerResponse(port=7070, vector_port=port)
    transport = SimpleNamespace(by_unix_socket=lambda: False)
    found = doctor._vectors(SimpleNamespace(server=server, address="127.0.0.1:7070", _transport=transport))
    assert found.good is None
    assert found.text.startswith(f"{port} refuses connections")
    assert found.text.endswith("Products go over gRPC, which takes longer.")


def test_doctor_goes_through_the_proxy_of_the_environment(said, place, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as other:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{other.getsockname()[1]}")
    code, out, _ = said("doctor", "--address", "no-such-host.invalid:7070", "--connect-timeout", "0.5")
    assert code == 1
    assert "add no-such-host.invalid to $no_proxy" in out
    assert "FAIL  server" in out
    assert "DNS" not in out  # The proxy asks.
    code, out, _ = said("doctor", "--address", place[0], "--token", place[1])
    assert code == 0
    assert "proxy" not in out  # gRPC takes none to this machine.


def test_doctor_names_a_misspelled_variable(said, place, monkeypatch):
    monkeypatch.setenv("HVPD_TOKEM", "x")
    with pytest.warns(UserWarning, match=r"did you mean \$HVPD_TOKEN"):
        code, out, _ = said("doctor", "--address", place[0], "--token", place[1])
    assert code == 1
    assert "did you mean $HVPD_TOKEN?" in out


def test_top_shows_the_load_and_its_shares(said, place):
    address, token, _ = place
    with hvpd.connect(address, token=token) as client:
        client.register(lambda x: jnp.sum(x**2), np.ones(3), name="top").hessp(np.ones(3), np.ones(3))
    code, out, _ = said("top", "--address", address, "--token", token, "--interval", "0.01", "--count", "1")
    assert code == 0
    assert "serving" in out
    assert "ops/top" in out


def test_top_takes_the_right_administer(said, place):
    token = token_file.create(place[2], "reader", ["use"])[0]
    code, _, err = said("top", "--address", place[0], "--token", token, "--count", "1")
    assert code == 1
    assert "administer" in err


def test_objectives_show_and_rename(said, place):
    address, token, _ = place
    connection = ("--address", address, "--token", token)
    with hvpd.connect(address, token=token) as client:
        first = client.register(lambda x: jnp.sum(x["a"] ** 2), {"a": np.ones(3)}, name="old/name")
        other = client.register(lambda x: jnp.sum(x**3), np.ones(2), name="taken")
        code, out, _ = said("objectives", *connection, "show", "old/name")
        assert code == 0
        assert first.digest in out
        assert "a     [3]    float64  0" in out
        assert said("objectives", "rename", "old/name", "new/name", *connection)[0] == 0
        assert client.objective("new/name").digest == first.digest
        with pytest.raises(hvpd.NotFoundError):
            client.objective("old/name")
        code, _, err = said("objectives", "rename", "new/name", "taken", *connection)
        assert code == 1
        assert "the name 'taken' belongs to another objective" in err
        assert client.objective("taken").digest == other.digest
        assert client.objective("new/name").digest == first.digest
        with pytest.raises(hvpd.InvalidArgumentError, match="digest"):
            client.rename(other.digest, "again")
        assert client.rename("taken", "taken").digest == other.digest


def test_python_m_hvpd_and_completion():
    shown = subprocess.run([sys.executable, "-m", "hvpd", "--version"], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == f"hvpd {hvpd.__version__}"
    for shell in ("bash", "zsh", "fish"):
        code = subprocess.run(
            [sys.executable, "-m", "hvpd", "completion", shell], capture_output=True, text=True, check=True
        ).stdout
        assert "hvpd" in code


def test_completion_offers_commands_and_flags(tmp_path):
    def offered(line):
        out = tmp_path / "out"
        environment = {
            "_ARGCOMPLETE": "1",
            "_ARGCOMPLETE_STDOUT_FILENAME": str(out),
            "COMP_LINE": line,
            "COMP_POINT": str(len(line)),
            "_ARGCOMPLETE_IFS": "\n",
        }
        subprocess.run([sys.executable, "-m", "hvpd"], env=os.environ | environment, check=True)
        return out.read_text().split("\n")

    assert "doctor " in offered("hvpd doc") or "doctor" in offered("hvpd doc")
    assert any(found.startswith("--vector-port") for found in offered("hvpd serve --vec"))


def test_a_profile_has_arguments_of_connect(place, tmp_path, monkeypatch):
    address, token, _ = place
    file = tmp_path / "config.toml"
    file.write_text(f'[profile.lab]\naddress = "{address}"\ntoken = "{token}"\n')
    file.chmod(0o600)
    monkeypatch.setenv("HVPD_PROFILES", str(file))
    with hvpd.connect(profile="lab") as client:
        assert client.usage().tenant == "ops"
    # The token of a profile does not go to another address.
    port = address.rpartition(":")[2]
    with hvpd.connect(f"localhost:{port}", profile="lab") as client, pytest.raises(hvpd.AccessError):
        client.usage()
    with pytest.raises(hvpd.InvalidArgumentError, match="no profile 'home'"):
        hvpd.connect(profile="home")


def test_serve_reads_a_file_of_settings(serve, tmp_path):
    file = tmp_path / "serve.toml"
    file.write_text('max-block-width = 8\nmemory_budget = "5M"\ndrain = 1.5\ninsecure = false\n')
    server = serve("--config", str(file), environment={"HVPD_MAX_BLOCK_WIDTH": "4"}, supervised=True)
    with hvpd.connect(server.address) as client:
        assert client.server.max_block_width == 4  # The variable wins.
        assert client.load().budget_bytes == 5 << 20


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("prot = 7", "'prot', which is no setting: did you mean port?"),
        ("port = 70000", "port in"),
        ("port = [1]", "must be a text, a number or a boolean"),
        ("port = ", "are no TOML"),
    ],
)
def test_a_wrong_file_of_settings_is_named(said, tmp_path, content, says):
    file = tmp_path / "serve.toml"
    file.write_text(content)
    code, _, err = said("serve", "--config", str(file), "--check-config")
    assert code == 2
    assert says in err


def test_every_wrong_setting_is_named_at_once(said, tmp_path, monkeypatch):
    file = tmp_path / "serve.toml"
    file.write_text('prot = 7\nmax-pending = "many"\ntokens = [1]\n')
    monkeypatch.setenv("HVPD_LOG_LEVEL", "LOUD")
    code, _, err = said("serve", "--config", str(file), "--check-config")
    assert code == 2
    lines = err.splitlines()
    assert len(lines) == 4
    assert all(line.startswith("hvpd: ") for line in lines)
    for part in ("'prot'", "max_pending in", "tokens in", "$HVPD_LOG_LEVEL"):
        assert part in err


def test_contradictions_between_settings_are_all_named(said):
    code, _, err = said("serve", "--check-config", "--max-pending", "1", "--tls-cert", "x", "--tls-client-ca", "y")
    assert code == 2
    assert "no room for one block" in err
    assert "--tls-cert and --tls-key need each other" in err


def test_check_config_names_every_fault(said, tmp_path):
    empty, file = tmp_path / "tokens.json", tmp_path / "file"
    empty.write_text('{"tokens": []}')
    file.write_text("x")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        code, out, err = said(
            *("serve", "--check-config", "--tokens", str(empty), "--store", str(file / "store"), "--port", port),
            *("--tls-cert", str(file), "--tls-key", str(file)),
        )
    assert code == 2
    assert out == "4 problems\n"
    for part in ("has no token", "is no directory", "another program listens on it", "--tls-cert"):
        assert part in err
    code, _, err = said("serve", "--check-config", "--port", port, "--metrics-port", port, "--store", str(tmp_path))
    assert code == 2
    assert f"--metrics-port {port}: --port has the same port" in err


@pytest.mark.parametrize(("rank", "faults"), [("0", 1), ("1", 0)])
def test_check_config_looks_at_the_address_of_a_leader(said, tmp_path, rank, faults):
    with socket.create_server(("127.0.0.1", 0)) as other:
        leader = f"localhost:{other.getsockname()[1]}"
        place = ("--leader", leader, "--size", "2", "--rank", rank)
        # The leader alone has a port for clients.
        port = "0" if rank == "0" else leader.rpartition(":")[2]
        code, out, err = said("serve", "--check-config", "--port", port, "--store", str(tmp_path), *place)
    assert code == 2 * faults
    assert (f"can join the leader at {leader}, and listens on no port" in out) is (rank == "1")
    assert err.count(f"--leader {leader.rpartition(':')[2]}: another program listens on it") == faults


@pytest.mark.parametrize("rank", ["0", "1"])
def test_check_config_names_a_leader_without_an_address(said, tmp_path, rank):
    place = ("--leader", "no-such-host.invalid:7075", "--size", "2", "--rank", rank)
    code, _, err = said("serve", "--check-config", "--port", "0", "--store", str(tmp_path), *place)
    assert code == 2
    assert "--leader no-such-host.invalid:7075: the host no-such-host.invalid has no address" in err
    if rank == "0":
        code, _, err = said("serve", "--port", "0", "--store", str(tmp_path), *place)
        assert code == 1
        assert "cannot start: --leader no-such-host.invalid:7075: the host no-such-host.invalid has no address" in err


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc, where no directory can be made")
def test_check_config_names_a_store_that_cannot_be_made(said):
    code, _, err = said("serve", "--check-config", "--port", "0", "--store", "/proc/hvpd")
    assert code == 2
    assert "--store /proc/hvpd: this user cannot write to /proc (" in err


def test_check_config_of_good_settings_changes_nothing(said, tmp_path):
    store = tmp_path / "store"
    code, out, _ = said("serve", "--check-config", "--port", "0", "--store", str(store))
    assert code == 0
    assert "the settings are good" in out
    assert not Path(store).exists()


def test_check_at_another_x_mentions_a_failed_check_of_the_registration(said, client):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hvpd.CurvatureWarning)
        objective = client.register(lambda x: jnp.sum(jnp.abs(jnp.fft.rfft(x)) ** 2), np.zeros(4), name="check/kink")
        until(lambda: objective.registration_check().verdict in ("failed", "undecided"))
        code, out, err = said("check", "check/kink", "--address", client.address)
    assert code == 0, out
    assert "at the x of the registration is" in err
    assert "at another x" in err
