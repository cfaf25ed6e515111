"""The modules that an exported model needs, as three files that need nothing of this project.

Modules are written one after the other, each after those that it imports. Imports among them are dropped, all others
stand at the head of the file, and where two modules have the same name for different things, one of them gets its
module's name as a prefix. Everything else is left as it is written, comments and docstrings too.

Invariant: what the files compute is what the modules compute, bit for bit.
"""

from __future__ import annotations

import ast
import builtins
import dataclasses
import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ENTRY = "orchestrator.distill.models.exported_model"
KERNELS, OPERATORS, MODEL = "layerswap_kernels", "layerswap_operators", "modeling_layerswap"
ROOT = Path(__file__).parents[3]
PACKAGES = ("operators", "orchestrator")
HEADS = {
    KERNELS: "Kernels for accelerators, of the operators in `layerswap_operators`.",
    OPERATORS: "The operators that stand where layers of this model had attention; `build` makes them.",
    MODEL: "A causal language model some of whose layers have operators in the place of attention.",
}
NOTE = "Written by layerswap: each section is a module of its package, told by the line above it."
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
Target = tuple[str, str]  # module and name


@dataclasses.dataclass(frozen=True)
class Module:
    """What is known of a module before it is rewritten.

    Attributes:
        imported: what its imports of the packages' own names mean, by the name that it uses.
        others: the same of the imports that move to the head of the file; the name is empty for `import a`.
        defined: its own names.
        words: every name that stands anywhere in it.
    """

    name: str
    source: str
    imported: dict[str, Target]
    others: dict[str, Target]
    defined: frozenset[str]
    words: frozenset[str]


@functools.cache
def bundle() -> dict[str, str]:
    """Name -> text of the files, `ENTRY` and what it imports, first what others import."""
    modules = {module.name: module for module in _in_order(ENTRY)}
    files = _files(modules)
    names = _final_names(list(modules.values()))
    return {f"{file}.py": _text(file, [modules[name] for name in files[file]], files, names) for file in files}


def _in_order(entry: str) -> Iterator[Module]:
    """The modules that `entry` needs, each after those that it imports."""
    seen: set[str] = set()

    def visit(name: str) -> Iterator[Module]:
        if name not in seen:
            seen.add(name)
            module = _read(name)
            for needed in dict.fromkeys(target for target, _ in module.imported.values()):
                yield from visit(needed)
            yield module

    yield from visit(entry)


