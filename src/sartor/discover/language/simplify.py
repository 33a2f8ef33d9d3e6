"""The same objective with fewer nodes: what the grammar makes is full of sums with 0 and signs of signs."""

from sartor.discover.language.expression import CONSTANT, Expression, LanguageError, constant
from sartor.discover.language.operators import apply

FOLDED = {"add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b}


def simplify(tree: Expression) -> Expression:
    """Fold constants and drop what changes nothing; the value is the same but for rounding.

    >>> from sartor.discover.language.parse import parse
    >>> from sartor.discover.language.printing import to_python
    >>> to_python(simplify(parse("-(-(1 * margin + 0)) + (2 + 3) * beta")))
    'margin + 5 * beta'
    """
    return tree.map(_simpler)


def _simpler(node: Expression) -> Expression:
    match node:
        case Expression("add" | "sub" | "mul" as op, (Expression("constant") as a, Expression("constant") as b)):
            return _folded(node, FOLDED[op](a.value, b.value))
        case Expression("neg", (Expression("constant", (), value),)):
            return constant(-value)
        case Expression("neg", (Expression("neg", (x,)),)) | Expression(
            "add" | "sub", (x, Expression("constant", (), 0.0))
        ):
            return x
        case Expression("add", (Expression("constant", (), 0.0), x)):
            return x
        case Expression("sub", (Expression("constant", (), 0.0), x)):
            return apply("neg", x)
        case Expression("mul", (x, Expression("constant", (), 1.0))) | Expression(
            "mul", (Expression("constant", (), 1.0), x)
        ):
            return x
        case Expression("div", (x, Expression("constant", (), 1.0))):
            return x
        case Expression("mul", (Expression("constant", (), a), Expression("mul", (Expression("constant", (), b), x)))):
            return _folded(node, a * b, x)
        case Expression("add", (x, Expression("neg", (y,)))):
            return apply("sub", x, y)
        case Expression("sub", (x, Expression("neg", (y,)))):
            return apply("add", x, y)
        case Expression("maximum" | "minimum", (x, y)) if x == y:
            return x
        case Expression("where", (_, x, y)) if x == y:
            return x
        case Expression("detach" | "relu" | "abs" | "batch_mean" as op, (Expression(inner) as x,)) if inner == op:
            return x
    return node


def _folded(node: Expression, value: float, factor: Expression | None = None) -> Expression:
    try:
        found = constant(value)
    except LanguageError:  # out of range: it stays as it is
        return node
    return found if factor is None else apply("mul", found, factor)


def constants_of(tree: Expression) -> list[int]:
    """Places of the constants in :meth:`Expression.walk`."""
    return [place for place, node in enumerate(tree.walk()) if node.op == CONSTANT]
