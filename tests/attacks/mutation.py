"""Changes of a valid program: of its text, and of its parsed module.

As a script, this is a process that makes mutants, and reads and imports them by the
functions of the server's vetter, without a fork for each. It leaves out a mutant that
is imported as the same program as an earlier one. It writes a mutant out before it
reads the mutant. If the process ends there, that mutant ended it.
"""

import functools
import hashlib
import itertools
import json
import random
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np
from jaxlib.mlir import ir

from hvpd_server.admission import vetting_process
from hvpd_server.importer import families, refusals
from hvpd_server.importer.refusals import Limits
from hvpd_server.importer.table import Refused

NUMBERS = [
    "0",
    "1",
    "-1",
    "2",
    "3",
    "7",
    "17",
    "64",
    "65536",
    "4294967296",
    "4611686018427387904",
    "-9223372036854775808",
]

WORDS = [
    "LT",
    "GE",
    "EQ",
    "NE",
    "TOTALORDER",
    "FLOAT",
    "SIGNED",
    "true",
    "false",
    "HIGHEST",
    "dense",
    "f32",
    "f64",
    "i32",
    "i1",
    "c64",
    "add",
    "multiply",
    "maximum",
    "minimum",
    "subtract",
    "divide",
    "compare",
    "select",
    "and",
    "or",
    "sort",
    "reduce",
    "scatter",
    "custom_call",
    "lapack_dgees_ffi",
    "lapack_dgesdd_ffi",
    "lapack_dgeqrf_ffi",
    "lapack_dorgqr_ffi",
    "lapack_dpotrf_ffi",
    "Qr",
    "xla_python_cpu_callback",
    "L",
    "U",
    "N",
    "V",
    "C",
    "mode",
    "uplo",
    "transpose",
    "while",
    "case",
    "call",
    "main",
    "return",
]

SAME_KIND = [
    "add subtract multiply divide maximum minimum power remainder atan2",
    "sine cosine tanh exponential log sqrt rsqrt cbrt negate abs sign floor ceil logistic exponential_minus_one log_plus_one",
    "and or xor",
    "shift_left shift_right_logical shift_right_arithmetic",
]
"""Operations with the same number of operands, and results of the same type."""

NUMBER = re.compile(r"(?<![\w.%#])-?\d+")
DIMENSIONS = re.compile(r"(?<=tensor<)((?:[\d?]+x)+)")
QUOTED = re.compile(r'"[^"\n]{1,40}"|@[\w.$]+')
VALUES = re.compile(r"(?<=dense<)[^>]{1,200}(?=> : tensor)")

MOST_TRIES = 30
"""Changes to try until one gives a module that MLIR verifies."""

MOST_OF_A_PROCESS = 500
"""Mutants of an original that a process makes, because jax keeps what it traced."""

SECONDS = 60
"""Seconds for one mutant."""

SEEN = "SEEN"
"""Verdict on a mutant that is imported as the same program as an earlier one."""


def mutate_text(text: str, rng: random.Random) -> str:
    """Change one to three places: a number, a word, a line, or a stretch of text."""
    for _ in range(rng.randint(1, 3)):
        kind = rng.randrange(6)
        if kind <= 1:
            text = _replace(NUMBER, text, NUMBERS, rng)
        elif kind <= 3:
            words = r"\b(?:[A-Z]{1,12}|true|false|f32|f64|i32|[a-z_]+_ffi|" + "|".join(WORDS) + r")\b"
            text = _replace(re.compile(words), text, WORDS, rng)
        else:
            lines = text.splitlines(keepends=True)
            first, second = rng.randrange(len(lines)), rng.randrange(len(lines))
            if kind == 4:
                lines[first], lines[second] = lines[second], lines[first]
            else:
                lines[first] = "" if rng.random() < 0.5 else lines[first] * 2
            text = "".join(lines)
    return text


def mutate_module(text: str, rng: random.Random) -> str:
    """Change one to three places of a parsed module, so that MLIR still verifies it:
    attributes, operands, operations and their regions, types, sizes, calls and marks.
    """
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        text = _verified(text, rng)
    return text


def _verified(text: str, rng: random.Random) -> str:
    for _ in range(MOST_TRIES):
        change = rng.choice(CHANGES)
        try:
            with _context(), ir.Location.unknown():
                changed = change(text, rng)
                found = ir.Module.parse(changed)
                if found.operation.verify() and changed != text:
                    return str(found)
        except (ir.MLIRError, ValueError, RuntimeError, IndexError, KeyError, TypeError):
            continue
    return text


@functools.cache
def _context() -> ir.Context:
    """Return the context of all changes, which takes 4 ms to make."""
    context = jax.interpreters.mlir.make_ir_context()
    context.enable_multithreading(False)
    context.allow_unregistered_dialects = True
    return context


def _replace(places: re.Pattern[str], text: str, choices: list[str], rng: random.Random) -> str:
    found = list(places.finditer(text))
    if not found:
        return text
    place = rng.choice(found)
    return text[: place.start()] + rng.choice(choices) + text[place.end() :]


