"""Registration checks: a cheap check of each registered objective, at the x of its
registration, in the background.

Checks run one at a time. A check calls the programs itself: it uses no queue, makes no
point resident, evicts nothing, is not counted as a product, and lets waiting products
go first. Nothing fails with a check. `hvpd._check.certificate` says what is checked.
"""

import concurrent.futures
import contextlib
import dataclasses
import logging
import math
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from hvpd._check import certificate, verdicts
from hvpd._errors import HvpdError
from hvpd._wire import codec
from hvpd.v1 import curvature_pb2, objective_pb2, tensor_pb2
from hvpd_server.device import data_sources
from hvpd_server.device.device import host
from hvpd_server.engine import probes
from hvpd_server.errors import ServiceError, to_service_error
from hvpd_server.scheduling.threads import Threads
from hvpd_server.store.store import Store

_log = logging.getLogger(__name__)

_YIELD_SECONDS = 0.5
"""Seconds for which a launch of a check lets waiting products go first."""

_VERDICTS = {
    True: objective_pb2.VERDICT_PASSED,
    False: objective_pb2.VERDICT_FAILED,
    None: objective_pb2.VERDICT_UNDECIDED,
}

_WORST_FIRST = {
    verdict: place
    for place, verdict in enumerate(
        (objective_pb2.VERDICT_FAILED, objective_pb2.VERDICT_UNDECIDED, objective_pb2.VERDICT_PASSED)
    )
}

_REASON = 1000
"""Most characters of a reason, because listings show it."""

Points = Callable[[Callable[[], None]], Callable[[codec.Array], verdicts.Curved]]
"""Takes a function to call before each launch, and returns a function that makes points
from flat vectors.
"""


class LoosePoint:
    """A point that is not resident: it is on the device for as long as it is
    referenced. Has value and gradient.

    Args:
        source: The data.
        x: The flat vector.
        on_device: The flat vector, on the device.
        product: Multiplies one row v[1,n].
        turn: Called before each launch.
    """

    def __init__(
        self,
        source: data_sources.Source,
        x: codec.Array,
        on_device: Any,
        product: Callable[[codec.Array], Any],
        turn: Callable[[], None],
    ) -> None:
        self._product = product
        self._turn = turn
        turn()
        value, gradient = source.call("value_and_grad", 0, on_device)
        self.x = x
        self.n, self.dtype = self.x.size, self.x.dtype
        self.value = float(host(value))
        self.gradient: codec.Array = host(gradient)
        found: dict[str, Any] = {"x": x, "value": self.value, "gradient": self.gradient}
        self.nonfinite: tuple[str, ...] = tuple(name for name, array in found.items() if not np.isfinite(array).all())

    def multiply(self, block: codec.Array, operator: int = curvature_pb2.OPERATOR_HESSIAN, /) -> codec.Array:
        """Multiply V[k,n] -> HV[k,n], row by row, because width 1 is compiled first."""
        rows = []
        for row in range(len(block)):
            self._turn()
            rows.append(host(self._product(block[row : row + 1])))
        return np.concatenate(rows)


def _pending() -> objective_pb2.RegistrationCheck:
    return objective_pb2.RegistrationCheck(verdict=objective_pb2.VERDICT_PENDING, reason="the check has not finished")


def _is_not_finite(check: objective_pb2.RegistrationCheck) -> bool:
    """Return whether a check failed because of NaN or infinity."""
    failed = (item.name for item in check.items if item.verdict == objective_pb2.VERDICT_FAILED)
    return any(name.startswith("finite") for name in failed)


class _Closed(Exception):  # noqa: N818 - not an error: the server ends
    pass


