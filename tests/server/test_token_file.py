"""The file of tokens and limits, and the commands that change it."""

import datetime
import json
import os
import stat
from pathlib import Path

import pytest

from hvpd._cli import main
from hvpd_server.tenancy import token_file
from hvpd_server.tenancy.tokens import Tokens

NOW = datetime.datetime(2026, 11, 21, 18, 0, tzinfo=datetime.UTC)


SHA = "ab" * 32


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tokens.json"


def bearer(token):
    return [f"Bearer {token}"]


def entry(**changes):
    return {"sha256": SHA, "tenant": "a", "rights": ["use"]} | changes


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ([entry(expire="2027-01-01T00:00:00Z")], r"token 1: unknown field 'expire'"),
        (
            [entry(), entry(sha256="cd" * 32, rights=["all"])],
            r"token 2: rights must be some of use, publish, administer, got 'all'",
        ),
        ([entry(rights=[])], "got none"),
        ([entry(rights="use")], "rights must be a list"),
        ([entry(rights=[["use"]])], "rights must be some of"),
        ([entry(sha256="AB" * 32)], "64 lower-case hexadecimal"),
        ([entry(sha256=5)], "64 lower-case hexadecimal"),
        ([entry(tenant="a/b")], "the name of a tenant must"),
        ([entry(tenant="")], "the name of a tenant must"),
        ([entry(tenant=None)], "the name of a tenant must"),
        ([entry(tenant="a" * 65)], "the name of a tenant must"),
        ([entry(expires="2027-01-01T00:00:00")], "with its offset"),
        ([entry(expires="soon")], "with its offset"),
        ([entry(expires=5)], "expires must be a date"),
        ([entry(weight=0)], "a weight must be a number"),
        ([entry(weight=float("nan"))], "a weight must be a number"),
        ([entry(weight=True)], "a weight must be a number"),
        ([entry(weight="2")], "a weight must be a number"),
        ([entry(label="a\nb")], "printable"),
        ([entry(), entry()], "twice"),
        (["token"], "expected an object"),
    ],
)
def test_an_entry_that_is_not_as_it_must_be_is_named(path, entries, says):
    path.write_text(json.dumps({"tokens": entries}))
    with pytest.raises(ValueError, match=says) as error:
        Tokens(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(("mode", "later"), [(0o644, 0o640), (0o664, 0o660), (0o666, 0o660), (0o600, 0o600)])
def test_a_file_keeps_the_rights_of_its_group_and_is_never_readable_by_all(path, mode, later):
    token_file.create(path, "vision", ["use"])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(mode)
    token_file.create(path, "vision", ["use"])
    assert stat.S_IMODE(path.stat().st_mode) == later
    assert [child.name for child in path.parent.iterdir()] == ["tokens.json"]


def test_a_file_behind_a_link_is_changed_where_it_is(path, tmp_path):
    link = tmp_path / "link.json"
    link.symlink_to(path)
    token, _ = token_file.create(link, "vision", ["use"])
    assert link.is_symlink()
    assert Tokens(path).find(bearer(token))


def test_a_file_that_cannot_be_written_stays_as_it_was(path, monkeypatch):
    token_file.create(path, "vision", ["use"])
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        token_file.create(path, "vision", ["use"])
    assert path.read_bytes() == before
    assert [child.name for child in path.parent.iterdir()] == ["tokens.json"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90d", NOW + datetime.timedelta(days=90)),
        ("30m", NOW + datetime.timedelta(minutes=30)),
        ("12h", NOW + datetime.timedelta(hours=12)),
        ("2w", NOW + datetime.timedelta(weeks=2)),
        ("2027-02-19T18:00:00+01:00", datetime.datetime(2027, 2, 19, 17, tzinfo=datetime.UTC)),
    ],
)
def test_an_expiry_is_parsed(text, expected):
    assert token_file.parse_expiry(text, NOW) == expected


@pytest.mark.parametrize("text", ["", "90", "d", "-1d", "1.5d", "90 days", "never", "999999w", "2027-02-19"])
def test_a_malformed_expiry_is_refused(text):
    with pytest.raises(ValueError, match=r"such as 90d"):
        token_file.parse_expiry(text, NOW)


def command(capsys, *arguments):
    code = main.main(["token", *map(str, arguments)])
    return (code, *capsys.readouterr())


