"""Every example runs: doctests of the modules, and the Python of the README and of the documentation's pages."""

from __future__ import annotations

import doctest
import importlib.util
import pkgutil
import re
from pathlib import Path

import pytest

import qaa

ROOT = Path(__file__).parent.parent
MODULES = [
    module.name
    for module in pkgutil.walk_packages(qaa.__path__, "qaa.")
    if not module.name.endswith(("_core", "__main__"))
]


#: Examples that need a package which not every environment has.
NEEDS = {"qaa.circuit.Circuit.to_qiskit": "qiskit"}


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name: str) -> None:
    runner = doctest.DocTestRunner()
    for test in doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(name)):
        if test.name not in NEEDS or importlib.util.find_spec(NEEDS[test.name]):
            runner.run(test)
    assert runner.failures == 0


def test_there_are_examples() -> None:
    finder = doctest.DocTestFinder(exclude_empty=True)
    with_examples = [name for name in MODULES if any(t.examples for t in finder.find(importlib.import_module(name)))]
    assert {"qaa.arrays", "qaa.circuit", "qaa.jax", "qaa.nn", "qaa.ops", "qaa.peft.config"} <= set(with_examples)


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


PAGES = [page for page in (ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))) if python_blocks(page)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_pages_python(page: Path) -> None:
    """The blocks of a page run one after the other, as a reader would run them."""
    names = {"__name__": page.stem}
    for block in python_blocks(page):
        exec(compile(block, page.name, "exec"), names)


def test_there_are_pages_with_python() -> None:
    assert {"README.md", "frameworks.md", "quickstart.md", "training.md"} <= {page.name for page in PAGES}


def test_the_pictured_circuit_is_as_it_is_drawn() -> None:
    expected = qaa.ansatz("ring", n_wires=4, n_layers=1).draw("svg")
    assert (ROOT / "docs" / "figures" / "ring.svg").read_text(encoding="utf-8") == expected
