"""Whether a product that is requested exists: its operator, its leaves or block, its
width, mode, precision and priority.
"""

from hvpd import _text
from hvpd._wire import protocol
from hvpd.v1 import curvature_pb2
from hvpd_server.engine.objective import OPERATORS, Objective, program_of
from hvpd_server.errors import Code, ServiceError, invalid


def check_operator(spec: curvature_pb2.ProductSpec) -> None:
    """Raise ServiceError unless this server has the operator of a product."""
    if spec.operator not in OPERATORS:
        unset = spec.operator == curvature_pb2.OPERATOR_UNSPECIFIED
        raise invalid(
            "UNKNOWN_OPERATOR",
            "the product's operator is not set: set ProductSpec.operator, for example to OPERATOR_HESSIAN"
            if unset
            else f"this server has the operators {min(OPERATORS)} to {max(OPERATORS)}, got {spec.operator}: upgrade the server",
        )


def check_product(spec: curvature_pb2.ProductSpec, objective: Objective, max_block_width: int) -> None:
    """Raise ServiceError unless an objective has the product that a spec asks for.

    Args:
        spec: The product, with an operator of this server.
        objective: The objective of its point.
        max_block_width: Most vectors of a product.
    """
    if not 0 <= spec.block <= len(objective.bundle.blocks) or (spec.block and spec.leaves):
        raise invalid(
            "UNKNOWN_BLOCK",
            f"objective {objective.digest[:12]} has {len(objective.bundle.blocks)} blocks, got {spec.block}",
        )
    if objective.bundle.sharded_parameters and (spec.block or spec.leaves or spec.mode):
        raise invalid(
            "UNKNOWN_MODE" if spec.mode else "UNKNOWN_BLOCK",
            f'objective {objective.digest[:12]} was registered with sharded="parameters": it has products of the whole Hessian in its own '
            "mode only",
        )
    if spec.mode or spec.precision:
        _check_choices(spec, objective)
    program = program_of(spec, objective.bundle)
    objective.columns(program)
    if OPERATORS[spec.operator] not in objective.described.programs:
        raise ServiceError(
            Code.FAILED_PRECONDITION,
            "NO_SUCH_OPERATOR",
            f"objective {objective.digest[:12]} has no {OPERATORS[spec.operator]}: "
            "register hvpd.composite(model, loss); the Fisher matrices need its distribution, too",
        )
    if not 1 <= spec.k <= max_block_width:
        raise invalid(
            "BLOCK_WIDTH",
            f"a product has 1 to {max_block_width} vectors, got {spec.k}: send a wider block as several products",
        )
    if abs(spec.priority) > protocol.MAX_PRIORITY:
        raise invalid(
            "PRIORITY", f"a priority is from -{protocol.MAX_PRIORITY} to {protocol.MAX_PRIORITY}, got {spec.priority}"
        )


def _check_choices(spec: curvature_pb2.ProductSpec, objective: Objective) -> None:
    """Raise ServiceError unless a product can have the mode and the precision that it
    asks for.
    """
    if spec.precision not in ("", *protocol.PRODUCT_PRECISIONS):
        raise invalid(
            "UNKNOWN_PRECISION",
            f"a product's precision is one of {', '.join(protocol.PRODUCT_PRECISIONS)}, got {_text.quoted(spec.precision, 40)}",
        )
    if not spec.mode or spec.mode == objective.bundle.mode:
        return
    if spec.mode not in protocol.PRODUCT_MODES:
        raise invalid(
            "UNKNOWN_MODE",
            f"a product's mode is one of {', '.join(protocol.PRODUCT_MODES)}, got {_text.quoted(spec.mode, 40)}",
        )
    if spec.operator != curvature_pb2.OPERATOR_HESSIAN:
        raise invalid("UNKNOWN_MODE", f"only products of the Hessian have a mode, got mode {spec.mode}")
    if spec.mode == "linearized" and (
        spec.leaves or spec.block or spec.precision or "apply" not in objective.described.programs
    ):
        raise invalid(
            "UNKNOWN_MODE",
            "mode linearized keeps residuals: it needs the whole Hessian, the objective's own precision, and an objective that was "
            "registered with neither sharded nor any_rows",
        )
