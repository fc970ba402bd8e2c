"""PyTorch modules as objectives, against torch.func and curvlinops."""

import contextlib
import copy
import importlib
import sys
import warnings
from unittest import mock

import curvlinops
import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own abbreviation
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hvpd
import hvpd.torch
from hvpd import InvalidArgumentError
from tests.client import test_torch_rules as rules

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def attention_by_formula():
    """PyTorch has no second derivative of its fused attention."""
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        yield


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True, dropout=0.1)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x):
        a = self.norm1(x)
        mask = torch.triu(torch.full((x.shape[1], x.shape[1]), float("-inf"), dtype=x.dtype), 1)
        x = x + self.attention(a, a, a, attn_mask=mask, need_weights=False)[0]
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """A small language model. Embedding and head share their weights."""

    def __init__(self, vocabulary=9, width=8, length=5):
        super().__init__()
        self.positions = nn.Parameter(0.1 * torch.randn(length, width))
        self.tokens = nn.Embedding(vocabulary, width)
        self.blocks = nn.Sequential(Block(width, 2), Block(width, 2))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens):
        x = self.tokens(tokens) + self.positions
        return self.head(self.norm(self.blocks(x))).flatten(0, 1)


def problem(case):
    """Return a module, a loss, inputs and targets."""
    torch.manual_seed(3)
    if case == "mlp":
        module = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
        inputs, targets = torch.randn(20, 4), torch.randint(0, 3, (20,))
    elif case == "cnn":
        features = [nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2)]
        module = nn.Sequential(*features, nn.Flatten(), nn.Dropout(), nn.Linear(12, 3))
        module(torch.randn(30, 2, 4, 4))  # Batch norm learns its statistics.
        # Images of few values have ties in the pools.
        inputs, targets = torch.randint(0, 2, (8, 2, 4, 4)).float(), torch.randint(0, 3, (8,))
    else:
        module = GPT()
        inputs, targets = torch.randint(0, 9, (3, 5)), torch.randint(0, 9, (15,))
    module = module.double().eval()
    return module, nn.CrossEntropyLoss(), inputs if case == "gpt" else inputs.double(), targets


CASES = ("mlp", "cnn", "gpt")


@pytest.fixture(scope="module")
def registered(client):
    made = {}

    def register(case):
        if case not in made:
            module, loss, inputs, targets = problem(case)
            made[case] = hvpd.torch.register(client, module, loss, inputs, targets, name=f"torch/{case}")
        return made[case], *problem(case)

    return register


def close(found, expected):
    return torch.as_tensor(found - expected).abs().max() <= 1e-10 * expected.abs().max()


@pytest.mark.parametrize("case", CASES)
def test_value_gradient_and_product_are_those_of_torch_func(registered, case):
    objective, module, loss, inputs, targets = registered(case)
    parameters = {name: value.detach() for name, value in module.named_parameters()}

    def value(parameters):
        return loss(torch.func.functional_call(module, parameters, (inputs,), tie_weights=True), targets)

    v = {name: torch.randn_like(each) for name, each in parameters.items()}
    gradient, product = torch.func.jvp(torch.func.grad(value), (parameters,), (v,))

    point = objective.at(module)
    assert objective.n == sum(each.numel() for each in parameters.values())
    assert abs(point.value - value(parameters).item()) < 1e-12
    flat = torch.cat([each.reshape(-1) for each in v.values()])
    assert close(torch.from_numpy(point.gradient.copy()), torch.cat([each.reshape(-1) for each in gradient.values()]))
    found = torch.from_numpy(point.hessian() @ flat.numpy())
    assert close(found, torch.cat([each.reshape(-1) for each in product.values()]))


# curvlinops' Hessian of the language model is no truth: its block products of layer
# norm's weights differ from PyTorch's own products and from finite differences.
@pytest.mark.parametrize(
    ("case", "kind"), [("mlp", "hessian"), ("mlp", "ggn"), ("cnn", "hessian"), ("cnn", "ggn"), ("gpt", "ggn")]
)
def test_operators_are_those_of_curvlinops(registered, case, kind):
    objective, module, loss, inputs, targets = registered(case)
    made = {"hessian": curvlinops.HessianLinearOperator, "ggn": curvlinops.GGNLinearOperator}[kind]
    theirs = made(module, loss, list(module.parameters()), [(inputs, targets)], check_deterministic=False)
    ours = hvpd.torch.LinearOperator(getattr(objective.at(module), kind)())
    V = torch.randn(objective.n, 3, dtype=torch.float64)
    assert ours.shape == theirs.shape
    block = theirs @ V
    assert close(ours @ V, block)
    # Lists have a tensor for each parameter, in the module's order.
    v = [torch.randn_like(each) for each in module.parameters()]
    products = theirs @ v
    largest = max(each.abs().max() for each in products)
    for found, expected in zip(ours @ v, products, strict=True):
        assert found.shape == expected.shape
        assert (found - expected).abs().max() <= 1e-10 * largest
    # The Fisher matrix of a cross entropy is the Gauss-Newton matrix.
    if kind == "ggn":
        fisher = hvpd.torch.LinearOperator(objective.at(module).fisher())
        assert close(fisher @ V, block)


