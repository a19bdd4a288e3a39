"""The C++ package as it was installed: an example is built against it, run, and held to the same core in Python."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import oracle
import qaa
from qaa.cli import cmake_dir
from qaa.program import Program, program
from strategies import random_circuit

EXAMPLE = Path(__file__).parent.parent / "examples" / "cpp"


def run(*command: object, code: int = 0) -> str:
    result = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert result.returncode == code, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds nothing but the example's two files, so that headers can come from the package alone."""
    source, build = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("build")
    shutil.copytree(EXAMPLE, source, dirs_exist_ok=True)
    prefix = run(sys.executable, "-m", "qaa", "info", "--cmake-dir").strip()
    assert prefix == cmake_dir()
    run("cmake", "-S", source, "-B", build, f"-DCMAKE_PREFIX_PATH={prefix}", "-DCMAKE_CXX_FLAGS=-Wall -Wextra -Werror")
    run("cmake", "--build", build)
    return build / "gradient"


@pytest.mark.parametrize("header", ["qaa.h", "basic.h", "plan.h", "cuda.h", "cuda/program.h", "cuda/layout.h"])
def test_every_installed_header_compiles_by_itself(header: str, tmp_path: Path) -> None:
    include = Path(cmake_dir()).parents[2] / "include"
    assert (include / "qaa" / header).is_file()
    (tmp_path / "it.cpp").write_text(f"#include <qaa/{header}>\n")
    compiler = os.environ.get("CXX", "c++")
    run(compiler, "-std=c++20", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", f"-I{include}", tmp_path / "it.cpp")


REFUSALS = """
#include <cstdio>
#include <functional>
#include <stdexcept>
#include <utility>

#include <qaa/qaa.h>

int main() {
  float x[8] = {1, 2, 3, 4, 5, 6, 7, 8}, z[4] = {9, 9, 9, 9};
  double grad_theta[1];
  qaa::Plan moved = qaa::compile("wires 2; theta 0; H 0 | ZI,IZ | normalize"), empty, plan = std::move(moved);
  const qaa::ConstMatrix in{x, 2, 4, 4}, grad{x, 2, 2, 2};
  const qaa::Matrix out{z, 2, 2, 2};
  const std::function<void()> calls[] = {
      [&] { qaa::forward({empty, nullptr, in, out}); },
      [&] { qaa::forward({moved, nullptr, in, out}); },
      [&] { qaa::backward({empty, nullptr, in, grad, grad_theta, {}}); },
      [&] { qaa::backward({moved, nullptr, in, grad, grad_theta, {}}); },
      [&] { qaa::count_operations(empty, 1); },
      [&] { qaa::forward({plan, nullptr, in, out, 0}); },
      [&] { qaa::backward({plan, nullptr, in, grad, grad_theta, {}, -3}); },
      [&] { qaa::project({grad, grad, {}, grad, 1.0, out, 0}); },
      [&] { qaa::project_backward({grad, grad, grad, 1.0, out, out, {}, 0}); },
  };
  for (const auto& call : calls) {
    try {
      call();
      std::puts("done");
    } catch (const std::invalid_argument& error) {
      std::puts(error.what());
    }
  }
  std::printf("%g\\n", z[0]);
  qaa::forward({plan, nullptr, in, out});
  std::printf("%.4f\\n", z[1]);
}
"""


def test_empty_plans_and_no_threads_are_refused(tmp_path: Path) -> None:
    (tmp_path / "refusals.cpp").write_text(REFUSALS)
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.20)\nproject(refusals LANGUAGES CXX)\nfind_package(qaa CONFIG REQUIRED)\n"
        "add_executable(refusals refusals.cpp)\ntarget_link_libraries(refusals PRIVATE qaa::qaa)\n"
    )
    run("cmake", "-S", tmp_path, "-B", tmp_path / "build", f"-DCMAKE_PREFIX_PATH={cmake_dir()}")
    run("cmake", "--build", tmp_path / "build")
    lines = run(tmp_path / "build" / "refusals").splitlines()
    assert lines[:5] == ["expected a plan from compile(), received one that is empty or was moved from"] * 5
    assert lines[5:9] == [f"expected threads of at least 1, received {received}" for received in (0, -3, 0, 0)]
    # nothing was written; then <Z> of the second wire of (1, 2, 3, 4), which H on the first leaves as it is
    assert lines[9:] == ["9", f"{(1 + 9 - 4 - 16) / 30:.4f}"]


READER = """
#include <cstdio>
#include <iostream>
#include <stdexcept>
#include <string>

#include <qaa/qaa.h>

int main() {
  for (std::string text; std::getline(std::cin, text, '\\0');) {
    try {
      qaa::compile(text);
      std::puts("taken");
    } catch (const std::invalid_argument& error) {
      std::puts("refused");
    }
  }
}
"""


