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


#: the one that is compiled here; the others' figures are those of the same sources, by their digest
ARCHITECTURE = "sm_90"


@pytest.fixture(scope="module")
def table() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(evidence.TABLE.read_text())
    return found


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, evidence.Resources]:
    """Float kernels as machine code, and what they need."""
    return evidence.assemble(evidence.compile_ptx("float", tmp_path_factory.mktemp("machine")), ARCHITECTURE)


def test_the_table_is_of_these_sources(table: dict[str, Any]) -> None:
    """After a change of the kernels: ``make cuda-evidence``, which compiles them for every architecture."""
    assert evidence.included() == set(evidence.SOURCES)
    assert table["digest"] == evidence.digest(), "the kernels have changed since `make cuda-evidence`"
    assert set(table["resources"]) == {f"{architecture} {number}" for architecture, number in evidence.CASES}
    for case, resources in table["resources"].items():
        assert len(resources) == (8 if case.endswith("float") else 12)
        assert all(kernel["stack_bytes"] == kernel["spill_bytes"] == 0 for kernel in resources.values())


def test_resources(code: tuple[Path, evidence.Resources], table: dict[str, Any]) -> None:
    """As committed (after a change that is meant: ``make cuda-evidence``), and no kernel needs local memory."""
    assert code[1] == table["resources"][f"{ARCHITECTURE} float"]


def test_occupancy(table: dict[str, Any], emulated_library: Path, tmp_path: Path) -> None:
    launches = evidence.launches(emulated_library)
    assert evidence.occupancies(launches, table["resources"], tmp_path) == table["occupancy"]


@pytest.mark.skipif(evidence.find("nvdisasm") is None, reason="needs nvdisasm (pip install '.[cuda-test]')")
def test_instructions(code: tuple[Path, evidence.Resources]) -> None:
    evidence.check_instructions(code[0])


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
