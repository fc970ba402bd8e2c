"""When compiled programs fill their memory, objectives are unloaded: a fake memory, and
an engine with real programs.
"""

import dataclasses
import gc

import jax.numpy as jnp
import numpy as np
import pytest

from hvpd._wire import codec
from hvpd_server.engine import objectives
from hvpd_server.engine.program_memory import ProgramMemory
from hvpd_server.errors import Code, ServiceError
from hvpd_server.tenancy.limits import TenantLimits
from tests.support.engine import create_point


@dataclasses.dataclass(eq=False)
class Loaded:
    digest: str
    program_bytes: int = 0
    description_bytes: int = 0
    used: float = 0.0


class Memory:
    """A memory of objectives "a1", "a2", "b1", ...: the letter is the tenant."""

    def __init__(self, budget, **limits):
        self.loaded, self.pinned, self.now, self.counts = [], set(), 0.0, 0
        self.memory = ProgramMemory(
            budget, self.count, lambda: self.pinned, self.loaded.remove, lambda d: d[:1], limits.get, lambda: self.now
        )

    def count(self):
        self.counts += 1
        return list(self.loaded)

    def load(self, digest, size, description=0):
        """Load a program of an objective, in a further second."""
        self.memory.make_room(digest, digest[:1])
        found = next((each for each in self.loaded if each.digest == digest), None)
        if found is None:
            found = Loaded(digest, description_bytes=description)
            self.loaded.append(found)
        found.used = 1 + max(each.used for each in self.loaded)
        found.program_bytes += size
        self.memory.added(digest[:1], size + description)

    def digests(self):
        return sorted(each.digest for each in self.loaded)


def refusal(call, *arguments):
    with pytest.raises(ServiceError) as error:
        call(*arguments)
    assert error.value.code is Code.RESOURCE_EXHAUSTED
    return error.value.reason


def test_with_room_nothing_is_unloaded():
    memory = Memory(100)
    for digest in ("a1", "b1", "a1", "a2"):
        memory.load(digest, 25)
    assert memory.digests() == ["a1", "a2", "b1"]
    assert [memory.memory.used_bytes(tenant) for tenant in ("a", "b", "")] == [75, 25, 100]


def test_a_program_that_is_loaded_during_a_count_is_counted():
    """A count that misses it must not make room for it: the sum was 0 then."""
    memory = Memory(100)
    memory.load("a1", 120)
    count = memory.memory._loaded

    def counted():
        found = count()
        memory.memory._loaded = count
        memory.loaded.append(Loaded("a3", 110))
        memory.memory.added("a", 110)
        return found

    memory.memory._loaded = counted
    memory.memory.make_room("a2", "a")
    assert memory.digests() == ["a3"]
    assert not memory.memory.has_room("a")


def test_full_memory_unloads_the_largest_tenants_least_recently_used_programs():
    memory = Memory(100)
    memory.load("b1", 20)
    for digest in ("a1", "a2", "a3", "a1"):
        memory.load(digest, 24)
    memory.load("c1", 5)  # 116 bytes are loaded before.
    assert memory.digests() == ["a1", "a3", "b1", "c1"]
    for index in range(50):
        memory.load(f"a{index + 4}", 25)
        assert memory.memory.used_bytes() <= 100 + 25
    assert {"b1", "c1"} <= set(memory.digests())


def test_a_tenant_with_most_and_one_objective_is_refused_and_others_lose_nothing():
    memory = Memory(100)
    memory.load("b1", 20)
    memory.load("a1", 60)
    memory.load("a1", 60)
    assert refusal(memory.load, "a1", 1) == "PROGRAM_MEMORY"
    assert memory.digests() == ["a1", "b1"]
    memory.load("b1", 1)  # Room for it is made.
    assert memory.digests() == ["b1"]


def test_a_limit_of_a_tenant_unloads_its_own_objectives_only_and_then_refuses():
    memory = Memory(1000, a=50)
    memory.load("b1", 300)
    memory.load("a1", 30)
    memory.load("a2", 30)
    memory.load("a3", 30)
    assert memory.digests() == ["a2", "a3", "b1"]
    memory.load("a3", 30)
    assert memory.digests() == ["a3", "b1"]
    assert refusal(memory.load, "a3", 1) == "TENANT_PROGRAMS"
    memory.load("a4", 1)  # Another objective takes its place.
    assert memory.digests() == ["a4", "b1"]


def test_each_objective_may_have_one_program():
    memory = Memory(1000, a=50)
    memory.load("a1", 200, description=500)
    assert refusal(memory.load, "a1", 1) == "TENANT_PROGRAMS"
    memory.load("a2", 200, description=500)
    assert memory.digests() == ["a2"]


def test_pinned_points_keep_an_objective_until_nothing_else_may_go():
    memory = Memory(100)
    for digest in ("a1", "a2", "a3"):
        memory.load(digest, 40)
    memory.pinned = {"a1", "a2"}
    memory.load("a4", 40)
    assert memory.digests() == ["a1", "a2", "a4"]
    memory.load("a5", 40)
    assert memory.digests() == ["a1", "a2", "a5"]
    memory.pinned = {"a1", "a2", "a5"}
    memory.load("a6", 40)
    assert memory.digests() == ["a2", "a5", "a6"]


