"""Single mutations of a Python file: what could be written wrong in it, one place at a time.

A mutant replaces the text of one node of the file's syntax tree; everything else stays as it is, to the byte. Left
alone is what no test could or should notice: docstrings, annotations, `__all__`, messages of assertions and of errors,
f-strings and texts with spaces (words for people), code under `TYPE_CHECKING`, the `encoding` of files and the `strict`
of `zip`, which asserts what cannot happen.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterator

COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,), ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,), ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
}  # fmt: skip
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
    ast.Pow: ast.Mult, ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitAnd,
}  # fmt: skip
OF_TYPES = {"cast", "TypeVar", "NewType", "ParamSpec"}  # calls whose arguments are types


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One wrong version of a file.

    Attributes:
        path: the file, from the root of the checkout.
        line: where the mutation is.
        kind: which mutation: comparison, constant, argument, branch, boolean, arithmetic, return or statement.
        before: the mutated lines as they are, on one line.
        after: the same with the mutation.
        lines: first and last line of the statement, without its body.
        at_import: whether the statement runs when the file is imported, not when a function is called.
        source: the whole mutated file.
        id: the same wherever the lines stand, as long as they read the same.
    """

    path: str
    line: int
    kind: str
    before: str
    after: str
    lines: tuple[int, int]
    at_import: bool
    source: str = dataclasses.field(repr=False)
    id: str = ""


def mutants(path: str, source: str) -> list[Mutant]:
    """All mutants of a file, in the order of its lines."""
    finder = _Finder(path, source)
    finder.visit(ast.parse(source))
    seen: Counter[str] = Counter()
    named = []
    for mutant in finder.found:
        same = f"{path}\n{mutant.kind}\n{mutant.before}\n{mutant.after}"
        name = hashlib.sha256(f"{same}\n{seen[same]}".encode()).hexdigest()[:8]
        seen[same] += 1
        named.append(dataclasses.replace(mutant, id=name))
    return named


class _Finder(ast.NodeVisitor):
    def __init__(self, path: str, source: str) -> None:
        self.path, self.source = path, source
        self.lines = source.encode().splitlines(keepends=True)
        self.found: list[Mutant] = []
        self.statement: ast.stmt | None = None
        self.functions = 0  # around the node

    def visit(self, node: ast.AST) -> None:
        outer = self.statement
        if isinstance(node, ast.stmt):
            self.statement = node
        for kind, replaced, text in _mutations(node):
            self.add(kind, replaced, text)
        super().visit(node)
        self.statement = outer

    def add(self, kind: str, node: ast.AST, text: str) -> None:
        first, last = node.lineno - 1, node.end_lineno - 1
        head, tail = self.lines[first][: node.col_offset], self.lines[last][node.end_col_offset :]
        new = head + text.encode() + tail
        whole = b"".join([*self.lines[:first], new, *self.lines[last + 1 :]])
        before = b"".join(self.lines[first : last + 1])
        statement = self.statement
        inner = [part for name in ("body", "cases") for part in getattr(statement, name, [])[:1]]
        below = [getattr(part, "pattern", part).lineno for part in inner]
        end = max(below[0] - 1, statement.lineno) if below else statement.end_lineno
        start = min([statement.lineno, *(part.lineno for part in getattr(statement, "decorator_list", []))])
        where, flat = (start, end), (_flat(before), _flat(new))
        mutant = Mutant(self.path, first + 1, kind, *flat, where, self.functions == 0, whole.decode())
        self.found.append(mutant)

    def several(self, nodes: list[ast.AST | None]) -> None:
        for node in nodes:
            if node is not None:
                self.visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self.several([*node.decorator_list, *node.args.defaults, *node.args.kw_defaults])
        self.functions += 1
        self.several(node.body)
        self.functions -= 1

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self.several([*node.args.defaults, *node.args.kw_defaults])
        self.functions += 1
        self.visit(node.body)
        self.functions -= 1

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.several([node.target, node.value])

    def visit_Assign(self, node: ast.Assign) -> None:
        if not any(isinstance(target, ast.Name) and target.id == "__all__" for target in node.targets):
            self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> None:
        if not isinstance(node.value, ast.Constant):  # a docstring
            self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        if _is_type_checking(node.test):
            self.several(node.orelse)
        else:
            self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if getattr(node.func, "id", getattr(node.func, "attr", "")) in OF_TYPES:
            self.several(node.args[1:])
        else:
            self.several(
                [node.func, *node.args, *(word.value for word in node.keywords if not _is_left_alone(node, word.arg))]
            )

    def visit_Assert(self, node: ast.Assert) -> None:
        self.visit(node.test)

    def visit_match_case(self, node: ast.match_case) -> None:
        self.several([node.guard, *node.body])

    def left_alone(self, node: ast.AST) -> None:
        """What is in it is not mutated."""

    visit_Raise = visit_JoinedStr = visit_Import = visit_ImportFrom = left_alone


