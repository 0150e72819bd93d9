"""The code version of a row: a hash of the sources that computed it, blind to comments, docstrings and formatting."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import CodeType
from typing import Any

from ufm.sweep.errors import SweepError

PACKAGE = Path(__file__).parents[1]
UNREAD = ("plots",)  # folders of the package that no result depends on


def code_version(function: Callable[..., Any]) -> str:
    """16 hexadecimal digits of sha256 over this package, the module that defines `function`, and the function's name in it.

    Modules that the function's own module imports are not read, other packages neither: give run a version= of your own where they
    matter. A function typed at a prompt is its source where Python still has it, its bytecode otherwise (which changes with
    Python's own version, as the parsed sources may). SweepError for what is no plain function: a value captured or bound beforehand
    would change the rows unseen.
    """
    if not inspect.isfunction(function) or function.__closure__:
        raise SweepError(
            f"run: function is {function!r:.80}, but only functions that capture nothing have a code version; "
            "define it with def at the top of a module and put its options into the points, or give version="
        )
    texts = [package_source(PACKAGE), function.__qualname__, _module_source(function)]
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


@functools.cache
def package_source(package: Path) -> str:
    """The meaning of all sources below a folder, in the order of their paths."""
    paths = sorted(path for path in package.rglob("*.py") if path.relative_to(package).parts[0] not in UNREAD)
    return "\0".join(f"{path.relative_to(package).as_posix()}\0{meaning(path.read_text(encoding='utf-8'))}" for path in paths)


def meaning(source: str) -> str:
    """The parsed source without docstrings, comments and formatting."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            body[:1] = [] if len(body) > 1 else [ast.Pass()]
    return ast.dump(tree)


def _module_source(function: Callable[..., Any]) -> str:
    path = Path(inspect.getsourcefile(function) or "")
    if path.suffix == ".py" and path.is_file():
        return meaning(path.read_text(encoding="utf-8"))
    try:
        return meaning(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError):
        return _bytecode(function.__code__)


def _bytecode(code: CodeType) -> str:
    inner = [_bytecode(constant) if isinstance(constant, CodeType) else repr(constant) for constant in code.co_consts]
    return "\0".join([code.co_code.hex(), *code.co_names, *code.co_varnames, *inner])