def test_an_objectives_bytes_are_counted_again_when_room_is_needed():
    memory = Memory(100)
    memory.load("a1", 90)
    memory.loaded[0].program_bytes = 10  # Programs for data that is gone.
    memory.load("a1", 20)
    memory.load("b1", 1)
    assert memory.digests() == ["a1", "b1"]
    assert memory.memory.has_room("ab")


def test_a_refused_objective_is_counted_once_a_second():
    """Otherwise a tenant over its limit would have all objectives counted at each
    product.
    """
    memory = Memory(1000, a=50)
    memory.load("a1", 60)
    assert refusal(memory.load, "a1", 1) == "TENANT_PROGRAMS"
    counts = memory.counts
    for _ in range(10):
        assert refusal(memory.load, "a1", 1) == "TENANT_PROGRAMS"
    assert memory.counts == counts
    memory.loaded[0].program_bytes = 20  # Programs for data that is gone.
    assert refusal(memory.load, "a1", 1) == "TENANT_PROGRAMS"
    memory.now = 1.0
    memory.load("a1", 1)


# An engine


@pytest.fixture
def example(make_example):
    """Return a function that makes objectives of their own."""

    def example(seed):
        rng = np.random.default_rng(seed)
        weights = rng.uniform(1, 2, 5)
        return make_example(lambda x, data: jnp.sum(weights * data * x**4), rng.uniform(1, 2, 5), np.ones(5))

    return example


def right(engine, point, example, assert_product):
    V = np.eye(5)[:1]
    products, _ = engine.multiply(point, "hvp", V)
    assert_product(products, example.hessian, V)


def test_unloaded_objectives_leave_the_memory_and_come_back_from_the_cache(open_engine, example, assert_product):
    examples = [example(seed) for seed in range(6)]
    engine = open_engine(examples[0])
    first = create_point(engine, examples[0])
    right(engine, first, examples[0], assert_product)
    one = engine.objectives.memory.used_bytes()
    engine.objectives.memory.budget_bytes = 3 * one
    gc.disable()
    try:
        for each in examples[1:]:
            for content in each.export.blobs.values():
                digest = codec.digest(content)
                with engine.store.upload(digest, len(content)) as upload:
                    upload.append(0, content)
                    upload.commit()
            engine.registration.register(each.export.digest, "")
            right(engine, create_point(engine, each), each, assert_product)
        right(engine, first, examples[0], assert_product)  # This product still has the point.
        assert engine.metrics.registry.get_sample_value("hvpd_unloaded_objectives_total") >= 2
        with pytest.raises(ServiceError, match="create it again"):
            engine.point(first.id)
        compiled = engine.metrics.registry.get_sample_value("hvpd_compiles_total", {"outcome": "compiled"})
        again = create_point(engine, examples[0])
        assert again.objective is not first.objective
        right(engine, again, examples[0], assert_product)
        assert engine.metrics.registry.get_sample_value("hvpd_compiles_total", {"outcome": "compiled"}) == compiled
        del first
        assert len(engine.objectives._every()) <= 4  # Nothing but products keeps an unloaded one.
        assert engine.objectives.memory.used_bytes() <= 4 * one
        assert engine.metrics.registry.get_sample_value("hvpd_program_bytes") <= 4 * one
    finally:
        gc.enable()


def test_a_registration_over_the_tenants_limit_unloads_its_other_objectives(open_engine, example, assert_product):
    engine = open_engine()
    limits = TenantLimits(program_bytes=1)
    engine.objectives.memory._limit_of = lambda tenant: limits.program_bytes if tenant == "a" else None
    examples = [example(seed) for seed in range(3)]
    for each in examples:
        for content in each.export.blobs.values():
            digest = codec.digest(content)
            with engine.store.upload(digest, len(content)) as upload:
                upload.append(0, content)
                upload.commit()
            engine.owners.add_blob("a", digest)
        engine.registration.register(each.export.digest, "", tenant="a")
    loaded = {objective.digest for objective in engine.objectives._every()}
    assert examples[0].export.digest not in loaded
    with pytest.raises(ServiceError) as error:
        engine.objectives.load(examples[2].export.digest).kernels.request("hvp", 8).result(60)
    assert error.value.reason == "TENANT_PROGRAMS"


def test_a_deleted_objective_that_was_unloaded_leaves_nothing(open_engine, example):
    each = example(1)
    engine = open_engine(each)
    create_point(engine, each)
    (objective,) = engine.objectives._every()
    engine.objectives._unload(objective)
    (lane,) = engine.lanes
    assert lane.blobs() == set()
    cache = engine.objectives.cache  # Other tests have files there, too.
    before = cache.bytes_of("")
    own = sum(file.stat().st_size for file in cache.directory.glob(f"{each.export.digest}-*"))
    engine.registration.delete(each.export.digest)
    assert lane.load_with(each.bundle)[2] == 0
    assert list(cache.directory.glob(f"{each.export.digest}-*")) == []
    assert own > 0
    assert cache.bytes_of("") == before - own


def test_a_start_loads_only_as_many_objectives_as_have_room(open_engine, example, caplog, monkeypatch):
    monkeypatch.setattr(objectives, "_WARMING", 0)  # Else all may be asked for before the first is loaded.
    examples = [example(seed) for seed in range(4)]
    open_engine(*examples)
    engine = open_engine()
    engine.objectives.memory.budget_bytes = 1
    engine.objectives.warm_all()
    assert 1 <= len(engine.objectives._every()) < 4
    assert "are loaded when they are first used" in caplog.text
    create_point(engine, examples[3])
