"""A sparse symmetric matrix from products.

A star colouring of the pattern says which columns share a product. One more product
checks the result.

The colouring is our own, because the client has SciPy and no jax. asdex has one, but
needs jax and numba (210 MB). networkx has none.
"""

from typing import Any

import numpy as np
import scipy.sparse

from hvpd._arguments import integer
from hvpd._errors import InvalidArgumentError
from hvpd._operators import blocks
from hvpd._wire import codec


def structure(pattern: Any, n: int) -> scipy.sparse.csr_array:
    """Return the symmetric pattern with its diagonal, as an n by n array of ones.

    Raises:
        InvalidArgumentError: The pattern is no matrix, or has another shape.
    """
    listed = all(hasattr(pattern, name) for name in ("rows", "cols", "shape"))
    if not listed and not scipy.sparse.issparse(pattern):
        pattern = np.asarray(pattern)
    if tuple(pattern.shape) != (n, n):
        raise InvalidArgumentError(
            f"the pattern must have the shape ({n}, {n}) of the operator, got {tuple(pattern.shape)}", reason="SHAPE"
        )
    if listed:
        rows, columns = np.asarray(pattern.rows), np.asarray(pattern.cols)
    elif isinstance(pattern, np.ndarray):
        rows, columns = np.nonzero(pattern)
    else:
        entries = pattern.tocoo()
        rows, columns = entries.row, entries.col
    every = np.arange(n)
    rows, columns = np.concatenate([rows, columns, every]), np.concatenate([columns, rows, every])
    found = scipy.sparse.coo_array((np.ones(len(rows), np.int64), (rows, columns)), shape=(n, n)).tocsr()
    found.data[:] = 1
    return found


def star_colouring(structure: scipy.sparse.csr_array) -> codec.Array:
    """Return a colour 0, 1, ... for each vertex of the graph of a symmetric pattern.

    The colouring is greedy, and takes vertices of high degree first. Neighbours have
    different colours, and each path of four vertices has at least three. So the
    vertices of any two colours form only stars. Each entry of the matrix is in two
    products, and in one of them it is alone in its row (Coleman, Moré 1984).

    The method is that of Gebremedhin, Tarafdar, Manne, Pothen 2007
    (https://doi.org/10.1137/050639879), star by star. Sets hold the colours around a
    vertex, so the time is proportional to entries times colours, even if one row is
    dense.
    """
    n = structure.shape[0]
    starts, columns = structure.indptr.tolist(), structure.indices.tolist()
    colours = [-1] * n
    # For each coloured vertex, by colour of its coloured neighbours: the first of them,
    # and whether there are more.
    around: list[dict[int, tuple[int, bool]]] = [{} for _ in range(n)]
    # Colours of the hubs of larger stars with this vertex as a leaf, because another
    # neighbour of that colour would make a path of four vertices in two colours.
    hubs: list[set[int]] = [set() for _ in range(n)]
    for vertex in np.argsort(-np.diff(structure.indptr), kind="stable").tolist():
        neighbours = [
            other for other in columns[starts[vertex] : starts[vertex + 1]] if other != vertex and colours[other] >= 0
        ]
        mine = around[vertex]
        for other in neighbours:
            colour = colours[other]
            mine[colour] = (mine[colour][0], True) if colour in mine else (other, False)
        forbidden = set(mine)
        for other in neighbours:
            forbidden |= around[other].keys() if mine[colours[other]][1] else hubs[other]
        chosen = next(colour for colour in range(n) if colour not in forbidden)
        colours[vertex] = chosen
        for other in neighbours:
            if mine[colours[other]][1]:
                hubs[other].add(chosen)
            theirs = around[other]
            if chosen in theirs:
                first, _ = theirs[chosen]
                theirs[chosen] = (first, True)
                hubs[first].add(colours[other])
                hubs[vertex].add(colours[other])
            else:
                theirs[chosen] = (vertex, False)
    return np.array(colours)


