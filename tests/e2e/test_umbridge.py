"""`hvpd umbridge` against the Python client of the protocol, and closed forms."""

import http.client
import json
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax.numpy as jnp
import jsonschema
import numpy as np
import pytest
import umbridge

from hvpd._umbridge.http_server import UmbridgeServer
from hvpd._umbridge.model import Model
from hvpd._umbridge.requests import RefusedError, parsed

M = np.random.default_rng(0).normal(size=(3, 4))
A, B = [1.0, -2.0, 0.5], [3.0, 0.0, -1.0, 2.0]


def coupled(x):
    """f(a, b) = sum(a^4) / 12 + a' M b + |b|^2 / 2: H = [[diag(a^2), M], [M', I]]."""
    b = x["b"].reshape(-1)
    return jnp.sum(x["a"] ** 4) / 12 + x["a"] @ M @ b + b @ b / 2


@pytest.fixture(scope="module")
def url(client):
    x = {"a": np.array(A), "b": np.array(B).reshape(2, 2)}
    objective = client.register(coupled, x, name="umbridge/coupled")
    unbounded = client.register(lambda x: jnp.sum(jnp.log(x)), np.ones(2), name="umbridge/log")
    models = [Model("umbridge/coupled", objective), Model("umbridge/log", unbounded)]
    with UmbridgeServer(models, "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server.url
        server.shutdown()
        thread.join()


@pytest.fixture(params=[False, True], ids=["json", "shared memory"])
def model(request, url, capsys):
    made = umbridge.HTTPModel(url, "umbridge/coupled", use_shmem=request.param)
    assert made.supports_shmem() == request.param
    before = set(Path("/dev/shm").glob("umbridge*"))
    yield made
    assert set(Path("/dev/shm").glob("umbridge*")) <= before


def close(found, expected):
    assert np.shape(found) == np.shape(expected)
    return np.abs(np.subtract(found, expected)).max() <= 1e-12 * max(1.0, np.abs(expected).max())


def test_the_client_sees_a_model_for_each_name_and_an_input_for_each_leaf(url, model):
    assert umbridge.supported_models(url) == ["umbridge/coupled", "umbridge/log"]
    assert model.get_input_sizes() == [3, 4]
    assert model.get_output_sizes() == [1]
    assert model.supports_evaluate()
    assert model.supports_gradient()
    assert model.supports_apply_jacobian()
    assert model.supports_apply_hessian()


def test_values_and_gradients_are_those_of_the_closed_form(model):
    a, b = np.array(A), np.array(B)
    assert close(model([A, B]), [[np.sum(a**4) / 12 + a @ M @ b + b @ b / 2]])
    assert close(model.gradient(0, 0, [A, B], [2.0]), 2 * (a**3 / 3 + M @ b))
    assert close(model.gradient(0, 1, [A, B], [-1.0]), -(M.T @ a + b))
    assert close(model.apply_jacobian(0, 1, [A, B], [1.0, 2.0, 3.0, 4.0]), [(M.T @ a + b) @ [1, 2, 3, 4]])


@pytest.mark.parametrize(("first", "second"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_each_block_of_the_hessian_is_that_of_the_closed_form(model, first, second):
    H = np.block([[np.diag(np.square(A)), M], [M.T, np.eye(4)]])
    span = [slice(0, 3), slice(3, 7)]
    vec = [1.0, -1.0, 0.5, 2.0][: span[second].stop - span[second].start]
    found = model.apply_hessian(0, first, second, [A, B], [3.0], vec)
    assert close(found, 3 * H[span[first], span[second]] @ vec)


def post(url, path, body):
    """Return status and answer of one request."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
    connection.request("POST", path, body if isinstance(body, (bytes, str)) else json.dumps(body))
    answer = connection.getresponse()
    found = answer.status, json.loads(answer.read())
    connection.close()
    return found


GRADIENT = {"name": "umbridge/coupled", "input": [A, B], "outWrt": 0, "inWrt": 0, "sens": [1.0]}
HESSIAN = {**GRADIENT, "inWrt1": 0, "inWrt2": 1, "vec": B}
ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
            "required": ["type", "message"],
            "additionalProperties": False,
        }
    },
    "required": ["error"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("path", "body", "kind", "words"),
    [
        (
            "/Evaluate",
            {"name": "other"},
            "ModelNotFound",
            r"no model 'other' here, but 'umbridge/coupled', 'umbridge/log'",
        ),
        ("/Evaluate", {}, "ModelNotFound", "no model nothing here"),
        ("/Evaluate", "{", "InvalidInput", "must be JSON"),
        ("/Evaluate", "[1]", "InvalidInput", r"a JSON object, got \[1\]"),
        ("/Evaluate", "[" * 100_000, "InvalidInput", "must be JSON"),
        (
            "/Evaluate",
            GRADIENT | {"input": [A]},
            "InvalidInput",
            r"input must have 2 vectors, of the sizes \[3, 4\], got 1",
        ),
        (
            "/Evaluate",
            GRADIENT | {"input": [A, A]},
            "InvalidInput",
            r"input\[1\] must have 4 elements, as the model has, got 3",
        ),
        ("/Evaluate", GRADIENT | {"input": "ab"}, "InvalidInput", "input must have 2 vectors"),
        ("/Evaluate", GRADIENT | {"input": [[True] * 3, B]}, "InvalidInput", r"input\[0\] must be a list of 3 numbers"),
        ("/Evaluate", GRADIENT | {"input": [[10**400] * 3, B]}, "InvalidInput", "too large for a floating number"),
        (
            "/Evaluate",
            GRADIENT | {"input": [[float("nan")] * 3, B]},
            "InvalidInput",
            r"input\[0\] must have finite elements",
        ),
        (
            "/Evaluate",
            GRADIENT | {"config": {"level": 1}},
            "InvalidInput",
            r"takes no config, got \{'level': 1\}: leave it empty",
        ),
        (
            "/Gradient",
            GRADIENT | {"inWrt": 2},
            "InvalidInput",
            "inWrt must be from 0 to 1, because there are 2 inputs; got 2",
        ),
        ("/Gradient", GRADIENT | {"inWrt": -1}, "InvalidInput", "inWrt must be from 0 to 1"),
        (
            "/Gradient",
            GRADIENT | {"outWrt": 1},
            "InvalidInput",
            "outWrt must be from 0 to 0, because there are 1 outputs; got 1",
        ),
        (
            "/Gradient",
            GRADIENT | {"sens": [1.0, 2.0]},
            "InvalidInput",
            "sens must have 1 elements, as the output has, got 2",
        ),
        ("/ApplyJacobian", GRADIENT | {"vec": B}, "InvalidInput", "vec must have 3 elements, as input 0 has, got 4"),
        ("/ApplyHessian", HESSIAN | {"vec": A}, "InvalidInput", "vec must have 4 elements, as input 1 has, got 3"),
        ("/ApplyHessian", HESSIAN | {"inWrt2": "1"}, "InvalidInput", "inWrt2 must be from 0 to 1"),
        ("/EvaluateShMem", GRADIENT, "InvalidInput", "shmem_num_inputs must be 2, got None"),
        (
            "/EvaluateShMem",
            GRADIENT | {"shmem_num_inputs": 2, "shmem_size_0": 3, "shmem_name": "/../etc", "tid": "1"},
            "InvalidInput",
            "shmem_name must begin with umbridge",
        ),
        (
            "/EvaluateShMem",
            GRADIENT | {"shmem_num_inputs": 2, "shmem_size_0": 3, "shmem_name": "/umbridge", "tid": "../1"},
            "InvalidInput",
            "tid must be a number",
        ),
        (
            "/EvaluateShMem",
            GRADIENT | {"shmem_num_inputs": 2, "shmem_size_0": 3, "shmem_name": "/umbridge", "tid": "none"},
            "InvalidInput",
            "umbridge_in_none_0 cannot be opened: No such file",
        ),
    ],
)
def test_a_wrong_request_gets_an_error_with_its_kind_and_reason(url, path, body, kind, words):
    status, answer = post(url, path, body)
    jsonschema.validate(answer, ERROR)
    assert (status, answer["error"]["type"]) == (400, kind)
    assert re.search(words, answer["error"]["message"])


def test_an_unknown_path_is_not_found(url):
    for body in (GRADIENT, {}):
        status, answer = post(url, "/Square", body)
        assert (status, answer["error"]["type"]) == (404, "UnsupportedFeature")
        assert "there is no Square: there are Evaluate, " in answer["error"]["message"]


def test_a_deleted_objective_is_a_model_that_is_not_found(client):
    deleted = client.register(lambda x: jnp.sum(jnp.cosh(3 * x)), np.ones(2), name="umbridge/deleted")
    with UmbridgeServer([Model("umbridge/deleted", deleted)], "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            client.delete("umbridge/deleted")
            status, answer = post(server.url, "/Evaluate", {"name": "umbridge/deleted", "input": [[0.5, 1.0]]})
        finally:
            server.shutdown()
            thread.join()
    assert (status, answer["error"]["type"]) == (400, "ModelNotFound")
    assert "the objective 'umbridge/deleted' is not on the hvpd server any more" in answer["error"]["message"]


def test_a_value_that_json_cannot_state_is_an_error(url):
    status, answer = post(url, "/Evaluate", {"name": "umbridge/log", "input": [[0.0, 1.0]]})
    assert (status, answer["error"]["type"]) == (500, "InvalidOutput")
    assert "not finite at this x" in answer["error"]["message"]


def test_a_segment_that_is_too_small_is_refused(url):
    path = Path("/dev/shm/umbridge_in_small_0")
    path.write_bytes(b"\0" * 8)
    try:
        body = GRADIENT | {"shmem_num_inputs": 2, "shmem_size_0": 3, "shmem_name": "umbridge", "tid": "small"}
        assert "has 8 bytes, and 24 are needed" in post(url, "/EvaluateShMem", body)[1]["error"]["message"]
    finally:
        path.unlink()


def test_a_body_without_a_size_is_refused_and_other_requests_go_on(url):
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
    connection.putrequest("POST", "/Evaluate")
    connection.endheaders()
    answer = connection.getresponse()
    assert answer.status == 411
    assert "Content-Length" in json.loads(answer.read())["error"]["message"]
    connection.close()
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
    connection.putrequest("POST", "/Evaluate")
    connection.putheader("Content-Length", str(1 << 40))
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
    connection.request("HEAD", "/")
    assert connection.getresponse().status == 200
    connection.close()
    assert post(url, "/OutputSizes", {"name": "umbridge/log"}) == (200, {"outputSizes": [1]})


def test_parsed_takes_objects_only():
    assert parsed(b'{"name": "a"}') == {"name": "a"}
    with pytest.raises(RefusedError):
        parsed(b"\xff")


def test_the_command_serves_until_it_is_told_to_stop(url, server):
    command = [
        sys.executable,
        "-m",
        "hvpd._cli",
        "umbridge",
        "umbridge/log",
        "--port",
        "0",
        "--retry-timeout",
        "5",
        "--address",
        server.address,
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        ready = re.fullmatch(r"hvpd: UM-Bridge on (http://127\.0\.0\.1:\d+): umbridge/log\n", process.stderr.readline())
        model = umbridge.HTTPModel(ready[1], "umbridge/log")
        assert model([[1.0, 1.0]]) == [[0.0]]
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
        assert process.stderr.read() == ""
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_a_port_that_is_taken_is_an_error(url, server, capsys):
    from hvpd._cli import main

    port = url.rpartition(":")[2]
    assert main.main(["umbridge", "umbridge/log", "--port", port, "--address", server.address]) == 1
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in capsys.readouterr().err
    assert main.main(["umbridge", "umbridge/log", "--port", "70000", "--address", server.address]) == 1
    assert "--port must be from 0 to 65535" in capsys.readouterr().err
