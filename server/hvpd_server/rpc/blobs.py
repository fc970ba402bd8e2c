"""BlobService: blobs in and out of the store."""

from collections.abc import Iterator

from hvpd._wire.frames import Frame
from hvpd.v1 import blob_pb2
from hvpd_server.engine.engine import Engine
from hvpd_server.errors import invalid
from hvpd_server.rpc.call_context import GrpcCall
from hvpd_server.rpc.call_limits import Stalls
from hvpd_server.rpc.methods import check_administers, unary


class BlobService:
    """Blobs in and out of the store."""

    def __init__(self, engine: Engine, stalls: Stalls | None = None) -> None:
        self._engine = engine
        self._stalls = stalls or Stalls()

    @unary
    def FindMissingBlobs(  # noqa: N802 - the contract's name
        self, request: blob_pb2.FindMissingBlobsRequest, call: GrpcCall
    ) -> blob_pb2.FindMissingBlobsResponse:
        if len(request.digests) > 10_000:
            raise invalid("TOO_MANY", f"ask for 10,000 digests at most, got {len(request.digests)}")
        missing = self._engine.owners.missing_blobs(call.owner, request.digests)
        return blob_pb2.FindMissingBlobsResponse(missing_digests=missing)

    @unary
    def UploadBlob(  # noqa: N802
        self, request_iterator: Iterator[Frame[blob_pb2.UploadBlobRequest]], call: GrpcCall
    ) -> blob_pb2.UploadBlobResponse:
        request_iterator = self._stalls.watch(request_iterator, call)
        first = next(request_iterator, None)
        if first is None:
            raise invalid("UPLOAD_SIZE", "an upload without a message")
        digest, announced = first.message.digest, first.message.size_bytes
        owner, store = call.owner, self._engine.store
        if owner and self._engine.owners.has_blob(owner, digest) and store.size(digest) == announced:
            # An earlier try stored the blob, and its answer was lost. There may be no
            # room to store the blob twice.
            return blob_pb2.UploadBlobResponse(size_bytes=announced)
        upload = store.upload(digest, announced)
        with call.reading(), self._engine.owners.adding_blob(owner, digest, announced), upload:
            upload.append(first.message.offset_bytes, first.chunk)
            for message, chunk in request_iterator:
                upload.append(message.offset_bytes, chunk)
            size_bytes = upload.commit()
        self._engine.metrics.uploaded()
        return blob_pb2.UploadBlobResponse(size_bytes=size_bytes)

    @unary
    def PruneBlobs(  # noqa: N802
        self, request: blob_pb2.PruneBlobsRequest, call: GrpcCall
    ) -> blob_pb2.PruneBlobsResponse:
        tenant = request.tenant or call.owner
        if tenant != call.owner:
            check_administers(call, "Pruning the blobs of other tenants")
        found = self._engine.registration.prune(tenant)
        return blob_pb2.PruneBlobsResponse(pruned_count=found.count, pruned_bytes=found.size_bytes)
