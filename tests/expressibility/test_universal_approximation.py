import json

import numpy as np
import pytest

import universal_approximation
from s3net_common.errors import InputError
from universal_approximation import Shallow, apply_deep, apply_shallow, deep_network, fit_shallow, grid

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(("dimensions", "neurons"), [(1, 5), (2, 40), (5, 1), (7, 12)])
def test_the_deep_network_has_width_d_plus_1_and_equals_the_shallow_one(dimensions, neurons):
    shallow = Shallow(RNG.normal(size=(neurons, dimensions)), RNG.normal(size=neurons), RNG.normal(size=neurons), 0.7)
    deep = deep_network(shallow)
    block, last = deep
    assert len(block.layers) == neurons
    assert {layer[0].out_features for layer in block.layers} == {dimensions + 1}
    assert [layer[0].in_features for layer in block.layers] == [dimensions] + [dimensions + 1] * (neurons - 1)
    assert last.in_features == neurons * (dimensions + 1)
    points = RNG.uniform(size=(200, dimensions))
    expected = 0.7 + sum(
        shallow.output[n] * np.maximum(points @ shallow.weight[n] + shallow.bias[n], 0) for n in range(neurons)
    )
    np.testing.assert_allclose(apply_deep(deep, points, batch=64), expected, atol=1e-12)
    np.testing.assert_allclose(apply_shallow(shallow, points), expected, atol=1e-12)


def test_the_equality_ends_outside_of_the_cube():
    shallow = Shallow(np.array([[1.0], [1.0]]), np.array([2.0, 2.0]), np.array([1.0, 1.0]), 0.0)
    points = np.array([[-1.0], [0.0], [1.0]])
    np.testing.assert_allclose(apply_shallow(shallow, points), [2.0, 4.0, 6.0])
    np.testing.assert_allclose(apply_deep(deep_network(shallow), points), [3.0, 4.0, 6.0])


def test_a_function_that_the_neurons_span_is_fitted_exactly():
    points = grid(9)
    known = fit_shallow(points, points[:, 0], 6, seed=3)
    target = apply_shallow(known._replace(output=np.arange(6.0), offset=-2.0), points)
    np.testing.assert_allclose(apply_shallow(fit_shallow(points, target, 6, seed=3), points), target, atol=1e-9)


def test_more_layers_have_a_smaller_error(tmp_path, capsys):
    args = universal_approximation.Args(out=tmp_path, depths=(64, 8, 8), seeds=2, function="sin(3*x)*y")
    universal_approximation.main(args)
    results = json.loads((tmp_path / "universal_approximation.json").read_text())
    assert [row["depth"] for row in results["rows"]] == [8, 64]
    assert [row["parameters"] for row in results["rows"]] == [9 + 7 * 12 + 8 * 3 + 1, 9 + 63 * 12 + 64 * 3 + 1]
    few, many = results["rows"]
    assert many["mean_error"] < 0.5 * few["mean_error"]
    assert few["mean_error"] == pytest.approx(np.mean(few["errors"])) and len(few["errors"]) == 2
    assert 0 < results["largest_difference_from_shallow"] < 1e-12
    points = grid(universal_approximation.TEST_POINTS)
    fit_points = grid(universal_approximation.FIT_POINTS)
    shallow = fit_shallow(fit_points, np.sin(3 * fit_points[:, 0]) * fit_points[:, 1], 8, seed=0)
    error = np.abs(apply_shallow(shallow, points) - np.sin(3 * points[:, 0]) * points[:, 1]).max()
    assert few["errors"][0] == pytest.approx(error, rel=1e-9)
    assert f"64 layers of 3 neurons: maximum error {many['mean_error']:.3g}" in capsys.readouterr().out
    assert (tmp_path / "universal_approximation.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ({"depths": (0,)}, "--depths must be one or more whole numbers from 1 to 2048"),
        ({"depths": ()}, "--depths must be"),
        ({"seeds": 1}, "--seeds is 1: give 2 or more"),
        ({"function": "1/(x-y)"}, "not finite at x = 0, y = 0: choose another --function"),
        ({"function": "x+z"}, "unknown name 'z': use only x, y, pi"),
    ],
)
def test_invalid_flags_are_an_input_error(tmp_path, flags, text):
    with pytest.raises(InputError, match=text):
        universal_approximation.main(universal_approximation.Args(out=tmp_path, **flags))
    assert list(tmp_path.iterdir()) == []
