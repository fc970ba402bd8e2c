"""A server that answers like a real server, and lies if a test says so."""

import collections

import grpc
import jax.numpy as jnp
import numpy as np

from hvpd._registration import export as _export
from hvpd.v1 import blob_pb2, curvature_pb2, objective_pb2, server_pb2

N = 4
X = np.arange(1.0, N + 1)
CODES = {code.value[0]: code for code in grpc.StatusCode}
EXPORT = _export.export(lambda x: jnp.sum(x**4) / 12, X, (), platforms=("cpu",), precision="highest")
DERIVATION = objective_pb2.Derivation(mode="forward_over_reverse", programs=["value_and_grad", "hvp", "hvp_pairs"])
OBJECTIVE = objective_pb2.Objective(name="quartic", digest=EXPORT.digest, bundle=EXPORT.bundle, derivation=DERIVATION)
POINT = curvature_pb2.Point(id="0" * 64, value=float(np.sum(X**4) / 12))


class Liar(grpc.GenericRpcHandler):
    """Answers as a real server would for x -> sum(x^4) / 12 at X, or with an answer
    from `lies`, if `lies` has the method.

    A lie is the bytes to send, and the call's end: code, message and trailing
    metadata, or None for OK.
    """

    def __init__(self):
        self.lies = {}
        self.asked = collections.Counter()

    def service(self, details):
        method = details.method.rpartition("/")[2]

        def answer(requests, context):
            self.asked[method] += 1
            if method not in self.lies:
                yield from self.honest(method, requests)
                return
            sent, end = self.lies[method]
            next(requests, None)
            yield from sent
            if end is not None:
                code, text, details = end
                if details is not None:
                    context.set_trailing_metadata((("grpc-status-details-bin", details),))
                context.abort(CODES[code], text)

        return grpc.stream_stream_rpc_method_handler(answer)

    def honest(self, method, requests):
        if method == "GetServer":
            yield server_pb2.GetServerResponse(
                min_protocol=1, max_protocol=1, platform="cpu", max_block_width=64, krylov_runs=True
            ).SerializeToString()
        elif method in ("GetObjective", "CreateObjective"):
            yield objective_pb2.GetObjectiveResponse(objective=OBJECTIVE).SerializeToString()
        elif method == "ListObjectives":
            yield objective_pb2.ListObjectivesResponse(objectives=[OBJECTIVE]).SerializeToString()
        elif method == "GetPlan":
            yield objective_pb2.GetPlanResponse().SerializeToString()
        elif method == "FindMissingBlobs":
            yield blob_pb2.FindMissingBlobsResponse().SerializeToString()
        elif method == "CreatePoint":
            next(requests)
            yield curvature_pb2.CreatePointResponse(point=POINT).SerializeToString()
            yield curvature_pb2.CreatePointResponse(chunk=(X**3 / 3).tobytes()).SerializeToString()
        elif method == "StreamProducts":
            for data in requests:
                message = curvature_pb2.StreamProductsRequest.FromString(data)
                V = np.frombuffer(message.chunk).reshape(-1, N)
                yield curvature_pb2.StreamProductsResponse(
                    tag=message.tag, info=curvature_pb2.ProductInfo(), chunk=(V * X**2).tobytes()
                ).SerializeToString()
