"""What `hvpd.torch.register` refuses before anything is sent, and what an import of it
leaves unchanged.
"""

import os
import subprocess
import sys
import warnings

import jax
import pytest
import torch
from torch import nn

import hvpd.aio
import hvpd.torch
from hvpd import InvalidArgumentError, MissingExtraError, _modules
from hvpd._registration import torch_program
from hvpd._torch.checks import check, distribution_of, index_check, label_check, reduction_of

pytestmark = pytest.mark.slow

X = torch.zeros(4, 3)
Y = torch.zeros(4, 2)


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.outer = nn.Sequential(nn.Linear(3, 3), Choice())

    def forward(self, x):
        return self.outer(x)


class Choice(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Leaving(nn.Module):
    def __init__(self, leave):
        super().__init__()
        self.leave = leave

    def forward(self, x):
        return x * self.leave(x)


class Airy(nn.Module):
    def forward(self, x):
        return torch.special.airy_ai(x)


def convert(module, x=X, loss=nn.functional.mse_loss, targets=(Y,)):
    return torch_program.convert(module, loss, (x,), targets)


def test_a_branch_on_values_is_named_with_module_and_line():
    with pytest.raises(InvalidArgumentError) as caught:
        convert(Branching())
    text = str(caught.value)
    assert "depends on the values of tensors, in the module 'outer.1' (Choice)" in text
    assert "test_torch.py" in text
    assert "torch.where" in text


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (
            nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)),
            r"changes its buffers \(1\.num_batches_tracked.*module\.eval\(\)",
        ),
        (
            nn.Sequential(nn.Linear(3, 2), nn.Dropout()),
            r"draws random numbers, in the module '1' \(Dropout\).*module\.eval\(\)",
        ),
        (
            nn.Sequential(nn.Linear(3, 2), nn.Sequential(Airy())),
            r"special_airy_ai\.default has no jax form in torchax, in the module '1\.0' \(Airy\), File .*test_torch\.py",
        ),
    ],
)
def test_an_operation_that_cannot_be_converted_is_named_with_its_module(module, words):
    converted = None
    with pytest.raises(InvalidArgumentError, match=words):
        converted = convert(module)
        with torch_program.wide():
            converted.model(converted.x, *converted.data[:2])


@pytest.mark.parametrize(
    ("leave", "words"),
    [
        (
            lambda x: x.sum().item(),
            r"read from a tensor \(\.item\(\), .*in the module '1' \(Leaving\), File .*test_torch\.py",
        ),
        (
            lambda x: torch.as_tensor(x.detach().numpy()),
            r"in the module '1' \(Leaving\).*leaves PyTorch by \.numpy\(\)",
        ),
    ],
)
def test_a_module_that_leaves_pytorch_is_named(leave, words):
    with pytest.raises(InvalidArgumentError, match=words):
        _run(convert(nn.Sequential(nn.Linear(3, 2), Leaving(leave))))


def _run(converted):
    with torch_program.wide():
        converted.model(converted.x, *converted.data[:2])


def test_a_boolean_mask_is_named_with_its_remedy():
    converted = convert(nn.Sequential(nn.Linear(3, 2), Leaving(lambda h: h[h > 0].sum())))
    with torch_program.wide(), pytest.raises(InvalidArgumentError, match=r"a boolean mask makes .*: use torch\.where"):
        jax.eval_shape(converted.model, converted.x, *converted.data[:2])


def test_nothing_is_printed_before_the_error(capfd):
    with pytest.raises(InvalidArgumentError, match=r"keep a number in a tensor in place of float\(\)"):
        convert(nn.Sequential(nn.Linear(3, 2), Leaving(lambda h: float(h.sum()))))
    assert capfd.readouterr().err == ""
    assert not hasattr(torch.export._trace, "print")


def test_errors_of_pytorch_for_the_values_have_the_modules_path():
    module, labels = nn.Sequential(nn.Linear(3, 2)), torch.tensor([0, 1, 2, 0])
    with pytest.raises(
        InvalidArgumentError, match=r"in the module 'loss' \(CrossEntropyLoss\).*Target 2 is out of bounds"
    ):
        convert(module, loss=nn.CrossEntropyLoss(), targets=(labels,))
    convert(module, loss=nn.CrossEntropyLoss(ignore_index=2), targets=(labels,))
    with pytest.raises(
        InvalidArgumentError,
        match=r"in the module '0' \(Linear\).* An input is torch\.float32, and the parameters are torch\.float64: pass the "
        r"input's \.to\(torch\.float64\)",
    ):
        convert(module.double())


def test_labels_outside_of_the_classes_have_no_value():
    module, loss = nn.Linear(3, 2).double(), nn.CrossEntropyLoss()
    labels = torch.tensor([0, 1, 1, 0])
    converted = convert(module, X.double() + 1, loss, (labels,))
    for wrong, expected in ((-100, None), (2, float("nan")), (-1, float("nan")), (1, None)):
        other = labels.clone()
        other[0] = wrong
        with torch_program.wide():
            found = float(converted.loss(converted.model(converted.x, *converted.data[:2]), other.numpy()))
        truth = loss(module(X.double() + 1), other).item() if expected is None else expected
        assert found == pytest.approx(truth, rel=1e-12, nan_ok=True)


