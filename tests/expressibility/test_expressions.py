import numpy as np
import pytest

import expressions
from s3net_common.errors import InputError

X = np.linspace(0.5, 2.0, 7)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sin(2*x)+abs(x)", np.sin(2 * X) + np.abs(X)),
        ("-x**2 / (1 + e**-x)", -(X**2) / (1 + np.exp(-X))),
        ("sqrt(log(x + 1)) - tanh(pi)", np.sqrt(np.log(X + 1)) - np.tanh(np.pi)),
        ("cosh(x)-sinh(x)*arctan(x)+cos(x)-exp(-x)", None),
        ("3", np.full(7, 3.0)),
        (" +x ", X),
    ],
)
def test_parsed_expressions_have_the_right_values(text, expected):
    if expected is None:
        expected = np.cosh(X) - np.sinh(X) * np.arctan(X) + np.cos(X) - np.exp(-X)
    values = expressions.parse(text)(X)
    assert values.dtype == np.float64
    np.testing.assert_allclose(values, expected, rtol=1e-14)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("__import__('os').system('echo')", "which is not arithmetic|which is unknown"),
        ("x.real", "'x.real', which is not arithmetic"),
        ("[x][0]", "which is not arithmetic"),
        ("lambda: x", "which is not arithmetic"),
        ("x if x else 1", "which is not arithmetic"),
        ("x < 1", "which is not arithmetic"),
        ("x @ x", "which is not arithmetic"),
        ("1j*x", "'1j', which is not arithmetic"),
        ("'x'", "which is not arithmetic"),
        ("True", "contains True: only numbers"),
        ("y + 1", "unknown name 'y': use only x, pi, e"),
        ("sin", "unknown name 'sin'"),
        ("eval(x)", r"calls eval\(\), which is unknown: use only abs"),
        ("sin(x, x)", r"calls sin\(\), which takes one argument"),
        ("sin(x=1)", r"calls sin\(\), which takes one argument"),
        ("sin(x", "is not an expression"),
        ("", "is not an expression"),
        ("x\nx", "is not an expression"),
        ("x = 1", "is not an expression"),
        ("(" * 400 + "x" + ")" * 400, "is not an expression"),
        ("x+" * 600 + "x", "has 1201 characters: at most 1000"),
    ],
)
def test_anything_but_arithmetic_is_an_input_error(text, message):
    with pytest.raises(InputError, match=message):
        expressions.parse(text)


@pytest.mark.parametrize(
    ("text", "position"),
    [
        ("1/x", "0"),
        ("x**-1", "0"),
        ("1/(x-0.3)", "0.5"),
        ("log(x)", "-2"),
        ("sqrt(x)", "-2"),
        ("9**9**9**9", "-2"),
        ("1e400*x", "-2"),
        ("exp(1000*x)", "1"),
    ],
)
def test_the_error_names_the_x_at_which_a_function_is_not_finite(text, position):
    with pytest.raises(InputError, match=f"not finite at x = {position}: choose another --interval or --function"):
        expressions.parse(text)(np.linspace(-2, 2, 9))
