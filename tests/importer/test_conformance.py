"""The conformance command: which verdict a program gets."""

import json

import ml_dtypes
import numpy as np
import pytest

from tests.importer import conformance

PROGRAM = """func.func public @main() -> tensor<2x{type}> {{
  %0 = call @inputs() : () -> tensor<2x{type}>
  %1 = call @expected() : () -> tensor<2x{type}>
  %2 = stablehlo.{operation} %0, %0 : tensor<2x{type}>
  stablehlo.custom_call @check.{check}(%2, %1) {{has_side_effect = true}} : (tensor<2x{type}>, tensor<2x{type}>) -> ()
  return %2 : tensor<2x{type}>
}}
func.func private @inputs() -> tensor<2x{type}> {{
  %0 = stablehlo.constant dense<{input}> : tensor<2x{type}>
  return %0 : tensor<2x{type}>
}}
func.func private @expected() -> tensor<2x{type}> {{
  %0 = stablehlo.constant dense<{expected}> : tensor<2x{type}>
  return %0 : tensor<2x{type}>
}}
"""


def written(expected, *, check="expect_eq", operation="add", type="f32", input="[1.5, -2.0]"):  # noqa: A002 - names in MLIR
    return PROGRAM.format(check=check, operation=operation, type=type, input=input, expected=expected)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        (written("[3.0, -4.0]"), "passed"),
        (written("[3.0, -4.00001]"), "near"),
        (written("[3.0, -4.5]"), "differs"),
        (written("[3.00000048, -4.0]", check="expect_close"), "passed"),
        (written("[3.00001, -4.0]", check="expect_close"), "near"),
        (written("[3.0, 0x7FC00000]", check="expect_close"), "differs"),
        (written("[3.0009, -4.0]", check="expect_almost_eq"), "passed"),
        (written("[3.0011, -4.0]", check="expect_almost_eq"), "differs"),
        (written("[2, -2]", type="i8", input="[1, 127]"), "passed"),
        (written("[2, -3]", type="i8", input="[1, 127]"), "differs"),
        (written("0", type="i4", input="0"), "refused"),
        (
            "func.func public @main(%n: tensor<i64>, %a: tensor<?xf32>) -> tensor<?xf32> { return %a : tensor<?xf32> }",
            "traced",
        ),
    ],
)
def test_verdicts(text, verdict, known):
    assert conformance.outcome(text, known=known).verdict == verdict


def test_steps_between_floats():
    for dtype in (np.float32, np.float64, np.float16, ml_dtypes.bfloat16):
        numbers = np.array([-1, -0.0, 0.0, 1]).astype(dtype)
        after = np.nextafter(numbers, np.full(4, np.inf).astype(dtype))
        assert conformance.compare("check.expect_close", numbers, after).verdict == "passed"
        assert conformance.compare("check.expect_eq", numbers, after).verdict != "passed"


def test_a_file_of_several_programs(tmp_path, capsys):
    one = """func.func @one() {
      %a = stablehlo.constant dense<[1, 2]> : tensor<2xi32>
      check.expect_eq_const %a, dense<[1, VALUE]> : tensor<2xi32>
      func.return
    }"""
    texts = [one.replace("VALUE", "2"), "// only a comment", one.replace("VALUE", "3")]
    (tmp_path / "file.mlir").write_text("\n// -----\n".join(texts))
    outcomes = tmp_path / "outcomes.json"
    assert conformance.main([str(tmp_path), "--json", str(outcomes)]) == 1
    assert [verdict for verdict, _ in json.loads(outcomes.read_text()).values()] == ["passed", "differs"]
    assert "2 programs: 1 passed, 1 differs" in capsys.readouterr().out
    assert conformance.main([str(tmp_path), "--match", "nothing"]) == 0
