"""Runs a folder of StableHLO files through the importer:
`python -m tests.importer.conformance DIR`.

It is for the folders stablehlo/testdata and stablehlo/tests/interpret of the repository
openxla/stablehlo, and fetches nothing. A program makes inputs, runs one
operation, and compares the results with expected ones, by custom calls
(`check.expect_eq`, `check.expect_close`, `check.expect_almost_eq`) or by operations of
a dialect of the same name, which this command turns into custom calls. They are the
comparison, so this command takes them out of the program and compares. The inputs are
passed under `jax.jit`, like a registration's data. Programs with arguments and
without expected results are only traced, with all unknown extents and sizes equal.
"""

import argparse
import collections
import dataclasses
import itertools
import json
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import jax
import numpy as np

from hvpd_server.importer import evaluate, reader
from hvpd_server.importer.attributes import dtype
from hvpd_server.importer.graph import Module, Operation, TensorType
from hvpd_server.importer.table import Refused

ULPS: Final = 3
"""Steps of a floating-point type that `check.expect_close` allows, as StableHLO's
interpreter does.
"""

LOOSE: Final = {"float64": 1e-11, "float32": 5e-5, "float16": 4e-3, "bfloat16": 3e-2}
"""Relative error, by dtype, within which a result is "near": the same function, by
another approximation of the compiler's.
"""

ABSOLUTE: Final = 1e-3
"""Absolute error that `check.expect_almost_eq` allows, as StableHLO's interpreter
does.
"""

SIZES: Final = (3, 4, 8, 12, 16, 2, 1)
"""Extents to try for files whose sizes are unknown."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of a file."""

    verdict: str
    """"passed", "near", "traced", "differs", "refused", "quantized", or "failed"."""
    reason: str = ""


