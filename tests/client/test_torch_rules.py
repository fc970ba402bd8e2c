"""Functions of PyTorch, converted to jax, against PyTorch itself.

Values, gradients and products with the Hessian, also at kinks and at ties. All
functions of a group are one module, which is converted once.
"""

import functools

import jax
import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own abbreviation

from hvpd._registration import torch_program

pytestmark = pytest.mark.slow

N = 12
POINTS = {
    "kinks": [-3.0, -1.0, -0.5, 0.0, 0.0, 0.5, 1.0, 3.0, 6.0, 21.0, -20.0, 1.5],
    "ties": [1.0, 1.0, 2.0, 2.0, 0.0, 0.0, 1.0, 3.0, 3.0, 3.0, 0.0, -1.0],
}

ZEROS = torch.zeros(N, dtype=torch.float64)
LABELS = torch.tensor([0, 1, 3])
WEIGHTS = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
EYE = torch.eye(3, dtype=torch.float64)


def rows(x):
    return x.reshape(3, 4)


def image(x):
    return x.reshape(1, 1, 3, 4)


def without_grad(x):
    with torch.no_grad():
        y = x * x
        y = y.sin()
    return y * x


# hardsigmoid, cdist and the multi-margin loss are left out: PyTorch has no second
# derivative of them. A norm of zero has a test of its own, because PyTorch's second
# derivative is NaN there. prelu has another slope at 0 in its second derivative than in
# its first.
FUNCTIONS = {
    "kinks": {
        "relu": F.relu,
        "relu6": F.relu6,
        "leaky_relu": functools.partial(F.leaky_relu, negative_slope=0.1),
        "elu": functools.partial(F.elu, alpha=0.7),
        "celu": functools.partial(F.celu, alpha=2.0),
        "selu": F.selu,
        "gelu": F.gelu,
        "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
        "silu": F.silu,
        "mish": F.mish,
        "softplus": F.softplus,
        "softsign": F.softsign,
        "hardtanh": F.hardtanh,
        "hardswish": F.hardswish,
        "logsigmoid": F.logsigmoid,
        "threshold": lambda x: F.threshold(x, 0.0, 0.0),
        "softshrink": F.softshrink,
        "hardshrink": F.hardshrink,
        "clamp": lambda x: x.clamp(-1, 1),
        "clamp_min": lambda x: x.clamp(min=0),
        "clamp_max": lambda x: x.clamp(max=1),
        "clamp by tensors": lambda x: torch.clamp(x, ZEROS - 1, ZEROS + 1),
        "abs": torch.abs,
        "sign": lambda x: x * torch.sign(x),
        "max": lambda x: x.max(),
        "minimum": lambda x: torch.minimum(x, ZEROS),
        "norm": torch.norm,
        "norm 1": lambda x: x.norm(1),
        "norm 3": lambda x: x.norm(3),
        "normalize": lambda x: F.normalize(rows(x)),
        "cosine_similarity": lambda x: F.cosine_similarity(rows(x), rows(x).flip(0) + 0.1),
        "pairwise_distance": lambda x: F.pairwise_distance(rows(x), rows(ZEROS)),
        "std": lambda x: rows(x).std(1),
        "square": lambda x: x**2,
        "cube": lambda x: x**3.0,
        "power 0": lambda x: x**0,
        "power of numbers": lambda x: 2.0 ** (x / 10),
        "power of tensors": lambda x: (x.abs() + 1) ** x.tanh(),
        "median": lambda x: x.median(),
        "prod": lambda x: rows(x).prod(1),
        "avg_pool2d": lambda x: F.avg_pool2d(image(x), 2, 1),
        "softmax": lambda x: F.softmax(rows(x), 1),
        "log_softmax": lambda x: F.log_softmax(rows(x), 1),
        "logsumexp": lambda x: torch.logsumexp(rows(x), 1),
        "logaddexp": lambda x: torch.logaddexp(x, -x),
        "smooth_l1": lambda x: F.smooth_l1_loss(x, ZEROS, reduction="none"),
        "huber": lambda x: F.huber_loss(x, ZEROS, reduction="none"),
        "l1": lambda x: F.l1_loss(x, ZEROS),
        "mse": lambda x: F.mse_loss(x, ZEROS),
        "cross_entropy": lambda x: F.cross_entropy(rows(x), LABELS),
        "cross_entropy sum": lambda x: F.cross_entropy(rows(x), LABELS, reduction="sum"),
        "cross_entropy rows": lambda x: F.cross_entropy(rows(x), LABELS, reduction="none"),
        "cross_entropy smoothed": lambda x: F.cross_entropy(rows(x), LABELS, label_smoothing=0.1),
        "cross_entropy ignored": lambda x: F.cross_entropy(rows(x), torch.tensor([0, -100, 3])),
        "cross_entropy weighted": lambda x: F.cross_entropy(rows(x), LABELS, weight=WEIGHTS),
        "binary cross entropy": lambda x: F.binary_cross_entropy_with_logits(x, ZEROS + 0.3),
        "binary cross entropy sum": lambda x: F.binary_cross_entropy_with_logits(x, ZEROS + 0.3, reduction="sum"),
        "mse sum": lambda x: F.mse_loss(x, ZEROS + 1, reduction="sum"),
        "nearest": lambda x: F.interpolate(image(x), scale_factor=2),
        "kl_div": lambda x: F.kl_div(F.log_softmax(x, 0), F.softmax(ZEROS, 0), reduction="sum"),
        "layer_norm": lambda x: F.layer_norm(rows(x), (4,)),
        "group_norm": lambda x: F.group_norm(x.reshape(1, 4, 3), 2),
        "instance_norm": lambda x: F.instance_norm(x.reshape(1, 2, 6)),
        "rms_norm": lambda x: F.rms_norm(rows(x), (4,)),
        "embedding": lambda x: F.embedding(torch.tensor([0, 1, 1, 2]), rows(x), padding_idx=1),
        "attention": lambda x: F.scaled_dot_product_attention(*[x.reshape(1, 3, 4) / 9] * 3, is_causal=True),
        "detach": lambda x: x.detach() * x,
        "no_grad": without_grad,
        "where": lambda x: torch.where(x > 0, x, 0.1 * x),
        "interpolate": lambda x: F.interpolate(image(x), scale_factor=2, mode="bilinear"),
        "pad": lambda x: F.pad(x.reshape(1, 3, 4), (1, 1), mode="reflect"),
        "glu": lambda x: F.glu(rows(x)),
        "conv1d": lambda x: F.conv1d(x.reshape(1, 1, N), x[:3].reshape(1, 1, 3)),
        "solve": lambda x: torch.linalg.solve(x[:9].reshape(3, 3) + 9 * EYE, x[:3]),
        "logdet": lambda x: torch.linalg.slogdet(x[:9].reshape(3, 3) + 9 * EYE)[1],
        "scatter_add": lambda x: torch.zeros(3, dtype=x.dtype).scatter_add(0, torch.arange(N) % 3, x),
    },
    "ties": {
        "max along": lambda x: rows(x).max(1)[0],
        "min along": lambda x: rows(x).min(1).values,
        "amax": lambda x: rows(x).amax(1),
        "amin": lambda x: rows(x).amin(0),
        "maximum": lambda x: torch.maximum(x, x.flip(0) * 1.0),
        "norm along": lambda x: x.reshape(6, 2)[torch.tensor([0, 1, 3, 4, 5])].norm(dim=1),
        "largest": lambda x: x.norm(float("inf")),
        "sort": lambda x: x.sort().values * torch.arange(N),
        "max_pool1d": lambda x: F.max_pool1d(x.reshape(1, 1, N), 2),
        "max_pool2d": lambda x: F.max_pool2d(image(x), 2, 1),
        "max_pool2d padded": lambda x: F.max_pool2d(image(x), 2, 2, 1),
    },
}


