"""Keeps today's wire beside this file, as a FileDescriptorSet:
`python tests/compat/freeze.py 0.2.0`, at each release.

test_protocol.py compares later wires with it.
"""

import sys
from pathlib import Path

from google.protobuf import descriptor_pb2

from hvpd.v1 import blob_pb2, curvature_pb2, objective_pb2, server_pb2, tensor_pb2

MODULES = (blob_pb2, curvature_pb2, objective_pb2, server_pb2, tensor_pb2)


def today():
    """Return all files of the wire, and then the files that they import."""
    found = {}

    def add(file):
        for dependency in file.dependencies:
            add(dependency)
        if file.name not in found:
            found[file.name] = descriptor_pb2.FileDescriptorProto()
            file.CopyToProto(found[file.name])

    for module in MODULES:
        add(module.DESCRIPTOR)
    return descriptor_pb2.FileDescriptorSet(file=found.values())


if __name__ == "__main__":
    (Path(__file__).parent / f"{sys.argv[1]}.binpb").write_bytes(today().SerializeToString(deterministic=True))
