"""Turns a PyTorch module and its loss into jax functions. Needs jax and torch.

`torch.export` traces both once, into programs of PyTorch's core operators. Such a
program has the names of its parameters and buffers, and knows the module of each
operation. `_Interpreter` runs it with jax arrays: by `torch_rules`, or else by torchax.
"""

import contextlib
import dataclasses
import importlib
import itertools
import logging
import operator
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, cast

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch.utils import _pytree as _trees

from hvpd import _text
from hvpd._errors import HvpdError, InvalidArgumentError
from hvpd._registration import torch_import
from hvpd._registration.torch_rules import DECOMPOSED, RULES, WINDOWS


class Parameters(dict[str, Any]):
    """The x of a module: its parameters by name, in the module's order.

    jax orders a plain dict by its keys.
    """


class Buffers(dict[str, Any]):
    """The tensors of a module that are data: buffers, and parameters without
    gradient.
    """


def _register(container: type[dict[str, Any]]) -> None:
    def flatten(tree: dict[str, Any]) -> tuple[Iterable[tuple[Any, Any]], Any]:
        return [(jax.tree_util.DictKey(name), value) for name, value in tree.items()], tuple(tree)

    jax.tree_util.register_pytree_with_keys(
        container, flatten, lambda names, values: container(zip(names, values, strict=True))
    )


_register(Parameters)
_register(Buffers)


@dataclasses.dataclass(frozen=True)
class Converted:
    """A module and its loss as jax functions, with their arrays."""

    model: Callable[..., Any]
    """model(parameters, buffers, *inputs) -> the module's output."""
    loss: Callable[..., Any]
    """loss(output, *targets) -> scalar."""
    x: Parameters
    """Arrays of the parameters that require a gradient, in the module's order."""
    data: tuple[Any, ...]
    """The buffers, then the inputs, then the targets."""
    inputs: int
    """Number of data arguments of the model."""
    output: tuple[int, ...]
    """Shape of the output if it is one tensor; otherwise ()."""
    program: Any
    """The module's program of core operators."""


def wide() -> Any:
    """Return a context in which jax has 64-bit types, as PyTorch has."""
    return jax.enable_x64(True)


def convert(
    module: torch.nn.Module, loss: Callable[..., Any], inputs: Sequence[Any], targets: Sequence[Any]
) -> Converted:
    """Convert a module and its loss.

    Raises:
        InvalidArgumentError: A part of the module has no jax form; the message names
            the operation and the module's path.
        MissingExtraError: torchax is not installed.
    """
    table = torch_import.operators()
    parameters = dict(module.named_parameters())
    x = Parameters((name, array(value)) for name, value in parameters.items() if value.requires_grad)
    names = _names(module)
    tensors = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    program = _traced(module, tuple(inputs), "the module")
    used = program.graph_signature
    buffers = Buffers(
        sorted(
            (name, array(tensors[name]))
            for name in {names[each] for each in (*used.parameters, *used.buffers)} - x.keys()
        )
    )
    run = _function(program, table, names)
    output = _called(module, tuple(inputs), "the module")
    lossy = _Loss(loss)
    loss_program = _traced(lossy, (output, *targets), "the loss")
    _check_value(_called(lossy, (output, *targets), "the loss"))
    constants = {name: array(value) for name, value in lossy.state_dict(keep_vars=True).items()}
    constants |= {name: array(value) for name, value in lossy.named_buffers()}
    run_loss = _function(loss_program, table, {name: name for name in constants})
    return Converted(
        model=_named(lambda parameters, buffers, *inputs: run({**buffers, **parameters}, inputs), module),
        loss=_named(lambda output, *targets: run_loss(constants, (output, *targets)), loss),
        x=x,
        data=(buffers, *jax.tree.map(array, tuple(inputs)), *jax.tree.map(array, tuple(targets))),
        inputs=1 + len(inputs),
        output=tuple(output.shape) if isinstance(output, torch.Tensor) else (),
        program=program,
    )


def array(tensor: Any) -> Any:
    """Return a tensor as an array of NumPy. Everything else is returned as it is."""
    return tensor.detach().cpu().resolve_conj().resolve_neg().numpy() if isinstance(tensor, torch.Tensor) else tensor


def _named(function: Callable[..., Any], source: Any) -> Callable[..., Any]:
    function.__name__ = getattr(source, "__name__", type(source).__name__)
    return function


class _Loss(torch.nn.Module):
    """A loss as a module: `torch.export` takes nothing else."""

    def __init__(self, loss: Callable[..., Any]) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, output: Any, *targets: Any) -> Any:
        return self.loss(output, *targets)


