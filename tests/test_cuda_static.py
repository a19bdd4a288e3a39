"""The CUDA kernels' machine code: resources as committed, and instructions that must or must not be there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import cuda_evidence as evidence
import qaa
from emulated import Device, draw
from qaa import _core

pytestmark = pytest.mark.skipif(evidence.find("nvcc") is None, reason="needs nvcc (pip install '.[cuda-test]')")


class Machine:
    """Kernels compiled on demand, once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ptx: dict[str, Path] = {}
        self._code: dict[str, tuple[Path, evidence.Resources]] = {}

    def code(self, architecture: str, number: str) -> tuple[Path, evidence.Resources]:
        if number not in self._ptx:
            self._ptx[number] = evidence.compile_ptx(number, self.folder)
        case = f"{architecture} {number}"
        if case not in self._code:
            self._code[case] = evidence.assemble(self._ptx[number], architecture)
        return self._code[case]


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    return Machine(tmp_path_factory.mktemp("machine"))


@pytest.fixture(scope="module")
def table() -> dict[str, dict[str, evidence.Resources]]:
    return json.loads(evidence.TABLE.read_text())


@pytest.mark.parametrize(("architecture", "number"), evidence.CASES)
def test_resources(machine: Machine, table: dict, architecture: str, number: str) -> None:
    """As committed (after a change that is meant: ``make cuda-evidence``), and no kernel needs local memory."""
    _, resources = machine.code(architecture, number)
    assert len(resources) == {"float": 8, "double": 12}[number]
    assert resources == table["resources"][f"{architecture} {number}"]
    assert all(kernel["stack_bytes"] == kernel["spill_bytes"] == 0 for kernel in resources.values())


def test_occupancy(machine: Machine, table: dict, emulated_library: Path) -> None:
    resources = {f"{arch} float": machine.code(arch, "float")[1] for arch in evidence.ARCHITECTURES}
    assert evidence.occupancies(evidence.launches(emulated_library), resources, machine.folder) == table["occupancy"]


@pytest.mark.skipif(evidence.find("nvdisasm") is None, reason="needs nvdisasm (pip install '.[cuda-test]')")
@pytest.mark.parametrize("architecture", evidence.ARCHITECTURES)
def test_instructions(machine: Machine, architecture: str) -> None:
    """No double arithmetic, no local memory, rows in 16-byte loads and stores, barriers where a block has one state."""
    kernels = evidence.instructions(machine.code(architecture, "float")[0])
    assert len(kernels) == 8
    for name, opcodes in kernels.items():
        assert len(opcodes) > 500, f"{name}: too short to be the kernel"
        forbidden = [o for o in opcodes if re.match(r"(DADD|DMUL|DFMA|DMMA|DSETP|LDL|STL)\b|.*\.F64", o)]
        assert not forbidden, f"{name} on {architecture} has {sorted(set(forbidden))}"
        wide = [sum(opcode.startswith(f"{kind}.E.128") for opcode in opcodes) for kind in ("LDG", "STG")]
        assert min(wide) >= 3, f"{name} on {architecture}: (LDG.E.128, STG.E.128) = {wide}, one for each dtype of a row"
        if "<float, false" in name:
            assert any(opcode.startswith("BAR.SYNC") for opcode in opcodes), name


@pytest.mark.skipif(
    qaa.cuda.compiler() is None or not qaa.cuda.is_built() or evidence.find("nvdisasm") is None,
    reason="needs NVRTC (pip install '.[cuda-test]') and a build with CUDA kernels",
)
@pytest.mark.parametrize(
    ("architecture", "n_wires", "kind", "dtype"),
    [("sm_80", 10, "z", ml_dtypes.bfloat16), ("sm_90", 11, "paulis", np.float32), ("sm_120", 9, "state", np.float16)],
)
def test_kernels_of_one_circuit_compile_at_run_time(
    emulated_library: Path, tmp_path: Path, architecture: str, n_wires: int, kind: str, dtype: Any
) -> None:
    """By the compiler and the source that programs use, which have no headers at hand; float32 arithmetic alone."""
    options = {"circuit": qaa.ansatz("ring", n_wires)} if kind == "z" else {}
    capability = divmod(int(architecture.removeprefix("sm_")), 10)
    for source in Device(emulated_library).known_sources(draw(10, n_wires, kind, **options), dtype):
        cubin = tmp_path / "known.cubin"
        cubin.write_bytes(qaa.cuda.compile_source(_core.cuda_kernel_headers() + source, capability))
        ((name, opcodes),) = evidence.instructions(cubin).items()
        assert name == "qaa_known_kernel" and len(opcodes) > 500
        assert not [o for o in opcodes if re.match(r"(DADD|DMUL|DFMA|DMMA|DSETP)\b|.*\.F64", o)]
        assert not [o for o in opcodes if o.startswith(("LDL", "STL"))]


def test_a_source_that_does_not_compile_is_told_with_its_log(monkeypatch: pytest.MonkeyPatch) -> None:
    if qaa.cuda.compiler() is not None:
        with pytest.raises(RuntimeError, match=r"(?s)expected NVRTC to compile a kernel for .*sm_90.*identifier"):
            qaa.cuda.compile_source("void f() { nowhere(); }", (9, 0))
    monkeypatch.setattr(qaa.cuda, "compiler", lambda: None)
    with pytest.raises(RuntimeError, match=r"expected the library NVRTC .*, found none"):
        qaa.cuda.compile_source("", (9, 0))
