"""Bytes that look like protobuf messages: fields of all kinds, changed real messages,
and any bytes.
"""

import hashlib

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message_factory import GetMessageClass
from hypothesis import strategies as st

from hvpd.v1 import blob_pb2, blob_pb2_grpc, curvature_pb2, krylov_pb2, objective_pb2, server_pb2

METHODS = [
    method
    for file in (blob_pb2, curvature_pb2, krylov_pb2, objective_pb2, server_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]

_BOUNDS = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}

NAMES = st.one_of(
    st.sampled_from(
        [
            "",
            ".",
            "..",
            "/",
            "../../etc/passwd",
            "a\0b",
            "0" * 64,
            "f" * 64,
            "F" * 64,
            "quartic",
            "x" * 300,
            "\u202e",
            "é",
        ]
    ),
    st.text(max_size=40),
)


def varint(number, pad=0):
    """Draw a number as a varint, in more bytes than it needs."""
    digits = bytearray()
    while number > 0x7F or pad > 0:
        digits.append(number & 0x7F | 0x80)
        number >>= 7
        pad -= number == 0
    return bytes([*digits, number & 0x7F])


def message(kind, depth=2):  # noqa: C901 - one case for each type of field
    """Draw a message of a type, with any values in its fields."""
    descriptor = kind.DESCRIPTOR

    def value(field):
        if field.cpp_type in _BOUNDS:
            low, high = _BOUNDS[field.cpp_type]
            return st.sampled_from([0, 1, 2, 3, 50, 64, 65, low, high, max(low, -1)]) | st.integers(low, high)
        if field.cpp_type == FieldDescriptor.CPPTYPE_ENUM:
            return st.integers(-1, 9)
        if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
            return st.booleans()
        if field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
            return message(GetMessageClass(field.message_type), depth - 1)
        if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
            return st.binary(max_size=40) if field.type == FieldDescriptor.TYPE_BYTES else NAMES
        return st.floats()

    def usable(field):
        is_map = field.message_type is not None and field.message_type.GetOptions().map_entry
        return not is_map and (depth > 0 or field.cpp_type != FieldDescriptor.CPPTYPE_MESSAGE)

    fields = [field for field in descriptor.fields if usable(field)]
    if not fields:
        return st.just(kind())
    chosen = st.lists(st.sampled_from(fields), max_size=4, unique_by=lambda field: field.number)

    @st.composite
    def build(draw):
        made = kind()
        for field in draw(chosen):
            several = isinstance(getattr(made, field.name), list) or hasattr(getattr(made, field.name), "extend")
            values = draw(st.lists(value(field), max_size=3)) if several else draw(value(field))
            if several:
                getattr(made, field.name).extend(values)
            elif field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
                getattr(made, field.name).CopyFrom(values)
            else:
                setattr(made, field.name, values)
        return made

    return build()


@st.composite
def fields(draw):
    """Draw fields one after the other, which no type need know."""
    parts = []
    for _ in range(draw(st.integers(0, 6))):
        number, kind = draw(st.integers(0, 18)), draw(st.sampled_from([0, 0, 1, 2, 2, 2, 2, 3, 4, 5, 6, 7]))
        parts.append(varint(number << 3 | kind, draw(st.sampled_from([0, 0, 0, 1, 8]))))
        if kind == 0:
            parts.append(varint(draw(st.integers(0, 2**70)), draw(st.sampled_from([0, 0, 3]))))
        elif kind == 2:
            content = draw(st.binary(max_size=8) | st.deferred(fields))
            said = draw(st.sampled_from([len(content)] * 6 + [len(content) + 1, 2**31, 2**63, 2**64 + len(content)]))
            parts += [varint(said, draw(st.sampled_from([0, 0, 0, 4, 9]))), content]
        else:
            parts.append(draw(st.binary(max_size=9)))
    return b"".join(parts)


@st.composite
def damaged(draw, source):
    """Draw bytes of which some are changed, taken out, doubled or added."""
    data = bytearray(draw(source))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(data)))
        how = draw(st.sampled_from(["set", "cut", "insert", "double"]))
        if how == "set" and at < len(data):
            data[at] = draw(st.integers(0, 255))
        elif how == "cut":
            del data[at : at + draw(st.integers(1, 8))]
        elif how == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=8))
        else:
            data[at:at] = data[at : at + 16]
    return bytes(data)


def looks_like(kind):
    """Draw bytes that are a message of a type, a damaged message, or no message."""
    real = message(kind).map(lambda made: made.SerializeToString())
    return st.one_of(
        real, damaged(real), damaged(st.tuples(real, real).map(b"".join)), fields(), st.binary(max_size=80)
    )


def send(channel, content):
    """Upload a blob of at most one message; return its digest."""
    digest = hashlib.sha256(content).hexdigest()
    message = blob_pb2.UploadBlobRequest(digest=digest, size_bytes=len(content), chunk=content)
    blob_pb2_grpc.BlobServiceStub(channel).UploadBlob(iter([message]))
    return digest
