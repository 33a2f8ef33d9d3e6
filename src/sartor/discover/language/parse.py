"""Text to tree: a small subset of Python, parsed and never executed.

``ast.parse`` builds a syntax tree and runs nothing. Of that tree only what is named here is read, everything else is
refused by its kind, and names are looked up in this module's own tables. So no name, attribute or call of the host can
be reached from a text, whatever it says: RestrictedPython and its kin filter code that then runs, and were broken.
"""

import ast
import re
import textwrap
import warnings
from collections.abc import Callable

from sartor.discover.language.expression import INPUTS, Expression, LanguageError, constant, given
from sartor.discover.language.operators import NUMBER, OPERATORS, apply, kind_of
from sartor.discover.language.printing import to_python

LONGEST = 4000  # characters
DEEPEST = 60  # brackets within brackets: Python's own parser recurses
INFIX: dict[type, str] = {ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.Div: "div"}
COMPARED: dict[type, str] = {ast.Gt: "greater", ast.GtE: "at_least", ast.Lt: "less", ast.LtE: "at_most"}
CALLS = {name: name for name, operator in OPERATORS.items() if not operator.binds} | {
    # What torch and numpy call them, so that what people and models write by habit is understood.
    "logsigmoid": "log_sigmoid",
    "mean": "batch_mean",
    "var": "batch_var",
    "std": "batch_std",
    "max": "maximum",
    "min": "minimum",
}
PREFIXES = ("torch.nn.functional.", "torch.", "functional.", "F.", "pair.", "np.", "math.")


def parse(text: str) -> Expression:
    """The objective that a text says: an expression, or assignments and a last expression, in ``def`` or without.

    >>> parse("z = beta * margin\\nreturn -log_sigmoid(z)") == parse("-F.logsigmoid(beta * pair.margin)")
    True

    Raises:
        LanguageError: what is not of the language, where, and what would be.
    """
    if not text.strip():
        raise LanguageError("wanted an expression, got nothing")
    _check_size(text)
    # A body is allowed on its own, return and all: it parses once it stands in a function.
    text = textwrap.dedent(text).strip()
    loose = not re.search(r"^def ", text, re.MULTILINE)
    body = text.splitlines()
    source = "\n".join(["def loss():", *(f" {line}" for line in body)] if loose else body)
    try:
        tree = _Reader(first_line=1 + loose).body(_statements(source, loose))
    except RecursionError:
        raise LanguageError("nested too deeply") from None
    if kind_of(tree) != NUMBER:
        raise LanguageError("wanted a number for each pair, got a truth: where(truth, a, b) makes one of it")
    _check_size(to_python(tree))  # locals make a tree deeper than its text, and what is archived must be read again
    return tree


def _check_size(text: str) -> None:
    if len(text) > LONGEST:
        raise LanguageError(f"wanted at most {LONGEST:,} characters, got {len(text):,}")
    depth = 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if depth > DEEPEST:
            raise LanguageError(f"more than {DEEPEST} brackets within brackets")


