"""PyTorch modules as objectives, and operators of a server in PyTorch.

>>> import hvpd.torch                                                # doctest: +SKIP
>>> loss = torch.nn.CrossEntropyLoss()                               # doctest: +SKIP
>>> objective = hvpd.torch.register(client, module, loss, X, y)      # doctest: +SKIP
>>> H = hvpd.torch.LinearOperator(objective.at(module).hessian())    # doctest: +SKIP

`register` needs the extra `torch`, and `LinearOperator` needs curvlinops. `import hvpd`
does not import this module.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from hvpd._client import Client
from hvpd._composite import composite
from hvpd._errors import InvalidArgumentError, MissingExtraError
from hvpd._objective import Objective
from hvpd._torch.checks import check, distribution_of, index_check, label_check, reduction_of
from hvpd._wire.protocol import Distribution, Reduction

if TYPE_CHECKING:
    from hvpd._torch.operator import LinearOperator

__all__ = ["LinearOperator", "register"]


def register(
    client: Client,
    module: torch.nn.Module,
    loss: Callable[..., Any],
    inputs: Any,
    targets: Any = (),
    *,
    name: str | None = None,
    distribution: Distribution | None = None,
    reduction: Reduction | None = None,
    samples: int = 1,
    **options: Any,
) -> Objective:
    """Register loss(module(*inputs), *targets) as a function of the parameters.

    `torch.export` traces the module and the loss once, for these shapes. torchax writes
    them with jax, and `Client.register` does the rest. Derivatives are PyTorch's, also
    at kinks: `relu` at 0, ties of max-pooling, a norm at 0. The objective is a
    composite, so its points have `ggn()`, `fisher()`, `empirical_fisher()` and
    `kfac()`.

    x is the parameters that require a gradient, in the order and under the names of
    `module.named_parameters()`. So a flat vector means the same as in
    `torch.nn.utils.parameters_to_vector`. Buffers and other parameters are data. Shared
    parameters count once.

    `objective.at(module)` is a point at the parameters and buffers of a module.
    `objective.at(module, *inputs, *targets)` is one on another batch of the same
    shapes. `objective.unravel(x)` is a state dict of tensors, without buffers:
    `module.load_state_dict(objective.unravel(x), strict=False)`.

    Args:
        client: The connection.
        module: The module, on one device, in float32 or float64. Batch norm and dropout
            must be in evaluation mode: `module.eval()`.
        loss: loss(output, *targets) -> scalar; a function or a module. Its own tensors
            are constants.
        inputs: A tensor, or a tuple of the module's positional arguments.
        targets: A tensor, or a tuple of the loss's further arguments.
        name: As for `Client.register`.
        distribution: As for `hvpd.composite`. None: "categorical" for PyTorch's cross
            entropy of [rows, classes] without weights and smoothing, otherwise none.
        reduction: As for `hvpd.composite`. None: the loss's own, otherwise "mean".
        samples: As for `hvpd.composite`.
        options: Further arguments of `Client.register`: `mode`, `precision`, `blocks`,
            `fixed_bucket`, `platforms`, `shared`.

    `objective.at` refuses a label that is no class, if the loss is PyTorch's
    `cross_entropy` or `nll_loss`. It also refuses an input that is an index out of
    range, as of `nn.Embedding`. An objective that another client found by name has NaN
    as its value, gradient and products there.

    Raises:
        InvalidArgumentError: The client is asynchronous. Or the module cannot be
            registered: it is on several devices, has other dtypes, branches on values,
            changes its buffers, or has an operator that is not served. Or PyTorch
            itself raises an error for the inputs or the targets. The message names the
            operator and the path of its module.
        MissingExtraError: The extra `torch` is not installed.

    Example:
        >>> objective = hvpd.torch.register(
        ...     client, module, torch.nn.MSELoss(), X, Y, name="demo/mlp"
        ... )
        >>> G = objective.at(module).ggn(shift=1e-3)
    """
    _check_client(client)
    given, wanted = _tuple(inputs), _tuple(targets)
    device = check(module, loss, given, wanted)
    try:
        from hvpd._registration import torch_program
    except ImportError as error:
        raise MissingExtraError(
            f"registering a module needs torchax and jax here: pip install 'hvpd[torch]' ({error})"
        ) from error
    converted = torch_program.convert(module, loss, given, wanted)
    made = composite(
        converted.model,
        converted.loss,
        inputs=converted.inputs,
        distribution=distribution or distribution_of(loss, converted.output),
        reduction=reduction or reduction_of(loss),
        samples=samples,
    )
    with torch_program.wide():
        objective = client.register(made, converted.x, *converted.data, name=name, **options)
    objective.containers(lambda leaves: _state(objective, leaves, device))
    check_indices = index_check(converted.program)
    check_labels = label_check(loss, converted.output, converted.inputs)

    def check_data(data: Sequence[Any]) -> None:
        check_indices(data[1 : converted.inputs])
        if check_labels is not None:
            check_labels(data)

    objective.data_check(check_data)
    return objective


def _check_client(client: Any) -> None:
    """Check that a client is a blocking one.

    Raises:
        InvalidArgumentError: It is another object.
    """
    if not isinstance(client, Client):
        asynchronous = type(client).__module__ == "hvpd.aio"
        raise InvalidArgumentError(
            f"client is {'asynchronous' if asynchronous else 'of another kind'} ({type(client).__name__}): register with "
            "hvpd.connect(...) or hvpd.local()"
            + (", and then find the objective by its name with the asynchronous client" if asynchronous else ""),
            reason="INVALID_OPTION",
        )


def _tuple(arguments: Any) -> tuple[Any, ...]:
    return tuple(arguments) if isinstance(arguments, (tuple, list)) else (arguments,)


def _state(objective: Objective, leaves: Sequence[Any], device: torch.device) -> dict[str, torch.Tensor]:
    """Return the leaves of x as a state dict."""
    names = [leaf.name for leaf in objective.leaves]
    return {name: torch.as_tensor(leaf).to(device) for name, leaf in zip(names, leaves, strict=True)}


def __getattr__(name: str) -> Any:
    if name != "LinearOperator":
        raise AttributeError(f"module 'hvpd.torch' has no attribute {name!r}")
    try:
        from hvpd._torch.operator import LinearOperator
    except ImportError as error:
        raise MissingExtraError(
            f"hvpd.torch.LinearOperator needs curvlinops: pip install curvlinops-for-pytorch ({error})"
        ) from error
    return LinearOperator