def test_the_order_of_x_is_the_order_of_the_modules_parameters(registered):
    objective, module, *_ = registered("gpt")
    names = [name for name, _ in module.named_parameters()]
    assert names != sorted(names)
    assert [leaf.name for leaf in objective.leaves] == names
    flat = nn.utils.parameters_to_vector(module.parameters()).detach().numpy()
    assert np.array_equal(objective.at(module).x, flat)
    assert objective.at(flat).value == objective.at(module).value


def test_a_point_of_a_module_has_its_buffers(registered):
    objective, module, loss, inputs, targets = registered("cnn")
    before = objective.at(module)
    changed = copy.deepcopy(module)
    changed[1].running_mean += 0.5
    after = objective.at(changed)
    assert abs(after.value - loss(changed(inputs), targets).item()) < 1e-12
    assert after.value != before.value
    assert objective.at(module).value == before.value


def test_a_teammate_takes_another_batch_and_gets_names(client, registered):
    _, module, loss, inputs, targets = registered("cnn")
    objective = client.objective("torch/cnn")
    other = inputs.flip(0) + 1
    assert abs(objective.at(module, other, targets).value - loss(module(other), targets).item()) < 1e-12
    found = objective.unravel(objective.at(module).x)
    assert list(found) == [name for name, _ in module.named_parameters()]
    with pytest.raises(
        InvalidArgumentError, match=r"needs the tensors 0\.weight.*, which the module Linear does not have"
    ):
        objective.at(nn.Linear(2, 2))


def test_a_vector_becomes_a_state_dict(registered):
    objective, module, _, inputs, _ = registered("cnn")
    fresh = problem("cnn")[0]
    for parameter in fresh.parameters():
        nn.init.zeros_(parameter)
    fresh.load_state_dict(objective.unravel(objective.at(module).x), strict=False)
    assert torch.equal(fresh(inputs), module(inputs))
    assert all(each.dtype == torch.float64 for each in objective.unravel(np.zeros(objective.n)).values())


def test_labels_that_are_no_classes_are_refused_or_have_no_value(client, registered):
    objective, module, _, inputs, targets = registered("mlp")
    for wrong in (3, -1):
        other = targets.clone()
        other[0] = wrong
        with pytest.raises(InvalidArgumentError, match=f"the label {wrong}, and the module has 3 classes"):
            objective.at(module, inputs, other)
        point = client.objective("torch/mlp").at(module, inputs, other)
        assert "value" in point.nonfinite
        assert "gradient" in point.nonfinite
        assert np.isnan(point.hessian() @ np.ones(objective.n)).any()


def test_indices_out_of_range_are_refused_or_make_results_nan(client):
    module = torch.nn.Embedding(20, 4).double()
    words = torch.tensor([0, 5, 19])
    objective = hvpd.torch.register(client, module, lambda z: z.square().sum(), words, name="torch/words")
    for wrong in (20, -1):
        other = torch.tensor([0, 5, wrong])
        with pytest.raises(InvalidArgumentError, match=f"the index {wrong}, .* pass indices from 0 to 19"):
            objective.at(module, other)
        point = client.objective("torch/words").at(module, other)
        assert "value" in point.nonfinite
        assert "gradient" in point.nonfinite
        assert np.isnan(point.hessian() @ np.ones(objective.n)).any()


def test_a_batch_of_another_size_needs_another_registration(registered):
    objective, module, _, inputs, targets = registered("mlp")
    with pytest.raises(InvalidArgumentError, match="are fixed; register it again for a batch of another size"):
        objective.at(module, inputs[:5], targets[:5])


