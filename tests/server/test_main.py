"""Tests of `hvpd_server.__main__`."""

import os
import subprocess
import sys

import pytest

STARTS = """
import sys
from hvpd_server import __main__ as main
from hvpd_server.admission.vetting import Vetter

def start(vetter):
    print("jax" in sys.modules)
    sys.exit(7)

Vetter.start = start
main.main()
"""


def test_the_vetting_process_starts_before_the_server_imports_jax(tmp_path):
    """Both import jax for a second, on two cores at the same time."""
    run = subprocess.run(
        [sys.executable, "-c", STARTS, "--store", tmp_path], stdout=subprocess.PIPE, text=True, check=False, timeout=60
    )
    assert (run.stdout, run.returncode) == ("False\n", 7)


@pytest.mark.parametrize(("flag", "said"), [("--port=x", "port"), ("--queue-delay=-1", "queue")])
def test_a_wrong_setting_ends_the_server_before_it_starts_anything(tmp_path, flag, said):
    run = subprocess.run(
        [sys.executable, "-m", "hvpd_server", "--store", tmp_path / "store", flag],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        timeout=60,
    )
    assert run.returncode == 2
    assert said in run.stderr
    assert not (tmp_path / "store").exists()


BLAS = """
from hvpd_server import __main__
import scipy.linalg
from threadpoolctl import threadpool_info
print({each["num_threads"] for each in threadpool_info() if each["internal_api"] == "openblas"})
"""


@pytest.mark.parametrize(("variables", "threads"), [({}, 1), ({"OPENBLAS_NUM_THREADS": "2"}, 2)])
def test_blas_has_one_thread_unless_the_user_says_otherwise(variables, threads):
    pytest.importorskip("threadpoolctl")
    inherited = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
    said = subprocess.run(
        [sys.executable, "-c", BLAS],
        env=inherited | variables,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=120,
    )
    assert said.stdout == f"{{{threads}}}\n"
