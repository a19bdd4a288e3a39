"""Every example runs: doctests of the modules, and the Python of the README and of a page of the docs."""

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


@pytest.mark.parametrize("page", ["README.md", "docs/frameworks.md"])
def test_the_python_of_a_page(page: str) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        exec(compile(block, page, "exec"), {"__name__": "page"})