def _mutations(node: ast.AST) -> Iterator[tuple[str, ast.AST, str]]:
    """Kind, the node whose text is replaced, and by what."""
    match node:
        case ast.Compare():
            for i, op in enumerate(node.ops):
                for other in COMPARISONS[type(op)]:
                    yield "comparison", node, _with(node, lambda new, i=i, other=other: new.ops.__setitem__(i, other()))
        case ast.BoolOp():
            other = ast.Or if isinstance(node.op, ast.And) else ast.And
            yield "boolean", node, _with(node, lambda new: setattr(new, "op", other()))
        case ast.UnaryOp(op=ast.Not()):
            yield "boolean", node, f"({ast.unparse(node.operand)})"
        case ast.UnaryOp(op=ast.USub()):
            yield "arithmetic", node, f"({ast.unparse(node.operand)})"
        case ast.BinOp() if type(node.op) in ARITHMETIC and not (_is_text(node.left) or _is_text(node.right)):
            yield "arithmetic", node, _with(node, lambda new: setattr(new, "op", ARITHMETIC[type(new.op)]()))
        case ast.AugAssign():
            if type(node.op) in ARITHMETIC and not _is_text(node.value):
                changed = _with(node, lambda new: setattr(new, "op", ARITHMETIC[type(new.op)]()), "{}")
                yield "arithmetic", node, changed
            yield "statement", node, "pass"
        case ast.Constant():
            for value in _other_constants(node.value):
                yield "constant", node, repr(value)
        case ast.Call():
            yield from _fewer_arguments(node)
        case ast.If() if not _is_type_checking(node.test):
            yield from (("branch", node.test, word) for word in ("True", "False"))
        case ast.IfExp():
            yield from (("branch", node.test, word) for word in ("True", "False"))
        case ast.While():
            yield "branch", node.test, "False"
        case ast.comprehension():
            yield from (("branch", condition, "True") for condition in node.ifs)
        case ast.Return(value=ast.expr()) if not isinstance(node.value, ast.Constant):
            yield "return", node, "return None"
        case ast.Expr() if isinstance(node.value, ast.Call | ast.Await):
            yield "statement", node, "pass"
        case ast.Assign() | ast.AnnAssign(value=ast.expr()):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if not any(isinstance(part, ast.Name) for target in targets for part in ast.walk(_stored(target))):
                yield "statement", node, "pass"
        case ast.Raise() | ast.Delete() | ast.Break() | ast.Continue():
            yield "statement", node, "pass"


def _with(node: ast.AST, change, form: str = "({})") -> str:
    """The text of a copy of the node, changed."""
    new = copy.deepcopy(node)
    change(new)
    return form.format(ast.unparse(new))


def _stored(target: ast.expr) -> ast.AST:
    """The part of an assignment's target that names what is bound: nothing of `a` in `a.b` or `a[0]`."""
    if isinstance(target, ast.Attribute | ast.Subscript):
        return ast.Pass()
    if isinstance(target, ast.Tuple | ast.List):
        return ast.Tuple([_stored(part) for part in target.elts])
    return target


def _other_constants(value: object) -> list[object]:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1]
    if isinstance(value, float):
        return [value * 2 if value else 1.0]
    if isinstance(value, str) and not any(letter.isspace() for letter in value):
        return [f"XX{value}"]
    return []


def _fewer_arguments(node: ast.Call) -> Iterator[tuple[str, ast.AST, str]]:
    if getattr(node.func, "id", getattr(node.func, "attr", "")) in OF_TYPES:
        return
    for i, word in enumerate(node.keywords):
        if not _is_left_alone(node, word.arg):
            yield "argument", node, _with(node, lambda new, i=i: new.keywords.pop(i), "{}")
    if len(node.args) > 1 and not isinstance(node.args[-1], ast.Starred):
        yield "argument", node, _with(node, lambda new: new.args.pop(), "{}")


def _is_left_alone(call: ast.Call, argument: str | None) -> bool:
    return argument == "encoding" or (argument == "strict" and getattr(call.func, "id", "") == "zip")


def _is_text(node: ast.AST) -> bool:
    """Whether it is a text, or a path or text with one added: other arithmetic makes no sense of those."""
    if isinstance(node, ast.BinOp):
        return _is_text(node.left) or _is_text(node.right)
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _is_type_checking(node: ast.AST) -> bool:
    return getattr(node, "id", getattr(node, "attr", "")) == "TYPE_CHECKING"


def _flat(text: bytes) -> str:
    return " ".join(text.decode().split())


def function_lines(source: str) -> set[int]:
    """The lines of a file that run only when a function in it is called."""
    lines: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines |= set(range(node.body[0].lineno, node.end_lineno + 1))
    return lines
