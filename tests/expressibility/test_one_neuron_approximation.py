import json

import numpy as np
import pytest

import one_neuron_approximation
from one_neuron_approximation import apply, max_error, monotone_bound, plain_chain, sparse_chain, study
from s3net_common.errors import InputError

X = np.linspace(-2.0, 3.0, 1001)


def wave(x):
    return np.sin(2 * x) + x / 3


def apply_with_numpy(weights, x):
    """Compute the network's output from its weights, independently of `apply`."""
    h, total = x, np.full_like(x, weights["offset"])
    for weight, bias, shortcut in zip(weights["weight"], weights["bias"], weights["shortcut"], strict=True):
        h = np.maximum(weight * h + bias, 0)
        total = total + shortcut * h
    return total


@pytest.mark.parametrize("depth", [1, 2, 7, 300])
def test_the_network_equals_the_function_at_the_knots(depth):
    chain = sparse_chain(wave, -2.0, 3.0, depth)
    assert [len(part) for part in chain[:3]] == [depth] * 3
    knots = np.linspace(-2.0, 3.0, depth + 1)
    np.testing.assert_allclose(apply(chain, knots), wave(knots), atol=1e-12)
    np.testing.assert_allclose(apply_with_numpy(chain._asdict(), X), apply(chain, X), atol=1e-12)


def abs_of(x):
    return np.abs(x) + np.sin(2 * x)


# From depth 127 on, the next term of the error's expansion is below 6% of the first one (the pieces are shorter than
# 0.05), and it falls at least by a factor of 8 over the fitted depths: the slope differs by at most
# log(1.06) / log(8) = 0.03.
@pytest.mark.parametrize(
    ("function", "even", "odd"),
    [
        (np.exp, 2, 2),
        (lambda x: 1 / (1 + x**2), 2, 2),
        (abs_of, 2, 1),
        (np.abs, None, 1),
        (lambda x: np.sqrt(np.abs(x)), 0.5, 0.5),
    ],
)
def test_the_order_is_that_of_the_theory(function, even, odd):
    results, _, _ = study(function, -3.0, 3.0, 20)
    for curve, expected in ((results, even), (results["odd"], odd)):
        assert curve["order"] == (None if expected is None else pytest.approx(expected, abs=0.05))
    assert results["greatest_error"] == pytest.approx(max_error(sparse_chain(function, -3, 3, 20), function, -3, 3))


def test_the_error_of_a_kink_in_the_middle_of_a_piece_is_half_of_its_length():
    assert max_error(sparse_chain(np.abs, -3.0, 3.0, 15), np.abs, -3.0, 3.0) == pytest.approx(6 / 15 / 2)
    root = lambda x: np.sqrt(np.abs(x))  # noqa: E731
    assert max_error(sparse_chain(root, -3.0, 3.0, 16), root, -3.0, 3.0) == pytest.approx(np.sqrt(6 / 16) / 4)


def test_the_known_orders_are_measured():
    for row in one_neuron_approximation.known_orders(-3.0, 3.0):
        for parity in ("even", "odd"):
            assert row[parity]["order"] == pytest.approx(row[parity]["theory"], abs=0.05), row


def test_a_piecewise_linear_function_is_exact_and_has_no_order():
    results, _, _ = study(np.abs, -1.0, 1.0, 2)
    assert results["greatest_error"] == 0
    assert results["order"] is None and results["odd"]["order"] == pytest.approx(1)


@pytest.mark.parametrize("depth", [1, 2, 9])
def test_a_chain_without_shortcuts_outputs_only_its_last_layer_and_is_monotone(depth):
    chain = plain_chain(wave, -2.0, 3.0, depth)
    assert np.count_nonzero(chain.shortcut[:-1]) == 0
    steps = np.diff(np.asarray(apply(chain, X)))
    assert (steps >= -1e-12).all() or (steps <= 1e-12).all()
    np.testing.assert_allclose(apply_with_numpy(chain._asdict(), X), apply(chain, X), atol=1e-12)


def test_no_random_chain_without_shortcuts_has_a_smaller_error_than_the_best():
    best = max_error(plain_chain(wave, -2.0, 3.0, 4), wave, -2.0, 3.0)
    assert best >= monotone_bound(wave(X)) - 1e-12
    rng = np.random.default_rng(0)
    for _ in range(300):
        weight, bias = rng.normal(size=4), rng.normal(size=4)
        h = X
        for w, b in zip(weight, bias, strict=True):
            h = np.maximum(w * h + b, 0)
        slope, offset = np.polyfit(h, wave(X), 1) if np.ptp(h) > 0 else (0.0, wave(X).mean())
        assert np.abs(offset + slope * h - wave(X)).max() > best - 1e-3


def test_a_clipped_linear_function_is_exact_without_shortcuts():
    def clip(x):
        return 2 - 3 * np.clip(x, -1.0, 0.5)  # both corners lie on the grid of the search

    chain = plain_chain(clip, -2.0, 2.0, 5)
    np.testing.assert_allclose(apply(chain, X), clip(np.minimum(X, 2.0)), atol=1e-6)


def test_the_monotone_bound_is_half_of_the_smaller_of_decrease_and_increase():
    assert monotone_bound(np.array([0.0, 4.0, 1.0, 5.0])) == 1.5
    assert monotone_bound(np.array([5.0, 1.0, 0.0])) == 0


def test_the_script_writes_weights_and_error(run_script, tmp_path):
    process = run_script("one_neuron_approximation.py", "--function", "sin(2*x)+x/3", "--interval", -2, 3,
                  "--depth", 12, "--out", "o")  # fmt: skip
    assert process.returncode == 0, process.stderr
    results = json.loads((tmp_path / "o" / "one_neuron.json").read_text())
    assert len(results["weights"]["shortcut"]) == 12
    error = np.abs(apply_with_numpy(results["weights"], X) - wave(X)).max()
    assert results["greatest_error"] == pytest.approx(error, rel=0.01)
    assert results["order"] == pytest.approx(2, abs=0.05)
    assert f"12 layers: maximum error {results['greatest_error']:.3g}" in process.stdout
    assert (tmp_path / "o" / "one_neuron.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ({"depth": 0}, "--depth is 0: it must be from 1"),
        ({"depth": 10**9}, "--depth is 1000000000"),
        ({"interval": (2.0, 2.0)}, "--interval is 2 2"),
        ({"interval": (0.0, float("inf"))}, "--interval is 0 inf"),
        ({"function": "1/x"}, "not finite at x = 0"),
    ],
)
def test_invalid_flags_are_an_input_error(tmp_path, flags, text):
    with pytest.raises(InputError, match=text):
        one_neuron_approximation.main(one_neuron_approximation.Args(out=tmp_path, **flags))
    assert list(tmp_path.iterdir()) == []


def test_an_invalid_function_is_reported_in_one_line(run_script, error_line):
    line = error_line(run_script("one_neuron_approximation.py", "--function", "__import__('os')"))
    assert "calls __import__(), which is unknown" in line