def _steps(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the positions of floating-point numbers among all of their type, in
    order.
    """
    width = array.dtype.itemsize
    bits = array.view(f"u{width}").astype(object)
    half = 1 << (8 * width - 1)
    return np.where(bits >= half, half - bits, bits)


def _ulps(got: np.ndarray[Any, Any], want: np.ndarray[Any, Any]) -> float:
    """Return the largest distance in steps of the type. It is infinite if one is not
    finite and the other differs.
    """
    worst = 0.0
    same = (got == want) | (np.isnan(got) & np.isnan(want))
    if same.all():
        return 0.0
    got, want = got[~same], want[~same]
    if not (np.isfinite(got) & np.isfinite(want)).all():
        return np.inf
    return max(worst, float(np.max(np.abs(_steps(got) - _steps(want)))))


def _parts(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    array = np.ascontiguousarray(array).reshape(-1)
    return array.view(array.real.dtype) if array.dtype.kind == "c" else array


def compare(how: str, got: Any, want: Any) -> Outcome:
    """Compare a result with the expected one.

    Args:
        how: "check.expect_eq", "check.expect_close" or "check.expect_almost_eq".
        got: The result.
        want: The expected one.
    """
    got, want = np.asarray(got), np.asarray(want)
    if got.shape != want.shape or got.dtype != want.dtype:
        return Outcome("failed", f"{got.dtype}{got.shape} instead of {want.dtype}{want.shape}")
    one, other = _parts(got), _parts(want)
    if one.dtype.kind in "iub":
        different = int(np.sum(one != other))
        return Outcome("passed") if not different else Outcome("differs", f"in {different} of {one.size} elements")
    ulps = _ulps(one, other)
    with np.errstate(all="ignore"):
        left, right = one.astype(np.float64), other.astype(np.float64)
        errors = np.where((left == right) | (np.isnan(left) & np.isnan(right)), 0.0, np.abs(left - right))
    allowed = {"check.expect_eq": ulps == 0, "check.expect_close": ulps <= ULPS}
    if allowed.get(how, bool(np.all(errors <= ABSOLUTE))):
        return Outcome("passed")
    # The parts of a complex number share the magnitude of the number.
    scale = np.abs(want.reshape(-1).astype(np.complex128 if want.dtype.kind == "c" else np.float64))
    scale = np.repeat(scale, 2) if want.dtype.kind == "c" else scale
    loose = LOOSE.get(one.dtype.name, 0.1)
    near = bool(np.all(errors <= loose * np.maximum(scale, 1.0)))
    worst = float(np.max(errors))
    return Outcome("near" if near else "differs", f"{ulps:g} ulps, {worst:.1e} absolute, with {how}")


def split(module: Module) -> tuple[Module, list[str], list[Operation]]:
    """Split a module into inputs as arguments and compared values as results.

    Returns:
        The module; the name of the comparison for each two results; the calls that make
        the inputs.
    """
    main = module.main
    kept: list[Operation] = []
    inputs: list[Operation] = []
    returns: list[int] = []
    checks: list[str] = []
    for each in main.operations:
        target = str(each.attributes.get("call_target_name", ""))
        if target.startswith("check."):
            checks.append(target)
            returns += each.operands[:2]
        elif each.attributes.get("callee") == "inputs" and not each.operands:
            inputs.append(each)
        else:
            kept.append(each)
    arguments = tuple(value for each in inputs for value in each.results)
    types = tuple(type_ for each in inputs for type_ in each.types)
    block = dataclasses.replace(
        main,
        arguments=main.arguments + arguments,
        types=main.types + types,
        operations=kept,
        returns=tuple(returns) or main.returns,
    )
    return dataclasses.replace(module, functions={**module.functions, module.entry: block}), checks, inputs


def _with_expected(module: Module, *, known: bool) -> Outcome:
    changed, checks, inputs = split(module)
    values: list[Any] = []
    for each in inputs:
        values += evaluate.function(dataclasses.replace(module, entry=str(each.attributes["callee"])))()
    run = evaluate.function(changed)
    results = run(*map(np.asarray, values)) if known else jax.jit(run)(*values)
    outcomes = [compare(how, results[2 * i], results[2 * i + 1]) for i, how in enumerate(checks)]
    order = ("failed", "differs", "near", "passed")
    return min(outcomes, key=lambda outcome: order.index(outcome.verdict))


def _argument(type_: TensorType, size: int, *, known: bool) -> Any:
    """Return an array, or a known size."""
    if known:
        return np.asarray(size, type_.dtype)
    return jax.ShapeDtypeStruct([size if extent is None else extent for extent in type_.shape], dtype(type_.dtype))


def _traced(module: Module) -> Outcome:
    """Trace with several sizes. Lone integers are sizes: all of them, or those before
    the first array.
    """
    run: Callable[..., Any] = evaluate.function(module)
    types = module.main.types
    lone = [not type_.shape and type_.dtype.startswith("int") for type_ in types]
    leading = [all(lone[: index + 1]) for index in range(len(lone))]
    first: Exception | None = None
    for sizes, size in itertools.product([lone, leading], SIZES):
        arguments = [_argument(type_, size, known=known) for type_, known in zip(types, sizes, strict=True)]
        data = [value for value, known in zip(arguments, sizes, strict=True) if not known]

        def traced(*rest: Any, arguments: list[Any] = arguments, sizes: list[bool] = sizes) -> Any:
            remaining = iter(rest)
            return run(*[v if known else next(remaining) for v, known in zip(arguments, sizes, strict=True)])

        try:
            jax.make_jaxpr(traced)(*data)
        except Exception as error:  # noqa: BLE001 - raised below if no size is better
            first = first or error
        else:
            return Outcome("traced")
    assert first is not None
    raise first


_CHECK: Final = re.compile(
    r"check\.(expect_eq|expect_almost_eq)_const (?P<got>%[\w#]+),\s*(?P<want>dense<[^%]*?>)(, tolerance = [^:]*: f64)?"
    r"\s*:\s*(?P<type>tensor<[^\n]*>)"
)


def programs(text: str) -> list[str]:
    """Return the programs of a file that compare something, or the one program of the
    file.

    Args:
        text: Programs that are divided by comments of dashes.
    """
    numbers = itertools.count()

    def custom_call(check: re.Match[str]) -> str:
        want, type_ = f"%expected_{next(numbers)}", check["type"]
        return (
            f"{want} = stablehlo.constant {check['want']} : {type_}\n"
            f"stablehlo.custom_call @check.{check[1]}({check['got']}, {want}) : ({type_}, {type_}) -> ()"
        )

    parts = re.split(r"^// -----.*$", text, flags=re.MULTILINE)
    return [_CHECK.sub(custom_call, part) for part in parts if "check." in part or len(parts) == 1]


def outcome(text: str, *, known: bool = False) -> Outcome:
    """Return the result of a module in text.

    Args:
        text: The module.
        known: Whether the inputs are known while the program is read, as sizes are, and
            not data.
    """
    try:
        module = reader.read(text)
        expected = any(
            str(each.attributes.get("call_target_name", "")).startswith("check.") for each in module.main.operations
        )
        return _with_expected(module, known=known) if expected else _traced(module)
    except Refused as refused:
        quantized = "!quant" in str(refused) or "uniform_quantize" in str(refused)
        return Outcome("quantized" if quantized else "refused", f"{refused.reason}: {refused}")
    except Exception as error:  # noqa: BLE001 - a failure of one file is a result
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return Outcome(
            "failed", f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}: {str(error)[:200]}"
        )


_WHERE: Final = re.compile(r" at \S+:\d+|\d+")


def main(argv: Sequence[str] | None = None) -> int:
    """Run all files, and print each that did not pass, then the counts."""
    parser = argparse.ArgumentParser(prog="python -m tests.importer.conformance", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--match", default="", help="regular expression that the file's name must contain")
    parser.add_argument("--part", default="0/1", help="I/N: only the I-th of N parts")
    parser.add_argument(
        "--known", action="store_true", help="pass inputs as sizes are: known while the program is read"
    )
    parser.add_argument("--json", type=Path, help="file to write all outcomes to")
    options = parser.parse_args(argv)
    jax.config.update("jax_enable_x64", True)
    part, parts = map(int, options.part.split("/"))
    files = [path for path in sorted(options.folder.glob("*.mlir")) if re.search(options.match, path.name)]
    outcomes: dict[str, Outcome] = {}
    for index, path in enumerate(files[part::parts]):
        for number, text in enumerate(programs(path.read_text(encoding="utf-8"))):
            name = f"{path.name}/{number}" if number else path.name
            found = outcomes[name] = outcome(text, known=options.known)
            if found.verdict not in ("passed", "traced"):
                print(f"{name}: {found.verdict}: {found.reason}", flush=True)  # noqa: T201
        if index % 100 == 99:
            jax.clear_caches()
    counts = collections.Counter(each.verdict for each in outcomes.values())
    reasons = collections.Counter(
        f"{each.verdict}: {_WHERE.sub('', each.reason)[:100]}"
        for each in outcomes.values()
        if each.verdict in ("refused", "failed")
    )
    for reason, count in reasons.most_common():
        print(f"{count:5} {reason}")  # noqa: T201
    print(f"{len(outcomes)} programs: " + ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common()))  # noqa: T201
    if options.json:
        options.json.write_text(json.dumps({name: dataclasses.astuple(each) for name, each in outcomes.items()}))
    return 0 if counts.keys() <= {"passed", "near", "traced", "quantized"} else 1


if __name__ == "__main__":
    sys.exit(main())
