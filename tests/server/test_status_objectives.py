"""All objectives of a store are listed with their faults, and the listing leaves the
store as it is.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hvpd_server.status_page.objectives import Catalogue
from hvpd_server.store.quarantine import Quarantine
from hvpd_server.store.store import blob_key


@pytest.fixture
def opened(open_engine, clock):
    """Return a function that opens an engine with examples, and returns its catalogue,
    too.
    """

    def opened(*examples):
        engine = open_engine(*examples)
        quarantine = Quarantine(engine.store.root, 1)
        catalogue = Catalogue(engine.store, engine.checks, quarantine, engine.objectives.derivation, clock)
        return engine, quarantine, catalogue

    return opened


def test_an_objective_is_told_with_its_facts(opened, rosen):
    engine, _, catalogue = opened(rosen)
    engine.store.add_objective(rosen.export.digest, "team/b")
    engine.store.add_objective(rosen.export.digest, "team/a")
    (entry,) = catalogue.entries()
    assert (entry.digest, list(entry.names)) == (rosen.export.digest, ["team/a", "team/b"])
    assert entry.created > 1.7e9
    facts = catalogue.facts(entry.digest)
    assert (facts.n, facts.dtype, facts.mode, facts.precision) == (7, "float64", "forward_over_reverse", "highest")
    assert (facts.check, facts.trouble) == ("", "")
    assert "no x came" in facts.check_reason
    assert catalogue.troubled() == {}


def test_the_derived_mode_is_shown(opened, export):
    @jax.custom_vjp
    def cube(x):
        return x**3

    cube.defvjp(lambda x: (cube(x), x), lambda x, g: (3 * x**2 * g,))
    exported = export(lambda x: jnp.sum(cube(x)), np.ones(3))
    assert exported.bundle.mode == "forward_over_reverse"
    _, _, catalogue = opened(SimpleNamespace(export=exported))
    assert catalogue.facts(exported.digest).mode == "reverse_over_reverse"


def test_a_later_registration_is_listed_at_once(opened, rosen, logistic, upload):
    engine, _, catalogue = opened(rosen)
    assert len(catalogue.entries()) == 1
    for content in logistic.export.blobs.values():
        upload(engine.store, content)
    engine.registration.register(logistic.export.digest, "late")
    assert {name for entry in catalogue.entries() for name in entry.names} == {"late"}
    assert len(catalogue.entries()) == 2


def test_a_listing_that_has_not_changed_is_not_read_again(opened, rosen, monkeypatch):
    engine, _, catalogue = opened(rosen)
    catalogue.entries()
    monkeypatch.setattr(engine.store, "objectives", lambda: pytest.fail("it was read again"))
    assert len(catalogue.entries()) == 1


def test_a_lost_part_is_damage_and_is_found_without_being_asked_for(opened, rosen, logistic, clock):
    engine, _, catalogue = opened(rosen, logistic)
    program = rosen.bundle.programs["objective"].digest
    engine.store.objects.fetch(blob_key(program)).unlink()
    found = catalogue.troubled()
    assert list(found) == [rosen.export.digest]
    assert found[rosen.export.digest].trouble == "damaged"
    assert program[:12] in found[rosen.export.digest].reason
    assert found[rosen.export.digest].n == 7


def test_a_corrupt_bundle_is_damage_and_is_left_where_it_is(opened, rosen):
    engine, _, catalogue = opened(rosen)
    path = engine.store.objects.fetch(blob_key(rosen.export.digest))
    path.write_bytes(b"x" + path.read_bytes()[1:])
    facts = catalogue.facts(rosen.export.digest)
    assert (facts.trouble, facts.n) == ("damaged", 0)
    assert "corrupt" in facts.reason
    assert path.exists()
    assert not list((engine.store.root / "corrupt").iterdir())


def test_damage_and_repair_are_seen_when_the_facts_expire(opened, rosen, clock, upload):
    engine, _, catalogue = opened(rosen)
    digest, program = rosen.export.digest, rosen.bundle.programs["objective"].digest
    assert not catalogue.facts(digest).trouble
    engine.store.objects.fetch(blob_key(program)).unlink()
    assert not catalogue.facts(digest).trouble
    clock.now += 31
    assert catalogue.facts(digest).trouble == "damaged"
    upload(engine.store, rosen.export.blobs[program])
    clock.now += 31
    assert not catalogue.facts(digest).trouble


def test_a_quarantined_objective_says_why_until_it_is_released(opened, rosen):
    engine, quarantine, catalogue = opened(rosen)
    digest = rosen.export.digest
    quarantine.strike(digest, "a launch of it did not end")
    found = catalogue.troubled()[digest]
    assert found.trouble == "quarantined"
    assert "a launch of it did not end" in found.reason
    assert found.n == 7
    (engine.store.root / "quarantine" / digest).unlink()
    assert catalogue.troubled() == {}


def test_few_are_read_at_once_for_damage_alone(opened, rosen, monkeypatch):
    engine, _, catalogue = opened(rosen)
    digests = [f"{number:064x}" for number in range(50)]
    for digest in digests:
        engine.store.add_objective(digest, "")
    sizes = [len(catalogue.troubled()) for _ in range(4)]
    assert sizes[0] <= sizes[1] <= sizes[2]
    assert sizes[0] in (19, 20)
    assert sizes[-1] == 50  # Their bundles are missing, and that of the example is not.
