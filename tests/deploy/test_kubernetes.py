"""The manifests of deploy/kubernetes, built by kustomize, against the published schemas
and against the parts that they name.
"""

import dataclasses
import functools
import os
import re
import shutil
import subprocess
import textwrap
from pathlib import Path

import pytest
import trustme

import hvpd
from hvpd._cli import main
from hvpd_server import config as _config
from hvpd_server.tenancy import token_file

yaml = pytest.importorskip("yaml", reason="needs kubernetes-validate, of the dependency group test")

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "deploy/kubernetes"
OVERLAYS = ("cpu", "gpu")
OURS = {f"HVPD_{field.name.upper()}" for field in dataclasses.fields(_config.Config)}
CLIENTS = {"HVPD_ADDRESS", "HVPD_CA"}
"""Variables of `hvpd health`."""

needs_kubectl = pytest.mark.skipif(
    shutil.which("kubectl") is None, reason="needs kubectl, which has kustomize: apt-get install kubernetes-client"
)


def load(path):
    return list(yaml.safe_load_all((KUBERNETES / path).read_text()))


@functools.cache
def written():
    """Return all objects of all files, as they are written."""
    return [each for path in sorted(KUBERNETES.rglob("*.yaml")) for each in load(path.relative_to(KUBERNETES))]


def of(kind, objects=None):
    return [found for found in objects or written() if found.get("kind") == kind]


def stateful_set():
    (found,) = (each for each in of("StatefulSet") if "serviceName" in each["spec"])
    return found


def pod():
    return stateful_set()["spec"]["template"]["spec"]


def container():
    (found,) = pod()["containers"]
    return found


def environment(objects=None):
    """Return every variable that a manifest sets."""
    found = {}
    for each in of("StatefulSet", objects):
        for variable in each["spec"]["template"]["spec"]["containers"][0].get("env", []):
            found[variable["name"]] = variable["value"]
    return found


# The named parts exist


def test_each_variable_is_a_setting():
    ours = {name for name in environment() if name.startswith("HVPD_")}
    assert ours <= OURS | CLIENTS
    assert {"HVPD_HOST", "HVPD_TLS_CERT", "HVPD_TLS_KEY", "HVPD_TOKENS", "HVPD_METRICS_HOST"} <= ours


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_settings_are_taken(overlay):
    """`hvpd serve` itself asks for TLS and tokens on such a host."""
    variables = environment() | environment(load(f"overlays/{overlay}/resources.yaml"))
    config = _config.load(_config.parse([]), variables)
    assert (config.host, config.port, config.vector_port, config.metrics_port) == ("0.0.0.0", 7070, "7071", 9464)
    assert not config.insecure
    without = {name: value for name, value in variables.items() if name != "HVPD_TOKENS"}
    with pytest.raises(ValueError, match="--tokens"):
        _config.load(_config.parse([]), without)


def test_links_of_services_would_be_taken_for_settings():
    """enableServiceLinks is off, because Kubernetes sets these variables for a Service
    of this name.
    """
    service = of("Service")[0]["metadata"]["name"]
    variable = f"{service.upper()}_PORT"
    assert variable in OURS
    with pytest.raises(ValueError, match=r"\$HVPD_PORT"):
        _config.load(_config.parse([]), {variable: "tcp://10.0.0.1:7070"})
    assert pod()["enableServiceLinks"] is False


def test_ports_agree():
    ports = {port["name"]: port["containerPort"] for port in container()["ports"]}
    assert ports == {
        "hvpd": int(environment()["HVPD_PORT"]),
        "vectors": int(environment()["HVPD_VECTOR_PORT"]),
        "metrics": int(environment()["HVPD_METRICS_PORT"]),
    }
    assert environment()["HVPD_ADDRESS"] == f"localhost:{ports['hvpd']}"
    for service in of("Service"):
        for port in service["spec"]["ports"]:
            assert ports[port["targetPort"]] == port["port"]
    for policy in of("NetworkPolicy"):
        for rule in policy["spec"]["ingress"]:
            assert {port["port"] for port in rule["ports"]} <= set(ports)
    (monitor,) = of("ServiceMonitor")
    scraped = {port["name"] for service in selected(monitor) for port in service["spec"]["ports"]}
    assert {endpoint["port"] for endpoint in monitor["spec"]["endpoints"]} <= scraped