def test_a_module_and_lists_of_tensors_get_a_hint(client, registered):
    objective, module, *_ = registered("mlp")
    with pytest.raises(InvalidArgumentError, match=r"PyTorch module Sequential: call hvpd\.torch\.register"):
        client.register(module, torch.zeros(3))
    for parameters in (list(module.parameters()), module.parameters()):
        with pytest.raises(InvalidArgumentError, match=r"x is a (list|generator), .* pass the module, a state dict"):
            objective.at(parameters)
    with pytest.raises(InvalidArgumentError, match=r"got a list of 6 arrays: join them.*parameters_to_vector"):
        objective.at(module).hessian() @ [each.detach() for each in module.parameters()]


def test_frozen_parameters_are_data(client):
    module, loss, inputs, targets = problem("mlp")
    module[0].requires_grad_(False)
    objective = hvpd.torch.register(client, module, loss, inputs, targets)
    free = [parameter for parameter in module.parameters() if parameter.requires_grad]
    assert [leaf.name for leaf in objective.leaves] == ["2.weight", "2.bias", "4.weight", "4.bias"]
    theirs = curvlinops.HessianLinearOperator(module, loss, free, [(inputs, targets)])
    v = torch.randn(objective.n, dtype=torch.float64)
    assert close(hvpd.torch.LinearOperator(objective.at(module).hessian()) @ v, theirs @ v)
    with torch.no_grad():
        module[0].weight.mul_(2)
    assert close(hvpd.torch.LinearOperator(objective.at(module).hessian()) @ v, theirs @ v)


def test_float32_stays_float32_with_integers_of_64_bits(client):
    module, loss, inputs, targets = problem("mlp")
    module, inputs = module.float(), inputs.float()
    objective = hvpd.torch.register(client, module, loss, inputs, targets)
    assert objective.dtype == np.float32
    H = hvpd.torch.LinearOperator(objective.at(module).hessian())
    theirs = curvlinops.HessianLinearOperator(module, loss, list(module.parameters()), [(inputs, targets)])
    v = torch.randn(objective.n)
    assert (H @ v).dtype == torch.float32
    with pytest.raises(
        InvalidArgumentError, match=r"the parameter '0\.weight' is float64, and .* is float32: pass it in"
    ):
        objective.at(copy.deepcopy(module).double())
    wide = {name: each.detach().double() for name, each in module.named_parameters()}
    with pytest.raises(InvalidArgumentError, match=r"x\.0\.weight is float64, and .* is float32"):
        objective.at(wide)
    assert objective.at(torch.nn.utils.parameters_to_vector(wide.values())).value == objective.at(module).value
    assert (H @ v - theirs @ v).abs().max() < 1e-5 * (theirs @ v).abs().max()


def test_products_of_tensors_are_tensors(registered):
    objective, module, *_ = registered("mlp")
    H = objective.at(module).hessian()
    V = torch.randn(objective.n, 2, dtype=torch.float64)
    found = H @ V
    assert (type(found), found.dtype, found.device) == (torch.Tensor, torch.float64, V.device)
    assert torch.equal(found, hvpd.torch.LinearOperator(H) @ V)
    assert (H @ V.float()).dtype == torch.float32
    assert all(isinstance(each, torch.Tensor) for each in objective.unravel(V[:, 0]).values())


def test_dense_layers_have_kfac(registered):
    objective, module, *_ = registered("mlp")
    assert [layer.kernel for layer in objective.dense_layers()] == ["0.weight", "2.weight", "4.weight"]
    assert objective.at(module).kfac(1e-3).shape == (objective.n, objective.n)


def test_a_principal_block_has_the_parameters_of_its_leaves(registered):
    objective, module, *_ = registered("mlp")
    H = objective.at(module).hessian()
    block = hvpd.torch.LinearOperator(H.block("2.weight", "2.bias"))
    v = [torch.randn(5, 6, dtype=torch.float64), torch.randn(5, dtype=torch.float64)]
    flat = np.concatenate([each.reshape(-1).numpy() for each in v])
    expected = H.block("2.weight", "2.bias") @ flat
    assert np.array_equal(torch.cat([each.reshape(-1) for each in block @ v]).numpy(), expected)


THROUGH = {
    "kinks": "relu leaky_relu elu gelu softplus hardswish hardtanh logsigmoid clamp abs smooth_l1 cross_entropy softmax detach no_grad",
    "ties": "max_pool2d amax largest maximum sort",
}
"""Functions of the client's tests of rules that also go through the server."""


