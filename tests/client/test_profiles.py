import pytest

import hvpd
from hvpd import _profiles


@pytest.fixture
def file(tmp_path):
    """Write a file of profiles: file(text) -> environment that names it."""

    def write(text, mode=0o600):
        path = tmp_path / "config.toml"
        path.write_text(text)
        path.chmod(mode)
        return {"HVPD_PROFILES": str(path)}

    return write


def test_a_missing_file_is_an_empty_profile_unless_it_is_named(tmp_path):
    home = {"XDG_CONFIG_HOME": str(tmp_path)}
    assert _profiles.load(None, home) == _profiles.Profile()
    with pytest.raises(hvpd.InvalidArgumentError, match="no profile 'lab', because there is no file"):
        _profiles.load("lab", home)
    with pytest.raises(hvpd.InvalidArgumentError, match=r"none.toml, which \$HVPD_PROFILES names"):
        _profiles.load(None, {"HVPD_PROFILES": str(tmp_path / "none.toml")})


def test_the_chosen_profile_then_the_variables_then_default(file):
    found = file('[profile.default]\naddress = "a:1"\n[profile.lab]\naddress = "b:2"\ntls = true\n')
    assert _profiles.load(None, found).address == "a:1"
    assert _profiles.load(None, found | {"HVPD_PROFILE": "lab"}) == _profiles.Profile(address="b:2", tls=True)
    assert _profiles.load("default", found | {"HVPD_PROFILE": "lab"}).address == "a:1"


def test_tokens_come_from_the_file_or_from_a_file_of_their_own(file, tmp_path):
    token = tmp_path / "token"
    token.write_text("hvpd_secret\n")
    token.chmod(0o600)
    assert _profiles.load("x", file('[profile.x]\ntoken = "hvpd_a"')).token == "hvpd_a"
    assert _profiles.load("x", file(f'[profile.x]\ntoken_file = "{token}"')).token == "hvpd_secret"


@pytest.mark.parametrize(
    ("text", "mode", "says"),
    [
        ('[profile.x]\ntoken = "t"', 0o644, "chmod 600"),
        ('[profile.x]\ntoken = "t"\ntoken_file = "f"', 0o600, "both token and token_file"),
        ('[profile.x]\ntoken_file = "/nowhere/at/all"', 0o600, "cannot read token_file"),
        ('[profile.x]\nadress = "a:1"', 0o600, "unknown keys adress; known are address"),
        ("[profile.x]\naddress = 7", 0o600, "address must be a text, got 7"),
        ('[profile.x]\ntls = "yes"', 0o600, "tls must be a boolean, got 'yes'"),
        ('[profile.y]\naddress = "a:1"', 0o600, "has no profile 'x'; it has y"),
        ("profile = 3", 0o600, r"must have tables such as \[profile.default\]"),
        ('address = "a:1"', 0o600, "must have tables"),
        ("[[[", 0o600, "are no TOML"),
    ],
)
def test_a_wrong_file_is_named_with_the_fault(file, text, mode, says):
    with pytest.raises(hvpd.InvalidArgumentError, match=says):
        _profiles.load("x", file(text, mode))
