import json

import numpy as np
import pytest

import one_neuron_approximation as one

X = np.linspace(-2.0, 3.0, 1001)


def wave(x):
    return np.sin(2 * x) + x / 3


def by_hand(weights, x):
    """The network from its weights, one neuron after another."""
    h, total = x, np.full_like(x, weights["offset"])
    for weight, bias, shortcut in zip(weights["weight"], weights["bias"], weights["shortcut"], strict=True):
        h = np.maximum(weight * h + bias, 0)
        total = total + shortcut * h
    return total


@pytest.mark.parametrize("depth", [1, 2, 7, 300])
def test_the_network_meets_the_function_at_its_knots(depth):
    chain = one.with_shortcuts(wave, -2.0, 3.0, depth)
    assert [len(part) for part in chain[:3]] == [depth] * 3
    knots = np.linspace(-2.0, 3.0, depth + 1)
    np.testing.assert_allclose(one.apply(chain, knots), wave(knots), atol=1e-12)
    np.testing.assert_allclose(by_hand(chain._asdict(), X), one.apply(chain, X), atol=1e-12)


@pytest.mark.parametrize("function", [wave, np.exp, lambda x: 1 / (1 + x**2)])
def test_smooth_functions_are_approximated_with_order_2(function):
    found, _, _ = one.study(function, -2.0, 3.0, 20)
    assert found["order"] == pytest.approx(2, abs=0.05)
    assert found["errors"][-1] < 1e-3
    assert 20 in found["depths"]


def test_a_broken_line_is_exact_and_has_no_order():
    found, _, _ = one.study(np.abs, -1.0, 1.0, 2)
    assert found["greatest_error"] == 0
    assert found["order"] is None


@pytest.mark.parametrize("depth", [1, 2, 9])
def test_without_shortcuts_only_the_last_layer_is_read_and_it_is_monotone(depth):
    chain = one.without_shortcuts(wave, -2.0, 3.0, depth)
    assert np.count_nonzero(chain.shortcut[:-1]) == 0
    steps = np.diff(np.asarray(one.apply(chain, X)))
    assert (steps >= -1e-12).all() or (steps <= 1e-12).all()
    np.testing.assert_allclose(by_hand(chain._asdict(), X), one.apply(chain, X), atol=1e-12)


def test_no_random_chain_without_shortcuts_beats_the_best_one():
    best = one.greatest_error(one.without_shortcuts(wave, -2.0, 3.0, 4), wave, -2.0, 3.0)
    assert best >= one.monotone_bound(wave(X)) - 1e-12
    rng = np.random.default_rng(0)
    for _ in range(300):
        weight, bias = rng.normal(size=4), rng.normal(size=4)
        h = X
        for w, b in zip(weight, bias, strict=True):
            h = np.maximum(w * h + b, 0)
        slope, offset = np.polyfit(h, wave(X), 1) if np.ptp(h) > 0 else (0.0, wave(X).mean())
        assert np.abs(offset + slope * h - wave(X)).max() > best - 1e-3


def test_a_clip_is_found_exactly():
    def clip(x):
        return 2 - 3 * np.clip(x, -1.0, 0.5)  # both corners lie on the grid of the search

    chain = one.without_shortcuts(clip, -2.0, 2.0, 5)
    np.testing.assert_allclose(one.apply(chain, X), clip(np.minimum(X, 2.0)), atol=1e-6)


def test_the_bound_is_half_of_the_least_detour():
    assert one.monotone_bound(np.array([0.0, 4.0, 1.0, 5.0])) == 1.5
    assert one.monotone_bound(np.array([5.0, 1.0, 0.0])) == 0


def test_the_command_line(script, tmp_path):
    done = script("one_neuron_approximation.py", "--function", "sin(2*x)+x/3", "--interval", -2, 3,
                  "--depth", 12, "--out", "o")  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "o" / "one_neuron.json").read_text())
    assert len(found["weights"]["shortcut"]) == 12
    error = np.abs(by_hand(found["weights"], X) - wave(X)).max()
    assert found["greatest_error"] == pytest.approx(error, rel=0.01)
    assert found["order"] == pytest.approx(2, abs=0.05)
    assert f"12 layers: greatest error {found['greatest_error']:.3g}" in done.stdout
    assert (tmp_path / "o" / "one_neuron.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"depth": 0}, "--depth is 0: it must be from 1"),
        ({"depth": 10**9}, "--depth is 1000000000"),
        ({"interval": (2.0, 2.0)}, "--interval is 2 2"),
        ({"interval": (0.0, float("inf"))}, "--interval is 0 inf"),
        ({"function": "1/x"}, "not finite at x = 0"),
    ],
)
def test_bad_options(tmp_path, options, text):
    with pytest.raises(one.InputError, match=text):
        one.main(one.Arguments(out=tmp_path, **options))
    assert list(tmp_path.iterdir()) == []


def test_bad_input_is_one_line(script, refused):
    line = refused(script("one_neuron_approximation.py", "--function", "__import__('os')"))
    assert "calls __import__(), which is unknown" in line