def _statements(source: str, loose: bool) -> list[ast.stmt]:
    """The body of the one function that the source is."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python's advice on odd literals is nothing to a parser
            found = ast.parse(source).body
    except SyntaxError as error:
        raise LanguageError(f"line {max(1, (error.lineno or 1) - loose)}: {error.msg}") from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise LanguageError(f"not readable: {str(error) or type(error).__name__}") from None
    match found:
        case [ast.FunctionDef(decorator_list=[], args=args, body=body)]:
            if all(_is_number(default) for default in (*args.defaults, *filter(None, args.kw_defaults))):
                return body
            raise LanguageError("the function's defaults: wanted numbers")
    raise LanguageError("wanted one function without decorators, or an expression, and nothing beside it")


class _Reader:
    """Reads statements in order; ``names`` are the locals so far."""

    def __init__(self, first_line: int) -> None:
        self.first_line = first_line
        self.names: dict[str, Expression] = {}

    def body(self, statements: list[ast.stmt]) -> Expression:
        *before, last = statements[_is_docstring(statements) :]
        for statement in before:
            match statement:
                case ast.Assign(targets=[ast.Name(id=name)], value=value):
                    if name in INPUTS:
                        raise self._refused(statement, f"{name} is an input: take another name")
                    self.names[name] = self.read(value)
                case _:
                    raise self._refused(statement, "wanted name = expression")
        match last:
            case ast.Return(value=ast.expr() as value) | ast.Expr(value=value):
                return self.read(value)
        raise self._refused(last, "wanted an expression, or return and one, as the last line")

    def read(self, node: ast.expr) -> Expression:
        match node:
            case ast.Constant(value=bool()) | ast.Constant(value=complex()):
                raise self._refused(node, f"{node.value!r} is no number of the language")
            case ast.Constant(value=int() | float() as value):
                return self._made(node, lambda: constant(float(value) if abs(value) < 1e300 else float("inf")))
            case ast.Name() | ast.Attribute() if name := _dotted(node):
                return self._named(node, name)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return self._apply(node, "neg", operand)
            case ast.UnaryOp(op=ast.UAdd(), operand=operand):
                return self.read(operand)
            case ast.BinOp(op=ast.Pow(), left=left, right=right):
                return self._power(node, self.read(left), self.read(right))
            case ast.BinOp(op=op, left=left, right=right) if type(op) in INFIX:
                return self._apply(node, INFIX[type(op)], left, right)
            case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in COMPARED:
                return self._apply(node, COMPARED[type(op)], left, right)
            case ast.IfExp(test=test, body=body, orelse=other):
                return self._apply(node, "where", test, body, other)
            case ast.Call(func=func, args=args, keywords=[]):
                return self._call(node, _dotted(func), args)
            case ast.Call():
                raise self._refused(node, "calls take no keywords here")
        raise self._refused(node, f"{type(node).__name__} is not part of the language")

    def _named(self, node: ast.expr, name: str) -> Expression:
        short = _short(name)
        if short in self.names and short == name:
            return self.names[name]
        if short in INPUTS:
            return given(short)
        raise self._refused(node, f"unknown name {name!r}; known: {', '.join([*INPUTS, *self.names])}")

    def _call(self, node: ast.expr, name: str | None, args: list[ast.expr]) -> Expression:
        if name is None or _short(name) not in CALLS:
            raise self._refused(node, f"unknown function {name or '?'}; known: {', '.join(CALLS)}")
        return self._apply(node, CALLS[_short(name)], *args)

    def _apply(self, node: ast.expr, name: str, *args: ast.expr) -> Expression:
        read = [self.read(arg) for arg in args]
        return self._made(node, lambda: apply(name, *read))

    def _made(self, node: ast.expr, make: Callable[[], Expression]) -> Expression:
        """What ``make`` makes; what it refuses is told with its line."""
        try:
            return make()
        except LanguageError as error:
            raise self._refused(node, str(error)) from None

    def _power(self, node: ast.expr, base: Expression, power: Expression) -> Expression:
        match (power.op, power.value):
            case ("constant", 2.0):
                return self._made(node, lambda: apply("square", base))
            case ("constant", 3.0):
                return self._made(node, lambda: apply("mul", base, apply("square", base)))
            case ("constant", 0.5):
                return self._made(node, lambda: apply("sqrt", base))
        raise self._refused(node, "powers are 2, 3 and 0.5; exp(p * log(x)) says any other")

    def _refused(self, node: ast.AST, why: str) -> LanguageError:
        return LanguageError(f"line {max(1, getattr(node, 'lineno', 1) - self.first_line + 1)}: {why}")


def _is_number(default: ast.expr) -> bool:
    match default:
        case (
            ast.Constant(value=int() | float())
            | ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float()))
        ):
            return True
    return False


def _is_docstring(statements: list[ast.stmt]) -> bool:
    match statements:
        case [ast.Expr(value=ast.Constant(value=str())), _, *_]:
            return True
    return False


def _dotted(node: ast.expr) -> str | None:
    """``a.b.c`` as text; None for anything that is not names and dots alone."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = _dotted(node.value)
        return None if before is None else f"{before}.{node.attr}"
    return None


def _short(name: str) -> str:
    """The name without the prefix of a module that people write by habit; a longer path is none of them."""
    for prefix in PREFIXES:
        if name.startswith(prefix) and "." not in name.removeprefix(prefix):
            return name.removeprefix(prefix)
    return name