def _names(module: torch.nn.Module) -> dict[str, str]:
    """Return the first name of each parameter and buffer, by any of its names.

    A module can use one tensor under several names, as with tied weights.
    """
    first: dict[int, str] = {}
    found = {}
    for name, tensor in [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]:
        found[name] = first.setdefault(id(tensor), name)
    return found


# Tracing


def _traced(module: torch.nn.Module, arguments: tuple[Any, ...], what: str) -> Any:
    """Return the program of core operators of a module."""
    where: list[str] = []
    try:
        with _quiet(), _entered(module, where), torch.enable_grad():
            program = torch.export.export(module, arguments, strict=False)
        with _quiet():
            _detach(program.graph_module)
            program = program.run_decompositions(_decompositions())
    except InvalidArgumentError:
        raise
    except Exception as error:
        raise _untraceable(error, what, _place(module, where[-1] if where else "")) from error
    changed = program.graph_signature.buffers_to_mutate.values()
    if changed:
        raise InvalidArgumentError(
            f"{what} changes its buffers ({', '.join(sorted(changed))}) when it is called, so it is no pure function: call "
            "module.eval() before it is registered",
            reason="SIDE_EFFECTS",
        )
    return program


def _called(module: torch.nn.Module, arguments: tuple[Any, ...], what: str) -> Any:
    """Return what PyTorch computes. Tracing does not see the values of the inputs.

    Raises:
        InvalidArgumentError: PyTorch raises an error, such as for a label that is no
            class.
    """
    where: list[str] = []
    try:
        with _entered(module, where), torch.no_grad():
            return module(*arguments)
    except Exception as error:
        raise InvalidArgumentError(
            f"PyTorch cannot compute {what} for these inputs and targets, in {_place(module, where[-1] if where else '')}: "
            f"{type(error).__name__}: {_text.cut(str(error), 500)}{_dtype_remedy(module, arguments)}",
            reason="DATA_MISMATCH",
        ) from error


def _dtype_remedy(module: torch.nn.Module, arguments: tuple[Any, ...]) -> str:
    """Return what to do about floating inputs of another dtype than the parameters."""
    own = {each.dtype for each in module.parameters() if each.is_floating_point()}
    given = {each.dtype for each in _trees.tree_leaves(arguments) if isinstance(each, torch.Tensor)}
    other = {dtype for dtype in given if dtype.is_floating_point} - own
    if len(own) != 1 or not other:
        return ""
    (wanted,) = own
    names = " and ".join(sorted(str(dtype) for dtype in other))
    return f". An input is {names}, and the parameters are {wanted}: pass the input's .to({wanted})"


def _check_value(value: Any) -> None:
    """Check that a loss returned a real scalar."""
    if not isinstance(value, torch.Tensor):
        raise InvalidArgumentError(
            f"the loss must return a scalar tensor, got a {type(value).__name__}", reason="NOT_SCALAR"
        )
    if value.dim() or not value.is_floating_point():
        raise InvalidArgumentError(
            f"the loss must return a real scalar tensor, got {str(value.dtype).removeprefix('torch.')}{list(value.shape)}: use "
            "reduction='mean' or 'sum', or .mean() or .sum() of the result",
            reason="NOT_SCALAR",
        )


def _decompositions() -> Any:
    """Return how operators are written with others.

    It is PyTorch's table for core operators, without the operators that have rules
    here, and with those of `DECOMPOSED`.
    """
    found = torch.export.default_decompositions()
    for each in RULES:
        found.pop(each, None)
    for each, how in torch._decomp.get_decompositions(DECOMPOSED).items():  # noqa: SLF001 - torch has no public name for it
        found[each] = how
    return found


def _detach(module: Any) -> None:
    """Detach what `torch.no_grad()` computes. A decomposition would forget it."""
    for each in [each for each in module.modules() if isinstance(each, torch.fx.GraphModule)]:
        for node in list(each.graph.nodes):
            if getattr(node.target, "__name__", "") != "wrap_with_set_grad_enabled" or node.args[0]:
                continue
            for result in list(node.users):
                with each.graph.inserting_after(result):
                    detached = each.graph.call_function(torch.ops.aten.detach.default, (result,))
                detached.meta = dict(result.meta)
                result.replace_all_uses_with(detached, delete_user_cb=lambda user, kept=detached: user is not kept)
        each.recompile()


