"""Which threads wait for sockets."""

import pytest

from hvpd_server import _polling


@pytest.mark.parametrize("version", ["1.80.0", "1.85.1"])
def test_the_event_engine_is_left_out(version):
    assert _polling.settings({"PATH": "x"}, version) == {
        "GRPC_EXPERIMENTS": "-event_engine_client,-event_engine_listener"
    }


@pytest.mark.parametrize("version", ["1.71.2", "1.79.9", "1.86.0", "2.0.0"])
def test_versions_that_have_none_or_were_not_tried_are_left_as_they_are(version):
    assert _polling.settings({}, version) == {}


@pytest.mark.parametrize("said", ["", "event_engine_client"])
def test_what_the_operator_says_counts(said):
    assert _polling.settings({"GRPC_EXPERIMENTS": said}, "1.85.1") == {}
