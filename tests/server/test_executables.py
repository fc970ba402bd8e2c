"""Executables come from the cache, from a worker, or from this process if the backend
cannot move them. Their memory is limited.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from hvpd._registration.export import export
from hvpd_server.admission.session import UnsupportedError
from hvpd_server.device.executables import Executables
from hvpd_server.errors import Code, ServiceError
from hvpd_server.importer import refusals
from hvpd_server.store.program_cache import ProgramCache


@pytest.fixture
def executables(rosen, device, vetter, tmp_path):
    def executables(instead=None, **settings):
        parts = {"bundle": rosen.bundle.SerializeToString()} | {
            name: rosen.read(program.digest) for name, program in rosen.bundle.programs.items()
        }
        return Executables(
            rosen.export.digest,
            rosen.bundle,
            vetter.vet(parts),
            device.parts,
            rosen.read,
            instead or vetter,
            ProgramCache(tmp_path, 1 << 30),
            **settings,
        )

    return executables


def right(compiled, rosen):
    value, _ = compiled(rosen.x)
    np.testing.assert_allclose(value, rosen.value, rtol=1e-12)
    return True


def test_a_program_is_compiled_once_and_loaded_from_then_on(executables, rosen):
    compiled, outcome, _ = executables()(0, "value_and_grad", 0)
    assert outcome == "compiled"
    assert right(compiled, rosen)
    loaded, outcome, _ = executables()(0, "value_and_grad", 0)
    assert outcome == "cached"
    assert right(loaded, rosen)


@pytest.mark.parametrize(
    "damage",
    [lambda blob: b"", lambda blob: blob[:-1], lambda blob: blob[:40] + bytes(8) + blob[48:], lambda blob: bytes(100)],
    ids=["empty", "cut", "altered", "zeros"],
)
def test_a_file_that_is_damaged_is_compiled_again(executables, rosen, tmp_path, caplog, damage):
    executables()(0, "value_and_grad", 0)
    (path,) = tmp_path.iterdir()
    good = path.read_bytes()
    path.write_bytes(damage(good))
    compiled, outcome, _ = executables()(0, "value_and_grad", 0)
    assert outcome == "compiled"
    assert "is damaged, and is compiled again" in caplog.text
    assert right(compiled, rosen)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("change", ["version", "flags"])
def test_a_changed_dependency_changes_the_executables_name(executables, tmp_path, monkeypatch, change):
    executables()(0, "value_and_grad", 0)
    if change == "version":
        monkeypatch.setattr(refusals, "version", lambda: "other code")
    else:
        monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    assert executables()(0, "value_and_grad", 0)[1] == "compiled"
    assert len(list(tmp_path.iterdir())) == 2


def test_objectives_that_differ_only_in_their_data_share_programs(device, vetter, tmp_path):
    rng, cache = np.random.default_rng(0), ProgramCache(tmp_path, 1 << 30)

    def made(rows):
        data = rng.normal(size=(rows, 3)), rng.normal(size=rows)
        found = export(
            lambda x, A, b: jnp.sum((A @ x - b) ** 2), np.ones(3), data, platforms=("cpu",), precision="highest"
        )
        blobs = {name: bytes(found.blobs[program.digest]) for name, program in found.bundle.programs.items()}
        derivation = vetter.vet({"bundle": found.bundle.SerializeToString()} | blobs)
        read = found.blobs.__getitem__
        return (
            data,
            Executables(found.digest, found.bundle, derivation, device.parts, read, vetter, cache),
            found.digest,
        )

    (_, first, digest), (data, second, other), (_, longer, _) = (made(rows) for rows in (5, 5, 6))
    assert first(0, "value_and_grad", 0).outcome == "compiled"
    assert longer(0, "value_and_grad", 0).outcome == "compiled"
    compiled, outcome, size = second(0, "value_and_grad", 0)
    assert outcome == "cached"
    A, b = data
    value, gradient = compiled(np.ones(3), A, b)
    np.testing.assert_allclose(value, np.sum((A @ np.ones(3) - b) ** 2), rtol=1e-12)
    np.testing.assert_allclose(gradient, 2 * A.T @ (A @ np.ones(3) - b), rtol=1e-12)
    assert cache.bytes_of("") > 3 * size - 1000  # Each link counts.
    cache.forget(digest)
    assert [path.name[:64] for path in tmp_path.glob(f"{other}-*")] == [other]
    assert second(0, "value_and_grad", 0).outcome == "cached"


class Unable:
    """A device of a backend that cannot serialize executables."""

    def compile(self, *args):
        raise UnsupportedError("UNIMPLEMENTED: serialize")


def test_a_backend_that_cannot_move_them_compiles_in_this_process_and_says_so(executables, rosen, caplog):
    found = executables(Unable())
    for name, width in (("value_and_grad", 0), ("hvp", 2)):
        _, outcome, _ = found(0, name, width)
        assert outcome == "compiled"
    assert right(found(0, "value_and_grad", 0)[0], rosen)
    assert caplog.text.count("this server compiles by itself") == 1
    with pytest.raises(ServiceError, match="bytes of memory"):
        executables(Unable(), memory_bytes=8)(0, "value_and_grad", 0)


def test_a_disk_that_is_full_costs_only_the_cache(executables, rosen, tmp_path, monkeypatch, caplog):
    def full(*args, **settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hvpd_server.device.executables.atomic_file", full)
    compiled, *_ = executables()(0, "value_and_grad", 0)
    assert right(compiled, rosen)
    assert not list(tmp_path.iterdir())
    assert "a compiled program is not kept" in caplog.text


def test_a_program_that_takes_too_much_memory_is_refused_when_it_is_compiled_and_when_it_is_cached(executables):
    for _ in range(2):
        with pytest.raises(
            ServiceError, match=r"value_and_grad \(width 0\) takes \d+ bytes of memory .* and 8 are"
        ) as error:
            executables(memory_bytes=8)(0, "value_and_grad", 0)
        assert (error.value.code, error.value.reason) == (Code.RESOURCE_EXHAUSTED, "DEVICE_MEMORY")
