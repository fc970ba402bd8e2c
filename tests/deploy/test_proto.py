"""proto/ is all that other languages need."""

import subprocess
import sys
from importlib import resources
from pathlib import Path

from google.protobuf import descriptor_pb2
from google.rpc import status_pb2

ROOT = Path(__file__).parents[2]


def test_protoc_needs_proto_and_its_own_types_only(tmp_path):
    found = tmp_path / "found.binpb"
    sources = sorted((ROOT / "proto/hvpd/v1").glob("*.proto"))
    assert sources
    own = resources.files("grpc_tools") / "_proto"
    protoc = [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'proto'}", f"-I{own}"]
    subprocess.run([*protoc, f"--descriptor_set_out={found}", "--include_imports", *sources], check=True)
    files = {file.name: file for file in descriptor_pb2.FileDescriptorSet.FromString(found.read_bytes()).file}
    assert {f"hvpd/v1/{source.name}" for source in sources} <= files.keys()
    # The copy is that of googleapis-common-protos, which Python programs use.
    copy = files["google/rpc/status.proto"]
    for field in copy.message_type[0].field:
        field.ClearField("json_name")  # Generated code leaves it out.
    assert copy == descriptor_pb2.FileDescriptorProto.FromString(status_pb2.DESCRIPTOR.serialized_pb)
