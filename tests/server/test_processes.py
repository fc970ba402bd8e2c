"""The place of a process in a group, as its launcher tells it, and its part of an
array.
"""

import jax
import numpy as np
import pytest

from hvpd_server.derivation.compiling import Target
from hvpd_server.device import processes

SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "node[001-004]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "3",
    "OMPI_COMM_WORLD_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}


@pytest.fixture
def launched(monkeypatch):
    """Take the place of a launcher: launched(variables)."""
    for name in (*SLURM, *OPEN_MPI, "KUBERNETES_SERVICE_HOST", "JAX_COORDINATOR_PORT"):
        monkeypatch.delenv(name, raising=False)

    def launched(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return launched


@pytest.mark.parametrize(
    ("variables", "place"),
    [(SLURM, ("node001:61441", 2, 4)), (OPEN_MPI, ("10.96.0.1:62777", 0, 3))],
    ids=["slurm", "open-mpi"],
)
def test_the_launcher_tells_the_place(launched, variables, place):
    launched(variables)
    found = processes.detect()
    host, _, port = found.leader.rpartition(":")
    assert (host, found.rank, found.size) == (place[0].rpartition(":")[0], *place[1:])
    assert 61440 <= int(port) <= 65535


def test_without_a_launcher_the_flags_are_asked_for(launched):
    launched({})
    with pytest.raises(ValueError, match="give --leader, --rank and --size"):
        processes.detect()


def test_a_launcher_that_says_nonsense_is_refused(launched):
    launched(SLURM | {"SLURM_PROCID": "second"})
    with pytest.raises(ValueError, match="cannot read this process's place"):
        processes.detect()


def test_facts_name_what_ranks_must_share(monkeypatch):
    with monkeypatch.context() as changed:
        changed.setenv("XLA_FLAGS", "--xla_some")
        software = processes.software()
    assert software["XLA_FLAGS"] == "--xla_some"
    assert software["version of jax"] == jax.__version__
    assert processes.hardware().keys() == {"platform", "kind of device", "driver", "processor", "number of CPUs"}


@pytest.mark.parametrize(("shape", "first"), [((6, 2), 0), ((6, 2), 3), ((4,), 0), ((), 0)])
def test_an_array_of_one_device_is_read_whole(shape, first):
    values = np.arange(40.0).reshape((20, 2) if len(shape) == 2 else -1)
    read = []

    def rows(part):
        read.append(part)
        return values[part]

    found = processes.assembled(Target(jax.local_devices()[:1]), shape, rows, data=True, first=first)
    assert read == [slice(first, first + (shape[0] if shape else 1))]
    assert np.array_equal(found, values[read[0]].reshape(shape))