class Group(torch.nn.Module):
    """Functions, each of a row of x."""

    def __init__(self, functions, x):
        super().__init__()
        self.x = torch.nn.Parameter(x)
        self.functions = functions

    def forward(self):
        return torch.cat([function(x).reshape(-1) for function, x in zip(self.functions, self.x, strict=True)])


def loss(z, w):
    return (w * z + 0.01 * (w * z) ** 2).sum()


@functools.cache
def found(group):
    """Return for each function its value, gradient and product, of jax and of torch."""
    functions = FUNCTIONS[group]
    x = torch.tensor([POINTS[group]] * len(functions), dtype=torch.float64)
    sizes = [function(row).numel() for function, row in zip(functions.values(), x, strict=True)]
    rng = np.random.default_rng(0)
    w, v = torch.tensor(rng.normal(size=sum(sizes))), torch.tensor(rng.normal(size=x.shape))
    converted = torch_program.convert(Group(list(functions.values()), x.clone()), loss, (), (w,))
    with torch_program.wide():

        def model(x):
            return converted.model(torch_program.Parameters(x=x), converted.data[0])

        def both(x, v):
            gradient, product = jax.jvp(jax.grad(lambda x: converted.loss(model(x), w.numpy())), (x,), (v,))
            return model(x), gradient, product

        fast = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
        z, gradients, products = jax.jit(both, compiler_options=fast)(x.numpy(), v.numpy())
    result, start = {}, 0
    for index, (name, function) in enumerate(functions.items()):
        span = slice(start, start + sizes[index])
        start = span.stop
        point = x[index].clone().requires_grad_()
        values = function(point).reshape(-1)
        (gradient,) = torch.autograd.grad(loss(values, w[span]), point, create_graph=True)
        product = None
        if gradient.requires_grad:
            (product,) = torch.autograd.grad(gradient, point, v[index], allow_unused=True)
        theirs = [values.detach(), gradient.detach(), torch.zeros(N) if product is None else product]
        result[name] = [z[span], gradients[index], products[index]], theirs
    return result


