"""The unit of deploy/systemd, read by systemd itself, and against the files that it
names.
"""

import configparser
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hvpd._cli import main
from hvpd_server import config

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "deploy/systemd/hvpd.service").read_text()
LOCATION = "/opt/hvpd/bin/hvpd"

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="needs systemd-analyze: apt-get install systemd"
)


@pytest.fixture(scope="module")
def service():
    parser = configparser.ConfigParser(interpolation=None, delimiters="=", comment_prefixes="#")
    parser.optionxform = str
    parser.read_string(TEXT)
    return parser["Service"]


def test_the_unit_runs_a_command_that_exists(service):
    location, *arguments = shlex.split(service["ExecStart"])
    assert location == LOCATION
    assert main._parser().parse_args(arguments).run is main._serve
    page = (ROOT / "docs/operate/run.md").read_text()
    assert f"until {location} health" in page
    assert "python3 -m venv /opt/hvpd " in page


def test_its_variables_are_settings(service):
    names = re.findall(r"\bHVPD_\w+", TEXT)
    settings = {f"HVPD_{name.upper()}" for name in config.Config.__dataclass_fields__}
    assert set(names) <= settings
    assert service["StateDirectory"] == "hvpd"
    assert "HVPD_STORE=%S/hvpd" in service["Environment"].split()


def test_there_is_time_to_drain(service):
    assert float(service["TimeoutStopSec"]) > config.Config().drain + 15


def test_the_exit_code_of_wrong_settings_is_no_reason_to_try_again(service):
    done = subprocess.run(
        [sys.executable, "-m", "hvpd._cli", "serve", "--host", "0.0.0.0"],
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == int(service["RestartPreventExitStatus"])


def test_its_user_is_made(service):
    line = (ROOT / "deploy/systemd/hvpd.sysusers").read_text().splitlines()[-1]
    assert line.split()[:2] == ["u", service["User"]]
    assert service["User"] == service["Group"]


def analyze(tmp_path, text, *arguments):
    """Return systemd-analyze's text about a unit, with this environment's command in
    it.
    """
    assert text.count(f"ExecStart={LOCATION}") == 1
    unit = tmp_path / "hvpd.service"
    unit.write_text(text.replace(f"ExecStart={LOCATION}", f"ExecStart={sys.executable} -m hvpd._cli"))
    return subprocess.run(
        ["systemd-analyze", *arguments, str(unit)], capture_output=True, text=True, timeout=60, check=False
    )


@needs_systemd
def test_systemd_understands_all_of_it(tmp_path):
    done = analyze(tmp_path, TEXT, "verify", "--man=no")
    assert (done.returncode, done.stderr) == (0, "")


@needs_systemd
def test_a_misspelt_setting_of_the_unit_is_found(tmp_path):
    done = analyze(tmp_path, TEXT.replace("ProtectSystem=strict", "ProtectSystem=strickt"), "verify", "--man=no")
    assert "strickt" in done.stderr


@needs_systemd
def test_the_unit_has_a_low_exposure_score(tmp_path):
    """systemd's own score, from 0 to 10; in tenths here."""
    done = analyze(tmp_path, TEXT, "security", "--offline=true", "--no-pager", "--threshold=25")
    if "unrecognized option" in done.stderr:
        pytest.skip("systemd-analyze cannot do that offline before systemd 250")
    assert done.returncode == 0, done.stdout[-2000:]
    open_ = re.sub(r"^(Protect|Private|Restrict|SystemCall|Capability)\w+=.*\n", "", TEXT, flags=re.MULTILINE)
    assert analyze(tmp_path, open_, "security", "--offline=true", "--no-pager", "--threshold=25").returncode != 0
