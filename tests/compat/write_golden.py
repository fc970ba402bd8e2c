"""Writes client/hvpd/_conformance/golden.json: `python -m tests.compat.write_golden`.

Frames of a revision never change: write them anew for a new revision only. The bundle
is what a client of today registers for f(x) = sum(x^4) / 12.
"""

import json
from pathlib import Path

import numpy as np

from hvpd._conformance.golden import PLACE
from hvpd._registration import stablehlo
from hvpd._wire import codec
from hvpd.v1 import blob_pb2, curvature_pb2, objective_pb2, server_pb2

MODULE = """
func.func @main(%x: tensor<4xf64>) -> tensor<f64> {
  %s = stablehlo.multiply %x, %x : tensor<4xf64>
  %q = stablehlo.multiply %s, %s : tensor<4xf64>
  %zero = stablehlo.constant dense<0.0> : tensor<f64>
  %sum = stablehlo.reduce(%q init: %zero) applies stablehlo.add across dimensions = [0] : (tensor<4xf64>, tensor<f64>) -> tensor<f64>
  %c = stablehlo.constant dense<12.0> : tensor<f64>
  %f = stablehlo.divide %sum, %c : tensor<f64>
  return %f : tensor<f64>
}
"""
X, FAR = np.array([1.0, -2.0, 0.5, 3.0]), np.array([2.0, 0.25, -1.0, 0.0])
V = np.array([[1.0, 2.0, 3.0, 4.0], [0.0, 1.0, -1.0, 0.5], [-2.0, 0.0, 8.0, 0.125]])


def frames(bundle):
    """Return the messages of each step, by name."""

    def spec(x):
        digest = codec.digest(codec.payload(x))
        return curvature_pb2.PointSpec(objective_digest=bundle, default_data=True, x_digest=digest)

    def product(**fields):
        asked = curvature_pb2.ProductSpec(point_id=PLACE.decode(), operator=curvature_pb2.OPERATOR_HESSIAN)
        asked.MergeFrom(curvature_pb2.ProductSpec(**fields))
        return asked

    one, three = V[:1].tobytes(), V.tobytes()
    stream = curvature_pb2.StreamProductsRequest
    return {
        "get_server": server_pb2.GetServerRequest(),
        "get_objective": objective_pb2.GetObjectiveRequest(name=bundle),
        "get_unknown": objective_pb2.GetObjectiveRequest(name="hvpd-conformance/none"),
        "upload_wrong": blob_pb2.UploadBlobRequest(digest="1" * 64, size_bytes=3, chunk=b"abc"),
        "point": curvature_pb2.CreatePointRequest(spec=spec(X), inline_x=X.tobytes()),
        "point_far": curvature_pb2.CreatePointRequest(spec=spec(FAR)),
        "point_far_begin": curvature_pb2.CreatePointRequest(chunk=FAR.tobytes()[:8]),
        "point_far_end": curvature_pb2.CreatePointRequest(chunk=FAR.tobytes()[8:]),
        "product": curvature_pb2.ComputeProductRequest(spec=product(k=1), vectors=one),
        "product_block": curvature_pb2.ComputeProductRequest(spec=product(k=3), vectors=three),
        "product_short": curvature_pb2.ComputeProductRequest(spec=product(k=3), vectors=one),
        "quadratic_form": curvature_pb2.ComputeProductRequest(spec=product(k=3, quadratic_form=True), vectors=three),
        "stream_1_begin": stream(tag=11, spec=product(k=1, pipelined=True), chunk=one[:8]),
        "stream_2_begin": stream(tag=12, spec=product(k=3, pipelined=True), chunk=three[:40]),
        "stream_1_end": stream(tag=11, chunk=one[8:]),
        "stream_2_end": stream(tag=12, chunk=three[40:]),
        "stream_refused": stream(tag=13, spec=product(k=3), chunk=one + one + one + one),
        "stream_after": stream(tag=14, spec=product(k=1), chunk=one),
        "vector_spec": product(k=1),
    }


def main():
    options = {"mode": "forward_over_reverse", "precision": "highest", "stablehlo_version": "1.0.0"}
    export = stablehlo.export(MODULE, np.zeros(4), (), **options)
    content = {
        "revision": 1,
        "bundle": export.digest,
        "x": X.tolist(),
        "far": FAR.tolist(),
        "vectors": V.tolist(),
        "blobs": {digest: bytes(blob).hex() for digest, blob in export.blobs.items()},
        "frames": {
            name: message.SerializeToString(deterministic=True).hex() for name, message in frames(export.digest).items()
        },
    }
    path = Path(__file__).parents[2] / "client/hvpd/_conformance/golden.json"
    path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
