"""The cheap check of what was registered, at the x that came with it: in the background, one at a time, off the product path.

It multiplies by calling the programs itself: it is in no queue, makes no point resident, counts as nobody's product, drops
nothing for its own sake, and lets products that wait go first. Nothing fails with it. What is looked at is in `hvpd._check`.
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

from hvpd import _check, _codec
from hvpd._errors import HvpdError
from hvpd.v1 import curvature_pb2, objective_pb2, tensor_pb2
from hvpd_server import _kernels, _probes, _sources
from hvpd_server._errors import ServiceError, to_service_error
from hvpd_server._store import Store

_log = logging.getLogger(__name__)

_COURTESY = 0.5
"""Seconds for which a launch lets products go first that wait for the device."""

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
"""Most characters of a reason that are kept: listings show it."""

Points = Callable[[Callable[[], None]], Callable[[_codec.Array], _check.Curved]]
"""Given what to call before each launch: makes points from flat vectors."""


class LoosePoint:
    """A point that nobody finds: on the device for as long as somebody holds it. Value and gradient are there.

    Args:
        source: The objective's data.
        x: The flat vector.
        on_device: The same on the device.
        product: Multiplies one row v[1,n].
        turn: Called before each launch.
    """

    def __init__(
        self,
        source: _sources.Source,
        x: _codec.Array,
        on_device: Any,
        product: Callable[[_codec.Array], Any],
        turn: Callable[[], None],
    ) -> None:
        self._product = product
        self._turn = turn
        turn()
        value, gradient = source.call("value_and_grad", 0, on_device)
        self.x = x
        self.n, self.dtype = self.x.size, self.x.dtype
        self.value = float(_kernels.host(value))
        self.gradient: _codec.Array = _kernels.host(gradient)
        found: dict[str, Any] = {"x": x, "value": self.value, "gradient": self.gradient}
        self.nonfinite: tuple[str, ...] = tuple(name for name, array in found.items() if not np.isfinite(array).all())

    def multiply(self, block: _codec.Array, operator: int = curvature_pb2.OPERATOR_HESSIAN, /) -> _codec.Array:
        """V[k,n] -> HV[k,n], row by row: the width that is compiled first."""
        rows = []
        for row in range(len(block)):
            self._turn()
            rows.append(_kernels.host(self._product(block[row : row + 1])))
        return np.concatenate(rows)


def _pending() -> objective_pb2.RegistrationCheck:
    return objective_pb2.RegistrationCheck(verdict=objective_pb2.VERDICT_PENDING, reason="the check has not finished")


class _Closed(Exception):  # noqa: N818 - no error: the server ends
    pass


class Checks:
    """The checks of one server.

    Args:
        store: Where x comes from, and verdicts are kept.
        waiting: How many vectors wait for the device.
        count: Told each verdict.
    """

    def __init__(
        self, store: Store, waiting: Callable[[], int], count: Callable[[str], None] = lambda verdict: None
    ) -> None:
        self._store = store
        self._waiting = waiting
        self._count = count
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="hvpd-check")
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._pending: set[tuple[str, str]] = set()
        self._found: dict[tuple[str, str], objective_pb2.RegistrationCheck] = {}
        """By digest and tenant, what the disk did not take."""

    def close(self) -> None:
        """Ends the check that runs before its next launch, and waits for nothing."""
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
        """Has an objective checked for a tenant, unless it is known to be right or wrong for that tenant already.

        Args:
            digest: The objective's.
            bundle: Its bundle.
            x_digest: Of a blob with the flat x.
            points: Makes its points, in the thread of the check; may raise.
            label: Its name, for the log.
            tenant: Whose registration it is; empty where nobody is told apart.
        """
        decided = (objective_pb2.VERDICT_PASSED, objective_pb2.VERDICT_FAILED, objective_pb2.VERDICT_PENDING)
        if self.found(digest, bundle, tenant).verdict in decided:
            return
        with self._lock:
            if (digest, tenant) in self._pending:
                return
            self._pending.add((digest, tenant))
        with contextlib.suppress(RuntimeError):  # The server is closing.
            self._thread.submit(self._run, digest, bundle, x_digest, points, label, tenant)

    def overall(self, digest: str, bundle: objective_pb2.Bundle) -> objective_pb2.RegistrationCheck:
        """Return the worst that is known of an objective, whoever has registered it: for the operator."""
        with self._lock:
            if any(each == digest for each, _ in self._pending):
                return _pending()
            known = [found for (each, _), found in self._found.items() if each == digest]
        known += self._store.checks(digest)
        return min(
            known, key=lambda found: _WORST_FIRST.get(found.verdict, len(_WORST_FIRST)), default=None
        ) or self.found(digest, bundle)

    def found(self, digest: str, bundle: objective_pb2.Bundle, tenant: str = "") -> objective_pb2.RegistrationCheck:
        """What is known of an objective by now, of the check that a tenant's registration asked for."""
        with self._lock:
            if (digest, tenant) in self._pending:
                return _pending()
            found = self._found.get((digest, tenant))
        found = found or self._store.check(digest, tenant)
        if found is not None:
            return found
        size = math.prod((bundle.n, _codec.dtype(bundle.dtype).itemsize))
        if size > _check.REGISTRATION_BYTES:
            reason = f"an x of {size >> 20} MiB is not sent to be checked at registration, {_check.REGISTRATION_BYTES >> 20} MiB are"
        else:
            reason = "no x came with the registration, or the server ended before it was checked"
        return objective_pb2.RegistrationCheck(reason=f"{reason}: run objective.check(x)")

    def _run(
        self, digest: str, bundle: objective_pb2.Bundle, x_digest: str, points: Points, label: str, tenant: str
    ) -> None:
        try:
            message = self._look(bundle, x_digest, points)
        except (_Closed, concurrent.futures.CancelledError):
            return  # The objective stays pending to the end, and is checked when it is registered again.
        except Exception as error:  # noqa: BLE001 - nothing fails with a check
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
        except OSError as error:
            _log.error("the check of objective %s cannot be kept: %s", digest, error)
            unkept[digest, tenant] = message
        with self._lock:
            self._found.pop((digest, tenant), None)
            self._found.update(unkept)
            self._pending.discard((digest, tenant))
        self._count(_check.verdict_of(message))
        if message.verdict == objective_pb2.VERDICT_FAILED:
            _log.warning(
                "objective %s (%s): its products are wrong at the x of its registration: %s",
                label or "without a name",
                digest,
                ", ".join(
                    f"{item.name} is {item.measured:.2g}, {item.threshold:.2g} passes"
                    for item in message.items
                    if item.verdict == objective_pb2.VERDICT_FAILED
                ),
            )

    def _look(self, bundle: objective_pb2.Bundle, x_digest: str, points: Points) -> objective_pb2.RegistrationCheck:
        x = self._store.read_tensor(tensor_pb2.Tensor(dtype=bundle.dtype, shape=[bundle.n], digest=x_digest))
        at = points(self._turn)
        eps = _check.resolution([leaf.dtype for leaf in bundle.x_leaves], bundle.precision)
        items = list(_check.brief(at(x), at, eps=eps, mode=bundle.mode))
        if not bundle.jax_version:  # The rules at kinks are presumed: look where x may have none, too.
            beside = _check.brief(at(_probes.nearby(x)), at, eps=eps, mode=bundle.mode)
            items += [dataclasses.replace(item, name=f"{item.name} beside x") for item in beside]
        verdicts = {item.passed for item in items}
        worst = next(passed for passed in (False, None, True) if passed in verdicts)
        return objective_pb2.RegistrationCheck(
            verdict=_VERDICTS[worst],
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
        """Lets products go first that wait, for a while.

        Raises:
            _Closed: The server ends.
        """
        ends = time.monotonic() + _COURTESY
        while self._waiting() and time.monotonic() < ends and not self._closed.wait(0.002):
            pass
        if self._closed.is_set():
            raise _Closed
