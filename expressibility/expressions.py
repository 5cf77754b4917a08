"""Parse functions of x, or of x and y, such as "sin(2*x)+abs(x)": arithmetic only. No code is executed."""

import ast
from collections.abc import Callable, Sequence

import numpy as np

from s3net_common.errors import InputError

FUNCTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "abs": np.abs,
    "arctan": np.arctan,
    "cos": np.cos,
    "cosh": np.cosh,
    "exp": np.exp,
    "log": np.log,
    "sin": np.sin,
    "sinh": np.sinh,
    "sqrt": np.sqrt,
    "tanh": np.tanh,
}
CONSTANTS = {"pi": np.pi, "e": np.e}
_OPERATORS = {
    ast.Add: np.add,
    ast.Sub: np.subtract,
    ast.Mult: np.multiply,
    ast.Div: np.divide,
    ast.Pow: np.power,
    ast.UAdd: np.positive,
    ast.USub: np.negative,
}
MAX_LENGTH = 1000

Values = dict[str, np.ndarray]  # the points by variable, each (n,)


def parse(text: str, variables: Sequence[str] = ("x",)) -> Callable[..., np.ndarray]:
    """Parse an expression in the variables: numbers, pi, e, + - * / **, brackets and the functions of `FUNCTIONS`.

    All of these are continuous wherever they are finite. Theorem 1 requires a continuous function.

    Returns:
        A function that maps an array (n,) for each variable to (n,) float64. The points are neighbours in a connected
        region: an ascending x, or a grid. It raises InputError if its value is not finite at a point or between two.

    Raises:
        InputError: the text contains anything else, or cannot be parsed.
    """
    if len(text) > MAX_LENGTH:
        raise InputError(f"the expression has {len(text)} characters: at most {MAX_LENGTH} are read")
    try:
        body = ast.parse(text.strip(), mode="eval").body
        _check_allowed(body, variables)
    except InputError:  # before its base class ValueError
        raise
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        shown = text if len(text) <= 60 else f"{text[:60]}..."
        raise InputError(f"{shown!r} is not an expression: write one like sin(2*x)+abs(x)") from None

    def function(*arrays: np.ndarray) -> np.ndarray:
        values = {name: np.asarray(array, dtype=np.float64) for name, array in zip(variables, arrays, strict=True)}
        with np.errstate(all="ignore"):
            result = np.broadcast_to(_evaluate(body, values), values[variables[0]].shape).astype(np.float64)
        if not np.isfinite(result).all():
            raise _not_finite_at(values, np.flatnonzero(~np.isfinite(result))[0])
        return result

    return function


def _not_finite_at(values: Values, index: int) -> InputError:
    place = ", ".join(f"{name} = {array[index]:.6g}" for name, array in values.items())
    flags = "another --interval or --function" if len(values) == 1 else "another --function"
    return InputError(f"the expression is not finite at {place}: choose {flags}")


def _check_allowed(node: ast.expr, variables: Sequence[str]) -> None:
    match node:
        case ast.Constant(value=bool()):
            raise InputError(f"the expression contains {node.value}: only numbers are allowed")
        case ast.Constant(value=int() | float()):
            pass
        case ast.Name(id=name):
            if name not in variables and name not in CONSTANTS:
                allowed = ", ".join([*variables, *CONSTANTS, *FUNCTIONS])
                raise InputError(f"the expression contains the unknown name {name!r}: use only {allowed}")
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            _check_allowed(left, variables)
            _check_allowed(right, variables)
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _OPERATORS:
            _check_allowed(operand, variables)
        case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]) if name in FUNCTIONS:
            _check_allowed(argument, variables)
        case ast.Call(func=ast.Name(id=name)):
            reason = "takes one argument" if name in FUNCTIONS else f"is unknown: use only {', '.join(FUNCTIONS)}"
            raise InputError(f"the expression calls {name}(), which {reason}")
        case _:
            part = ast.unparse(node)
            raise InputError(
                f"the expression contains {part!r}, which is not arithmetic: use + - * / ** and functions of x"
            )


def _evaluate(node: ast.expr, values: Values) -> np.ndarray:
    match node:
        case ast.Constant(value=value):
            return np.float64(value) if abs(value) < 1e308 else np.float64(np.inf)
        case ast.Name(id=name):
            return values[name] if name in values else np.float64(CONSTANTS[name])
        case ast.Call(func=ast.Name(id=name), args=[argument]):
            return FUNCTIONS[name](_evaluate(argument, values))
        case ast.UnaryOp(op=op, operand=operand):
            return _OPERATORS[type(op)](_evaluate(operand, values))
        case ast.BinOp(left=left, op=op, right=right):
            first, second = _evaluate(left, values), _evaluate(right, values)
            if isinstance(op, ast.Div):
                _check_no_zero(second, values)
            if isinstance(op, ast.Pow) and np.any(second < 0):
                _check_no_zero(first, values)
            return _OPERATORS[type(op)](first, second)
    raise AssertionError(f"_check_allowed accepted {ast.dump(node)}, which cannot be evaluated")


def _check_no_zero(divisor: np.ndarray, values: Values) -> None:
    """Raise InputError if the divisor is 0 at a point or, since it changes its sign, between two points."""
    shape = next(iter(values.values())).shape
    sign = np.sign(np.broadcast_to(divisor, shape))
    zeros = np.flatnonzero((sign == 0) | (sign != sign[0]))
    if len(zeros):
        raise _not_finite_at(values, zeros[0])
