"""Functions of x from text such as "sin(2*x)+abs(x)", read by a parser that knows only arithmetic."""

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
    """Reads an expression in x: numbers, pi, e, + - * / **, brackets and the functions of `FUNCTIONS`.

    All of these are continuous wherever they are finite, which is what the theorem asks of a function.
    Nothing is executed: the text is parsed, and every part that isn't on the list is refused.

    Returns:
        A function of x, (n,) in rising order, that returns (n,) float64 and raises InputError where it is not
        finite on the interval that x spans.

    Raises:
        InputError: the text isn't such an expression.
    """
    if len(text) > MAX_LENGTH:
        raise InputError(f"the expression has {len(text)} characters: at most {MAX_LENGTH} are read")
    try:
        body = ast.parse(text.strip(), mode="eval").body
        _refuse_unknown(body)
    except InputError:  # a ValueError, too
        raise
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        shown = text if len(text) <= 60 else f"{text[:60]}..."
        raise InputError(f"{shown!r} is not an expression: write one like sin(2*x)+abs(x)") from None

    def function(x: np.ndarray) -> np.ndarray:
        x = np.asarray(x, dtype=np.float64)
        with np.errstate(all="ignore"):
            y = np.broadcast_to(_evaluate(body, x), x.shape).astype(np.float64)
        if not np.isfinite(y).all():
            raise _not_finite(x[~np.isfinite(y)][0])
        return y

    return function


def _not_finite(x: float) -> InputError:
    return InputError(f"the expression is not finite at x = {x:.6g}: choose another --interval or --function")


def _refuse_unknown(node: ast.expr) -> None:
    match node:
        case ast.Constant(value=bool()):
            raise InputError(f"the expression has {node.value}: only numbers are known")
        case ast.Constant(value=int() | float()):
            pass
        case ast.Name(id=name):
            if name != "x" and name not in CONSTANTS:
                known = ", ".join(["x", *CONSTANTS, *FUNCTIONS])
                raise InputError(f"the expression has the unknown name {name!r}: known are {known}")
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            _refuse_unknown(left)
            _refuse_unknown(right)
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _OPERATORS:
            _refuse_unknown(operand)
        case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]) if name in FUNCTIONS:
            _refuse_unknown(argument)
        case ast.Call(func=ast.Name(id=name)):
            what = "takes one argument" if name in FUNCTIONS else f"is unknown: known are {', '.join(FUNCTIONS)}"
            raise InputError(f"the expression calls {name}(), which {what}")
        case _:
            part = ast.unparse(node)
            raise InputError(f"the expression has {part!r}, which is not arithmetic: use + - * / ** and functions of x")


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
                _refuse_zero(second, x)
            if isinstance(op, ast.Pow) and np.any(second < 0):
                _refuse_zero(first, x)
            return _OPERATORS[type(op)](first, second)
    raise AssertionError(f"{ast.dump(node)} passed the check and can't be evaluated")


def _refuse_zero(divisor: np.ndarray, x: np.ndarray) -> None:
    """A continuous divisor that changes its sign between two points is 0 somewhere between them."""
    sign = np.sign(np.broadcast_to(divisor, x.shape))
    zero = np.flatnonzero((sign == 0) | (sign != sign[0]))
    if len(zero):
        raise _not_finite(x[zero[0]])