def selected(monitor):
    wanted = monitor["spec"]["selector"]["matchLabels"].items()
    return [service for service in of("Service") if wanted <= service["metadata"]["labels"].items()]


def test_selectors_find_the_pods():
    labels = stateful_set()["spec"]["template"]["metadata"]["labels"].items()
    selectors = [stateful_set()["spec"]["selector"]["matchLabels"]]
    selectors += [service["spec"]["selector"] for service in of("Service")]
    selectors += [policy["spec"]["podSelector"]["matchLabels"] for policy in of("NetworkPolicy")]
    selectors += [budget["spec"]["selector"]["matchLabels"] for budget in of("PodDisruptionBudget")]
    assert len(selectors) == 6
    assert all(selector.items() <= labels for selector in selectors)


def test_each_pod_is_scraped_once():
    """Prometheus scrapes through the headless Service. The other Service has no port
    for it.
    """
    (monitor,) = of("ServiceMonitor")
    assert [service["metadata"]["name"] for service in selected(monitor)] == [stateful_set()["spec"]["serviceName"]]
    assert selected(monitor)[0]["spec"]["clusterIP"] == "None"
    assert monitor["spec"]["jobLabel"] in selected(monitor)[0]["metadata"]["labels"]
    assert selected(monitor)[0]["metadata"]["labels"][monitor["spec"]["jobLabel"]] == "hvpd"


def test_each_mount_has_its_volume_and_nothing_is_mounted_by_subpath():
    volumes = {volume["name"] for volume in pod()["volumes"]}
    volumes |= {claim["metadata"]["name"] for claim in stateful_set()["spec"]["volumeClaimTemplates"]}
    mounts = {mount["name"]: mount for mount in container()["volumeMounts"]}
    assert set(mounts) == volumes
    assert not [mount for mount in mounts.values() if "subPath" in mount]
    paths = [Path(mount["mountPath"]) for mount in mounts.values()]
    for name in ("HVPD_STORE", "HVPD_TLS_CERT", "HVPD_TLS_KEY", "HVPD_TOKENS", "HVPD_CA"):
        assert any(path in (Path(environment()[name]), *Path(environment()[name]).parents) for path in paths), name


def test_there_is_time_to_drain():
    assert pod()["terminationGracePeriodSeconds"] > float(environment()["HVPD_DRAIN"]) + 15


@pytest.mark.parametrize("probe", ["startupProbe", "readinessProbe"])
def test_probes_run_a_command_that_exists(probe, monkeypatch):
    name, *arguments = container()[probe]["exec"]["command"]
    assert name == "hvpd"
    parsed = main._parser().parse_args(arguments)
    assert parsed.run is main._health
    assert parsed.connect_timeout < container()[probe]["timeoutSeconds"]


def test_the_container_runs_a_command_that_exists():
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert 'ENTRYPOINT ["hvpd"]' in dockerfile
    parsed = main._parser().parse_args(container()["args"])
    assert parsed.run is main._serve
    assert "command" not in container()


def test_the_user_is_the_images():
    dockerfile = (ROOT / "Dockerfile").read_text()
    context = pod()["securityContext"]
    assert f"USER {context['runAsUser']}:{context['runAsGroup']}" in dockerfile
    assert context["fsGroup"] == context["runAsGroup"]
    assert environment()["HVPD_STORE"] in re.findall(r"^VOLUME (.*)$", dockerfile, re.MULTILINE)


