"""A token bucket begins full, grows with time up to its limit, and may be overdrawn."""

import math

import pytest

from hvpd_server.token_bucket import TokenBucket


def test_a_bucket_begins_full_and_grows_at_its_rate():
    bucket = TokenBucket(seconds=10)
    assert bucket.level(3.0, 100) == 30
    bucket.spend(25)
    assert bucket.level(3.0, 100) == 5
    assert bucket.level(3.0, 102) == 11
    assert bucket.level(3.0, 1e6) == 30


def test_an_overdrawn_bucket_recovers_after_the_debt():
    bucket = TokenBucket(seconds=1)
    bucket.level(2.0, 0)
    bucket.spend(12)
    assert bucket.level(2.0, 4) == -2
    assert bucket.level(2.0, 5.5) == 1


def test_given_back_tokens_do_not_exceed_the_limit():
    bucket = TokenBucket(seconds=1)
    bucket.level(2.0, 0)
    bucket.spend(-5)
    assert bucket.level(2.0, 0) == 2


@pytest.mark.parametrize("spent", [0, 1e9])
def test_a_bucket_without_a_rate_is_never_empty_and_begins_full_with_its_next_rate(spent):
    bucket = TokenBucket(seconds=5)
    assert bucket.level(None, 0) == math.inf
    bucket.spend(spent)
    assert bucket.level(2.0, 1) == 10
