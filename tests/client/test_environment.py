import dataclasses

import pytest

from hvpd import _environment
from hvpd_server.config import Config


def test_the_servers_variables_are_its_settings():
    settings = [f"HVPD_{field.name.upper()}" for field in dataclasses.fields(Config)]
    assert sorted(_environment.SERVER) == sorted([*settings, "HVPD_CONFIG"])


@pytest.mark.parametrize(
    "name",
    [
        *_environment.CLIENT,
        "HVPD_PORT",
        "HVPD_FUZZ_EXAMPLES",
        "HVPD_FUZZ_COUNTS",
        "HVPD_PORT_7070_TCP",
        "HVPD_SERVICE_HOST",
        "PATH",
    ],
)
def test_variables_of_hvpd_and_of_kubernetes_are_known(name):
    assert _environment.unknown([name]) == []


def test_a_misspelled_variable_is_named_with_the_right_one():
    assert _environment.unknown(["HVPD_ADRESS", "HVPD_FOO_BAR"]) == [
        "hvpd does not know the environment variable $HVPD_ADRESS: did you mean $HVPD_ADDRESS?",
        "hvpd does not know the environment variable $HVPD_FOO_BAR: unset it, or correct its name",
    ]