def test_the_pod_is_a_restricted_one():
    """The Pod Security Standards define "restricted"."""
    context, own = pod()["securityContext"], container()["securityContext"]
    assert context["runAsNonRoot"] is True
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert own["allowPrivilegeEscalation"] is False
    assert own["capabilities"] == {"drop": ["ALL"]}
    assert own["readOnlyRootFilesystem"] is True
    assert pod()["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod())
    assert all(volume.keys() & {"emptyDir", "secret"} for volume in pod()["volumes"])


def test_the_server_may_open_no_connection():
    (policy,) = (policy for policy in of("NetworkPolicy") if "Egress" in policy["spec"]["policyTypes"])
    assert policy["spec"]["egress"] == []


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_images_are_of_this_version_and_of_a_target(overlay):
    (overlay,) = load(f"overlays/{overlay}/kustomization.yaml")
    (image,) = overlay["images"]
    assert image["name"] == container()["image"]
    version, _, target = image["newTag"].rpartition("-")
    assert version == hvpd.__version__
    assert f"FROM base AS {target}\n" in (ROOT / "Dockerfile").read_text()


def test_the_rules_are_those_of_prometheus():
    (rule,) = of("PrometheusRule")
    assert rule["spec"] == yaml.safe_load((ROOT / "deploy/prometheus/rules.yml").read_text())


def test_the_autoscaler_reads_metrics_that_exist():
    (scaler,) = of("HorizontalPodAutoscaler")
    (adapter,) = load("components/autoscaling/prometheus-adapter.yaml")
    (rule,) = adapter["rules"]
    (metric,) = scaler["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]
    target = scaler["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("StatefulSet", stateful_set()["metadata"]["name"])
    used = set(re.findall(r"hvpd_\w+", rule["seriesQuery"] + rule["metricsQuery"]))
    assert used == {"hvpd_queue_seconds_count", "hvpd_queue_seconds_sum"}
    assert "| `hvpd_queue_seconds` | histogram |" in (ROOT / "docs/reference/metrics.md").read_text()


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool: apt-get install prometheus")
def test_the_autoscaler_sees_each_pods_mean_wait_and_0_without_waits(tmp_path):
    (adapter,) = load("components/autoscaling/prometheus-adapter.yaml")
    query = adapter["rules"][0]["metricsQuery"]
    query = query.replace("<<.GroupBy>>", "pod").replace("<<.LabelMatchers>>", 'namespace="n"')
    assert "<<" not in query
    rules = {"groups": [{"name": "scale", "rules": [{"record": "scale", "expr": query}]}]}
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(rules))
    (tmp_path / "test.yml").write_text(
        textwrap.dedent("""
        rule_files: [rules.yml]
        evaluation_interval: 1m
        tests:
          - interval: 1m
            input_series:
              - {series: 'hvpd_queue_seconds_sum{namespace="n", pod="hvpd-0"}', values: 0+30x20}
              - {series: 'hvpd_queue_seconds_count{namespace="n", pod="hvpd-0"}', values: 0+60x20}
              - {series: 'hvpd_queue_seconds_sum{namespace="n", pod="hvpd-1"}', values: 7+0x20}
              - {series: 'hvpd_queue_seconds_count{namespace="n", pod="hvpd-1"}', values: 9+0x20}
              - {series: 'hvpd_queue_seconds_sum{namespace="other", pod="hvpd-0"}', values: 0+600x20}
              - {series: 'hvpd_queue_seconds_count{namespace="other", pod="hvpd-0"}', values: 0+1x20}
            promql_expr_test:
              - expr: scale
                eval_time: 15m
                exp_samples:
                  - {labels: 'scale{pod="hvpd-0"}', value: 0.5}
                  - {labels: 'scale{pod="hvpd-1"}', value: 0}
        """)
    )
    done = subprocess.run(
        ["promtool", "test", "rules", "test.yml"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


# The output of kustomize


def build(folder, overlay, *components, **more):
    """Return the objects of an overlay with components."""
    root = os.path.relpath(KUBERNETES, folder.resolve())
    made = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [f"{root}/overlays/{overlay}"],
        "components": [f"{root}/components/{component}" for component in components],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(made | more))
    done = subprocess.run(
        ["kubectl", "kustomize", str(folder)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def without_custom(objects):
    return [each for each in objects if "coreos.com" not in each["apiVersion"]]


VERSIONS = ("1.27", "1.30", "1.33")
"""Versions of Kubernetes: the first that knows all fields, and later ones."""


def check_schema(each, version):
    validate = pytest.importorskip(
        "kubernetes_validate", reason="needs kubernetes-validate, of the dependency group test"
    )
    validate.validate(each, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    "path", sorted(str(path.relative_to(KUBERNETES)) for path in (KUBERNETES / "base").glob("*.yaml"))
)
def test_the_files_of_the_base_are_valid(path, version):
    for each in load(path):
        if each["kind"] != "Kustomization":
            check_schema(each, version)


@needs_kubectl
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize(
    ("components", "count"),
    [((), 6), (("replicas",), 7), (("monitoring", "replicas", "autoscaling"), 11)],
    ids=["plain", "replicas", "all"],
)
def test_applied_manifests_are_valid(tmp_path, overlay, components, count, version):
    built = build(tmp_path, overlay, *components, namespace="vision")
    assert len(built) == count
    for each in without_custom(built):
        assert each["metadata"]["namespace"] == "vision"
        check_schema(each, version)


def test_an_invalid_manifest_is_found():
    wrong = of("NetworkPolicy")[0] | {"spec": {"podSelektor": {}}}
    with pytest.raises(Exception, match="podSelektor"):
        check_schema(wrong, VERSIONS[-1])


@needs_kubectl
def test_the_gpu_overlay_asks_for_one_gpu(tmp_path):
    (found,) = of("StatefulSet", build(tmp_path, "gpu", "monitoring", "autoscaling"))
    assert "replicas" not in found["spec"]  # The autoscaler sets it.
    (container,) = found["spec"]["template"]["spec"]["containers"]
    assert container["image"] == f"hvpd:{hvpd.__version__}-cuda"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    names = [variable["name"] for variable in container["env"]]
    assert len(names) == len(set(names)) > 10
    assert {"HVPD_HOST", "JAX_PLATFORMS"} <= set(names)
    modes = [volume["secret"]["defaultMode"] for volume in found["spec"]["template"]["spec"]["volumes"][1:]]
    assert modes == [0o440, 0o440]


@needs_kubectl
@pytest.mark.parametrize("suffix", ["", "-audio"])
def test_replicas_mount_one_store(tmp_path, suffix):
    built = build(tmp_path, "gpu", "replicas", nameSuffix=suffix)
    (found,), (claim,) = of("StatefulSet", built), of("PersistentVolumeClaim", built)
    assert found["spec"]["replicas"] == 3
    assert "volumeClaimTemplates" not in found["spec"]
    (mount,) = (volume for volume in found["spec"]["template"]["spec"]["volumes"] if volume["name"] == "store")
    assert mount["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"] == f"hvpd-store{suffix}"
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert "replicas" not in of("StatefulSet", build(tmp_path, "gpu", "replicas", "autoscaling"))[0]["spec"]


@needs_kubectl
def test_several_servers_of_one_namespace_do_not_find_each_others_pods(tmp_path):
    """The page says to give each a suffix and a label of its own."""
    labels = [{"pairs": {"app.kubernetes.io/instance": "audio"}, "includeSelectors": True}]
    built = build(tmp_path, "gpu", "monitoring", nameSuffix="-audio", labels=labels)
    (found,) = of("StatefulSet", built)
    assert found["spec"]["serviceName"] == "hvpd-pods-audio"
    assert found["spec"]["template"]["spec"]["serviceAccountName"] == "hvpd-audio"
    for kind in ("Service", "StatefulSet"):
        for each in of(kind, built):
            selector = each["spec"]["selector"]
            assert selector.get("matchLabels", selector)["app.kubernetes.io/instance"] == "audio"


@needs_kubectl
@pytest.mark.skipif(
    "HVPD_CRDS" not in os.environ,
    reason="needs $HVPD_CRDS, a directory with the definitions of the Prometheus Operator (its example/prometheus-operator-crd)",
)
def test_manifests_for_the_prometheus_operator_are_valid(tmp_path):
    import jsonschema

    schemas = {}
    for path in Path(os.environ["HVPD_CRDS"]).glob("*.yaml"):
        definition = yaml.safe_load(path.read_text())
        (version,) = (each for each in definition["spec"]["versions"] if each["name"] == "v1")
        schemas[definition["spec"]["names"]["kind"]] = strict(version["schema"]["openAPIV3Schema"])
    custom = [each for each in build(tmp_path, "cpu", "monitoring") if "coreos.com" in each["apiVersion"]]
    assert sorted(each["kind"] for each in custom) == ["PrometheusRule", "ServiceMonitor"]
    for each in custom:
        metadata = each.pop("metadata")
        assert metadata["name"] == "hvpd"
        jsonschema.validate(each, schemas[each["kind"]])
        with pytest.raises(jsonschema.ValidationError, match="other"):
            jsonschema.validate(each | {"spec": each["spec"] | {"other": 1}}, schemas[each["kind"]])


def strict(schema):
    """Return a schema that refuses fields which Kubernetes would silently drop."""
    if isinstance(schema, list):
        return list(map(strict, schema))
    if not isinstance(schema, dict):
        return schema
    # Patterns are in Go's syntax.
    found = {key: strict(value) for key, value in schema.items() if key != "pattern" or not isinstance(value, str)}
    if "properties" in found and found.get("type") == "object" and "additionalProperties" not in found:
        found["additionalProperties"] = False
    return found


# Secrets that change while a pod runs


class Mounted:
    """A directory like a Secret that the kubelet mounts and changes: links to links,
    one of which is renamed.
    """

    def __init__(self, root):
        self._root = root
        self._count = 0
        root.mkdir()

    def put(self, **files):
        self._count += 1
        fresh = self._root / f"..{self._count}"
        fresh.mkdir()
        for name, content in files.items():
            (fresh / name).write_bytes(content)
            link = self._root / name
            if not link.is_symlink():
                link.symlink_to(f"..data/{name}")
        (self._root / "..data_tmp").symlink_to(fresh.name)
        (self._root / "..data_tmp").rename(self._root / "..data")


def test_certificates_and_tokens_change_under_a_pod(serve, tmp_path):
    """With the variables of the manifests and of the probe, a revoked token is refused
    and a new certificate is shown.
    """
    secrets = {"/etc/hvpd/tls": Mounted(tmp_path / "tls"), "/etc/hvpd/tokens": Mounted(tmp_path / "tokens")}

    def certify(authority):
        leaf = authority.issue_cert("localhost")
        secrets["/etc/hvpd/tls"].put(
            **{
                "tls.crt": b"".join(pem.bytes() for pem in leaf.cert_chain_pems),
                "tls.key": leaf.private_key_pem.bytes(),
                "ca.crt": authority.cert_pem.bytes(),
            }
        )

    def grant(tenant):
        token, _ = token_file.create(tmp_path / f"{tenant}.json", tenant, ["use"])
        secrets["/etc/hvpd/tokens"].put(**{"tokens.json": (tmp_path / f"{tenant}.json").read_bytes()})
        return token

    certify(trustme.CA())
    token = grant("vision")
    variables = {name: value for name, value in environment().items() if "/etc/hvpd" in value}
    for mounted, name in (("/etc/hvpd/tls", "tls"), ("/etc/hvpd/tokens", "tokens")):
        variables = {key: value.replace(mounted, str(tmp_path / name)) for key, value in variables.items()}
    server = serve(environment=variables)
    address = f"localhost:{server.port}"
    health = container()["readinessProbe"]["exec"]["command"][1:]

    def probe():
        with pytest.MonkeyPatch.context() as patch:
            for name, value in (variables | {"HVPD_ADDRESS": address}).items():
                patch.setenv(name, value)
            return main.main(health)

    assert probe() == 0
    with hvpd.connect(address, token=token, ca=variables["HVPD_CA"]) as client:
        assert client.objectives() == []
        another = grant("audio")
        certify(trustme.CA())
        assert probe() == 0  # The probe trusts the new certificate only.
        with hvpd.connect(address, token=another, ca=variables["HVPD_CA"]) as other:
            assert other.objectives() == []
        with pytest.raises(hvpd.AccessError):
            until_refused(client)
    assert server.terminate() == 0


def until_refused(client):
    """Ask until the server refuses, because the server looks at the file once a
    second.
    """
    for _ in range(100_000):
        client.objectives()
