"""The `hvpd` command, as a shell calls it."""

import json
import re
import sys
import textwrap

import jax.numpy as jnp
import numpy as np
import pytest

import hvpd
from hvpd._cli.main import main


def test_help_of_serve_names_each_setting_and_its_variable(command):
    done = command("serve", "--help", COLUMNS="200")
    assert done.returncode == 0
    for name in (
        "host",
        "port",
        "store",
        "metrics-port",
        "memory-budget",
        "max-block-width",
        "max-pending",
        "insecure",
    ):
        assert f"--{name}" in done.stdout
        assert f"[$HVPD_{name.upper().replace('-', '_')}]" in done.stdout
    assert "hvpd: serving on HOST:PORT" in done.stdout


def test_version_and_no_command(command):
    assert command("--version").stdout.strip() == f"hvpd {hvpd.__version__}"
    nothing = command()
    assert nothing.returncode == 2
    assert re.search(r"^    doctor +find problems", nothing.stderr, re.MULTILINE)


def test_register_and_list(serve, tmp_path, command):
    server = serve()
    source = tmp_path / "model.py"
    source.write_text(
        textwrap.dedent("""
        import jax.numpy as jnp, numpy as np
        def objective():
            return lambda x, s: s * jnp.sum(x**2), np.zeros(3), np.ones(())
        def wrong():
            return 5
        """)
    )
    done = command("register", f"{source}:objective", "--name", "from/cli", "--address", server.address)
    assert done.returncode == 0, done.stderr
    digest = re.fullmatch(r"from/cli ([0-9a-f]{64}) n=3 float64 forward_over_reverse check=\w+\n", done.stdout)[1]
    listed = command("objectives", HVPD_ADDRESS=server.address).stdout.splitlines()
    titles = "NAME N DTYPE PRECISION MODE PLATFORMS DATA CHECK CREATED DIGEST"
    assert listed[0].split() == titles.split()
    assert listed[1].split()[:6] == ["from/cli", "3", "float64", "highest", "forward_over_reverse", "any"]
    as_json = json.loads(command("objectives", "--json", "--address", server.address).stdout)
    assert as_json["digest"] == digest
    assert json.loads(command("info", "--json", "--address", server.address).stdout)["version"] == hvpd.__version__
    shown = command("info", "--address", server.address).stdout
    assert "max block width: 64" in shown
    assert "vector port: none" not in shown
    without = serve("--vector-port", "off")
    assert "vector port: none" in command("info", "--address", without.address).stdout
    for wrong, says in [
        ("nothing", "SOURCE must be FILE.py:NAME"),
        (f"{source}:missing", "defines no function"),
        (f"{source}:wrong", "must return"),
        (f"{tmp_path}/none.py:f", "cannot read"),
        (f"--exported={tmp_path}/none", "cannot read"),
        (f"--exported={source}", "not the bytes of a jax.export.Exported"),
        ("--name=x", "say SOURCE"),
    ]:
        failed = command("register", wrong, "--address", server.address)
        assert failed.returncode == 1
        assert failed.stderr.startswith("hvpd: ")
        assert says in failed.stderr
        assert "Traceback" not in failed.stderr


def test_register_without_jax_names_the_extra(monkeypatch, tmp_path, capsys):
    source = tmp_path / "model.py"
    source.write_text("import jax\n")
    monkeypatch.setitem(sys.modules, "jax", None)  # An import fails.
    assert main(["register", f"{source}:objective"]) == 1
    assert (
        capsys.readouterr().err
        == f"hvpd: {source} needs jax here (the server's is not enough): pip install 'hvpd[jax]'\n"
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("import no_such_module\n", ":1: ModuleNotFoundError: No module named 'no_such_module'"),
        ("x = 1\ndef loss(:\n", ":2: SyntaxError: "),
        ("x = 1\nraise ValueError('no\\nluck')\n", ":2: ValueError: no luck"),
        ("def loss():\n    return 1 / 0\n", ":2: ZeroDivisionError: division by zero"),
        (
            "def loss(w, X, y): pass\n",
            "needs arguments (w, X, y): name a function without arguments that returns (fun, x",
        ),
    ],
)
def test_a_file_that_fails_is_one_line(server, tmp_path, capsys, text, says):
    source = tmp_path / "model.py"
    source.write_text(text)
    assert main(["register", f"{source}:loss", "--address", server.address]) == 1
    error = capsys.readouterr().err
    assert error.startswith("hvpd: ")
    assert f"{source}{says}" in error or f"loss in {source} {says}" in error
    assert error.count("\n") == 1


