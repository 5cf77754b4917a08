import jax
import numpy as np
import pytest

from finite_width import relative_errors
from kernels import (
    B_STD,
    TOPOLOGIES,
    W_STD,
    closed_form_kernels,
    empirical_ntk,
    kernel_row_blocks,
    stax_network,
)
from scaling_fit import fitted_order

RNG = np.random.default_rng(0)
X1, X2 = RNG.normal(size=(9, 4)), RNG.normal(size=(5, 4)) * 3
NETWORKS = [("residual", False), ("proposed", False), ("proposed", True), ("chain", False)]


def relative_difference(a, b):
    return np.max(np.abs(np.asarray(a) - np.asarray(b)) / np.abs(np.asarray(b)))


@pytest.mark.parametrize(("topology", "h0_shortcut"), NETWORKS)
def test_the_closed_form_agrees_with_neural_tangents(topology, h0_shortcut):
    kernels = closed_form_kernels(X1, X2, topology, 4, h0_shortcut=h0_shortcut)
    assert list(kernels) == [1, 2, 3, 4]
    for depth in (1, 4):
        _, _, kernel_fn = stax_network(topology, depth, h0_shortcut=h0_shortcut)
        expected = kernel_fn(X1, X2, ("nngp", "ntk"))
        assert kernels[depth].ntk.dtype == np.float64
        assert kernels[depth].ntk.shape == (9, 5)
        assert relative_difference(kernels[depth].nngp, expected.nngp) < 1e-10
        assert relative_difference(kernels[depth].ntk, expected.ntk) < 1e-6


def variances(x, topology, depth, h0_shortcut=False):
    """Compute the output's variance layer by layer. A ReLU's mean square is half of its input's variance."""

    def after_relu(v):
        return W_STD**2 * v / 2 + B_STD**2

    v = W_STD**2 * np.mean(x**2, axis=1) + B_STD**2
    if topology == "residual":
        for _ in range(depth):
            v = v + after_relu(v)
        return after_relu(v)
    if topology == "chain":
        for _ in range(depth):
            v = after_relu(v)
        return after_relu(v)
    total = v if h0_shortcut else 0 * v
    for _ in range(depth):
        v = after_relu(v)
        total = total + v
    return after_relu(total)


@pytest.mark.parametrize(("topology", "h0_shortcut"), NETWORKS)
def test_the_diagonal_of_the_nngp_kernel_is_the_variance(topology, h0_shortcut):
    kernels = closed_form_kernels(X1, None, topology, 5, h0_shortcut=h0_shortcut)
    for depth, kernel in kernels.items():
        np.testing.assert_allclose(np.diag(kernel.nngp), variances(X1, topology, depth, h0_shortcut), rtol=1e-12)


def test_the_relu_covariance_equals_that_of_sampled_gaussians():
    x = np.array([[1.0, 0.5], [-0.4, 1.2]])
    [kernel] = closed_form_kernels(x, None, "proposed", 1).values()
    h0 = W_STD**2 * x @ x.T / 2 + B_STD**2
    samples = np.random.default_rng(1).multivariate_normal(np.zeros(2), h0, size=400_000)
    h1 = W_STD**2 * np.mean(np.maximum(samples[:, 0], 0) * np.maximum(samples[:, 1], 0)) + B_STD**2
    variance = W_STD**2 * np.diag(h0) / 2 + B_STD**2
    samples = np.random.default_rng(2).multivariate_normal(
        np.zeros(2), [[variance[0], h1], [h1, variance[1]]], size=400_000
    )
    output = W_STD**2 * np.mean(np.maximum(samples[:, 0], 0) * np.maximum(samples[:, 1], 0)) + B_STD**2
    assert kernel.nngp[0, 1] == pytest.approx(output, rel=0.02)


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_backends_and_block_sizes_give_equal_kernels(topology):
    with_numpy = closed_form_kernels(X1, X2, topology, 3, backend="numpy")
    with_jax = closed_form_kernels(X1, X2, topology, 3, backend="jax", block_rows=2)
    for depth in (1, 2, 3):
        np.testing.assert_allclose(with_jax[depth].nngp, with_numpy[depth].nngp, rtol=1e-12)
        np.testing.assert_allclose(with_jax[depth].ntk, with_numpy[depth].ntk, rtol=1e-12)


def test_blocks_cover_all_rows_and_only_the_triangle_on_request():
    expected = closed_form_kernels(X1, None, "proposed", 2)
    blocks = list(kernel_row_blocks(X1, None, "proposed", [2], block_rows=4))
    assert [(rows.start, rows.stop) for rows, _ in blocks] == [(0, 4), (4, 8), (8, 9)]
    for rows, kernels in kernel_row_blocks(X1, None, "proposed", [2], block_rows=4, lower_triangle=True):
        assert kernels.keys() == {2}
        np.testing.assert_allclose(kernels[2].ntk, expected[2].ntk[rows, : rows.stop], rtol=1e-12)


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_kernels_are_symmetric_and_positive_definite(topology):
    for kernel in closed_form_kernels(X1, None, topology, 3)[3]:
        np.testing.assert_allclose(kernel, kernel.T, rtol=1e-7)
        assert np.linalg.eigvalsh(kernel).min() > 0


