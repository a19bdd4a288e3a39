"""The CUDA kernels' machine code: resources as committed, and instructions that must or must not be there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import cuda_evidence as evidence

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
