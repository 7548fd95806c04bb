"""The rules of the book: what makes one long file readable is checked here, not hoped for.

`python -m tests.test_layout` prints how long the chapters are; with --write it makes the
tables of specifications in README.md anew.
"""

from __future__ import annotations

import ast
import functools
import io
import re
import statistics
import subprocess
import symtable
import sys
import tokenize
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

import xmppd

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
TOP_LEVEL = {"xmppd.py", "tests", "README.md", "LICENSE", "example.toml", "pyproject.toml"} | {
    ".ci", ".gitignore", ".gitattributes",
}  # fmt: skip
LONGEST = 60  # lines of a function that gives no reason
SPECS = re.compile(r"<!-- specs -->\n(.*?)<!-- /specs -->", re.DOTALL)
COMPLIANCE = re.compile(r"<!-- compliance -->\n(.*?)<!-- /compliance -->", re.DOTALL)
RULER = re.compile(r"# ==== (\d+)\. (\S.*\S) ====")
CITATION = re.compile(r"XEP-\d{4}|RFC \d{4}")

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Chapter(NamedTuple):
    """A chapter with the lines it spans, the ruler's line being the first; the preface is number 0."""

    number: int
    title: str
    first: int
    last: int


class Book:
    """The server's source, read once."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.lines = source.splitlines()
        self.tree = ast.parse(source)
        self.docstring = ast.get_docstring(self.tree) or ""
        self.chapters = list(self._chapters())
        self.functions = [node for node in ast.walk(self.tree) if isinstance(node, Function)]
        self.comments = dict(comments_of(source))

    def _chapters(self) -> Iterator[Chapter]:
        rulers = [(at, match) for at, line in enumerate(self.lines, 1) if (match := RULER.fullmatch(line))]
        starts = [(0, "Preface", 1), *((int(match[1]), match[2], at) for at, match in rulers)]
        ends = [start[2] - 1 for start in starts[1:]] + [len(self.lines)]
        for (number, title, first), last in zip(starts, ends, strict=True):
            yield Chapter(number, title, first, last)

    def chapter_of(self, line: int) -> Chapter:
        """Return the chapter that a line belongs to."""
        return next(chapter for chapter in self.chapters if chapter.first <= line <= chapter.last)


def comments_of(source: str) -> Iterator[tuple[int, str]]:
    """Yield (line, comment)."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


@pytest.fixture(scope="module")
def book() -> Book:
    return Book(Path(xmppd.__file__).read_text())


# ---- chapters -------------------------------------------------------------------------


def test_contents_and_rulers_agree(book: Book) -> None:
    contents = re.search(r"^Contents\n((?: +\d+\. .*\n)+)", book.docstring + "\n", re.MULTILINE)
    assert contents, "the module's docstring has no contents"
    listed = [line.strip() for line in contents[1].splitlines()]
    assert listed == [f"{chapter.number}. {chapter.title}" for chapter in book.chapters[1:]]


def test_rulers_have_one_form_and_ascending_numbers(book: Book) -> None:
    almost = [line for line in book.lines if re.match(r"#\s*[=#*-]{3,}", line) and not RULER.fullmatch(line)]
    assert not almost, "other rulers"
    numbers = [chapter.number for chapter in book.chapters]
    assert numbers == sorted(set(numbers))


def test_each_chapter_opens_with_5_to_25_lines_of_prose(book: Book) -> None:
    lengths = {chapter.title: opening_length(book.lines[chapter.first : chapter.last]) for chapter in book.chapters[1:]}
    assert not {title: length for title, length in lengths.items() if not 5 <= length <= 25}


def opening_length(lines: Sequence[str]) -> int:
    """Count the comment lines with words in them, up to the first line that is none."""
    words = 0
    for line in lines:
        if not line.startswith("#"):
            break
        words += line.strip("# ") != ""
    return words


def test_no_chapter_uses_a_name_that_stands_further_down(book: Book) -> None:
    assert not list(forward_uses(book)), "(line, name, chapter that defines it)"


def forward_uses(book: Book) -> Iterator[tuple[int, str, str]]:
    """Yield (line of the statement, name, chapter that defines it) for what a reader would not know yet."""
    defined = {name: book.chapter_of(node.lineno) for node in book.tree.body for name in names_defined(node)}
    for node in book.tree.body:
        here = book.chapter_of(node.lineno).number
        for name in sorted(names_used(node) & defined.keys()):
            if defined[name].number > here:
                yield node.lineno, name, defined[name].title


def names_defined(node: ast.stmt) -> list[str]:
    """Return the names that a statement at the top of the module defines."""
    scope = symtable.symtable(ast.unparse(node), "xmppd", "exec")
    return [symbol.get_name() for symbol in scope.get_symbols() if symbol.is_assigned() or symbol.is_imported()]


def names_used(node: ast.stmt) -> set[str]:
    """Return the module's names that a statement reads, annotations aside, at once or when it is called."""
    bare = WithoutAnnotations().visit(ast.parse(ast.unparse(node)))
    return set(global_names(symtable.symtable(ast.unparse(bare), "xmppd", "exec")))