def _operation(text: str, rng: random.Random) -> str:
    """Replace an operation, also in the region of a sort or reduction."""
    kind = rng.choice(SAME_KIND).split()
    return _replace(re.compile(r"(?<=stablehlo\.)(?:" + "|".join(kind) + r")\b"), text, kind, rng)


def _size(text: str, rng: random.Random) -> str:
    """Replace a dimension in all types, or in one; also by an unknown one."""
    sizes = sorted({size for found in DIMENSIONS.findall(text) for size in found.split("x") if size})
    old, new = rng.choice(sizes), rng.choice([*sizes, "?", "0", "1", "2", "5", "8", "32", "65536", "1099511627776"])
    pattern = re.compile(rf"(?<=[<x])(?<!: ){re.escape(old)}(?=x)")
    if rng.random() < 0.5:
        return pattern.sub(new, text)
    return _replace(pattern, text, [new], rng)


def _element(text: str, rng: random.Random) -> str:
    """Replace an element type, in all types or in one."""
    old = rng.choice(["f64", "f32", "i32", "i64", "i1"])
    new = rng.choice(["f64", "f32", "f16", "bf16", "i32", "i64", "ui32", "i8", "i1", "complex<f64>"])
    pattern = re.compile(rf"(?<=[x<]){old}(?=[>,])")
    return pattern.sub(new, text) if rng.random() < 0.5 else _replace(pattern, text, [new], rng)


def _constant(text: str, rng: random.Random) -> str:
    """Replace the value of a constant, such as an index or an initial value."""
    numbers = ["0", "1", "-1", "2", "15", "16", "17", "65536", "-2147483648", "2147483647"]
    floats = [
        "0.0",
        "1.0",
        "-1.0",
        "1.0e300",
        "1.0e-300",
        "0x7FF0000000000000",
        "0xFFF0000000000000",
        "0x7FF8000000000000",
    ]
    return _replace(VALUES, text, [*numbers, *floats, "true", "false"], rng)


def _name(text: str, rng: random.Random) -> str:
    """Replace the name of a call, a mark or a setting by another one."""
    names = QUOTED.findall(text)
    strings = [name for name in names if name.startswith('"')]
    kind = rng.choice([name for name in (names, strings) if name])
    return _replace(QUOTED, text, [*kind, *(f'"{word}"' for word in WORDS)], rng)


def _number(text: str, rng: random.Random) -> str:
    """Replace a number outside of types: of an attribute, a setting or a window."""
    return _replace(NUMBER, text, [*NUMBERS, "4", "5", "6", "8", "9", "15", "16"], rng)


def _word(text: str, rng: random.Random) -> str:
    """Replace an enumerated setting."""
    words = [
        "LT",
        "LE",
        "GT",
        "GE",
        "EQ",
        "NE",
        "FLOAT",
        "TOTALORDER",
        "SIGNED",
        "UNSIGNED",
        "true",
        "false",
        "DEFAULT",
        "HIGH",
        "HIGHEST",
        "RFFT",
        "IRFFT",
        "FFT",
        "IFFT",
    ]
    words += ["NO_TRANSPOSE", "TRANSPOSE", "ADJOINT"]
    return _replace(re.compile(r"\b(?:" + "|".join(words) + r")\b"), text, words, rng)


def _every(module: ir.Module) -> list[ir.Operation]:
    found: list[ir.Operation] = []

    def visit(operation: ir.Operation) -> ir.WalkResult:
        found.append(operation)
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    return found


def _attribute(text: str, rng: random.Random) -> str:
    """Change an attribute, drop it, or take another operation's."""
    module = ir.Module.parse(text)
    operations = _every(module)
    pairs = [(each, name) for each in operations for name in each.attributes if name != "sym_name"]
    operation, name = rng.choice(pairs)
    others = [each.attributes[name] for each, same in pairs if same == name]
    way = rng.randrange(4)
    if way == 0 and len(others) > 1:
        operation.attributes[name] = rng.choice(others)
    elif way == 1:
        del operation.attributes[name]
    else:
        old = str(operation.attributes[name])
        changed = rng.choice([_number, _word, _name])(old, rng)
        operation.attributes[name] = ir.Attribute.parse(changed)
    return str(module)


def _operand(text: str, rng: random.Random) -> str:
    """Exchange two operands, or take another value of the operand's type."""
    module = ir.Module.parse(text)
    operations = [each for each in _every(module) if len(each.operands)]
    operation = rng.choice(operations)
    first = rng.randrange(len(operation.operands))
    value = operation.operands[first]
    if rng.random() < 0.4:
        second = rng.randrange(len(operation.operands))
        operation.operands[first] = operation.operands[second]
        operation.operands[second] = value
    else:
        values = [each for other in operations for each in other.operands if each.type == value.type]
        operation.operands[first] = rng.choice(values)
    return str(module)