def _read(name: str) -> Module:
    path = ROOT.joinpath(*name.split("."))
    source = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8")
    tree = ast.parse(source)
    imported: dict[str, Target] = {}
    others: dict[str, Target] = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module != "__future__":
            into = imported if _ours(str(node.module)) else others
            into |= {alias.asname or alias.name: (str(node.module), alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            for alias in node.names:
                assert not _ours(alias.name), f"{name} imports {alias.name} whole: import names from it"
                assert alias.asname or "." not in alias.name, f"{name} imports {alias.name}: give it a name"
                others[alias.asname or alias.name] = (alias.name, "")
    inside = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node not in tree.body}
    assert not [other for other in inside if _ours(str(other))], f"{name} imports a module of ours late: do it above"
    defined = {
        bound for node in tree.body if not isinstance(node, ast.ImportFrom) for bound in _bound(node)
    } - others.keys()
    words = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    words |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    return Module(name, source, imported, others, frozenset(defined - {"__all__"}), frozenset(words | defined))


def _bound(node: ast.AST) -> Iterator[str]:
    """The names that a statement binds in the scope where it stands."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield node.name
        return
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield from (alias.asname or alias.name for alias in node.names)
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id
    if isinstance(node, ast.ExceptHandler) and node.name:
        yield node.name
    if not isinstance(node, (ast.Lambda, *COMPREHENSIONS)):
        for child in ast.iter_child_nodes(node):
            yield from _bound(child)


def _ours(module: str) -> bool:
    return module.split(".")[0] in PACKAGES


def _files(modules: dict[str, Module]) -> dict[str, list[str]]:
    """File -> its modules; a file needs files before it only."""
    kernels: list[str] = []
    for module in modules.values():
        needs = {target for target, _ in module.imported.values()}
        if module.name.startswith("operators.gpu") and needs <= {*kernels}:
            kernels.append(module.name)
    operators = [name for name in modules if name.startswith("operators.") and name not in kernels]
    return {
        KERNELS: kernels,
        OPERATORS: operators,
        MODEL: [name for name in modules if name.startswith("orchestrator.")],
    }


def _final_names(modules: Sequence[Module]) -> dict[Target, str]:
    """Module and name -> its name in the files, which no other thing has."""
    outside: dict[str, Target] = {}
    for module in modules:
        for name, target in module.others.items():
            assert outside.setdefault(name, target) == target, f"{module.name}: {name} is {outside[name]} elsewhere"
    taken = {*outside, *dir(builtins)}
    for target, name in ((target, name) for module in modules for name, target in module.imported.items()):
        if name != target[1]:  # under its own name it must not be hidden where it is used
            user = next(module for module in modules if module.imported.get(name) == target)
            taken |= {target[1]} & user.words
    owners: dict[str, list[str]] = {}
    for module in modules:
        for name in module.defined:
            owners.setdefault(name, []).append(module.name)
    words = taken.union(*(module.words for module in modules))
    final: dict[Target, str] = {}
    for name, those in sorted(owners.items()):
        for owner in those:
            alone = len(those) == 1 and name not in taken
            final[owner, name] = name if alone else _prefixed(owner, name, words)
            words.add(final[owner, name])
    return final


def _prefixed(module: str, name: str, words: set[str]) -> str:
    """The name with as much of its module's before it as makes it new, in the style of the name."""
    bare = name.lstrip("_")
    parts = [part for part in module.split(".")[1:] if part.replace("_", "") not in bare.lower().replace("_", "")]
    for count in range(1, len(parts) + 1):
        prefix = "_".join(parts[-count:])
        if bare.isupper():
            made = f"{prefix.upper()}_{bare}"
        elif bare[0].isupper():
            made = "".join(part.capitalize() for part in prefix.split("_")) + bare
        else:
            made = f"{prefix}_{bare}"
        made = "_" * (len(name) - len(bare)) + made
        if made not in words:
            return made
    return _prefixed(module, f"{name}_", words)


def _text(file: str, modules: Sequence[Module], files: dict[str, list[str]], names: dict[Target, str]) -> str:
    """A file from its modules."""
    place = {module: other for other, those in files.items() for module in those}
    outside: dict[str, set[str]] = {}
    beside: dict[str, set[str]] = {}
    for module in modules:
        for used, (target, name) in module.others.items():
            outside.setdefault(target, set()).add(_alias(name, used) if name else _alias(target, used, whole=True))
        for target, name in module.imported.values():
            if place[target] != file:
                assert [*files].index(place[target]) < [*files].index(file), (
                    f"{module.name} imports from {place[target]}"
                )
                beside.setdefault(place[target], set()).add(names[target, name])
    whole = sorted(each for wanted in outside.values() for each in wanted if each.startswith("import "))
    parts = [
        (target, {each for each in wanted if not each.startswith("import ")}) for target, wanted in outside.items()
    ]
    others = [line for target, wanted in sorted(parts) for line in _import(target, wanted)]
    near = [line for target, wanted in beside.items() for line in _import(f".{target}", wanted)]
    head = [f'"""{HEADS[file]}\n\n{NOTE}\n"""', "from __future__ import annotations"]
    head += ["\n".join(lines) for lines in (whole, others, near) if lines]
    rule = 119  # characters
    sections = [f"# {module.name} ".ljust(rule, "-") + "\n\n" + _rewritten(module, names) for module in modules]
    return "\n\n\n".join(["\n\n".join(head), *sections]) + "\n"


def _alias(name: str, used: str, *, whole: bool = False) -> str:
    return ("import " if whole else "") + (name if name == used else f"{name} as {used}")


def _import(module: str, names: Iterable[str]) -> list[str]:
    """An import as short as it can be."""
    wanted = sorted(names)
    line = f"from {module} import {', '.join(wanted)}"
    if not wanted or len(line) <= 120:
        return [line] if wanted else []
    return [f"from {module} import (", *(f"    {name}," for name in wanted), ")"]


def _rewritten(module: Module, names: dict[Target, str]) -> str:
    """A module's text without the imports that its file does for it, and with its final names."""
    renamed = {name: names[module.name, name] for name in module.defined if names[module.name, name] != name}
    renamed |= {name: names[target] for name, target in module.imported.items() if names[target] != name}
    tree = ast.parse(module.source)
    lines = [line.encode() for line in module.source.splitlines()]  # the offsets of nodes are of bytes
    found = {_place(node, lines) for node in _meant(tree, renamed, renamed)}
    for line, column, name in sorted(found, reverse=True):
        text = lines[line]
        lines[line] = text[:column] + renamed[name].encode() + text[column + len(name) :]
    for statement in reversed(tree.body):
        if _is_done_above(statement):
            above = statement.lineno - 1
            del lines[above : statement.end_lineno]
            while above < len(lines) and not lines[above].strip() and (above == 0 or not lines[above - 1].strip()):
                del lines[above]
    return b"\n".join(lines).decode().strip()


def _is_done_above(statement: ast.stmt) -> bool:
    """Whether it is an import that stands at the head of the file, or `__all__`, which a file has no use for."""
    if isinstance(statement, ast.Assign):
        return isinstance(statement.targets[0], ast.Name) and statement.targets[0].id == "__all__"
    return isinstance(statement, ast.Import | ast.ImportFrom)


def _meant(node: ast.AST, here: Mapping[str, str], outer: Mapping[str, str]) -> Iterator[tuple[ast.AST, str]]:
    """Nodes that use or bind a name of the module, with that name.

    `here` are the names that mean the module's where `node` stands, `outer` those that do in functions inside of it:
    what a class binds is not seen by its methods.
    """
    inside: list[Any] = []
    below, above = here, outer
    if isinstance(node, ast.Name) and node.id in here:
        yield node, node.id
    elif isinstance(node, ast.Global):
        yield from ((node, name) for name in node.names if name in outer)
    elif isinstance(node, FUNCTIONS):
        own = {argument.arg for argument in ast.walk(node.args) if isinstance(argument, ast.arg)}
        inside = node.body if isinstance(node.body, list) else [node.body]
        own |= {name for each in inside for name in _bound(each)}
        own -= {
            name for each in inside for found in ast.walk(each) if isinstance(found, ast.Global) for name in found.names
        }
        below = above = _without(outer, own)
    elif isinstance(node, ast.ClassDef):
        inside = list(node.body)
        below, above = _without(outer, {name for each in inside for name in _bound(each)}), outer
    elif isinstance(node, COMPREHENSIONS):
        inside = list(ast.iter_child_nodes(node))
        own = {name for each in node.generators for name in _bound(each.target)}
        below, above = _without(here, own), _without(outer, own)
        yield from _meant(node.generators[0].iter, here, outer)
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name in here:
        yield node, node.name
    for child in ast.iter_child_nodes(node):
        within = child in inside
        yield from _meant(child, below if within else here, above if within else outer)


def _without(names: Mapping[str, str], hidden: set[str]) -> Mapping[str, str]:
    return {name: final for name, final in names.items() if name not in hidden}


def _place(meant: tuple[ast.AST, str], lines: list[bytes]) -> tuple[int, int, str]:
    """Line, column in bytes and the name itself, of a node that names it first on its line."""
    node, name = meant
    assert isinstance(node, ast.stmt | ast.expr)
    line, column = node.lineno - 1, node.col_offset
    if isinstance(node, ast.Name):
        assert lines[line][column:].startswith(name.encode()), f"{name} stands in a string of several lines"
        return line, column, name
    found = re.compile(rf"\b{name}\b".encode()).search(lines[line], column)
    assert found is not None
    return line, found.start(), name
