"""The Dockerfile's image, built and run without a Docker engine: by buildah, on a
Debian that debootstrap made.

It takes minutes, root, and $HVPD_IMAGE_TEST. The build uses this machine's settings of
pip, and its certificates, which are mounted and stay outside.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import uuid
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import hvpd

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
CERTIFICATES = Path("/etc/ssl/certs")
WAIT = 600


def test_copied_paths_exist_and_are_not_ignored():
    ignored = (ROOT / ".dockerignore").read_text().split()
    copied = [
        word for line in re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE) for word in line.split()
    ]
    assert len(copied) > 5
    for name in copied:
        assert (ROOT / name).exists(), name
        assert f"!{name}" in ignored, name


def test_its_extras_are_the_projects():
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    installed = re.findall(r"'\.\[(\w+)\]'", DOCKERFILE)
    assert len(installed) == 2
    assert set(installed) <= set(extras)


def run(*command, timeout=WAIT, **settings):
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, check=False, env=os.environ | settings, cwd=ROOT
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def pip_settings(folder):
    """Return the files that buildah mounts, so that pip finds packages as it does
    here.
    """
    lines = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, timeout=60, check=True
    ).stdout.splitlines()
    found = {}
    for line in sorted(lines, key=lambda line: line.startswith(":env:")):  # Variables come before files.
        name, _, value = line.partition("=")
        found[name.rpartition(".")[2]] = value.strip("'\"").replace("\\n", " ")
    found.setdefault("disable-pip-version-check", "1")
    file = folder / "pip.conf"
    file.write_text("[global]\n" + "".join(f"{name} = {value}\n" for name, value in found.items()))
    paths = {CERTIFICATES}
    for word in " ".join(found.values()).split():
        path = Path(word.removeprefix("file://"))
        if path.is_absolute() and path.exists():
            # An index links to files beside it.
            paths.add(path.parent if path.is_file() or word.startswith("file:") else path)
    mounts = [(file, Path("/etc/pip.conf")), *((path, path) for path in sorted(paths) if path.is_dir())]
    return [f"--volume={source}:{target}:ro" for source, target in mounts]


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """Build the target `cpu`; yield its mounted root directory and its
    configuration.
    """
    if not os.environ.get("HVPD_IMAGE_TEST"):
        pytest.skip("takes minutes: set HVPD_IMAGE_TEST=1")
    missing = [name for name in ("buildah", "debootstrap", "unshare", "chroot") if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"needs {', '.join(missing) or 'root'}: apt-get install buildah debootstrap, as root")
    folder = tmp_path_factory.mktemp("image")
    if shutil.disk_usage(folder).free < 8 << 30:
        pytest.skip("needs 8 GiB of disk")
    storage = ["--root", str(folder / "storage"), "--runroot", str(folder / "runroot")]

    def buildah(*arguments):
        return run("buildah", *storage, *arguments, BUILDAH_ISOLATION="chroot").strip()

    debian = folder / "debian"
    made = subprocess.run(
        ["debootstrap", "--variant=minbase", "--include=python3,python3-venv,ca-certificates", "bookworm", str(debian)],
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=False,
    )
    if made.returncode != 0:
        pytest.skip(f"debootstrap cannot make a Debian here: {made.stdout[-300:]}")
    name = f"localhost/hvpd-test-{uuid.uuid4().hex[:8]}"
    base = buildah("from", "scratch")
    buildah("add", "--quiet", base, str(debian), "/")
    buildah("commit", "--quiet", base, f"{name}-base")
    shutil.rmtree(debian)
    arguments = ["--isolation", "chroot", "--pull=never", "--target", "cpu", "--build-arg", f"BASE={name}-base"]
    buildah("build", "--quiet", *arguments, *pip_settings(folder), "--tag", f"{name}:cpu", ".")
    container = buildah("from", "--pull=never", f"{name}:cpu")
    config = json.loads(buildah("inspect", "--type", "image", f"{name}:cpu"))["OCIv1"]["config"]
    root = Path(buildah("mount", container))
    try:
        yield root, config
    finally:
        buildah("umount", container)
        shutil.rmtree(folder / "storage", ignore_errors=True)


INSIDE = """
set -eu
mount --make-rprivate /
mount --bind "$ROOT" "$ROOT"
mount --bind "$DATA" "$ROOT/data"
mount -t tmpfs tmpfs "$ROOT/tmp"
mount -t proc proc "$ROOT/proc"
mount --rbind /dev "$ROOT/dev"
mount -o remount,bind,ro "$ROOT"
exec chroot --userspec="$USERSPEC" "$ROOT" env -i HOME=/tmp "$@"
"""


class Container:
    """A container that runs like one of
    `docker run --read-only --tmpfs /tmp -v DATA:/data`, with its own mount namespaces.
    """

    def __init__(self, image, data):
        self._root, self._config = image
        user = self._config["User"]
        data.mkdir()
        os.chown(data, *map(int, user.split(":")))
        self._settings = {"ROOT": str(self._root), "DATA": str(data), "USERSPEC": user}

    def command(self, arguments, **environment):
        variables = [*self._config["Env"], *(f"{name}={value}" for name, value in environment.items())]
        return ["unshare", "--mount", "sh", "-c", INSIDE, "sh", *variables, *self._config["Entrypoint"], *arguments]

    def run(self, *arguments, **environment):
        return subprocess.run(
            self.command(arguments, **environment),
            env=os.environ | self._settings,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    @contextlib.contextmanager
    def serving(self):
        """Run the default command on a free port."""
        process = subprocess.Popen(
            self.command(self._config["Cmd"], HVPD_PORT="0", JAX_PLATFORMS="cpu"),
            env=os.environ | self._settings,
            stderr=subprocess.PIPE,
            text=True,
        )
        lines, ready = [], threading.Event()

        def read():
            for line in process.stderr:
                lines.append(line.rstrip())
                if "hvpd: serving on" in line:
                    ready.set()
            ready.set()

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        try:
            assert ready.wait(120), lines
            assert process.poll() is None, lines
            yield lines[-1].rpartition(" ")[2]
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0, lines
        finally:
            if process.poll() is None:
                process.kill()
                process.wait(60)
            reader.join(60)
            process.stderr.close()


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
def test_the_image_serves_products_as_a_user_without_rights_and_writes_nowhere_else(image, tmp_path):
    root, config = image
    container = Container(image, tmp_path / "data")
    assert config["User"] == "10001:10001"
    before = {path: path.stat().st_mtime_ns for path in (root / "opt/hvpd").rglob("*") if path.is_file()}
    with container.serving() as address:
        port = address.rpartition(":")[2]
        with hvpd.connect(f"127.0.0.1:{port}") as client:
            assert client.server.version == hvpd.__version__
            objective = client.register(lambda x, A: x @ A @ x / 2, np.zeros(5), np.diag(np.arange(5.0)), name="image")
            np.testing.assert_allclose(objective.at(np.ones(5)).hessian() @ np.ones(5), np.arange(5.0))
            assert client.register(lambda x: jnp.sum(x**4), np.ones(3)).at(np.ones(3)).value == 3.0
        health = container_health(config)
        healthy = container.run(*health, HVPD_ADDRESS=f"127.0.0.1:{port}")
        assert (healthy.returncode, healthy.stdout) == (0, "serving\n"), healthy.stderr
    assert container.run(*health, HVPD_ADDRESS=f"127.0.0.1:{port}").returncode == 1
    with container.serving() as address, hvpd.connect(address) as client:
        assert [listing.name for listing in client.objectives()] == ["image", ""]
    assert {path.stat().st_uid for path in (tmp_path / "data").rglob("*")} == {10001}
    assert before == {path: path.stat().st_mtime_ns for path in (root / "opt/hvpd").rglob("*") if path.is_file()}
    settings = json.dumps(config) + (root / "etc/environment").read_text()
    assert "pip" not in settings.lower()
    assert not (root / "etc/pip.conf").exists() or (root / "etc/pip.conf").stat().st_size == 0


def container_health(config):
    """Return the HEALTHCHECK's command, which OCI images do not carry, without the
    leading `hvpd`.
    """
    written = re.search(r"^HEALTHCHECK .* CMD (\[.*\])$", DOCKERFILE, re.MULTILINE)[1]
    command, *arguments = json.loads(written)
    assert [command] == config["Entrypoint"]
    return arguments
