"""Parse functions of x such as "sin(2*x)+abs(x)". Only arithmetic is allowed, and no code is executed."""

import ast
from collections.abc import Callable

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


def parse(text: str) -> Callable[[np.ndarray], np.ndarray]:
    """Parse an expression in x: numbers, pi, e, + - * / **, brackets and the functions of `FUNCTIONS`.

    All of these are continuous wherever they are finite. Theorem 1 requires a continuous function.

    Returns:
        A function that maps x, (n,) in ascending order, to (n,) float64. It raises InputError if its value is not
        finite somewhere on the interval that x spans.

    Raises:
        InputError: the text contains anything else, or cannot be parsed.
    """
    if len(text) > MAX_LENGTH:
        raise InputError(f"the expression has {len(text)} characters: at most {MAX_LENGTH} are read")
    try:
        body = ast.parse(text.strip(), mode="eval").body
        _check_allowed(body)
    except InputError:  # before its base class ValueError
        raise
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        shown = text if len(text) <= 60 else f"{text[:60]}..."
        raise InputError(f"{shown!r} is not an expression: write one like sin(2*x)+abs(x)") from None

    def function(x: np.ndarray) -> np.ndarray:
        x = np.asarray(x, dtype=np.float64)
        with np.errstate(all="ignore"):
            y = np.broadcast_to(_evaluate(body, x), x.shape).astype(np.float64)
        if not np.isfinite(y).all():
            raise _not_finite_at(x[~np.isfinite(y)][0])
        return y

    return function


def _not_finite_at(x: float) -> InputError:
    return InputError(f"the expression is not finite at x = {x:.6g}: choose another --interval or --function")


def _check_allowed(node: ast.expr) -> None:
    match node:
        case ast.Constant(value=bool()):
            raise InputError(f"the expression contains {node.value}: only numbers are allowed")
        case ast.Constant(value=int() | float()):
            pass
        case ast.Name(id=name):
            if name != "x" and name not in CONSTANTS:
                allowed = ", ".join(["x", *CONSTANTS, *FUNCTIONS])
                raise InputError(f"the expression contains the unknown name {name!r}: use only {allowed}")
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            _check_allowed(left)
            _check_allowed(right)
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _OPERATORS:
            _check_allowed(operand)
        case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]) if name in FUNCTIONS:
            _check_allowed(argument)
        case ast.Call(func=ast.Name(id=name)):
            reason = "takes one argument" if name in FUNCTIONS else f"is unknown: use only {', '.join(FUNCTIONS)}"
            raise InputError(f"the expression calls {name}(), which {reason}")
        case _:
            part = ast.unparse(node)
            raise InputError(
                f"the expression contains {part!r}, which is not arithmetic: use + - * / ** and functions of x"
            )


def _evaluate(node: ast.expr, x: np.ndarray) -> np.ndarray:
    match node:
        case ast.Constant(value=value):
            return np.float64(value) if abs(value) < 1e308 else np.float64(np.inf)
        case ast.Name(id=name):
            return x if name == "x" else np.float64(CONSTANTS[name])
        case ast.Call(func=ast.Name(id=name), args=[argument]):
            return FUNCTIONS[name](_evaluate(argument, x))
        case ast.UnaryOp(op=op, operand=operand):
            return _OPERATORS[type(op)](_evaluate(operand, x))
        case ast.BinOp(left=left, op=op, right=right):
            first, second = _evaluate(left, x), _evaluate(right, x)
            if isinstance(op, ast.Div):
                _check_no_zero(second, x)
            if isinstance(op, ast.Pow) and np.any(second < 0):
                _check_no_zero(first, x)
            return _OPERATORS[type(op)](first, second)
    raise AssertionError(f"_check_allowed accepted {ast.dump(node)}, which cannot be evaluated")


def _check_no_zero(divisor: np.ndarray, x: np.ndarray) -> None:
    """Raise InputError if the divisor is 0 at a point or, since it changes its sign, between two points."""
    sign = np.sign(np.broadcast_to(divisor, x.shape))
    zeros = np.flatnonzero((sign == 0) | (sign != sign[0]))
    if len(zeros):
        raise _not_finite_at(x[zeros[0]])