def test_labels_are_checked_for_losses_of_classes_only():
    labels = torch.tensor([[0, 5], [2, -100]])
    check_labels = label_check(nn.CrossEntropyLoss(), (2, 3, 2), 1)
    check_labels(("buffers", torch.tensor([[0, 1], [2, -100]])))
    with pytest.raises(
        InvalidArgumentError, match="hold the label 5, and the module has 3 classes: pass labels from 0 to 2, or -100"
    ):
        check_labels(("buffers", labels))
    with pytest.raises(InvalidArgumentError, match=r"the label -100.* or 5 "):
        label_check(nn.NLLLoss(ignore_index=5), (2, 3, 2), 1)(("buffers", labels))
    label_check(nn.functional.cross_entropy, (3,), 0)((torch.tensor([0.5, 0.25, 0.25]),))
    assert label_check(nn.MSELoss(), (2, 3), 0) is None
    assert label_check(nn.CrossEntropyLoss(), (), 0) is None


def test_inputs_that_are_indices_are_checked():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.rows = nn.Embedding(20, 4)

        def forward(self, words, columns, floats):
            return self.rows(words.reshape(-1).to(torch.int64))[:, columns] + floats

    words, columns, floats = torch.tensor([[3, 19]], dtype=torch.int32), torch.tensor([0, -4]), torch.zeros(2)
    converted = torch_program.convert(Words(), lambda z: z.sum(), (words, columns, floats), ())
    check_indices = index_check(converted.program)
    check_indices((words, columns.numpy(), floats + 30))
    check_indices((words,))  # The number of inputs is another check.
    with pytest.raises(
        InvalidArgumentError, match=r"the index 20, .* reads 20 elements with it: pass indices from 0 to 19"
    ):
        check_indices((words + 1, columns, floats))
    with pytest.raises(InvalidArgumentError, match=r"the index -5, .* from -4 to 3"):
        check_indices((words, columns - 1, floats))


def test_entries_of_dicts_are_found_by_their_keys():
    class Entries(nn.Module):
        def __init__(self):
            super().__init__()
            self.line = nn.Linear(3, 3)

        def forward(self, given):
            return {"q": self.line(given["z"]), "b": given["a"]}

    module, given = Entries(), {"z": torch.ones(4, 3), "a": torch.full((4, 3), 2.0)}
    loss = lambda found: found["q"].square().sum() + found["b"].sum()  # noqa: E731 - a loss in one line
    converted = torch_program.convert(module, loss, (given,), ())
    with torch_program.wide():
        found = jax.jit(lambda x, *data: converted.loss(jax.jit(converted.model)(x, *data)))(
            converted.x, *converted.data
        )
    assert float(found) == pytest.approx(loss(module(given)).item(), rel=1e-6)


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (nn.MSELoss(reduction="none"), r"got float32\[4, 2\]: use reduction='mean' or 'sum', or \.mean\(\)"),
        (lambda z, y: (z, y), "must return a scalar tensor, got a tuple"),
    ],
)
def test_a_loss_that_returns_no_scalar_is_refused(loss, words):
    with pytest.raises(InvalidArgumentError, match=words):
        convert(nn.Linear(3, 2), loss=loss)


def test_arguments_of_other_kinds_are_refused():
    assert "got None" in refused(nn.Linear(3, 2), loss=None)
    assert "inputs[0] is a numpy.ndarray" in refused(nn.Linear(3, 2), (X.numpy(),))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y))
    assert "inputs[0] is a DataLoader: pass the tensors of one batch" in refused(nn.Linear(3, 2), (loader,))
    assert "pass torch.as_tensor(" in refused(nn.Linear(3, 2), targets=(Y.numpy(),))


@pytest.mark.parametrize(
    "error",
    [
        AttributeError(
            "partially initialized module 'sympy' has no attribute 'S' (most likely due to a circular import)"
        ),
        AttributeError("module 'sympy' has no attribute 'Expr'"),
        ImportError("cannot import name 'Basic' from 'sympy.core' (/somewhere/__init__.py)"),
    ],
)
def test_after_an_interrupted_import_the_module_is_not_blamed(monkeypatch, error):
    def export(*_, **__):
        raise RuntimeError("in the trace") from error

    monkeypatch.setattr(torch.export, "export", export)
    with pytest.raises(hvpd.HvpdError, match="was interrupted: restart Python") as caught:
        convert(nn.Linear(3, 2))
    assert caught.value.reason == "INTERRUPTED_IMPORT"


def test_a_loss_that_branches_is_named_as_the_loss():
    with pytest.raises(InvalidArgumentError, match="the loss takes a branch"):
        convert(nn.Linear(3, 2), loss=lambda z, y: z.sum() if z.sum() > 0 else y.sum())


def refused(module, inputs=(X,), targets=(Y,), loss=nn.functional.mse_loss):
    with pytest.raises(InvalidArgumentError) as caught:
        check(module, loss, inputs, targets)
    return str(caught.value)


