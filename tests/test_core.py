"""The compiled core through its C++ header, without Python: also as another processor would run it."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import oracle
from qaa.circuit import GATES, ansatz
from qaa.cli import cmake_dir
from strategies import Array, Problem, random_circuit, random_problem

ROOT = Path(__file__).parent.parent
KINDS = {"expval": 0, "probs": 1, "state": 2}


def text_of(problem: Problem) -> str:
    """A case as tests/core/replay.cpp reads it; numbers in hexadecimal, to the last bit."""
    circuit, readout = problem.circuit, problem.readout
    words: list[object] = [circuit.n_wires, circuit.n_parameters, len(circuit.gates)]
    for gate in circuit.gates:
        words += [gate.name, len(gate.wires), *gate.wires, len(gate.parameters), *gate.parameters]
    words += [KINDS[readout.kind], readout.n_outputs, *readout.paulis, int(problem.normalize), *problem.x.shape]
    options = {"normalize": problem.normalize}
    features = oracle.features(circuit, problem.theta, problem.x, readout, **options)
    grad_theta, grad_x = oracle.vjp(circuit, problem.theta, problem.x, problem.grad, readout, **options)

    def numbers(a: Array) -> list[str]:
        a = np.ascontiguousarray(a)
        return [float(v).hex() for v in a.view(a.real.dtype).ravel()]

    for array in (problem.theta, problem.x, problem.grad, features, grad_theta, grad_x):
        words += numbers(array)
    return " ".join(map(str, words))


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty circuits that hold every gate, on 1 to 8 wires, with every kind of readout, and eight default ones."""
    rng = np.random.default_rng(20)
    problems = []
    for i in range(40):
        circuit = random_circuit(rng, n_wires=1 + i % 8, n_gates=int(rng.integers(1, 40)))
        problems.append(random_problem(rng, circuit, batch=int(rng.integers(1, 9))))
    for n in range(1, 9):
        problems.append(random_problem(rng, ansatz("ring", n), "z", batch=9, normalize=True))
    assert {gate.name for problem in problems for gate in problem.circuit.gates} == set(GATES)
    assert {problem.readout.kind for problem in problems} == set(KINDS)
    path = tmp_path_factory.mktemp("cases") / "cases.txt"
    path.write_text("\n".join(map(text_of, problems)))
    return path


def build(folder: Path, *options: str) -> Path:
    for command in (
        ["cmake", "-S", str(ROOT), "-B", str(folder), "-DQAA_BUILD_REPLAY=ON", *options],
        ["cmake", "--build", str(folder), "--parallel", "2"],
    ):
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return folder / "replay"


@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")
def test_the_core_runs_without_python(cases: Path, tmp_path: Path) -> None:
    """With the address and undefined-behaviour sanitizers watching, and with a baseline of sixteen lanes and four wires
    a pass, as AVX-512 has them, so that these are run on every machine. Null pointers, ends of objects and overflowing
    pointers are left to the address sanitizer, which sees what is read there and compiles faster. Optimising would take
    minutes, and what is not optimised runs for seconds."""
    program = build(
        tmp_path,
        "-DQAA_OPTIMIZE=-O0",
        "-DQAA_AVX512=OFF",
        "-DQAA_BASELINE_SHAPE=64;4;3",
        "-DCMAKE_CXX_FLAGS_RELEASE=-O0 -DNDEBUG",
        "-DCMAKE_CXX_FLAGS=-fsanitize=address,undefined -fno-sanitize-recover=all "
        "-fno-sanitize=null,object-size,pointer-overflow --param asan-instrumentation-with-call-threshold=0",
    )
    for isa in ("baseline", "avx2", "neon"):
        result = subprocess.run([program, cases], env={"QAA_ISA": isa}, capture_output=True, text=True)
        if "expected QAA_ISA to be one of" in result.stderr:
            continue
        assert result.returncode == 0, result.stdout + result.stderr[-3000:]
        assert f"{isa}: 96 passed, 0 failed" in result.stdout
        fuzz(program.with_name("fuzz"), isa, runs=1500)


CORPUS = ROOT / "tests" / "core" / "corpus"


