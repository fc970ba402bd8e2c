"""Registers a program of very many operations:
`python -m bench._large ADDRESS OPERATIONS`.
"""

import contextlib
import sys

import numpy as np

import hvpd


def program(operations: int) -> str:
    """Return StableHLO text of f(x) = sum of sin(sin(... x)); x is 16 elements of
    float32.
    """
    body = "\n".join(f"%{i + 1} = stablehlo.sine %{i} : tensor<16xf32>" for i in range(operations))
    return f"""
    module {{ func.func public @main(%0 : tensor<16xf32>) -> tensor<f32> {{
      {body}
      %zero = stablehlo.constant dense<0.0> : tensor<f32>
      %sum = stablehlo.reduce(%{operations} init: %zero) applies stablehlo.add across dimensions = [0]
        : (tensor<16xf32>, tensor<f32>) -> tensor<f32>
      return %sum : tensor<f32>
    }} }}
    """


def main() -> None:
    """Register the program. It does not matter whether the server accepts it."""
    address, operations = sys.argv[1:]
    with hvpd.connect(address) as client:
        text = program(int(operations))
        print("registering", file=sys.stderr, flush=True)
        with contextlib.suppress(hvpd.HvpdError):
            client.register_stablehlo(text, np.ones(16, np.float32))
    print("done", file=sys.stderr, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
