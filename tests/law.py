"""The checkers behind test_law.py: each reads text and answers with a list of sentences, empty where all is well.

No checker opens a file itself, so that a test can hand each of them something wrong and see it rejected.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "flashtile"

FILE_LINES = 500
HOST_LINES = 60
DEVICE_LINES = 120
HOST_ARGUMENTS = 10
ENVIRONMENT_VARIABLES = 3

Function = ast.FunctionDef | ast.AsyncFunctionDef


def module_name(path: Path) -> str:
    """flashtile.backends.triton.forward for src/flashtile/backends/triton/forward.py."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@dataclass(frozen=True)
class Arrows:
    """Who may import whom: a unit sees only units of a higher rank; backends are units of one rank."""

    ranks: dict[str, int]

    @classmethod
    def from_document(cls, text: str) -> Arrows:
        """Reads the line of arrows and the line of leaves in docs/design.md."""
        line = re.search(r"^(    \S.* ->(?:.*\n    )+.*leaves)$", text, re.MULTILINE)
        leaves = re.search(r"^Leaves: (.*?)\.", text, re.MULTILINE)
        if line is None or leaves is None:
            raise ValueError("docs/design.md has no line of arrows, or no line of leaves")
        layers = [[word.strip() for word in layer.split(",")] for layer in line.group(1).split("->")]
        layers[-1] = re.findall(r"`(\w+)`", leaves.group(1))
        return cls({unit: rank for rank, layer in enumerate(layers) for unit in layer})

    def unit(self, module: str) -> str:
        """The unit a module belongs to: "api", "reference", "backends/triton"; "flashtile" for the package itself."""
        parts = module.split(".")
        if len(parts) == 1:
            return "flashtile"
        return "/".join(parts[1:3]) if parts[1] == "backends" else parts[1]

    def rank(self, unit: str) -> float | None:
        if unit == "flashtile":
            # The package exports api and integrations: only what stands above both may import it as a user does.
            return self.ranks["integrations"] - 0.5
        return self.ranks.get("backends/*" if unit.startswith("backends") else unit)

    def violations(self, module: str, source: str) -> list[str]:
        """The imports in a module's source that go against the arrows."""
        here = self.unit(module)
        if here in ("flashtile", "__main__"):
            return []  # exports and the way into the command line
        if self.rank(here) is None:
            return [f"{module}: {here} has no place in the arrows of docs/design.md"]
        found = []
        for imported in imports(source, module):
            there = self.unit(imported)
            if there == here:
                continue
            if self.rank(there) is None:
                found.append(f"{module} imports {imported}, which has no place in the arrows")
            elif self.rank(there) <= self.rank(here):
                found.append(f"{module} imports {imported}: against the arrows")
        return found


def imports(source: str, module: str) -> Iterator[str]:
    """Every flashtile module that a source imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "flashtile")
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: -node.level]
                base = ".".join([*parents, *([base] if base else [])])
            if base == "flashtile" or base.startswith("flashtile."):
                names = [f"{base}.{alias.name}" for alias in node.names]
                yield from (name if _is_module(name) else base for name in names)


def _is_module(name: str) -> bool:
    path = PACKAGE.parent.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def functions(source: str) -> Iterator[tuple[str, Function]]:
    """(qualified name, node) of every function and method."""

    def walk(node: ast.AST, prefix: str) -> Iterator[tuple[str, Function]]:
        for child in ast.iter_child_nodes(node):
            named = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
            name = f"{prefix}{child.name}" if named else ""
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield name, child
            yield from walk(child, f"{name}." if named else prefix)

    yield from walk(ast.parse(source), "")


def is_device(function: Function) -> bool:
    """True for source in Triton's language: a decorator whose last name is jit (triton.jit, gluon.jit)."""
    targets = (d.func if isinstance(d, ast.Call) else d for d in function.decorator_list)
    return any(ast.unparse(target).split(".")[-1] == "jit" for target in targets)


def length(function: Function) -> int:
    """Lines of a function without its docstring: a full contract is no reason for a shorter function."""
    lines = function.end_lineno - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function, clean=False) is not None:
        lines -= first.end_lineno - first.lineno + 1
    return lines


def argument_count(function: Function) -> int:
    arguments = function.args
    named = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return len([name for name in named if name not in ("self", "cls")])


def oversized(where: str, source: str) -> list[str]:
    """Files and functions that are longer than their budget."""
    lines = len(source.splitlines())
    found = [f"{where}: {lines} lines, at most {FILE_LINES}"] if lines > FILE_LINES else []
    for name, function in functions(source):
        budget = DEVICE_LINES if is_device(function) else HOST_LINES
        if length(function) > budget:
            found.append(f"{where}: {name} has {length(function)} lines, at most {budget}")
    return found


def too_many_arguments(where: str, source: str, exempt: set[str] = frozenset()) -> list[str]:
    """Host functions with more arguments than the budget, and exemptions that no function needs."""
    wide = {
        name: argument_count(function)
        for name, function in functions(source)
        if not is_device(function) and argument_count(function) > HOST_ARGUMENTS
    }
    found = [f"{where}: {name} has {n} arguments, at most {HOST_ARGUMENTS}" for name, n in wide.items()]
    needless = [f"{where}: {name} is exempt and needs no exemption" for name in sorted(exempt - set(wide))]
    return [sentence for sentence in found if sentence.split()[1] not in exempt] + needless


def environment_variables(source: str) -> set[str]:
    """Names of the environment variables that a source reads or writes; "?" for one that is computed."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("environ"):
            found.add(_literal(node.slice))
        elif isinstance(node, ast.Call) and _reads_environment(ast.unparse(node.func)):
            found.add(_literal(node.args[0]))
        elif isinstance(node, ast.Compare) and any(ast.unparse(c).endswith("environ") for c in node.comparators):
            found.add(_literal(node.left))
    return found


def _reads_environment(function: str) -> bool:
    return function.endswith(("environ.get", "environ.setdefault", "environ.pop", "getenv", "putenv"))


def _literal(node: ast.expr) -> str:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else "?"


_SUFFIXES = r"\.(?:py|md|txt|toml|json|jsonl|png|html|svg|yaml|yml)"


def paths_in(document: str) -> set[str]:
    """What a Markdown document names as a file or folder: code spans, links and arguments of shown commands."""
    fenced = "\n".join(re.findall(r"^```.*?$(.*?)^```", document, re.MULTILINE | re.DOTALL))
    prose = re.sub(r"^```.*?^```", "", document, flags=re.MULTILINE | re.DOTALL)
    spans = re.findall(r"`([^`\n]+)`", prose)
    links = [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", prose) if "://" not in target]
    named = {span for span in spans if re.fullmatch(rf"[\w./-]+(?:{_SUFFIXES}|/)", span)}
    shown = set(re.findall(r"(?<![\w./<-])((?:\w[\w.-]*/)+[\w.-]+\.py)\b", fenced))
    return named | shown | {link for link in links if link}


def missing_paths(document: str, folder: Path) -> list[str]:
    """Paths that a document in `folder` names and that are neither beside it, in the repository nor in the package.

    A bare file name may stand anywhere in the package: each backend has its configs.py.
    """
    places = (folder, ROOT, PACKAGE, ROOT / "tests")
    bare = {path.name for path in PACKAGE.rglob("*") if path.is_file()}
    named = paths_in(document) - bare
    return sorted(path for path in named if not any((place / path).exists() for place in places))
