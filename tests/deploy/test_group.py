"""The files of deploy/group: a LeaderWorkerSet, and a job of Slurm."""

import dataclasses
import os
import re
import subprocess
from pathlib import Path

import pytest

import hvpd
from hvpd._cli import main
from hvpd_server import config as _config

yaml = pytest.importorskip("yaml", reason="needs kubernetes-validate, of the dependency group test")

GROUP = Path(__file__).parents[2] / "deploy/group"
OURS = {f"HVPD_{field.name.upper()}" for field in dataclasses.fields(_config.Config)}
TEMPLATES = ("leaderTemplate", "workerTemplate")
PLACE = {"LWS_LEADER_ADDRESS": "hvpd-0.hvpd", "LWS_WORKER_INDEX": "3", "LWS_GROUP_SIZE": "4"}
"""Variables that LeaderWorkerSet sets in each container."""


def objects():
    return {each["kind"]: each for each in yaml.safe_load_all((GROUP / "leaderworkerset.yaml").read_text())}


def template(name):
    return objects()["LeaderWorkerSet"]["spec"]["leaderWorkerTemplate"][name]


def container(name):
    (found,) = template(name)["spec"]["containers"]
    return found


def settings(arguments, environment):
    parsed = main._parser().parse_args(arguments)
    assert parsed.run is main._serve
    return _config.load(parsed, environment)


@pytest.mark.parametrize("version", ["1.27", "1.33"])
def test_the_parts_are_valid_by_the_schemas_of_kubernetes(version):
    validate = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate")
    found = objects()
    for kind in ("PersistentVolumeClaim", "Service", "NetworkPolicy"):
        validate.validate(found[kind], version, strict=True)
    for name in TEMPLATES:
        pod = {"apiVersion": "v1", "kind": "Pod", **template(name)}
        pod["metadata"] = pod["metadata"] | {"name": "hvpd"}
        validate.validate(pod, version, strict=True)


def test_the_set_has_the_fields_of_its_definition():
    """https://lws.sigs.k8s.io/docs/reference/leaderworkerset.v1/"""
    found = objects()["LeaderWorkerSet"]
    assert found["apiVersion"] == "leaderworkerset.x-k8s.io/v1"
    assert found["spec"].keys() <= {
        "replicas",
        "startupPolicy",
        "leaderWorkerTemplate",
        "rolloutStrategy",
        "networkConfig",
    }
    assert found["spec"]["startupPolicy"] in ("LeaderCreated", "LeaderReady")
    group = found["spec"]["leaderWorkerTemplate"]
    assert group.keys() == {"size", "restartPolicy", *TEMPLATES}
    assert group["restartPolicy"] in ("RecreateGroupOnPodRestart", "RecreateGroupAfterStart", "None")
    assert group["size"] > 1


@pytest.mark.parametrize("name", TEMPLATES)
def test_each_pod_gets_its_place_from_the_set(name):
    arguments = [re.sub(r"\$\((\w+)\)", lambda found: PLACE[found[1]], each) for each in container(name)["args"]]
    variables = {each["name"]: each["value"] for each in container(name)["env"]}
    assert {each for each in variables if each.startswith("HVPD_")} <= OURS | {"HVPD_ADDRESS", "HVPD_CA"}
    config = settings(arguments, variables)
    assert (config.leader, config.rank, config.size) == ("hvpd-0.hvpd:7075", 3, 4)
    assert not config.insecure


def test_pods_differ_in_ports_and_probes_only():
    leader, worker = map(container, TEMPLATES)
    assert leader.keys() - worker.keys() == {"ports", "startupProbe", "readinessProbe"}
    assert all(leader[key] == worker[key] for key in worker)
    others = [
        {key: value for key, value in template(name)["spec"].items() if key != "containers"} for name in TEMPLATES
    ]
    assert others[0] == others[1]


def test_a_startup_may_not_wait_for_the_leader_that_waits_for_the_others():
    assert objects()["LeaderWorkerSet"]["spec"]["startupPolicy"] == "LeaderCreated"


def test_clients_reach_the_leader_only():
    found = objects()
    labels = template("workerTemplate")["metadata"]["labels"]
    assert labels.items() < found["Service"]["spec"]["selector"].items()
    assert found["Service"]["spec"]["selector"]["leaderworkerset.sigs.k8s.io/worker-index"] == "0"
    ports = {port["name"] for port in container("leaderTemplate")["ports"]}
    inside, clients = found["NetworkPolicy"]["spec"]["ingress"]
    assert inside["from"] == [{"podSelector": found["NetworkPolicy"]["spec"]["podSelector"]}]
    assert {port["port"] for port in clients["ports"]} < ports
    assert {port["targetPort"] for port in found["Service"]["spec"]["ports"]} < ports


def test_images_are_of_this_version():
    assert {container(name)["image"] for name in TEMPLATES} == {f"hvpd:{hvpd.__version__}-cpu"}


@pytest.fixture
def submitted(tmp_path):
    """Run the job's script with an srun that writes its arguments and variables."""
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\nenv | grep "^HVPD_\\|^JAX_" >&2\n')
    srun.chmod(0o700)

    def submitted(**variables):
        own = {name: value for name, value in os.environ.items() if not name.startswith(("HVPD_", "JAX_"))}
        environment = own | {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | variables
        return subprocess.run(
            ["sh", GROUP / "hvpd.sbatch"], env=environment, capture_output=True, text=True, timeout=60, check=False
        )

    return submitted


SECURE = {"HVPD_TLS_CERT": "/etc/c.pem", "HVPD_TLS_KEY": "/etc/k.pem", "HVPD_TOKENS": "/etc/t.json"}


def test_the_job_starts_a_rank_on_each_node(submitted):
    done = submitted(HVPD_STORE="/shared", **SECURE)
    assert done.returncode == 0, done.stderr
    option, command, *arguments = done.stdout.split()
    assert (option, command) == ("--kill-on-bad-exit=0", "hvpd")
    variables = dict(line.split("=", 1) for line in done.stderr.split())
    config = settings(arguments, variables)
    assert (config.group, config.host, config.store) == (True, "0.0.0.0", Path("/shared"))
    assert variables["JAX_PLATFORMS"] == "cpu"


@pytest.mark.parametrize("missing", ["HVPD_STORE", *SECURE])
def test_the_job_says_what_is_missing(submitted, missing):
    variables = {"HVPD_STORE": "/shared", **SECURE}
    del variables[missing]
    done = submitted(**variables)
    assert done.returncode != 0
    assert missing in done.stderr


def test_the_options_of_the_job_are_those_of_sbatch():
    lines = re.findall(r"^#SBATCH --([a-z-]+)=\S+$", (GROUP / "hvpd.sbatch").read_text(), re.MULTILINE)
    assert lines == ["job-name", "nodes", "ntasks-per-node", "cpus-per-task", "mem", "time", "output"]
    assert len(lines) == (GROUP / "hvpd.sbatch").read_text().count("#SBATCH")