def test_an_option_before_the_command_is_explained(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--address", "gpu-box:7070", "info"])
    assert ended.value.code == 2
    assert "options come after the command, such as: hvpd info --address ..." in capsys.readouterr().err


def test_health(serve, command):
    server = serve()
    done = command("health", "--address", server.address)
    assert (done.returncode, done.stdout) == (0, "serving\n")
    server.terminate()
    done = command("health", "--address", server.address, "--connect-timeout", "0.5")
    assert done.returncode == 1
    assert "no hvpd server answers" in done.stderr


def test_settings_come_from_the_environment(serve, command):
    server = serve(environment={"HVPD_MAX_BLOCK_WIDTH": "8"})
    assert json.loads(command("info", "--json", "--address", server.address).stdout)["max_block_width"] == 8


@pytest.mark.parametrize(
    ("arguments", "environment", "says"),
    [
        (["--port", "70000"], {}, "port from 0 to 65535"),
        (["--host", "0.0.0.0"], {}, "--insecure"),
        ([], {"HVPD_MEMORY_BUDGET": "lots"}, r"\$HVPD_MEMORY_BUDGET: expected a size"),
        (["--log-level", "loud"], {}, "argument --log-level: expected DEBUG"),
    ],
)
def test_wrong_settings_are_named(arguments, environment, says, command):
    done = command("serve", *arguments, **environment)
    assert done.returncode == 2
    assert re.search(says, done.stderr)
    assert "Traceback" not in done.stderr


def test_no_server_is_one_line(command):
    done = command("objectives", "--address", "127.0.0.1:1", "--connect-timeout", "0.3")
    assert done.returncode == 1
    assert done.stderr.startswith("hvpd: no hvpd server answers at 127.0.0.1:1")
    assert "Traceback" not in done.stderr


def test_register_a_foreign_export(server, client, tmp_path, command):
    import jax
    import numpy as np

    with jax.enable_x64(True):
        exported = jax.export.export(jax.jit(lambda x, s: s * (x**4).sum()))(np.zeros(3), np.zeros(()))
    (tmp_path / "f.bin").write_bytes(exported.serialize(vjp_order=2))
    (tmp_path / "data.py").write_text("def data():\n    return (2.0,)\n")
    arguments = ["--exported", str(tmp_path / "f.bin"), "--name", "cli/foreign", "--address", server.address]
    done = command("register", f"{tmp_path}/data.py:data", *arguments)
    assert done.returncode == 0, done.stderr
    assert "reverse_over_reverse" in done.stdout
    assert np.allclose(client.objective("cli/foreign").hessp(np.ones(3), np.ones(3)), 24)


def test_bench_says_how_long_products_take_and_where_the_time_goes(client, command):
    client.register(lambda x: jnp.sum(x**4), np.ones(40), name="cli/bench")
    done = command(
        "bench", "cli/bench", "--k", "1,3", "--callers", "2", "--seconds", "0", "--json", HVPD_ADDRESS=client.address
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(line["k"], line["callers"], line["products"]) for line in lines] == [(1, 2, 2), (3, 2, 2)]
    for line in lines:
        assert 0 < line["compute_ms"] <= line["p90_ms"]
        assert line["median_ms"] <= line["p90_ms"]
        assert line["vectors_per_second"] > 0
        assert line["k"] <= line["batch_width"] <= 2 * line["k"]
    table = command("bench", "cli/bench", "--seconds", "0", HVPD_ADDRESS=client.address).stdout.splitlines()
    assert table[0].startswith("cli/bench: n = 40, float64")
    assert [row.split()[0] for row in table[2:]] == ["1", "4", "16"]


@pytest.mark.parametrize(
    "wrong",
    [("--k", "0"), ("--k", "a"), ("--callers", "-1"), ("--callers", "5000"), ("--seconds", "-1"), ("--seed", "-1")],
)
def test_bench_refuses_numbers_that_it_cannot_use(client, wrong, command):
    done = command("bench", "cli/bench", f"{wrong[0]}={wrong[1]}", HVPD_ADDRESS=client.address)
    assert done.returncode == 1
    assert wrong[0] in done.stderr


def test_ctrl_c_ends_a_command_in_one_line(monkeypatch, capsys):
    def interrupt(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("hvpd._cli.main.connect", interrupt)
    assert main(["info"]) == 130
    assert capsys.readouterr().err == "hvpd: interrupted\n"