@pytest.mark.parametrize(("group", "name"), [(group, name) for group in FUNCTIONS for name in FUNCTIONS[group]])
def test_the_derivatives_are_those_of_torch(group, name):
    ours, theirs = found(group)[name]
    for each, tensor in zip(ours, theirs, strict=True):
        expected = tensor.numpy()
        assert np.abs(np.asarray(each) - expected).max() <= 1e-10 * max(1.0, np.abs(expected).max())


def test_a_norm_of_zero_has_no_slope():
    for function in (torch.norm, lambda x: (1 + x).std()):
        converted = torch_program.convert(
            Group([function], torch.zeros(1, N).double()), loss, (), (torch.ones(1).double(),)
        )
        with torch_program.wide():

            def value(x, converted=converted):
                return converted.loss(converted.model(torch_program.Parameters(x=x), converted.data[0]), np.ones(1))

            assert np.array_equal(jax.grad(value)(np.zeros((1, N))), np.zeros((1, N)))
        point = torch.zeros(N, dtype=torch.float64, requires_grad=True)
        function(point).backward()
        assert torch.equal(point.grad, torch.zeros(N).double())


# An index in range is one of 0, 3 and 4. Each case has indices out of range.
INDEXED = {
    "embedding": (lambda w, i: F.embedding(i, w), (5, -1, 35, -25)),
    "first axis": (lambda w, i: w[i], (5, -6)),
    "last axis": (lambda w, i: w[:, i], (5, -6)),
    "two axes": (lambda w, i: w.reshape(5, 1, 5)[i[:, None], :, i], (5, -6)),
    "table": (lambda w, i: w[torch.arange(5)[i]], (5, -6)),
    "take": (lambda w, i: w.take(5 * i), (5, -6)),
    "index_select": (lambda w, i: w.index_select(1, i), (5, -1)),
    "gather": (lambda w, i: w.gather(0, i[:, None]), (5, -1)),
    "index_put": (lambda w, i: (0 * w).index_put((i,), w[:3]), (5, -6)),
    "index_add": (lambda w, i: (0 * w).index_add(0, i, w[:3]), (5,)),
    "scatter": (lambda w, i: (0 * w).scatter(0, i[:, None].expand(3, 5), w[:3]), (5, -1)),
    "scatter_add": (lambda w, i: (0 * w).scatter_add(0, i[:, None].expand(3, 5), w[:3]), (5, -1)),
    "scatter_reduce": (lambda w, i: (0 * w).scatter_reduce(0, i[:, None].expand(3, 5), w[:3], "sum"), (5, -1)),
    "cross entropy": (lambda w, i: F.cross_entropy(w[:3], i), (5, -1)),
    "nll of each row": (lambda w, i: F.nll_loss(w[:3].log_softmax(1), i, reduction="none"), (5, -1)),
}


class Indexed(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.w = torch.nn.Parameter(torch.linspace(-1, 2, 25, dtype=torch.float64).reshape(5, 5))
        self.function = function

    def forward(self, indices):
        return self.function(self.w, indices)


@pytest.mark.parametrize("name", INDEXED)
def test_an_index_out_of_range_makes_all_results_nan(name):
    function, outside = INDEXED[name]
    module, right = Indexed(function), torch.tensor([0, 3, 4])
    converted = torch_program.convert(module, lambda z: z.sin().sum(), (right,), ())

    @jax.jit
    def results(x, indices):
        def value(x):
            return converted.loss(converted.model(torch_program.Parameters(w=x), converted.data[0], indices))

        product = jax.jvp(jax.grad(value), (x,), (x + 1,))[1]
        return value(x), jax.grad(value)(x), product

    with torch_program.wide():
        x = converted.x["w"]
        value, gradient, product = results(x, right.numpy())
        expected = module(right).sin().sum()
        (slope,) = torch.autograd.grad(expected, module.w)
        assert float(value) == pytest.approx(expected.item(), rel=1e-12)
        assert np.abs(gradient - slope.numpy()).max() <= 1e-12
        assert np.isfinite(product).all()
        for index in outside:
            found = results(x, np.array([index, 3, 4]))
            assert all(np.isnan(each).any() for each in found), index
