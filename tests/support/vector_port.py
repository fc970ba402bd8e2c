"""An engine that doubles, and a client of the vector port with a ticket."""

import contextlib
import os
import socket
import threading

import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2

from hvpd._wire import segment, vector_protocol, vector_socket
from hvpd._wire.vector_protocol import CallerEnd, ClosedError
from hvpd._wire.vector_socket import Connection, open_caller
from hvpd.v1 import curvature_pb2, objective_pb2
from hvpd_server.errors import Code, ServiceError
from tests.support.waiting import until

N = 3


BIG = 1 << 20  # Number of elements: 8 MiB of float64.


class Objective:
    digest = "d" * 64
    sizes = (N, BIG)
    dtype = np.dtype("float64")
    bundle = objective_pb2.Bundle(blocks=[objective_pb2.Block(leaves=[0])])
    own_rules = False

    def columns(self, program):
        return self.sizes["[" in program]


class Point:
    objective = Objective()


class Engine:
    """An engine that doubles, and notes the tenant. It refuses vectors that begin with
    a negative number.
    """

    busy = False

    def __init__(self):
        self.asked = []
        self.ended = 0

    def record_deferred(self):
        self.ended += 1

    def resident(self, spec, tenant):
        if spec.point_id == "nowhere":
            raise ServiceError(Code.NOT_FOUND, "POINT_NOT_RESIDENT", "not here")
        return Point()

    def point(self, identity, tenant):
        return Point()

    def multiply(self, point, program, vectors, *, tenant, deadline, on_queue, **settings):
        self.asked.append((tenant, settings["priority"], deadline))
        if vectors[0, 0] < 0:
            raise ServiceError(Code.RESOURCE_EXHAUSTED, "QUEUE_FULL", "full", retry_after=0.5)
        return 2 * vectors, curvature_pb2.ProductInfo(batch_width=len(vectors), program="hvp")


def by_tcp(port):
    return socket.create_connection(("127.0.0.1", port.port), 30)


def by_unix_socket(port):
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(30)
    try:
        sock.connect(vector_socket.unix_name(port.unix_id))
    except BaseException:
        sock.close()
        raise
    return sock


@contextlib.contextmanager
def connected(port):
    """Yield a socket whose greeting has come, and is not read yet."""
    with port.connect() as sock:

        def greeted():
            said = sock.recv(vector_protocol.OPENING_BYTES, socket.MSG_PEEK)
            if not said:  # The port accepted it while it ended.
                raise ConnectionError("the port closed the connection")
            return len(said) == vector_protocol.OPENING_BYTES

        until(greeted)
        yield sock


class Caller:
    """A client with a ticket."""

    def __init__(self, sock, port, ticket):
        end = CallerEnd(port.greeting, ticket.id, ticket.server_proof, ticket.client_proof)
        self.connection = Connection(sock, end, 30)
        open_caller(self.connection)

    def send(self, vectors, *, timeout_ns=0, announced=None, **spec):
        message = curvature_pb2.ProductSpec(
            **{"operator": curvature_pb2.OPERATOR_HESSIAN, "k": len(vectors)} | spec
        ).SerializeToString()
        payload = vectors.tobytes()
        size = len(payload) if announced is None else announced
        self.connection.send(vector_protocol.request(message, size, timeout_ns), payload)

    def offer(self, size):
        """Offer a segment; return whether the server takes it."""
        self.connection.send(vector_protocol.offer(size))
        return self.connection.next_event().taken

    def share(self, size):
        """Share a segment; return it."""
        assert self.offer(size)
        found, descriptor = segment.create(size)
        self.connection.send_descriptor(descriptor)
        os.close(descriptor)
        assert self.connection.next_event().taken
        return found

    def send_shared(self, size, **spec):
        """Ask for the product of vectors that the segment has."""
        message = curvature_pb2.ProductSpec(
            **{"operator": curvature_pb2.OPERATOR_HESSIAN, "k": 1} | spec
        ).SerializeToString()
        self.connection.send(vector_protocol.request(message, size, 0, shared=True))

    def receive_shared(self):
        """Return the bytes of the result, which is in the segment."""
        response = self.connection.next_event()
        assert response.shared, status_pb2.Status.FromString(response.message)
        self.connection.skip()
        return response.size

    def receive(self, shape=(1, N)):
        response = self.connection.next_event()
        if response.failed:
            self.connection.skip()
            return status_pb2.Status.FromString(response.message)
        found = np.empty(shape)
        self.connection.receive_into(found.reshape(-1).view("uint8").data)
        return curvature_pb2.ProductInfo.FromString(response.message), found


@contextlib.contextmanager
def calling(port, caller=None):
    with connected(port) as sock:
        yield Caller(sock, port, port.tickets.new(caller, "tenant", "ipv4:10.0.0.1:5000", "request"))


def ends(connection):
    with pytest.raises((ClosedError, ConnectionError)):
        connection.next_event()


def hears_nothing(sock):
    """The server ends the connection, and says nothing more than its greeting."""
    said = b""
    with contextlib.suppress(ConnectionError):
        while piece := sock.recv(1000):
            said += piece
    assert len(said) <= vector_protocol.OPENING_BYTES


def reason(status):
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    return info.reason


class Waiting(Engine):
    """An engine that multiplies when the test says so, or never if the product is
    cancelled.
    """

    def __init__(self):
        super().__init__()
        self.began = threading.Semaphore(0)
        self.changed = threading.Condition()
        self.goes_on = False
        self.cancelled = 0

    def multiply(self, point, program, vectors, *, on_queue, **settings):
        mine = []

        def cancel():
            with self.changed:
                self.cancelled += 1
                mine.append(True)
                self.changed.notify_all()

        on_queue(cancel)
        self.began.release()
        with self.changed:
            assert self.changed.wait_for(lambda: mine or self.goes_on, 30)
        return super().multiply(point, program, vectors, on_queue=on_queue, **settings)

    def go_on(self):
        with self.changed:
            self.goes_on = True
            self.changed.notify_all()


def asked(caller):
    caller.send(np.ones((1, N)))
    np.testing.assert_array_equal(caller.receive()[1], np.full((1, N), 2))