@pytest.mark.parametrize("group", THROUGH)
def test_the_server_keeps_the_derivatives_at_kinks(client, group):
    functions = [rules.FUNCTIONS[group][name] for name in THROUGH[group].split()]
    x = torch.tensor([rules.POINTS[group]] * len(functions), dtype=torch.float64)
    module = rules.Group(functions, x.clone())
    torch.manual_seed(5)
    w, v = torch.randn(module().numel(), dtype=torch.float64), torch.randn_like(x)
    objective = hvpd.torch.register(client, module, rules.loss, (), w)
    (gradient,) = torch.autograd.grad(rules.loss(module(), w), module.x, create_graph=True)
    (product,) = torch.autograd.grad(gradient, module.x, v)
    point = objective.at(module)
    rows = {
        "gradient": (torch.from_numpy(point.gradient.copy()), gradient.detach()),
        "product": (point.hessian() @ v.reshape(-1), product),
    }
    for name, (found, expected) in rows.items():
        error = (found.reshape(x.shape) - expected).abs().amax(1)
        wrong = [each for each, size in zip(THROUGH[group].split(), error, strict=True) if not size <= 1e-10]
        assert wrong == [], name


# Libraries of curvature


@pytest.fixture(scope="module")
def operators(registered):
    """Return an operator and curvlinops' own at the same point."""
    objective, module, loss, inputs, targets = registered("mlp")
    theirs = curvlinops.GGNLinearOperator(module, loss, list(module.parameters()), [(inputs, targets)])
    return hvpd.torch.LinearOperator(objective.at(module).ggn()), theirs


def twice(operators, estimate):
    """Return an estimate for both operators, with the same random numbers."""
    for operator in operators:
        torch.manual_seed(1)
        np.random.seed(1)  # noqa: NPY002 - curvlinops draws from it
        yield estimate(operator)


def test_curvlinops_trace_and_diagonal(operators):
    ours, theirs = twice(operators, lambda A: curvlinops.hutchinson_trace(A, num_matvecs=20))
    assert close(ours, theirs)
    ours, theirs = twice(operators, lambda A: curvlinops.hutchinson_diag(A, num_matvecs=20))
    assert close(ours, theirs)
    ours, theirs = twice(operators, lambda A: curvlinops.hutchinson_squared_fro(A, num_matvecs=20))
    assert close(ours, theirs)


def test_curvlinops_spectral_density(operators):
    def density(A):
        return curvlinops.lanczos_approximate_spectrum(A, 10, num_points=64, boundaries=(-0.1, 2.0))[1]

    ours, theirs = twice(operators, density)
    assert theirs.max() > 0
    assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max()


def test_curvlinops_inverses(registered, operators):
    objective, module, *_ = registered("mlp")
    n = objective.n
    damped = hvpd.torch.LinearOperator(objective.at(module).ggn(shift=0.1))
    b = torch.ones(n, dtype=torch.float64)
    expected = torch.linalg.solve(operators[1] @ torch.eye(n, dtype=b.dtype) + 0.1 * torch.eye(n, dtype=b.dtype), b)
    by_cg = curvlinops.CGInverseLinearOperator(damped, max_iter=500, max_tridiag_iter=0, tolerance=1e-4)
    assert (by_cg @ b - expected).abs().max() <= 1e-3 * expected.abs().max()
    by_series = curvlinops.NeumannInverseLinearOperator(damped, num_terms=300, scale=0.5)
    assert (by_series @ b - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_laplace_torch_gets_the_same_posterior(client, monkeypatch):
    # laplace-torch imports torchvision and needs nothing of it here. A mock takes its
    # place, because torchvision's usual build does not fit torch's build for CPUs.
    for name in ("torchvision", "torchvision.models", "torchvision.transforms"):
        monkeypatch.setitem(sys.modules, name, mock.MagicMock())
    laplace = importlib.import_module("laplace")
    CurvlinopsGGN = importlib.import_module("laplace.curvature.curvlinops").CurvlinopsGGN
    module, _, inputs, targets = problem("mlp")
    objective = hvpd.torch.register(client, module, nn.CrossEntropyLoss(reduction="sum"), inputs, targets)

    class Served(CurvlinopsGGN):
        @property
        def _linop_context(self):
            def operator(model, loss, parameters, data, **_):
                return hvpd.torch.LinearOperator(objective.at(model, *data[0]).ggn())

            return operator

    batches = DataLoader(TensorDataset(inputs, targets), batch_size=len(inputs))
    fits = []
    with warnings.catch_warnings(), default_dtype(torch.float64):
        warnings.simplefilter("ignore")  # laplace's and curvlinops' own
        for backend in (Served, CurvlinopsGGN):
            fits.append(laplace.FullLaplace(module, "classification", backend=backend))
            fits[-1].fit(batches)
    ours, theirs = (each.posterior_precision for each in fits)
    assert close(ours, theirs)


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