def test_the_command_makes_lists_and_revokes(path, capsys):
    code, out, err = command(
        capsys,
        "new",
        "--file",
        path,
        "--tenant",
        "vision",
        "--rights",
        "use,publish",
        "--expires",
        "90d",
        "--label",
        "CI",
    )
    token = out.strip()
    assert code == 0
    assert token not in err
    grant = Tokens(path).find(bearer(token))
    assert (grant.tenant, grant.rights) == ("vision", {"use", "publish"})
    lives = grant.expires - datetime.datetime.now(datetime.UTC)
    assert datetime.timedelta(days=89, hours=23) < lives <= datetime.timedelta(days=90)
    token_file.create(path, "speech", ["use"], expires=NOW - datetime.timedelta(days=300))
    code, out, _ = command(capsys, "list", "--file", path)
    assert code == 0
    assert out.splitlines()[0].split() == ["ID", "TENANT", "RIGHTS", "EXPIRES", "WEIGHT", "LABEL"]
    assert out.splitlines()[1].split() == [
        grant.id,
        "vision",
        "use,publish",
        token_file.timestamp(grant.expires),
        "1",
        "CI",
    ]
    assert "(over)" in out.splitlines()[2]
    assert token not in out
    code, _, err = command(capsys, "revoke", "--file", path, "CI")
    assert (code, grant.id in err) == (0, True)
    assert [each.tenant for each in token_file.read(path).grants] == ["speech"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["new", "--tenant", "a/b"], "the name of a tenant must"),
        (["new", "--tenant", "a", "--rights", "use,all"], "rights must be some of use, publish, administer, got 'all'"),
        (["new", "--tenant", "a", "--expires", "soon"], "such as 90d"),
        (["new", "--tenant", "a", "--weight", "0"], "a weight must be"),
        (["new", "--tenant", "a", "--label", "a\tb"], "printable"),
        (["revoke", "nothing"], "no token is called 'nothing'"),
        (["revoke", ""], "no token is called ''"),
        (["revoke", "twice"], "2 tokens are called 'twice'"),
    ],
)
def test_a_wrong_command_explains_itself_and_changes_nothing(path, capsys, arguments, says):
    for _ in range(2):
        token_file.create(path, "a", ["use"], label="twice")
    before = path.read_bytes()
    code, out, err = command(capsys, *arguments, "--file", path)
    assert (code, out) == (1, "")
    assert says in err
    assert path.read_bytes() == before


def test_the_command_names_the_file_that_it_cannot_read_or_write(tmp_path, capsys):
    assert "No such file" in command(capsys, "list", "--file", tmp_path / "none.json")[2]
    code, _, err = command(capsys, "new", "--tenant", "a", "--file", tmp_path / "no" / "dir.json")
    assert (code, "No such file" in err) == (1, True)


def test_tokens_and_limits_of_a_file_do_not_lose_each_other(path):
    _, grant = token_file.create(path, "vision", ["use"])
    token_file.limit(path, "vision", {"stored_bytes": 5})
    token_file.create(path, "speech", ["use"])
    token_file.revoke(path, grant.id)
    found = token_file.read(path)
    assert [each.tenant for each in found.grants] == ["speech"]
    assert found.limits == {"vision": {"stored_bytes": 5}}


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        ([], 'expected {"tokens": [...]}'),
        ({"a/b": {}}, "limits of 'a/b': the name of a tenant must"),
        ({"a": {"rate": 1}}, "limits of 'a': unknown limit 'rate'"),
        ({"a": {"vectors_per_second": -1}}, "vectors_per_second must be a number above 0"),
    ],
)
def test_a_file_with_wrong_limits_is_refused(path, limits, says):
    path.write_text(json.dumps({"tokens": [], "limits": limits}))
    with pytest.raises(ValueError, match="cannot be used") as error:
        token_file.read(path)
    assert says in str(error.value)


def test_the_command_sets_lists_and_removes_limits(path, capsys):
    token_file.create(path, "vision", ["use"])

    def limit(*arguments):
        code = main.main(["limit", *map(str, arguments), "--file", str(path)])
        return code, *capsys.readouterr()

    assert limit("set", "vision", "--resident-bytes", "4G", "--vectors-per-second", 2.5) == (0, "", "")
    assert limit("set", "vision", "--vectors-per-second", "none", "--vectors-in-flight", 7) == (0, "", "")
    said = {"resident_bytes": 4 << 30, "vectors_per_second": None, "vectors_in_flight": 7}
    assert token_file.read(path).limits == {"vision": said}
    code, out, _ = limit("list")
    assert code == 0
    assert out.splitlines()[1].split() == ["vision", "none", "7", "-", "4294967296", "-", "-", "-"]
    assert limit("remove", "vision")[0] == 0
    assert limit("remove", "vision")[0] == 1
    code, _, err = limit("set", "vision")
    assert (code, "give at least one limit of 'vision'" in err) == (1, True)
    code, _, err = limit("set", "a/b", "--stored-bytes", "1K")
    assert (code, "the name of a tenant must" in err) == (1, True)
    before = path.read_bytes()
    code, _, err = limit("set", "vision", "--device-share", "-1")
    assert (code, "device_share must be a number above 0" in err) == (1, True)
    assert path.read_bytes() == before


def test_a_token_file_that_is_no_plain_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path):
        with pytest.raises(ValueError, match="it must be a plain file of at most 16777216 bytes"):
            token_file.read(Path(path))
