"""Bundles and programs for the tests of vetting."""

import jax
import jax.extend.mlir
import jax.interpreters.mlir
import jax.numpy as jnp
import numpy as np
import pytest
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo

from hvpd._registration import export as _export
from hvpd_server.errors import Code, ServiceError
from hvpd_server.importer import families

families.load()  # The table of operations is empty before.


def parts(made, **replaced):
    """Return the process's input: the bundle and its programs."""
    programs = {name: bytes(made.blobs[program.digest]) for name, program in made.bundle.programs.items()}
    return {"bundle": made.bundle.SerializeToString()} | programs | replaced


def made(fun, x, *data, **options):
    return _export.export(fun, x, data, platforms=("cpu",), precision="highest", **options)


PLAIN = made(lambda x: jnp.sum(x**4) / 12, np.zeros(3, np.float32))


def artifact(text):
    """Return the portable artifact of a text."""
    with jax.interpreters.mlir.make_ir_context() as context, ir.Location.unknown():
        context.allow_unregistered_dialects = True
        return bytes(
            jax.extend.mlir.serialize_portable_artifact(ir.Module.parse(text), stablehlo.get_current_version())
        )


def main(body, outside="", attributes="", argument=""):
    """Return a program that takes float32[3], %x, and returns its element of position 0
    after `body`, which sets %y.
    """
    return f"""
    module @jit_f {attributes} {{
      func.func public @main(%x: tensor<3xf32> {argument}) -> tensor<f32> {{
        {body}
        %first = stablehlo.slice %y [0:1] : (tensor<3xf32>) -> tensor<1xf32>
        %value = stablehlo.reshape %first : (tensor<1xf32>) -> tensor<f32>
        return %value : tensor<f32>
      }}
      {outside}
    }}
    """


def refused(vetter, program, reason, *says):
    """Return the message that refuses PLAIN's bundle with another program, as bytes or
    as text.
    """
    blob = artifact(program) if isinstance(program, str) else program
    with pytest.raises(ServiceError) as error:
        vetter.vet(parts(PLAIN, objective=blob))
    assert (error.value.code, error.value.reason) == (Code.INVALID_ARGUMENT, reason), error.value
    for text in says:
        assert text in str(error.value)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 3000
    return str(error.value)


A = np.eye(4) + 0.1 * np.arange(16.0).reshape(4, 4)