def fuzz(program: Path, isa: str, runs: int) -> None:
    """So many mutations of the corpus: what is accepted equals a dense simulation, what is refused is left alone."""
    command = [program, "--corpus", CORPUS, "--runs", str(runs), "--seed", "0"]
    result = subprocess.run(command, env={"QAA_ISA": isa}, capture_output=True, text=True, cwd=program.parent)
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    assert result.stdout.startswith(f"{isa}: {runs} inputs, ") and "equal to the oracle" in result.stdout


@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")
def test_the_core_has_no_data_races(tmp_path: Path) -> None:
    """Four threads call the kernels at once, each on several threads, with ThreadSanitizer watching."""
    flags = "-DCMAKE_CXX_FLAGS=-fsanitize=thread"
    release = "-DCMAKE_CXX_FLAGS_RELEASE=-Og -DNDEBUG"
    program = build(tmp_path, "-DQAA_OPTIMIZE=-Og", "-DQAA_AVX2=OFF", release, flags)
    for command in ([program, "4", "1"], [program.with_name("fuzz"), "--corpus", CORPUS, "--runs", "0"]):
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr[-3000:]
        assert result.stdout.startswith(("4 callers, 1 rounds: 0 different", "baseline: 0 inputs"))


@pytest.mark.skipif(
    shutil.which("aarch64-linux-gnu-g++") is None or shutil.which("qemu-aarch64") is None,
    reason="needs g++-aarch64-linux-gnu and qemu-user",
)
@pytest.mark.parametrize("isa", ["neon", "baseline"])
def test_the_arm_kernels_under_emulation(cases: Path, tmp_path_factory: pytest.TempPathFactory, isa: str) -> None:
    folder = tmp_path_factory.getbasetemp() / "arm"
    program = build(
        folder,
        "-DCMAKE_SYSTEM_NAME=Linux",
        "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        "-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++",
        "-DQAA_OPTIMIZE=-Og",
        "-DCMAKE_CXX_FLAGS_RELEASE=-Og -DNDEBUG",
        "-DCMAKE_EXE_LINKER_FLAGS=-static",
    )
    command = ["qemu-aarch64", "-E", f"QAA_ISA={isa}", str(program), str(cases)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    assert f"{isa}: 96 passed, 0 failed" in result.stdout


# Instructions per state of the AVX2 kernels, by compiler: a regression guard that a busy machine cannot disturb.
INSTRUCTIONS = ROOT / "tests" / "core" / "instructions.json"


def instructions_per_state(program: Path, wires: int, layers: int, direction: str, folder: Path) -> int:
    """Counted by callgrind as the difference between two batches, so that what is paid once per call drops out."""

    def count(rows: int) -> int:
        out = folder / "callgrind.out"
        function = f"qaa::{direction}(qaa::{direction.capitalize()}Call const&)"
        command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={out}", f"--toggle-collect={function}"]
        command += [str(program), str(wires), str(layers), str(rows), direction]
        result = subprocess.run(command, env={"QAA_ISA": "avx2"}, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-2000:]
        return next(int(line.split()[1]) for line in out.read_text().splitlines() if line.startswith("totals:"))

    return (count(96) - count(32)) // 64


@pytest.mark.skipif(shutil.which("valgrind") is None, reason="needs valgrind")
def test_instructions_per_state(tmp_path: Path) -> None:
    """Of the installed library; at most 5 % more than the committed count. After a change that is meant, write the new
    counts there."""
    compiler = (
        "gcc-" + subprocess.run(["c++", "-dumpversion"], capture_output=True, text=True).stdout.split(".")[0].strip()
    )
    committed = json.loads(INSTRUCTIONS.read_text())
    if compiler not in committed or platform.machine() != "x86_64":
        pytest.skip(f"no counts are committed for {compiler} on {platform.machine()}")
    library, program = Path(cmake_dir()).parents[1], tmp_path / "replay"
    options = [f"-I{ROOT / 'csrc'}", f"-L{library}", "-lqaa", f"-Wl,-rpath,{library}", "-pthread", "-o", str(program)]
    command = ["c++", "-std=c++20", "-O2", str(ROOT / "tests" / "core" / "replay.cpp"), *options]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    for case, expected in committed[compiler].items():
        wires, layers, direction = case.split()
        counted = instructions_per_state(program, int(wires), int(layers), direction, tmp_path)
        assert counted <= 1.05 * expected, f"{case}: {counted} instructions per state, {expected} were committed"
        assert counted >= 0.8 * expected, f"{case}: {counted} instructions per state, commit this gain over {expected}"