class Checks:
    """The checks of one server.

    Args:
        store: Has x, and keeps verdicts.
        waiting: Returns how many vectors wait for the device.
        count: Called with each verdict.
    """

    def __init__(
        self, store: Store, waiting: Callable[[], int], count: Callable[[str], None] = lambda verdict: None
    ) -> None:
        self._store = store
        self._waiting = waiting
        self._count = count
        self._thread = Threads(1, "hvpd-check")
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._pending: set[tuple[str, str]] = set()
        self._found: dict[tuple[str, str], objective_pb2.RegistrationCheck] = {}
        """Checks that the disk could not keep, by digest and tenant."""

    def close(self) -> None:
        """End the check that runs before its next launch, without waiting for it."""
        self._closed.set()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def start(
        self,
        digest: str,
        bundle: objective_pb2.Bundle,
        x_digest: str,
        points: Points,
        label: str = "",
        *,
        tenant: str = "",
    ) -> None:
        """Start the check of an objective for a tenant, unless its verdict is known or
        pending.

        Args:
            digest: Digest of the objective.
            bundle: The bundle.
            x_digest: Digest of the blob with the flat x.
            points: Makes points, in the thread of the check; may raise.
            label: Name of the objective, for the log.
            tenant: The tenant that registered it; empty without tokens.
        """
        decided = (objective_pb2.VERDICT_PASSED, objective_pb2.VERDICT_FAILED, objective_pb2.VERDICT_PENDING)
        found = self.found(digest, bundle, tenant)
        # Another x may give finite numbers: many users register at zeros.
        if found.verdict in decided and not _is_not_finite(found):
            return
        with self._lock:
            if (digest, tenant) in self._pending:
                return
            self._pending.add((digest, tenant))
        with contextlib.suppress(RuntimeError):  # The server is closing.
            self._thread.submit(self._run, digest, bundle, x_digest, points, label, tenant)

    def overall(self, digest: str, bundle: objective_pb2.Bundle) -> objective_pb2.RegistrationCheck:
        """Return an objective's worst check, over all tenants, for the operator."""
        with self._lock:
            if any(each == digest for each, _ in self._pending):
                return _pending()
            known = [found for (each, _), found in self._found.items() if each == digest]
        known += self._store.checks(digest)
        return min(
            known, key=lambda found: _WORST_FIRST.get(found.verdict, len(_WORST_FIRST)), default=None
        ) or self.found(digest, bundle)

    def found(self, digest: str, bundle: objective_pb2.Bundle, tenant: str = "") -> objective_pb2.RegistrationCheck:
        """Return the check of a tenant's registration, as far as it is known."""
        with self._lock:
            if (digest, tenant) in self._pending:
                return _pending()
            found = self._found.get((digest, tenant))
        found = found or self._store.check(digest, tenant)
        if found is not None:
            return found
        size = math.prod((bundle.n, codec.dtype(bundle.dtype).itemsize))
        if size > verdicts.REGISTRATION_BYTES:
            reason = f"an x of {size >> 20} MiB is not sent to be checked at registration, {verdicts.REGISTRATION_BYTES >> 20} MiB are"
        else:
            reason = "no x came with the registration, or the server ended before it was checked"
        return objective_pb2.RegistrationCheck(reason=f"{reason}: run objective.check(x)")

    def _run(
        self, digest: str, bundle: objective_pb2.Bundle, x_digest: str, points: Points, label: str, tenant: str
    ) -> None:
        try:
            message = self._look(bundle, x_digest, points)
        except (_Closed, concurrent.futures.CancelledError):
            return  # It stays pending, and is checked when it is registered again.
        except Exception as error:  # noqa: BLE001 - nothing may fail because of a check
            known = isinstance(error, ServiceError | HvpdError)
            reason = str(to_service_error(error))
            level = logging.INFO if known else logging.ERROR
            _log.log(level, "objective %s could not be checked: %s", label or digest, reason, exc_info=not known)
            message = objective_pb2.RegistrationCheck(verdict=objective_pb2.VERDICT_UNDECIDED, reason=reason[:_REASON])
        if self._closed.is_set():
            return
        unkept = {}
        try:
            self._store.add_check(digest, message, tenant)
        except (OSError, ServiceError) as error:
            _log.error("the check of objective %s cannot be kept: %s", digest, error)
            unkept[digest, tenant] = message
        with self._lock:
            self._found.pop((digest, tenant), None)
            self._found.update(unkept)
            self._pending.discard((digest, tenant))
        self._count(verdicts.verdict_of(message))
        if message.verdict == objective_pb2.VERDICT_FAILED:
            _log.warning(
                "objective %s (%s): its products are wrong at the x of its registration: %s",
                label or "without a name",
                digest,
                message.reason
                or ", ".join(
                    f"{item.name} is {item.measured:.2g}, {item.threshold:.2g} passes"
                    for item in message.items
                    if item.verdict == objective_pb2.VERDICT_FAILED
                ),
            )

    def _look(self, bundle: objective_pb2.Bundle, x_digest: str, points: Points) -> objective_pb2.RegistrationCheck:
        x = self._store.read_tensor(tensor_pb2.Tensor(dtype=bundle.dtype, shape=[bundle.n], digest=x_digest))
        at = points(self._turn)
        eps = verdicts.resolution([leaf.dtype for leaf in bundle.x_leaves], bundle.precision)
        items = list(certificate.brief(at(x), at, eps=eps, mode=bundle.mode))
        # Rules at kinks are presumed, so the check looks at a point without kinks, too.
        if not bundle.jax_version:
            beside = certificate.brief(at(probes.nearby(x)), at, eps=eps, mode=bundle.mode)
            items += [dataclasses.replace(item, name=f"{item.name} beside x") for item in beside]
        passed = {item.passed for item in items}
        worst = next(verdict for verdict in (False, None, True) if verdict in passed)
        finite = items[0]
        return objective_pb2.RegistrationCheck(
            verdict=_VERDICTS[worst],
            reason="" if finite.passed else f"{finite.meaning} at the x of the registration: check it at another x",
            items=[
                objective_pb2.CheckItem(
                    name=item.name,
                    measured=item.measured,
                    threshold=item.threshold,
                    verdict=_VERDICTS[item.passed],
                    meaning=item.meaning,
                )
                for item in items
            ],
        )

    def _turn(self) -> None:
        """Let waiting products go first, for a while.

        Raises:
            _Closed: The server ends.
        """
        ends = time.monotonic() + _YIELD_SECONDS
        while self._waiting() and time.monotonic() < ends and not self._closed.wait(0.002):
            pass
        if self._closed.is_set():
            raise _Closed
