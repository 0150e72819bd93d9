"""The house rules that a program can read: imports point down, `import ufm` stays light, some spellings are banned."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent

# Each storey may import the ones before it, and its own rooms so long as no circle closes.
STOREYS = (
    ("arrays", "records", "counts", "sweep"),
    ("frames", "losses", "polar"),
    ("etf", "etf_policies", "heads"),
    ("problem", "chain", "starts"),
    ("objective", "coordinates", "headed", "certificate", "metrics", "theory"),
    ("rules", "flow", "stabilised", "dynamics"),
    ("solvers",),
    ("landscape",),
    ("bridge", "plots"),
    ("__init__",),
    ("figures",),
    ("studies",),
)
LEVEL = {room: level for level, storey in enumerate(STOREYS) for room in storey}

# What a room may see of `ufm` where that is less than every storey below; () is nothing.
ONLY = {
    "theory": ("counts", "frames", "problem", "records"),  # its agreement with the solvers is evidence
    "sweep": (),  # knows nothing of the models
    "plots": ("arrays", "records", "sweep"),  # knows nothing of solvers
    "figures": ("plots", "counts", "records", "sweep"),  # draw stored rows and compute nothing again
}
READERS_OF_THEORY = ("landscape", "__init__", "studies")

HEAVY = ("scipy", "matplotlib", "plotly", "pymanopt", "autograd", "torch", "sklearn", "distributed", "xarray", "loky", "tyro", "tqdm")


class Ban(NamedTuple):
    """A pattern no line may hold, in files whose path starts with one of `where` and is not in `but`."""

    pattern: str
    why: str
    where: tuple[str, ...] = ("ufm/", "studies/", "figures/")
    but: tuple[str, ...] = ()


BANS = (
    Ban(r"\beinsum\b", "not in the array standard; write @"),
    Ban(r"(?<![\w.])print\(", "results are returned; messages go to logging", where=("ufm/",)),
    Ban(
        r"\.T\b",
        "not in the array standard for batches; write arrays.transpose",
        where=("ufm/chain.py", "ufm/objective.py", "ufm/losses.py"),
        but=("lam_w.T",),
    ),
    Ban(r"np\.random\.(seed|rand|randn|random|normal|uniform|choice|shuffle|permutation)\b", "randomness is passed in as a Generator"),
    Ban(r"^\s*(import|from) torch\b", "torch lives in the bridge and in arrays", where=("ufm/",), but=("ufm/bridge", "ufm/arrays.py")),
    Ban(r"^(import|from) torch\b", "imported inside the function that needs it", but=("ufm/bridge",)),
    Ban(r"^\s*(import|from) pymanopt\b", "one module knows pymanopt", but=("ufm/solvers/stiefel.py",)),
    Ban(r"\bpickle\b(?!s)", "files hold arrays and text only"),
    Ban(r"allow_pickle\s*=\s*True", "files hold arrays and text only"),
    Ban(r"\bos\.(environ|getenv)\b", "no environment variable changes behaviour"),
    Ban(r"\b(TODO|FIXME|XXX)\b", "finish it, or say what is not done"),
    Ban(r"\*\*kwargs\b", "options are named"),
    Ban(r"(?<![\w.])/(wor[k]|tm[p]|hom[e]|roo[t]|op[t])/", "no machine's paths", where=("",)),
    Ban(r"\bpy[p]i\.|\bpython[h]osted\b", "no package registry", where=("",)),
)
CREATORS = ("zeros", "ones", "full", "eye", "empty", "arange", "linspace")


def sources() -> list[Path]:
    return sorted(path for folder in ("ufm", "studies", "figures") for path in (ROOT / folder).rglob("*.py"))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module(path: str) -> str:
    """ufm/theory/seli.py -> ufm.theory.seli; a package's own file is the package."""
    return path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