def _untraceable(error: Exception, what: str, place: str) -> HvpdError:
    text = str(error)
    if _is_half_imported(error):
        return HvpdError(
            f"PyTorch cannot trace, because an import in this process was interrupted: restart Python ({_text.cut(text, 200)})",
            reason="INTERRUPTED_IMPORT",
        )
    if "data-dependent" in text or "DataDependent" in type(error).__name__:
        lines = [line.strip() for line in text.splitlines()]
        source = next((f"{a}: {b}" for a, b in itertools.pairwise(lines) if a.startswith("File ")), "")
        return InvalidArgumentError(
            f"{what} takes a branch, or makes a shape, that depends on the values of tensors, in {place}"
            f"{f' ({source})' if source else ''}: hvpd registers one program for all values. Use torch.where in place of a branch or a "
            "boolean mask, keep a number in a tensor in place of float() or .item(), or move the choice out of the module",
            reason="VALUE_DEPENDENT",
        )
    remedy = ""
    if ".numpy() is not supported" in text:
        remedy = (
            ". It leaves PyTorch by .numpy(), so that its derivative is lost: write this part with functions of torch"
        )
    return InvalidArgumentError(
        f"torch.export cannot trace {what}, in {place}: {type(error).__name__}: {_text.cut(text, 500).rstrip('.')}{remedy}",
        reason="NOT_TRACEABLE",
    )


