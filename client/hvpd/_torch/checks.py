"""Checks of a module before it is traced, and what is known of a loss."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import torch

from hvpd import _arrays
from hvpd._errors import InvalidArgumentError
from hvpd._wire.protocol import Distribution, Reduction

_DTYPES: Final = (torch.float32, torch.float64)


def _check_module(module: Any) -> None:
    if not isinstance(module, torch.nn.Module):
        raise InvalidArgumentError(
            f"module must be a torch.nn.Module, got a {type(module).__name__}", reason="INVALID_OPTION"
        )
    remedy = ""
    if isinstance(module, (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)):
        remedy = "pass the inner module, its .module"
    elif hasattr(module, "_orig_mod"):  # of torch.compile
        remedy = "pass the inner module, its ._orig_mod"
    elif isinstance(module, torch.jit.ScriptModule):
        remedy = "pass the module that torch.jit scripted or traced"
    if remedy:
        raise InvalidArgumentError(
            f"module is a {type(module).__name__}, which torch.export cannot trace: {remedy}", reason="NOT_TRACEABLE"
        )


def check(module: Any, loss: Any, inputs: Sequence[Any], targets: Sequence[Any]) -> torch.device:
    """Return the device of a module, its inputs and its targets.

    Raises:
        InvalidArgumentError: There are several devices, or a tensor has no values, or a
            parameter has a dtype that is not served, or an argument is of another kind.
    """
    _check_module(module)
    _check_kinds(loss, inputs, targets)
    parameters = dict(module.named_parameters())
    if not any(each.requires_grad for each in parameters.values()):
        raise InvalidArgumentError(
            f"{type(module).__name__} has no parameter that requires a gradient: there is nothing to differentiate by",
            reason="NO_PARAMETERS",
        )
    for name, each in parameters.items():
        if each.requires_grad and each.dtype not in _DTYPES:
            raise InvalidArgumentError(
                f"the parameter {name!r} is {_short(each.dtype)}, and curvature needs float32 or float64: call module.float() or "
                "module.double() first, and convert the inputs as well",
                reason="DTYPE",
            )
    tensors: dict[str, torch.Tensor] = {f"the parameter {name!r}": each for name, each in parameters.items()}
    tensors |= {f"the buffer {name!r}": buffer for name, buffer in module.named_buffers()}
    for what, given in (("inputs", inputs), ("targets", targets)):
        tensors |= {f"{what}{path}": value for path, value in _leaves(given) if isinstance(value, torch.Tensor)}
    first = next(iter(tensors))
    for what, tensor in tensors.items():
        if tensor.device != tensors[first].device:
            raise InvalidArgumentError(
                f"{first} is on {tensors[first].device}, and {what} is on {tensor.device}: move module, inputs and targets to one "
                "device, for instance with .to('cpu')",
                reason="TENSOR_DEVICE",
            )
        if tensor.is_meta:
            raise InvalidArgumentError(
                f"{what} is on the device meta, so it has no values: load the module on a device",
                reason="TENSOR_DEVICE",
            )
        if what.startswith(("inputs", "targets")) and tensor.dtype in (torch.float16, torch.bfloat16):
            raise InvalidArgumentError(
                f"{what} is {_short(tensor.dtype)}: convert it to the dtype of the parameters", reason="DTYPE"
            )
    return tensors[first].device


def _check_kinds(loss: Any, inputs: Sequence[Any], targets: Sequence[Any]) -> None:
    if not callable(loss):
        raise InvalidArgumentError(
            f"loss must be a function loss(output, *targets) or a module such as torch.nn.MSELoss(), got {loss!r}",
            reason="INVALID_OPTION",
        )
    for what, given in (("inputs", inputs), ("targets", targets)):
        for path, value in _leaves(given):
            if isinstance(value, torch.utils.data.DataLoader):
                raise InvalidArgumentError(
                    f"{what}{path} is a DataLoader: pass the tensors of one batch", reason="INVALID_OPTION"
                )
            if _arrays.is_array(value) and not isinstance(value, torch.Tensor):
                raise InvalidArgumentError(
                    f"{what}{path} is a {_arrays.described(value)}, and PyTorch needs tensors: pass torch.as_tensor(...)",
                    reason="DTYPE",
                )


def _leaves(tree: Any, path: str = "") -> list[tuple[str, Any]]:
    if isinstance(tree, (tuple, list)):
        return [found for index, each in enumerate(tree) for found in _leaves(each, f"{path}[{index}]")]
    if isinstance(tree, Mapping):
        return [found for key, each in tree.items() for found in _leaves(each, f"{path}[{key!r}]")]
    return [(path, tree)]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def distribution_of(loss: Callable[..., Any], output: Sequence[int]) -> Distribution | None:
    """Return the distribution of the output that a loss of PyTorch implies.

    Args:
        loss: The loss.
        output: Shape of the module's output; () if it is not one tensor.
    """
    if len(output) != 2:
        return None
    if loss is torch.nn.functional.cross_entropy:
        return "categorical"
    plain = (
        isinstance(loss, torch.nn.CrossEntropyLoss)
        and loss.weight is None
        and loss.label_smoothing == 0
        and loss.reduction in ("mean", "sum")
    )
    return "categorical" if plain else None


def reduction_of(loss: Callable[..., Any]) -> Reduction:
    """Return how a loss of PyTorch reduces rows."""
    return "sum" if getattr(loss, "reduction", "mean") == "sum" else "mean"


def label_check(
    loss: Callable[..., Any], output: Sequence[int], position: int
) -> Callable[[Sequence[Any]], None] | None:
    """Return a check of the labels among other data, for PyTorch's losses of classes.

    PyTorch raises an error for a label that is no class. A compiled program cannot.

    Args:
        loss: The loss.
        output: Shape of the module's output; () if it is not one tensor.
        position: Position of the labels in the data.

    Returns:
        A function of the data, which raises InvalidArgumentError; None for other
        losses.
    """
    functions = (torch.nn.functional.cross_entropy, torch.nn.functional.nll_loss)
    if not output or not (loss in functions or isinstance(loss, (torch.nn.CrossEntropyLoss, torch.nn.NLLLoss))):
        return None
    classes = output[1] if len(output) > 1 else output[0]
    ignored = getattr(loss, "ignore_index", -100)

    def check_labels(data: Sequence[Any]) -> None:
        labels = _arrays.host(data[position], "the targets")
        if labels.dtype.kind not in "iu":
            return  # Probabilities of classes.
        wrong = labels[((labels < 0) | (labels >= classes)) & (labels != ignored)]
        if wrong.size:
            raise InvalidArgumentError(
                f"the targets hold the label {wrong[0]}, and the module has {classes} classes: pass labels from 0 to {classes - 1}, or "
                f"{ignored} (ignore_index) for rows that do not count",
                reason="DATA_MISMATCH",
            )

    return check_labels


_aten: Final[Any] = torch.ops.aten

_READS: Final[Mapping[Any, bool]] = {
    _aten.embedding.default: False,
    _aten.gather.default: False,
    _aten.index_select.default: False,
    _aten.index.Tensor: True,
}
"""Operators that read at indices, and whether they count negative ones from the end."""

_SAME_ELEMENTS: Final = frozenset(
    getattr(_aten, name).default for name in ("_to_copy", "clone", "expand", "permute", "unsqueeze", "view")
)
"""Operators whose results have all elements of their first argument, and no others."""


def index_check(program: Any) -> Callable[[Sequence[Any]], None]:
    """Return a check of inputs that a module uses as indices.

    Args:
        program: The module's program of core operators.

    Returns:
        A function of the inputs, which raises InvalidArgumentError.
    """
    kinds = [spec.kind for spec in program.graph_signature.input_specs]
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    user = torch.export.graph_signature.InputKind.USER_INPUT
    inputs = [node for node, kind in zip(placeholders, kinds, strict=True) if kind == user]
    in_spec = program.call_spec.in_spec
    ranges = {(inputs.index(node), low, end) for node, low, end in _ranges(program.graph) if node in inputs}

    def check_indices(given: Sequence[Any]) -> None:
        try:
            leaves = in_spec.flatten_up_to((tuple(given), {}))
        except ValueError:
            return  # Another structure, which has an error of its own.
        for position, low, end in ranges:
            indices = _arrays.host(leaves[position], "the inputs")
            wrong = indices[(indices < low) | (indices >= end)]
            if indices.dtype.kind in "iu" and wrong.size:
                raise InvalidArgumentError(
                    f"the inputs hold the index {wrong[0]}, and the module reads {end} elements with it: pass indices from {low} to {end - 1}",
                    reason="DATA_MISMATCH",
                )

    return check_indices


def _ranges(graph: Any) -> Iterator[tuple[Any, int, int]]:
    """Yield each node that is an index, its lowest value, and the end of its values."""
    for node in graph.nodes:
        if node.op != "call_function" or node.target not in _READS:
            continue
        sizes = node.args[0].meta["val"].shape
        if node.target is _aten.index.Tensor:
            found = [(index, axis) for axis, index in enumerate(node.args[1]) if index is not None]
        elif node.target is _aten.embedding.default:
            found = [(node.args[1], 0)]
        else:
            found = [(node.args[2], node.args[1])]
        for index, axis in found:
            source = index
            while source.op == "call_function" and source.target in _SAME_ELEMENTS:
                source = source.args[0]
            if sizes:
                yield source, -sizes[axis] if _READS[node.target] else 0, sizes[axis]
