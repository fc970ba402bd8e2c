"""Objectives that crashed the server too often."""

import json

import pytest

from hvpd_server.errors import Code, ServiceError
from hvpd_server.store.quarantine import Quarantine

DIGEST, OTHER = "a" * 64, "b" * 64


def test_so_many_strikes_and_it_is_not_served(tmp_path):
    for strikes in (1, 2, 3):
        record = Quarantine(tmp_path, 3).strike(DIGEST, f"it did this, {strikes}")
        assert record.strikes == strikes
        quarantine = Quarantine(tmp_path, 3)
        quarantine.check(OTHER)
        if strikes < 3:
            quarantine.check(DIGEST)
    with pytest.raises(ServiceError, match=r"not served any more: it did this, 3 \(3 times, the last at 20") as error:
        quarantine.check(DIGEST)
    assert (error.value.code, error.value.reason) == (Code.FAILED_PRECONDITION, "QUARANTINED")
    assert [found.name for found in (tmp_path / "quarantine").iterdir()] == [DIGEST]


def test_the_operator_releases_it_by_removing_its_record(tmp_path):
    Quarantine(tmp_path, 1).strike(DIGEST, "it did this")
    quarantine = Quarantine(tmp_path, 1)
    with pytest.raises(ServiceError):
        quarantine.check(DIGEST)
    (tmp_path / "quarantine" / DIGEST).unlink()
    quarantine.check(DIGEST)
    quarantine.check(DIGEST)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", json.dumps({"strikes": 1}), "\x00\xff"])
def test_a_damaged_record_is_not_taken_for_none(tmp_path, content):
    Quarantine(tmp_path, 3).strike(DIGEST, "it did this")
    (tmp_path / "quarantine" / DIGEST).write_text(content)
    with pytest.raises(ServiceError, match="record cannot be read"):
        Quarantine(tmp_path, 3).check(DIGEST)


def test_other_files_are_left_alone(tmp_path):
    (tmp_path / "quarantine").mkdir()
    (tmp_path / "quarantine" / "README").write_text("a note")
    Quarantine(tmp_path, 1).check("README")
    with pytest.raises(ValueError, match="no digest"):
        Quarantine(tmp_path, 1).strike("../../etc/passwd", "no")


def test_probation_is_kept_for_its_time(tmp_path):
    assert Quarantine(tmp_path, 3).probation() is None
    Quarantine(tmp_path, 3).suspect([DIGEST, OTHER], 1000)
    found = Quarantine(tmp_path, 3).probation()
    assert (found.suspects, found.everyone) == ({DIGEST, OTHER}, False)
    assert Quarantine(tmp_path, 3).release(DIGEST) == 0  # It is no strike.
    Quarantine(tmp_path, 3).check(DIGEST)
    Quarantine(tmp_path, 3).end_probation()
    assert Quarantine(tmp_path, 3).probation() is None
    Quarantine(tmp_path, 3).end_probation()
    Quarantine(tmp_path, 3).suspect([DIGEST, OTHER], 0)
    assert Quarantine(tmp_path, 3).probation() is None


def test_all_are_on_probation_once_a_suspect_ran_beside_others_again(tmp_path):
    quarantine, third, fourth = Quarantine(tmp_path, 3), "c" * 64, "d" * 64
    quarantine.suspect([DIGEST, OTHER], 1000)
    assert not quarantine.suspect([third, fourth], 1000).everyone
    found = quarantine.suspect([DIGEST, "e" * 64], 1000)
    assert found.everyone
    assert found.suspects == {DIGEST, OTHER, third, fourth, "e" * 64}
    assert quarantine.suspect((), 1000) == quarantine.probation()
    assert quarantine.probation().everyone


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"suspects": 1}', "\x00\xff"])
def test_a_damaged_record_of_probation_is_none(tmp_path, content):
    Quarantine(tmp_path, 3).suspect([DIGEST, OTHER], 1000)
    (tmp_path / "quarantine" / "probation").write_text(content)
    assert Quarantine(tmp_path, 3).probation() is None
    Quarantine(tmp_path, 3).check(DIGEST)