def room(name: str) -> str:
    """ufm.theory.seli -> theory, ufm -> __init__, studies.maps -> studies."""
    head, *rest = name.split(".")
    return head if head != "ufm" else (rest[0] if rest else "__init__")


def imports(path: str, source: str, known: set[str]) -> set[str]:
    """The modules of this repository that a file imports, wherever in the file; `from ufm import x` is ufm.x where that is a module."""
    package = module(path) if path.endswith("__init__.py") else module(path).rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            up = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*up, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names}
    return {name for name in found if name.split(".")[0] in ("ufm", "studies", "figures")} - {module(path)}


def wrong_way(importer: str, imported: str) -> str | None:
    """What is wrong with one room importing another, or None."""
    for name in (importer, imported):
        if name not in LEVEL:
            return f"{name} is no room of the table"
    if importer == imported:
        return None
    if importer in ONLY and imported not in ONLY[importer]:
        return f"{importer} may see {', '.join(ONLY[importer]) or 'nothing'} of ufm, not {imported}"
    if imported == "theory" and importer not in READERS_OF_THEORY:
        return f"{importer} may not see theory"
    if LEVEL[imported] > LEVEL[importer]:
        return f"{importer} may not look up to {imported}"
    return None


def circle(graph: dict[str, set[str]]) -> list[str] | None:
    """One circle of a directed graph, or None."""
    done: set[str] = set()

    def walk(node: str, path: list[str]) -> list[str] | None:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return None
        for after in sorted(graph.get(node, ())):
            if found := walk(after, [*path, node]):
                return found
        done.add(node)
        return None

    return next((found for node in sorted(graph) if (found := walk(node, []))), None)


def banned(path: str, source: str) -> list[str]:
    """The banned spellings of a file."""
    found = []
    for ban in BANS:
        if path.startswith(ban.where) and not path.startswith(tuple(b for b in ban.but if "/" in b) or ("\0",)):
            harmless = [b for b in ban.but if "/" not in b]
            for number, line in enumerate(source.splitlines(), 1):
                for text in harmless:
                    line = line.replace(text, "")
                if re.search(ban.pattern, line):
                    found.append(f"{path}:{number}: {line.strip()[:60]} ({ban.why})")
    for node in ast.walk(ast.parse(source if path.endswith(".py") and path.startswith(("ufm/", "studies/", "figures/")) else "")):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CREATORS:
            missing = {"dtype", "device"} - {k.arg for k in node.keywords}
            if isinstance(node.func.value, ast.Name) and node.func.value.id == "xp" and missing:
                found.append(
                    f"{path}:{node.lineno}: xp.{node.func.attr} without {' and '.join(sorted(missing))} (defaults differ between libraries)"
                )
    if path.endswith("/utils.py"):
        found.append(f"{path}: a room has a subject (no utils.py)")
    return found


def known_modules() -> set[str]:
    return {module(relative(path)) for path in sources()}


def test_there_is_something_to_read() -> None:
    assert {"ufm", "ufm.problem", "ufm.losses"} <= known_modules()


@pytest.mark.parametrize("path", sources(), ids=relative)
def test_imports_point_down(path: Path) -> None:
    """A file imports only rooms below its own, at module level or inside a function."""
    here = module(relative(path))
    seen = imports(relative(path), path.read_text(), known_modules())
    assert [] == [f"{here}: {wrong}" for name in sorted(seen) if (wrong := wrong_way(room(here), room(name)))]


def test_no_circle() -> None:
    """The modules can be written in one line so that each imports only earlier ones."""
    known = known_modules()
    graph = {module(relative(p)): imports(relative(p), p.read_text(), known) - {"ufm"} for p in sources()}
    assert circle(graph) is None


@pytest.mark.parametrize("path", sources(), ids=relative)
def test_no_banned_spelling(path: Path) -> None:
    assert banned(relative(path), path.read_text()) == []


