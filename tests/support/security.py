"""A place with keys, certificates and tokens, and callers with them."""

import dataclasses
import socket
import ssl

import grpc
import numpy as np
import pytest
import trustme
from google.rpc import error_details_pb2
from grpc_status import rpc_status

import hvpd
from hvpd.v1 import (
    blob_pb2_grpc,
    curvature_pb2,
    curvature_pb2_grpc,
    objective_pb2_grpc,
)
from hvpd_server.tenancy import token_file

N = 5


class Place:
    """The files of a server, and of its callers."""

    def __init__(self, root):
        self.root = root
        self.ca = trustme.CA()
        self.tokens = root / "tokens.json"
        self.made = []
        self.trust = self.write("ca.pem", self.ca.cert_pem.bytes())
        self.certify()

    def write(self, name, content):
        path = self.root / name
        scratch = self.root / f"{name}.new"
        scratch.write_bytes(content)
        scratch.rename(path)
        return path

    def certify(self, ca=None):
        """Give the server another certificate, for 127.0.0.1 only; return it."""
        leaf = (ca or self.ca).issue_cert("127.0.0.1")
        self.write("server.pem", b"".join(pem.bytes() for pem in leaf.cert_chain_pems))
        self.write("server.key", leaf.private_key_pem.bytes())
        return ssl.PEM_cert_to_DER_cert(leaf.cert_chain_pems[0].bytes().decode())

    def personal(self, name, ca=None, **validity):
        """Return the settings of connect() with a client's certificate."""
        leaf = (ca or self.ca).issue_cert(f"{name}.example", **validity)
        return {
            "cert": self.write(f"{name}.pem", leaf.cert_chain_pems[0].bytes()),
            "key": self.write(f"{name}.key", leaf.private_key_pem.bytes()),
        }

    def token(self, tenant, *rights, **settings):
        """Return a new token, and its id in the listing."""
        token, grant = token_file.create(self.tokens, tenant, rights, **settings)
        self.made.append(token)
        return token, grant.id

    @property
    def flags(self):
        return "--tls-cert", str(self.root / "server.pem"), "--tls-key", str(self.root / "server.key")

    def shown(self, serving):
        """Return the certificate that the server shows a new connection."""
        context = ssl.create_default_context(cadata=self.ca.cert_pem.bytes().decode())
        context.set_alpn_protocols(["h2"])
        with socket.create_connection(("127.0.0.1", serving.port), 30) as plain:
            with context.wrap_socket(plain, server_hostname="127.0.0.1") as secure:
                return secure.getpeercert(binary_form=True)


def connect(place, server, token=None, **settings):
    return hvpd.connect(server.address, token=token, **{"ca": place.trust, "connect_timeout": 60} | settings)


def channel(place, server):
    credentials = grpc.ssl_channel_credentials(place.trust.read_bytes())
    return grpc.secure_channel(server.address, credentials)


def metadata(token):
    return (("authorization", f"Bearer {token}"),)


def product(client, name, x=3.0):
    """Make a product at a new point, and check it."""
    H = client.objective(name).at(np.full(N, x)).hessian()
    np.testing.assert_allclose(H @ np.arange(N), x**2 * np.arange(N), rtol=1e-12)


@dataclasses.dataclass
class Tenant:
    """A tenant with the rights to use and publish, with its client and raw calls."""

    name: str
    client: hvpd.Client
    token: str
    blobs: blob_pb2_grpc.BlobServiceStub
    objectives: objective_pb2_grpc.ObjectiveServiceStub
    curvature: curvature_pb2_grpc.CurvatureServiceStub

    def refused(self, method, request):
        """Return the reason for which a call is refused."""
        with pytest.raises(grpc.RpcError) as error:
            answer = method(request, metadata=metadata(self.token), timeout=60)
            list(answer) if hasattr(answer, "__iter__") else answer
        info = error_details_pb2.ErrorInfo()
        assert any(detail.Unpack(info) for detail in rpc_status.from_call(error.value).details)
        return info.reason

    def opens(self, **request):
        """Return the first answer to CreatePoint."""
        requests = iter([curvature_pb2.CreatePointRequest(**request)])
        return next(self.curvature.CreatePoint(requests, metadata=metadata(self.token), timeout=60))

    def refused_at(self, point):
        """Return the reasons for which each request at a point is refused."""
        spec = curvature_pb2.ProductSpec(point_id=point, operator=curvature_pb2.OPERATOR_HESSIAN, k=1)
        request = curvature_pb2.ComputeProductRequest(spec=spec, vectors=bytes(8 * N))
        message = curvature_pb2.StreamProductsRequest(tag=1, spec=spec, chunk=bytes(8 * N))
        streamed = self.curvature.StreamProducts(iter([message]), metadata=metadata(self.token), timeout=60)
        info = error_details_pb2.ErrorInfo()
        assert any(detail.Unpack(info) for detail in next(streamed).error.details)
        factors = curvature_pb2.ComputeFactorsRequest(point_id=point)
        return {
            info.reason,
            self.refused(self.curvature.ComputeProduct, request),
            self.refused(self.curvature.ComputeFactors, factors),
        }


SECRET = np.arange(N) + 0.25