def _bypass(text: str, rng: random.Random) -> str:
    """Use an operation's operand, or an earlier value of its type, in the place of its
    result.
    """
    module = ir.Module.parse(text)
    operations = [each for each in _every(module) if len(each.results) and len(each.operands)]
    operation = rng.choice(operations)
    result = rng.choice(list(operation.results))
    same = [each for each in operation.operands if each.type == result.type]
    result.replace_all_uses_with(rng.choice(same))
    return str(module)


def _move(text: str, rng: random.Random) -> str:
    """Copy or move an operation of a block to another place of a block."""
    module = ir.Module.parse(text)
    operations = [each for each in _every(module) if each.name.startswith(("stablehlo.", "chlo."))]
    operation, place = rng.choice(operations), rng.choice(operations)
    if rng.random() < 0.5:
        operation.clone(ir.InsertionPoint(place))
    elif not any(each == operation for each in _around(place)):  # Otherwise the module would contain itself.
        operation.move_before(place)
    return str(module)


def _around(operation: ir.Operation) -> Iterator[ir.Operation]:
    """Yield an operation, and those whose regions it is in."""
    while operation is not None:
        yield operation
        operation = operation.parent and operation.parent.operation


CHANGES = [
    *(_operation, _size, _element, _constant, _name, _number, _word),
    *(_attribute, _attribute, _operand, _operand, _bypass, _move),
]


def mutate(text: str, rng: random.Random) -> str:
    """Change the text or, three times of four, the parsed module."""
    return mutate_text(text, rng) if rng.randrange(4) == 0 else mutate_module(text, rng)


class Read(NamedTuple):
    """A mutant that the vetter's functions have read, and imported or refused."""

    original: str
    text: str
    reason: str
    """The reason of a refusal; empty if the mutant is imported; "ENDED" if it ended its
    reader.
    """


def mutants(originals: Mapping[str, Mapping[str, bytes]], count: int, seed: object) -> Iterator[Read]:
    """Yield different mutants of programs, read by processes of this module.

    Args:
        originals: By name, a bundle and its programs as text.
        count: Mutants of each.
        seed: Seed of the choices.
    """
    left = dict.fromkeys(originals, count)
    for round_ in itertools.count():
        left = {name: number for name, number in left.items() if number > 0}
        if not left:
            return
        parts = {name: {part: blob.hex() for part, blob in originals[name].items()} for name in left}
        with subprocess.Popen(
            [sys.executable, "-m", "tests.attacks.mutation"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps([parts, left, f"{seed} {round_}"]))
            process.stdin.close()
            begun: tuple[str, str] | None = None
            for line in process.stdout:
                name, text, reason = json.loads(line)
                begun = None
                if reason is None:
                    begun = name, text
                elif reason != SEEN:
                    left[name] -= 1
                    yield Read(name, text, reason)
        if begun is not None:
            left[begun[0]] -= 1
            yield Read(*begun, "ENDED")
        else:
            assert process.returncode == 0


def _read(parts: Mapping[str, bytes], text: str, seen: set[str]) -> str:
    """Read and import a mutant. Return the reason of a refusal, SEEN, or an empty text.

    The server differentiates it later.
    """
    limits = Limits()
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        parts = {**parts, "objective": text.encode()}
        derivation = vetting_process.derivation_of(parts, "cpu", limits)
        bundle = derivation.bundle
        sized = derivation.for_rows(bundle.data[bundle.row_leaves[0]].shape[0] if bundle.row_leaves else 0)
        with sized.tracing():
            imported = jax.make_jaxpr(sized.traced.fun)(sized.traced.x, *sized.traced.args)
        constants = [np.asarray(constant).tobytes() for constant in imported.consts]
        key = hashlib.sha256(repr([str(imported), constants]).encode()).hexdigest()
        if key in seen:
            return SEEN
        seen.add(key)
    except Refused as refused:
        return refused.reason
    except Exception:  # noqa: BLE001 - the vetter refuses such a program, too
        return refusals.VETTING_FAILED
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return ""


def main() -> None:
    """Make mutants, and read each."""
    originals, left, seed = json.load(sys.stdin)
    jax.config.update("jax_enable_x64", True)
    families.load()
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for name, encoded in originals.items():
        parts = {part: bytes.fromhex(blob) for part, blob in encoded.items()}
        rng = random.Random(f"{seed} {name}")
        text, seen, made = parts["objective"].decode(), set[str](), 0
        _read(parts, text, seen)
        while made < min(left[name], MOST_OF_A_PROCESS):
            mutant = mutate(text, rng)
            if mutant in seen:
                continue
            seen.add(mutant)
            sys.stdout.write(json.dumps([name, mutant, None]) + "\n")
            sys.stdout.flush()
            reason = _read(parts, mutant, seen)
            sys.stdout.write(json.dumps([name, mutant, reason]) + "\n")
            made += reason != SEEN


if __name__ == "__main__":
    main()