def recover(
    multiply: blocks.Multiply,
    structure: scipy.sparse.csr_array,
    dtype: np.dtype[Any],
    *,
    max_products: int,
    verify: bool,
    seed: int,
) -> scipy.sparse.csr_array:
    """Return the matrix of a pattern; see `CurvatureOperator.sparse`."""
    seed = integer(seed, "seed", 0)
    n = structure.shape[0]
    colours = star_colouring(structure)
    count = int(colours.max()) + 1
    _check_budget(count, max_products, "this pattern takes as many products as it has colours")
    vectors = np.zeros((count + verify, n), dtype)
    vectors[colours, np.arange(n)] = 1
    if verify:
        vectors[-1] = np.random.default_rng(seed).standard_normal(n)
    found = np.concatenate([blocks.products(multiply, vectors[span]) for span in codec.spans(len(vectors), n, dtype)])

    entries = structure.tocoo()
    rows, columns = entries.row.astype(np.int64), entries.col.astype(np.int64)
    # If an entry is alone in its row with its colour, it is read there, otherwise in
    # the row of its mirror image.
    _, group, sizes = np.unique(rows * count + colours[columns], return_inverse=True, return_counts=True)
    alone = sizes[group] == 1
    values = np.where(alone, found[colours[columns], rows], found[colours[rows], columns])
    lower = rows > columns  # The lower one counts for both, so that the result is symmetric to the bit.
    matrix = scipy.sparse.csr_array((values, (rows, columns)), shape=(n, n))
    mirrored = scipy.sparse.csr_array((values[lower], (columns[lower], rows[lower])), shape=(n, n))
    matrix = scipy.sparse.csr_array(scipy.sparse.tril(matrix) + mirrored)
    if verify:
        _verify(matrix, vectors[-1], found[-1])
    return matrix


def _verify(matrix: scipy.sparse.csr_array, vector: codec.Array, product: codec.Array) -> None:
    """Raise InvalidArgumentError if the matrix and the operator multiply differently.

    A row may err by sqrt(eps) of its sum, because a function's own rounding exceeds
    that of a product. It may also err by 10 eps^(2/3) of the largest row, because
    products can be differences of gradients.
    """
    eps = np.finfo(matrix.dtype).eps
    exact = matrix.astype(np.float64)
    size = abs(exact) @ abs(vector.astype(np.float64))
    difference = abs(exact @ vector.astype(np.float64) - product)
    largest = max(size.max(), abs(product).max())
    wrong = np.flatnonzero(difference > np.sqrt(eps) * size + 10 * eps ** (2 / 3) * largest)
    if wrong.size:
        shown = ", ".join(map(str, wrong[:5])) + (", ..." if wrong.size > 5 else "")
        raise InvalidArgumentError(
            f"the pattern misses entries: the recovered matrix and the operator differ by {difference.max():.3g} on a random "
            f"vector, in {wrong.size} of {len(product)} rows ({shown}). Give a pattern that holds all entries that can be nonzero "
            "at any x, such as asdex.hessian_sparsity(fun, x)",
            reason="SPARSITY_PATTERN",
        )


def detect(multiply: blocks.Multiply, n: int, dtype: np.dtype[Any], *, max_products: int) -> scipy.sparse.csr_array:
    """Return the matrix from n products, with its nonzero elements as the pattern."""
    _check_budget(
        n, max_products, "without a pattern it takes a product for each unit vector to find one: pass a pattern"
    )
    parts = [scipy.sparse.csr_array(rows) for _, rows in blocks.unit_products(multiply, n, dtype)]
    rows = scipy.sparse.vstack(parts, format="csr")
    matrix = scipy.sparse.csr_array((rows + rows.T) * dtype.type(0.5))
    matrix.eliminate_zeros()
    return matrix


def _check_budget(needed: int, max_products: int, why: str) -> None:
    if needed > integer(max_products, "max_products", 1):
        raise InvalidArgumentError(
            f"{needed} products are more than max_products={max_products}: {why}, or raise max_products",
            reason="TOO_MANY_PRODUCTS",
        )
