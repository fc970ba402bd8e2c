"""The facts that must be equal on all ranks."""

from hvpd_server.group.facts import differences

FACTS = {"version of jax": "0.10.2", "XLA_FLAGS": ""}


def test_equal_facts_admit_a_rank():
    assert differences(1, dict(FACTS), FACTS) == ""


def test_each_difference_is_named_with_both_values():
    found = differences(3, {"version of jax": "0.10.1", "XLA_FLAGS": "--xla_x"}, FACTS)
    assert found.startswith("rank 3 differs from the leader: ")
    assert "its XLA_FLAGS is '--xla_x', and the leader's is ''" in found
    assert "its version of jax is '0.10.1', and the leader's is '0.10.2'" in found


def test_a_fact_that_one_side_does_not_know_differs():
    assert "its processor is not known, and the leader's is 'abc'" in differences(
        1, FACTS, FACTS | {"processor": "abc"}
    )
    assert "its processor is 'abc', and the leader's is not known" in differences(
        1, FACTS | {"processor": "abc"}, FACTS
    )