@pytest.mark.parametrize(("topology", "h0_shortcut"), NETWORKS)
@pytest.mark.parametrize("depth", [1, 5])
def test_a_network_contains_each_dense_layer_once(topology, h0_shortcut, depth):
    init_fn, apply_fn, _ = stax_network(topology, depth, width=7, h0_shortcut=h0_shortcut)
    shape, params = init_fn(jax.random.PRNGKey(0), (-1, 4))
    weights = sorted(leaf.shape for leaf in jax.tree.leaves(params) if leaf.shape[0] > 1)
    assert weights == sorted([(4, 7)] + [(7, 7)] * depth + [(7, 1)])
    assert shape == (-1, 1)
    assert apply_fn(params, X1).shape == (9, 1)


def test_the_proposed_network_sums_the_outputs_of_its_layers():
    init_fn, apply_fn, _ = stax_network("proposed", 3, width=6)
    _, params = init_fn(jax.random.PRNGKey(1), (-1, 4))
    dense = list(_dense_pairs(params))
    assert len(dense) == 5

    def layer(h, pair, inputs):
        w, b = pair
        return W_STD / np.sqrt(inputs) * h @ w + B_STD * b

    first, last = dense[0], dense[-1]
    h, total = layer(X1, first, 4), 0.0
    for pair in dense[1:-1]:
        h = layer(np.maximum(h, 0), pair, 6)
        total = total + h
    expected = layer(np.maximum(total, 0), last, 6)
    np.testing.assert_allclose(apply_fn(params, X1), expected, rtol=1e-10)


def _dense_pairs(params):
    if isinstance(params, tuple) and len(params) == 2 and all(hasattr(p, "shape") for p in params):
        yield tuple(np.asarray(p) for p in params)
    elif isinstance(params, tuple | list):
        for part in params:
            yield from _dense_pairs(part)


def test_deep_networks_do_not_exceed_the_recursion_limit():
    _, _, kernel_fn = stax_network("proposed", 60)
    assert relative_difference(closed_form_kernels(X1, None, "proposed", 60)[60].ntk, kernel_fn(X1, None, "ntk")) < 1e-6


def test_the_empirical_ntk_of_a_linear_model_is_the_gram_matrix():
    gram = empirical_ntk(lambda w, x: x @ w, np.ones((4, 1)), X1, X2)
    np.testing.assert_allclose(gram, X1 @ X2.T, rtol=1e-12)


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_finite_networks_approach_the_kernel_as_one_over_sqrt_width(topology):
    widths = (32, 128, 512)
    errors = relative_errors(topology, widths, seeds=24, progress=False).mean(axis=1)
    assert -0.7 < fitted_order(np.array(widths), errors) < -0.3
    assert errors[-1] < 0.25


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((X1, X2, "residual", 0), "depth is 0: it must be at least 1"),
        ((X1, X2, "dense", 1), "topology is 'dense': choose one of residual, proposed, chain"),
        ((X1, X2[:, :3], "residual", 1), "x1 has 4 features and x2 has 3"),
        ((X1[0], X2, "residual", 1), r"x1 has shape \(4,\)"),
        ((X1[:0], X2, "residual", 1), r"x1 has shape \(0, 4\)"),
    ],
)
def test_the_error_names_the_invalid_argument(arguments, text):
    with pytest.raises(ValueError, match=text):
        closed_form_kernels(*arguments)


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_w_std_is_that_of_the_network(topology):
    kernel = closed_form_kernels(X1, X2, topology, 3, w_std=1.1)[3]
    _, _, kernel_fn = stax_network(topology, 3, w_std=1.1)
    expected = kernel_fn(X1, X2, ("nngp", "ntk"))
    assert relative_difference(kernel.nngp, expected.nngp) < 1e-10
    assert relative_difference(kernel.ntk, expected.ntk) < 1e-6
    with_jax = closed_form_kernels(X1, X2, topology, 3, w_std=1.1, backend="jax")[3]
    np.testing.assert_allclose(with_jax.ntk, kernel.ntk, rtol=1e-12)
    assert relative_difference(kernel.ntk, closed_form_kernels(X1, X2, topology, 3)[3].ntk) > 0.1


def test_the_chain_and_the_proposed_topology_of_depth_1_are_the_same_network():
    chain, proposed = (closed_form_kernels(X1, X2, topology, 2) for topology in ("chain", "proposed"))
    np.testing.assert_array_equal(chain[1].ntk, proposed[1].ntk)
    assert relative_difference(chain[2].ntk, proposed[2].ntk) > 0.05


def test_invalid_depth_width_and_triangle_are_errors():
    with pytest.raises(ValueError, match="w_std is 0: it must be above 0"):
        closed_form_kernels(X1, X2, "chain", 1, w_std=0.0)
    with pytest.raises(ValueError, match="depth is 0"):
        stax_network("proposed", 0)
    with pytest.raises(ValueError, match="width is 0"):
        stax_network("proposed", 1, width=0)
    with pytest.raises(ValueError, match="leave x2 None"):
        next(kernel_row_blocks(X1, X2, "proposed", [1], lower_triangle=True))
