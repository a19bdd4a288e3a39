"""Every example runs: doctests of the modules, and the README's Python."""

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
    assert {"qaa.arrays", "qaa.circuit", "qaa.nn", "qaa.ops", "qaa.peft.config"} <= set(with_examples)


def test_the_readmes_python() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
