"""Calls, branches and loops.

A loop that counts becomes a scan, so that reverse mode can differentiate the loop.

A loop is raised in these steps. The loop stays a while loop if the second step fails:
1. Functions are put in place of their calls, and operations that change nothing are
   left out (`loops`).
2. The counter, its step and its limit are found; all have to be known while the program
   is read (`loops`).
3. The integers that depend linearly on the counter are followed (`indices`).
4. Rows that are read (xs) and rows that are written (ys) at such integers are taken out
   of the body (`scans`).

Then time and memory are those of `jax.lax.scan`. A loop that carried whole arrays would
keep a copy of each for each round.
"""

from collections.abc import Callable, Sequence
from typing import Final

import jax.numpy as jnp
from jax import lax

from hvpd_server.importer import recognise
from hvpd_server.importer.loops import Loop, counting, flat
from hvpd_server.importer.scans import Plan
from hvpd_server.importer.table import Call, Value, known, operation

DYNAMIC_LOOP: Final = "a loop whose trip count depends on data: forward mode only"
"""Note in the report for each loop that stays a while loop."""

RAISED_LOOP: Final = "a loop that counts, as a scan"
"""Note in the report for each loop that becomes a scan."""


@operation("func.call", attributes=["callee"])
def _call(call: Call) -> Sequence[Value]:
    symbol = call.attributes["callee"]
    known_rule = recognise.rule_of(call, symbol)
    return known_rule(*call.operands) if known_rule is not None else call.call(symbol, *call.operands)


@operation("stablehlo.if", regions=2)
def _if(call: Call) -> Sequence[Value]:
    (predicate,) = call.operands
    if known(predicate):
        return call.run(call.regions[0 if predicate else 1])
    return list(lax.cond(jnp.asarray(predicate), _arrays(call.region(0)), _arrays(call.region(1))))


@operation("stablehlo.case", regions=-1)
def _case(call: Call) -> Sequence[Value]:
    (index,) = call.operands
    last = len(call.regions) - 1
    if known(index):
        return call.run(call.regions[int(index) if 0 <= index <= last else last])
    if last == 0:
        return call.run(call.regions[0])
    # An index out of range takes the last branch; lax.switch would take the first for a
    # negative one.
    inside = jnp.where(index < 0, last, index)
    return list(lax.switch(inside, [_arrays(call.region(each)) for each in range(last + 1)]))


def _arrays(function: Callable[..., list[Value]]) -> Callable[..., list[Value]]:
    """Return a function whose results are jax arrays, as branches and loops of jax need
    them.
    """
    return lambda *args: [jnp.asarray(each) for each in function(*args)]


@operation("stablehlo.while", regions=2)
def _while(call: Call) -> Sequence[Value]:
    condition, body = call.regions
    if not len(call.operands) == len(body.arguments) == len(body.returns) == len(condition.arguments):
        raise call.refuse("whose regions do not take and return the values of the loop")
    loop = Loop(call, flat(call, condition), flat(call, body))
    counter = counting(loop)
    if counter is None:
        return _dynamic(loop)
    call.report.recognised[RAISED_LOOP] += 1
    return Plan(loop, counter).run()


def _dynamic(loop: Loop) -> list[Value]:
    """Rebuild a loop as a while loop that carries the values that change."""
    call = loop.call
    call.report.presumed[DYNAMIC_LOOP] += 1
    changing = [index for index, invariant in enumerate(loop.invariant) if not invariant]

    def filled(carried: Sequence[Value]) -> list[Value]:
        values = list(call.operands)
        for index, value in zip(changing, carried, strict=True):
            values[index] = value
        return values

    def holds(carried: Sequence[Value]) -> Value:
        return jnp.asarray(call.run(loop.condition, *filled(carried))[0])

    def step(carried: Sequence[Value]) -> list[Value]:
        results = call.run(loop.body, *filled(carried))
        return [jnp.asarray(results[index]) for index in changing]

    return filled(lax.while_loop(holds, step, [jnp.asarray(call.operands[index]) for index in changing]))