def mutated(rng: np.random.Generator, text: str) -> str:
    """One to three characters or words of a program's text replaced, taken out or put in."""
    parts = list(text) if rng.integers(2) else re.findall(r" +|[^ ;]+|;", text)
    for _ in range(rng.integers(1, 4)):
        at, count = int(rng.integers(len(parts))), int(rng.integers(2))
        new = ["", *" ;x|tT+-_01293[]:,/\t\u00a0\uff11\u00b2", *parts][rng.integers(len(parts) + 22)]
        parts[at : at + count] = [new]
    return "".join(parts)


def is_program(text: str) -> bool:
    try:
        Program.parse(text)
    except ValueError as error:
        assert re.fullmatch("expected .+, received .+", str(error))
        return False
    return True


def test_both_parsers_take_and_refuse_the_same_texts(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    circuits = [random_circuit(rng, n_wires=1 + i % 4, n_gates=i % 6) for i in range(30)]
    known = [str(program(c, ("z", "probs[:2]", "state")[i % 3], i % 2 > 0)) for i, c in enumerate(circuits)]
    texts = [*known, *(mutated(rng, known[i % 30]) for i in range(6000))]
    (tmp_path / "reader.cpp").write_text(READER)
    library, reader = Path(cmake_dir()).parents[1], tmp_path / "reader"
    options = [f"-I{library.parent / 'include'}", f"-L{library}", "-lqaa", f"-Wl,-rpath,{library}", "-o", reader]
    run(os.environ.get("CXX", "c++"), "-std=c++20", tmp_path / "reader.cpp", *options)
    result = subprocess.run([reader], input="\0".join(texts).encode(), capture_output=True, check=True)
    answers = [line == b"taken" for line in result.stdout.splitlines()]
    assert all(answers[: len(known)]) and 330 < sum(answers) < 3000
    assert [text for text, taken in zip(texts, answers, strict=True) if is_program(text) != taken] == []


def numbers_after(label: str, text: str) -> np.ndarray:
    found = re.search(rf"{label} (.*)", text)
    assert found, text
    return np.array(found[1].split(), float)


def test_the_example_agrees_with_finite_differences_and_with_the_oracle(example: Path) -> None:
    circuit = qaa.ansatz("ring", n_wires=4, n_layers=2)
    text = run(example)
    theta = np.sin(1 + 0.7 * np.arange(circuit.n_parameters)).reshape(circuit.parameter_shape)
    x = np.sin(1 + 0.7 * np.arange(100 * 12)).reshape(100, 12)
    expected = oracle.features(circuit, theta, x)
    grad_theta, _ = oracle.vjp(circuit, theta, x, np.ones_like(expected))
    np.testing.assert_allclose(numbers_after("<Z> of the first row", text), expected[0], rtol=0, atol=1e-13)
    np.testing.assert_allclose(numbers_after("sum of the angles' gradient", text), [grad_theta.sum()], atol=1e-10)
    assert numbers_after("largest deviation from finite differences", text) < 1e-7
    assert f"instruction set {qaa._core.instruction_set()}" in text
    assert run(example, program(circuit, "z", True)) == text  # the same circuit, from its text


@pytest.mark.parametrize(
    ("text", "received"),
    [
        ("wires 2; theta 0; H 0", "'CIRCUIT | READOUT | normalize' or '... | as is', received 'wires 2; theta 0; H 0'"),
        ("wires; theta 0 | ZZ | as is", "'wires N; theta SHAPE; GATE ...', received 'wires; theta 0'"),
        ("wires 2; H 0 | ZZ | as is", "'wires N; theta SHAPE; GATE ...', received 'wires 2; H 0'"),
        ("wires 2; theta 1x; H 0 | ZZ | as is", "an integer of at least 0, received ''"),
        ("wires 2; theta 0; H zero | ZZ | as is", "an integer of at least 0, received 'zero'"),
        ("wires 2; theta 0; H 0; | ZZ | as is", "a gate between semicolons, received ''"),
        ("wires 2; theta 0; FOO 0 | ZZ | as is", "a gate of the gate table, received 'FOO'"),
        ("wires 2; theta 0; H 2 | ZZ | as is", "wires below 2, received H on wire 2"),
        ("wires 2; theta 65536x65536; H 0 | ZZ | as is", "less than 2^32 parameters, received '65536x65536'"),
        ("wires 2; theta 0; H 0 | ZZ,Z | as is", "received"),
        ("wires 2; theta 0; H 0 | probs[:5] | as is", "received"),
        ("wires 2; theta 0; H 0 | state[:1 | as is", "a readout 'probs[:K]' or 'state[:K]', received 'state[:1'"),
    ],
)
def test_a_text_that_is_no_program_is_named(example: Path, text: str, received: str) -> None:
    message = run(example, text, code=2)
    assert message.startswith("gradient: expected ") and received in message and message.count("\n") == 1