def global_names(scope: symtable.SymbolTable) -> Iterator[str]:
    """Yield the names that a scope and those in it take from the module."""
    for symbol in scope.get_symbols():
        if symbol.is_referenced() and (scope.get_type() == "module" or symbol.is_global()):
            yield symbol.get_name()
    for child in scope.get_children():
        yield from global_names(child)


class WithoutAnnotations(ast.NodeTransformer):
    """Take the annotations away: they are never evaluated, so they may name what comes later."""

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node.returns = None
        self.generic_visit(node)
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.stmt:
        self.generic_visit(node)
        if node.value is None:
            return ast.Pass()
        return ast.fix_missing_locations(ast.Assign([node.target], node.value, lineno=node.lineno))


def test_names_are_defined_once(book: Book) -> None:
    """Grep is the index."""
    names = [name for node in book.tree.body if not is_overload(node) for name in names_defined(node)]
    assert not {name for name in names if names.count(name) > 1}


def is_overload(node: ast.stmt) -> bool:
    return isinstance(node, Function) and any("overload" in ast.unparse(decorator) for decorator in node.decorator_list)


# ---- prose ----------------------------------------------------------------------------


def test_every_feature_cites_its_specification(book: Book) -> None:
    uncited = [node.name for node in features(book) if not CITATION.search(ast.get_docstring(node) or "")]
    assert not uncited


def features(book: Book) -> list[ast.ClassDef]:
    """Return the classes that are features, those of other features included."""
    found: dict[str, ast.ClassDef] = {}
    for node in book.tree.body:  # in reading order: a base class stands above
        if isinstance(node, ast.ClassDef) and {ast.unparse(base) for base in node.bases} & {"Feature", *found}:
            found[node.name] = node
    return list(found.values())


def test_everything_public_has_a_docstring(book: Book) -> None:
    missing = [name for name, node in public(book.tree.body) if not ast.get_docstring(node)]
    assert not missing


def public(body: Iterable[ast.stmt], within: str = "") -> Iterator[tuple[str, ast.ClassDef | Function]]:
    """Yield (dotted name, node) of the public classes, functions and methods."""
    for node in body:
        if isinstance(node, ast.ClassDef | Function) and not node.name.startswith("_"):
            yield within + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public(node.body, f"{within}{node.name}.")


def test_the_share_of_prose_is_that_of_a_book_that_teaches(book: Book) -> None:
    assert 0.15 <= prose_share(book) <= 0.40


def prose_share(book: Book) -> float:
    """Return the share of docstrings and lines of comment in all lines that are not empty."""
    docstrings = {line for node in documented(book.tree) for line in docstring_lines(node)}
    prose = docstrings | {line for line in book.comments if book.lines[line - 1].lstrip().startswith("#")}
    return len(prose) / sum(1 for line in book.lines if line.strip())


def documented(tree: ast.Module) -> Iterator[ast.Module | ast.ClassDef | Function]:
    """Yield what may have a docstring."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | Function):
            yield node


def docstring_lines(node: ast.Module | ast.ClassDef | Function) -> range:
    """Return the lines of a node's docstring."""
    if ast.get_docstring(node) is None:
        return range(0)
    text = node.body[0]
    return range(text.lineno, (text.end_lineno or text.lineno) + 1)


# ---- functions ------------------------------------------------------------------------


def length_of(function: Function) -> int:
    """Count the lines of a function, docstring included."""
    return (function.end_lineno or function.lineno) - function.lineno + 1


def test_long_functions_give_a_reason(book: Book) -> None:
    """`# long: reason`, on the line of the def or the one below."""
    long = [function for function in book.functions if length_of(function) > LONGEST]
    given = {line for line, comment in book.comments.items() if re.match(r"# long: \S", comment)}
    assert not [function.name for function in long if not given & {function.lineno, function.lineno + 1}]


def test_functions_are_short(book: Book) -> None:
    assert statistics.median(map(length_of, book.functions)) < 10


def measures(book: Book) -> Iterator[str]:
    """Yield how long everything is."""
    for chapter in book.chapters:
        yield f"{chapter.last - chapter.first + 1:6} lines  {chapter.number:2}. {chapter.title}"
    lengths = [length_of(function) for function in book.functions]
    yield f"{len(book.lines):6} lines in all, {prose_share(book):.0%} of them prose"
    yield f"{len(lengths):6} functions, median {statistics.median(lengths):.0f} lines, longest {max(lengths)}"


def test_broad_excepts_say_why(book: Book) -> None:
    handlers = [node for node in ast.walk(book.tree) if isinstance(node, ast.ExceptHandler)]
    assert not [node.lineno for node in handlers if node.type is None], "bare except"
    broad = [node.lineno for node in handlers if node.type and is_broad(node.type)]
    assert not [line for line in broad if line not in book.comments], "no comment that says why"


def is_broad(caught: ast.expr) -> bool:
    names = caught.elts if isinstance(caught, ast.Tuple) else [caught]
    return any(isinstance(name, ast.Name) and name.id in ("Exception", "BaseException") for name in names)