def test_wrapped_modules_are_refused_with_the_inner_module_as_the_remedy():
    parallel = nn.DataParallel.__new__(nn.DataParallel)  # Its constructor needs a device that torchax can lack.
    nn.Module.__init__(parallel)
    parallel.module = nn.Linear(3, 2)
    assert refused(parallel) == (
        "module is a DataParallel, which torch.export cannot trace: pass the inner module, its .module"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and torch.compile imports it.
        scripted, compiled = torch.jit.script(nn.Linear(3, 2)), torch.compile(nn.Linear(3, 2))
    assert refused(compiled).endswith("pass the inner module, its ._orig_mod")
    assert refused(scripted).endswith("pass the module that torch.jit scripted or traced")
    for wrapped, inner in ((parallel, "module"), (compiled, "_orig_mod")):
        with pytest.raises(InvalidArgumentError, match=rf"needs the tensors weight, .* its \.{inner}"):
            _modules.tensors(wrapped, ["weight"], "demo")


def test_clients_and_operators_of_asyncio_are_refused():
    client = hvpd.aio.AsyncClient(None, None)
    with pytest.raises(
        InvalidArgumentError, match=r"client is asynchronous \(AsyncClient\): register with hvpd\.connect"
    ):
        hvpd.torch.register(client, nn.Linear(3, 2), nn.MSELoss(), X, Y)
    with pytest.raises(InvalidArgumentError, match=r"client is of another kind \(str\)"):
        hvpd.torch.register("localhost:7070", nn.Linear(3, 2), nn.MSELoss(), X, Y)
    operator = hvpd.aio.AsyncOperator(None, None)
    with pytest.raises(
        InvalidArgumentError, match="got a AsyncOperator, which is asynchronous: make the operator with"
    ):
        hvpd.torch.LinearOperator(operator)


def test_float16_parameters_are_refused_with_the_remedy():
    assert refused(nn.Linear(3, 2).half()) == (
        "the parameter 'weight' is float16, and curvature needs float32 or float64: call module.float() or module.double() first, "
        "and convert the inputs as well"
    )
    assert "inputs[0] is bfloat16" in refused(nn.Linear(3, 2), (X.bfloat16(),))


def test_several_devices_are_named():
    text = refused(nn.Linear(3, 2), (X,), (Y.to("meta"),))
    assert text.startswith("the parameter 'weight' is on cpu, and targets[0] is on meta: move")
    assert "has no values" in refused(nn.Linear(3, 2, device="meta"), (X.to("meta"),))


def test_a_module_without_parameters_is_refused():
    assert "got a function" in refused(convert)
    assert "no parameter that requires a gradient" in refused(nn.Linear(3, 2).requires_grad_(False))


def test_a_cross_entropy_of_rows_is_categorical():
    assert distribution_of(nn.CrossEntropyLoss(), (4, 3)) == "categorical"
    assert distribution_of(nn.functional.cross_entropy, (4, 3)) == "categorical"
    assert distribution_of(nn.CrossEntropyLoss(), (4, 3, 5)) is None
    assert distribution_of(nn.CrossEntropyLoss(label_smoothing=0.1), (4, 3)) is None
    assert distribution_of(nn.CrossEntropyLoss(weight=torch.ones(3)), (4, 3)) is None
    assert distribution_of(nn.MSELoss(), (4, 3)) is None
    assert (reduction_of(nn.MSELoss(reduction="sum")), reduction_of(nn.MSELoss())) == ("sum", "mean")


def test_parameters_keep_the_modules_order_and_tied_ones_count_once():
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2))
    module[1].weight = module[0].weight
    module[2].bias.requires_grad_(False)
    converted = convert(module)
    assert list(converted.x) == ["0.weight", "0.bias", "1.bias", "2.weight"]
    assert list(converted.data[0]) == ["2.bias"]


def test_a_conversion_leaves_the_module_and_the_settings_of_torch_unchanged():
    fast = torch.backends.mha.get_fastpath_enabled()
    module = nn.Sequential(nn.Linear(3, 2), nn.Tanh())
    convert(module)
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert "ENABLE_RUNTIME_UPTIME_TELEMETRY" not in os.environ
    assert all(not each._forward_hooks and not each._forward_pre_hooks for each in module.modules())
    with pytest.raises(AttributeError, match="no overload name 'names_dim'"):
        torch.ops.aten.std.names_dim  # noqa: B018 - the attribute is the test


def test_hvpd_alone_imports_no_torch():
    code = "import sys, hvpd; assert 'torch' not in sys.modules; hvpd.torch.register; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_without_curvlinops_the_operator_names_the_package_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "hvpd._torch.operator", None)
    with pytest.raises(MissingExtraError, match="pip install curvlinops-for-pytorch"):
        hvpd.torch.LinearOperator  # noqa: B018 - the attribute is the test
    with pytest.raises(AttributeError, match="no attribute 'linear_operator'"):
        hvpd.torch.linear_operator  # noqa: B018 - the attribute is the test
