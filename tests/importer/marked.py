"""A function's whole way: exported with marks as by a client, read, and evaluated as by
a server.
"""

import jax
import jax.export
import jax.extend.mlir
import jax.interpreters.mlir
import numpy as np
from jaxlib.mlir import ir, passmanager
from jaxlib.mlir.dialects import stablehlo

from hvpd._registration import hijax, marked_primitives, marks
from hvpd_server.importer import evaluate


def artifact(fun, specs, platforms):
    """Return the bytes that a client sends: a portable artifact of the oldest version
    that servers read, without locations.
    """
    with hijax.kept_rules():
        exported = jax.export.export(
            jax.jit(fun, keep_unused=True),
            platforms=platforms,
            disabled_checks=marked_primitives.ALLOWED_CALLS,
            _override_lowering_rules=marks.rules(),
        )(*specs)
    with jax.interpreters.mlir.make_ir_context() as context:
        module = jax.extend.mlir.deserialize_portable_artifact(exported.mlir_module_serialized)
        parsed = ir.Module.parse(module, context) if isinstance(module, str | bytes) else module
        passmanager.PassManager.parse("builtin.module(strip-debuginfo)").run(parsed.operation)
        version = stablehlo.get_version_from_compatibility_requirement(
            stablehlo.StablehloCompatibilityRequirement.WEEK_4
        )
        return jax.extend.mlir.serialize_portable_artifact(parsed, version)


def imported(module, platform_index=None):
    """Return the function of a module that was read."""
    function = evaluate.function(module)
    first = [] if platform_index is None else [np.asarray(platform_index, module.main.types[0].dtype)]
    return lambda *args: function(*first, *args)[0]