def test_what_this_house_does_without(book: Book) -> None:
    assert not [node.lineno for node in ast.walk(book.tree) if isinstance(node, ast.Global)], "global"
    imported = {name.partition(".")[0] for node in ast.walk(book.tree) for name in imports(node)}
    assert not imported & {"asyncio", "pickle", "marshal", "shelve"}
    unfinished = r"\b(TODO|FIXME|XXX|HACK|NotImplemented|not implemented|placeholder|stub)\b"
    assert not [line for line in book.lines if re.search(unfinished, line)]


def imports(node: ast.AST) -> list[str]:
    """Return the modules that a node imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else []


# ---- the files around it --------------------------------------------------------------


def test_the_top_level_holds_only_what_belongs_there() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("not a git checkout: nobody says which files belong to the project")
    assert {line.partition("/")[0] for line in tracked.stdout.splitlines()} <= TOP_LEVEL


@functools.cache
def project() -> dict[str, dict[str, list[str]]]:
    """Return the [project] of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]  # type: ignore[no-any-return]


def test_the_file_alone_asks_for_the_same_packages_as_the_project(book: Book) -> None:
    """PEP 723: `uv run xmppd.py` and `pipx run xmppd.py` read the block at the head."""
    block = re.search(r"^# /// script\n((?:#.*\n)+?)# ///$", book.source, re.MULTILINE)
    assert block, "no PEP 723 block"
    script = tomllib.loads(re.sub(r"^# ?", "", block[1], flags=re.MULTILINE))
    assert script["dependencies"] == project()["dependencies"]
    assert script["requires-python"] == project()["requires-python"]


def test_tests_wait_for_events_and_never_sleep() -> None:
    nap = re.compile(r"\bsleep\(")
    paths = [path for path in (ROOT / "tests").rglob("*.py") if path != Path(__file__)]
    assert not [str(path) for path in paths if nap.search(path.read_text())]


def test_the_readmes_commands_are_what_continuous_integration_runs() -> None:
    setup = "python3 -m venv .venv && .venv/bin/pip install --quiet --editable '.[test]' && .venv/bin/python -m tests"
    assert setup in README.read_text()
    assert setup in (ROOT / ".ci" / "run").read_text()


def test_the_readmes_table_of_specifications_is_the_codes() -> None:
    block = SPECS.search(README.read_text())
    assert block, "README.md has no <!-- specs --> block"
    assert block[1] == specs_table(), "write it anew: python -m tests.test_layout --write"


def specs_table() -> str:
    """Return the table of what the code says it supports, in Markdown."""
    rows = [f"| {spec} | {title} | {where} |\n" for spec, title, where in xmppd.supported_specs()]
    return "| Specification | Title | In the code |\n|---|---|---|\n" + "".join(rows)


def test_the_readmes_table_of_compliance_is_the_codes() -> None:
    block = COMPLIANCE.search(README.read_text())
    assert block, "README.md has no <!-- compliance --> block"
    assert block[1] == compliance_table(), "write it anew: python -m tests.test_layout --write"


def compliance_table() -> str:
    """Return what the compliance suites ask of a server and what is there, in Markdown."""
    rows = [f"| {' | '.join(row)} |\n" for row in xmppd.compliance_table()]
    return "| Suite | Level | Feature | Specifications | Here |\n|---|---|---|---|---|\n" + "".join(rows)


# ---- a bad book, in which all of this is found -----------------------------------------

BAD = """
'''A book.

Contents
     1. One
'''
# ==== 1. One ====
# too short
def long(first: Two, second=Two):
    return lambda: Two
class Late(Feature):
    '''No source.'''
    def method(self): return [name for name in later]
def twice(): pass
# ---- two ----
# ==== 2. Two ====
# Here
# is
# enough
# said
# already.
Two = 2
later = [Two]
def twice():
    try:
        import pickle
    except Exception:
        pass
""".lstrip()


def test_these_checks_find_what_they_look_for() -> None:
    bad = Book(BAD)
    assert [(line, name) for line, name, _ in forward_uses(bad)] == [(8, "Two"), (10, "later")]
    for check in (
        test_contents_and_rulers_agree,
        test_rulers_have_one_form_and_ascending_numbers,
        test_each_chapter_opens_with_5_to_25_lines_of_prose,
        test_no_chapter_uses_a_name_that_stands_further_down,
        test_names_are_defined_once,
        test_every_feature_cites_its_specification,
        test_everything_public_has_a_docstring,
        test_broad_excepts_say_why,
        test_what_this_house_does_without,
    ):
        with pytest.raises(AssertionError):
            check(bad)


def main() -> int:
    """Print the measures; with --write, write the table into README.md."""
    print("\n".join(measures(Book(Path(xmppd.__file__).read_text()))))
    if "--write" in sys.argv:
        text = README.read_text()
        text = SPECS.sub(lambda _: f"<!-- specs -->\n{specs_table()}<!-- /specs -->", text)
        text = COMPLIANCE.sub(lambda _: f"<!-- compliance -->\n{compliance_table()}<!-- /compliance -->", text)
        README.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
