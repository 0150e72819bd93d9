"""`python -m studies` lists the studies; `python -m studies NAME [options]` runs one."""

from __future__ import annotations

import difflib
import importlib
import sys

import tyro

from studies import STUDIES
from ufm.arrays import NoDevice


def main(arguments: list[str]) -> int:
    """Run what the command line asks for; the exit status."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(listing())
        return 0
    name, *rest = arguments
    if name not in STUDIES:
        return _fail(unknown(name))
    study = importlib.import_module(f"studies.{name}")
    options = tyro.cli(study.Options, args=rest, prog=f"python -m studies {name}", config=(tyro.conf.FlagCreatePairsOff,))
    try:
        return int(study.main(options))
    except (OSError, NoDevice, ImportError) as error:
        return _fail(f"studies {name}: {error}")
    except KeyboardInterrupt:
        _fail(f"studies {name}: interrupted; what was finished is stored, run again to go on")
        return 130


def listing() -> str:
    """The studies with their questions, one a line."""
    width = max(map(len, STUDIES))
    lines = [f"  {name:<{width}}  {question}" for name, question in STUDIES.items()]
    return "\n".join(["python -m studies NAME [options]; NAME --help for the options", "", *lines])


def unknown(name: str) -> str:
    """One sentence for a name that is no study, with the nearest one."""
    near = difflib.get_close_matches(name, STUDIES, n=1)
    remedy = f"did you mean {near[0]}?" if near else f"the studies are: {', '.join(STUDIES)}"
    return f"studies: there is no study named {name!r}; {remedy}"


def _fail(sentence: str) -> int:
    print(sentence, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