def test_no_banned_spelling_elsewhere() -> None:
    """The other files that people read name no machine's paths and no registry."""
    others = [*ROOT.glob("*.*"), *(ROOT / "tests").rglob("*.py"), *(ROOT / ".ci").iterdir(), *(ROOT / "studies").glob("*.md")]
    texts = {relative(path): path.read_text() for path in others if path.is_file()}
    assert {"README.md", "pyproject.toml", "tests/test_rooms.py"} <= set(texts)
    assert [] == [line for path, text in texts.items() for line in banned(path, text)]


BAD = {
    "ufm/losses.py": "import torch\nfrom ufm.solvers import robust\n",
    "ufm/theory/deep.py": "def f():\n    from ..objective import objective\n",
    "ufm/sweep/run.py": "from ufm import problem\n",
    "ufm/solvers/robust.py": "import ufm.theory\n",
    "ufm/plots/phase.py": "from ufm.landscape import hessian\n",
    "ufm/strange.py": "import ufm.arrays\n",
    "ufm/problem.py": "import studies.maps\n",
    "figures/maps.py": "import ufm\n",
}


@pytest.mark.parametrize("path", BAD)
def test_wrong_imports_are_seen(path: str) -> None:
    """The reader of imports finds each of these, absolute, relative, hidden in a function or by `from ufm import`."""
    known = {
        "ufm",
        "ufm.problem",
        "ufm.arrays",
        "ufm.objective",
        "ufm.solvers",
        "ufm.theory",
        "ufm.landscape",
        "ufm.solvers.robust",
        "studies.maps",
    }
    assert any(wrong_way(room(module(path)), room(name)) for name in imports(path, BAD[path], known))


def test_circles_are_seen() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None


@pytest.mark.parametrize(
    "line",
    [
        "y = np.einsum('ij->ji', x)",
        "print(x)",
        "y = x.T",
        "np.random.seed(0)",
        "x = np.random.rand(3)",
        "    import torch",
        "import pymanopt",
        "import pickle",
        "np.load(f, allow_pickle=True)",
        "os.environ['X'] = '1'",
        "x = 1  # TODO",
        "def f(**kwargs): ...",
        "x = xp.zeros((2, 2), dtype=y.dtype)",
        "x = xp.eye(3)",
        "x = '/" + "tmp/x'",
        "url = 'https://py" + "pi.org/x'",
    ],
)
def test_banned_spellings_are_seen(line: str) -> None:
    source = f"if True:\n{line}\n" if line.startswith(" ") else f"{line}\n"
    assert len(banned("ufm/losses.py", source)) >= 1


def test_innocent_spellings_pass() -> None:
    source = "x = xp.zeros((2,), dtype=y.dtype, device=device_of(y))\nw = problem.lam_w.T\nblueprint(x)\nr = np.random.default_rng(0)\n"
    assert banned("ufm/objective.py", source) == []


REPORT = "import atexit, sys; atexit.register(lambda: sys.__stderr__.write('\\n' + ' '.join(sys.modules)))\n"


def loaded(code: str) -> set[str]:
    """The modules a fresh interpreter has loaded after running `code`."""
    done = subprocess.run([sys.executable, "-c", REPORT + code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.splitlines()[-1].split())


def test_import_ufm_is_light() -> None:
    """`import ufm` loads numpy and the array shim, and none of the heavy packages."""
    modules = loaded("import ufm")
    assert {"ufm", "numpy"} <= modules
    assert modules.isdisjoint(HEAVY)


@pytest.mark.parametrize("arguments", ["--help", "minority_collapse --help"])
def test_help_is_light(arguments: str) -> None:
    """A help text needs the command-line package at most."""
    modules = loaded(f"import runpy; sys.argv[1:] = {arguments.split()!r}; runpy.run_module('studies', run_name='__main__')")
    assert "studies.minority_collapse" in modules or arguments == "--help"
    assert modules.isdisjoint(set(HEAVY) - {"tyro"})