def _is_half_imported(error: BaseException | None) -> bool:
    """Return whether an error comes from a module whose import was interrupted.

    PyTorch imports sympy at the first trace. After a Ctrl-C there, parts of it stay.
    """
    while error is not None:
        if isinstance(error, (AttributeError, ImportError)) and re.search(
            r"partially initialized module|module 'sympy[\w.]*' has no|from 'sympy|No module named 'sympy", str(error)
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def _entered(module: torch.nn.Module, where: list[str]) -> Iterator[None]:
    """Keep the paths of the modules that run, innermost last. An error leaves them."""

    def enter(path: str) -> Callable[..., None]:
        return lambda *_: where.append(path)

    def leave(*_: Any) -> None:
        where.pop()

    handles = []
    for path, each in module.named_modules():
        handles += [each.register_forward_pre_hook(enter(path)), each.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch from writing graphs and its own deprecations to stderr: our errors say
    what matters.
    """
    logger = logging.getLogger("torch")
    level = logger.level
    fast = torch.backends.mha.get_fastpath_enabled()
    # This module prints a graph to stderr before it raises an error.
    trace = importlib.import_module("torch.export._trace")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.CRITICAL)
        vars(trace)["print"] = lambda *_, **__: None
        torch.backends.mha.set_fastpath_enabled(False)  # Its fused kernels have no core operators.
        try:
            yield
        finally:
            vars(trace).pop("print", None)
            torch.backends.mha.set_fastpath_enabled(fast)
            logger.setLevel(level)


def _place(module: torch.nn.Module, path: str) -> str:
    """Describe a module by path and class."""
    kind = type(dict(module.named_modules()).get(path, module)).__name__
    return f"the module {path!r} ({kind})" if path else f"the module itself ({kind})"


# Interpreting


def _function(
    program: Any, table: Mapping[Any, Any], names: Mapping[str, str]
) -> Callable[[Mapping[str, Any], Any], Any]:
    """Return a function of (tensors by name, arguments) that runs a program in jax."""
    signature = program.graph_signature
    kinds = torch.export.graph_signature.InputKind
    module = program.graph_module
    in_spec, out_spec = program.call_spec

    def run(tensors: Mapping[str, Any], arguments: Any) -> Any:
        # By the traced structure, because jax hands dicts on with sorted keys.
        flat = iter(in_spec.flatten_up_to((tuple(arguments), {})))
        values = []
        for spec in signature.input_specs:
            if spec.kind in (kinds.PARAMETER, kinds.BUFFER):
                values.append(tensors[names[spec.target]])
            elif spec.kind == kinds.TOKEN:
                values.append(None)
            elif spec.kind == kinds.CONSTANT_TENSOR:
                values.append(jnp.asarray(array(program.constants[spec.target])))
            else:
                values.append(next(flat))
        found = _Interpreter(module, table).run(*values, enable_io_processing=False)
        results = [value for value, spec in zip(found, signature.output_specs, strict=True) if spec.kind != _TOKEN]
        return _trees.tree_unflatten(results, out_spec)

    return run


_TOKEN: Final = torch.export.graph_signature.OutputKind.TOKEN


class _Interpreter(torch.fx.Interpreter):
    """Runs a program of core operators with jax arrays."""

    def __init__(self, module: Any, table: Mapping[Any, Any]) -> None:
        super().__init__(module)
        self.extra_traceback = False  # Our errors name the place.
        self._table = table

    def run_node(self, n: Any) -> Any:
        if n.op != "call_function":
            return super().run_node(n)
        function = self._function(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        try:
            found = function(*args, **kwargs)
        except InvalidArgumentError:
            raise
        except jax.errors.NonConcreteBooleanIndexError as error:
            raise InvalidArgumentError(
                f"a boolean mask makes a shape that depends on values, in {_source(n)}: use torch.where",
                reason="VALUE_DEPENDENT",
            ) from error
        except Exception as error:
            raise InvalidArgumentError(
                f"the operator {n.target} cannot be converted to jax, in {_source(n)}: {type(error).__name__}: "
                f"{_text.cut(str(error), 300)}",
                reason="UNSUPPORTED_OPERATOR",
            ) from error
        return _typed(found, n.meta.get("val"))

    def _function(self, n: Any) -> Callable[..., Any]:
        """Return the jax function of a node.

        Raises:
            InvalidArgumentError: There is none.
        """
        target = n.target
        if getattr(operator, getattr(target, "__name__", ""), None) is target:
            return cast("Callable[..., Any]", target)
        if (
            getattr(target, "__name__", "") == "with_effects"
            and n.args[1] is torch.ops.aten._linalg_check_errors.default  # noqa: SLF001 - an operator's name
        ):
            return lambda *_, **__: (None,)  # A check of a status, which raises in PyTorch.
        if not isinstance(target, _OVERLOAD):
            raise InvalidArgumentError(
                f"{target} has functions inside, or is a custom operator, which hvpd cannot convert, in {_source(n)}: write this part "
                "with other operators of torch",
                reason="UNSUPPORTED_OPERATOR",
            )
        if target is torch.ops.aten._local_scalar_dense.default:  # noqa: SLF001 - an operator's name
            raise InvalidArgumentError(
                f"a number is read from a tensor (.item(), float() or int()), in {_source(n)}: hvpd registers one program for all "
                "values. Keep the number in a tensor",
                reason="VALUE_DEPENDENT",
            )
        if torch.Tag.nondeterministic_seeded in target.tags:
            raise InvalidArgumentError(
                f"the operator {target} draws random numbers, in {_source(n)}, and an objective has one value at each x: call "
                "module.eval() before the module is registered, or pass the numbers as an input",
                reason="RANDOM_NUMBERS",
            )
        if target in RULES:
            return RULES[target]
        if target in WINDOWS and all(user.target is operator.getitem and user.args[1] == 0 for user in n.users):
            return WINDOWS[target]
        found = self._table.get(target) or self._table.get(target.overloadpacket)
        if found is None or not found.is_jax_function or found.needs_env:
            raise InvalidArgumentError(
                f"the operator {target} has no jax form in torchax, in {_source(n)}: write this part with other operators of torch",
                reason="UNSUPPORTED_OPERATOR",
            )
        return cast("Callable[..., Any]", found.func)


_OVERLOAD: Final[Any] = torch._ops.OpOverload  # noqa: SLF001 - torch has no public name for it


_HOME: Final = str(Path(torch.__file__).parent)


def _source(n: Any) -> str:
    """Describe the module of a node, and the line of the user that made it."""
    stack = list((n.meta.get("nn_module_stack") or {}).values())
    path, kind = stack[-1] if stack else ("", "")
    kind = str(kind).rpartition(".")[2]
    place = f"the module {path!r} ({kind})" if path else f"the module itself{f' ({kind})' if kind else ''}"
    lines = [line.strip() for line in (n.meta.get("stack_trace") or "").splitlines() if line.strip()]
    own = [index for index, line in enumerate(lines) if line.startswith("File ") and _HOME not in line]
    return f"{place}, {lines[own[-1]]}" if own else place


def _typed(found: Any, meta: Any) -> Any:
    """Give results the dtypes that PyTorch computes with.

    A scalar of jax could make them wider.
    """
    if isinstance(meta, (tuple, list)) and isinstance(found, (tuple, list)):
        return tuple(_typed(each, of) for each, of in zip(found, meta, strict=False))
    if not isinstance(meta, torch.Tensor) or not hasattr(found, "dtype"):
        return found
    dtype = np.dtype(str(meta.dtype).removeprefix("torch."))
    return found if found.dtype == dtype else jnp.asarray(found).astype(dtype)
