"""The circuits whose cost docs/hardware.md counts compute what the kernels compute."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import oracle
import qaa

pytest.importorskip("qiskit")
hardware = pytest.importorskip("benchmarks.hardware")

PAGE = Path(__file__).parent.parent / "docs" / "hardware.md"


@pytest.mark.parametrize(("width", "n_wires"), [(8, 3), (11, 4)])
@pytest.mark.parametrize("name", ["all to all", "line", "heavy-hex"])
def test_the_transpiled_circuit_has_the_layers_features(width: int, n_wires: int, name: str) -> None:
    from qiskit import transpile
    from qiskit.quantum_info import Pauli, Statevector

    rng = np.random.default_rng(width)
    x, circuit = rng.normal(size=width), qaa.ansatz("ring", n_wires)
    theta = rng.uniform(-np.pi, np.pi, circuit.parameter_shape)
    whole = hardware.embedding(x, n_wires).compose(circuit.to_qiskit(theta))
    transpiled = transpile(
        whole, basis_gates=hardware.BASIS, coupling_map=hardware.couplings(name, n_wires), seed_transpiler=0
    )
    assert set(transpiled.count_ops()) <= set(hardware.BASIS)
    state = Statevector(transpiled)
    places = range(n_wires) if transpiled.layout is None else transpiled.layout.final_index_layout()
    z = [state.expectation_value(Pauli("Z"), [place]).real for place in places]
    np.testing.assert_allclose(z, oracle.features(circuit, theta, x[None])[0], rtol=0, atol=1e-8)


def test_the_rows_add_up() -> None:
    cells = [[c.strip() for c in row.strip("|").split("|")] for row in hardware.rows(np.arange(1.0, 9.0))]
    assert [cell[1:3] for cell in cells] == [[name, str(level)] for name in hardware.MAPS for level in hardware.LEVELS]
    assert [cell[3:5] for cell in cells[:2]] == [["4", "3"]] * 2  # 2**n - n - 1, and a ring of n
    for cell in cells:
        embedding, ring, both, depth, depth_in_cz = (int(number) for number in cell[3:8])
        assert max(embedding, ring) <= both and depth_in_cz <= min(both, depth)


def test_the_page_holds_the_commands_table(tmp_path: Path) -> None:
    text = PAGE.read_text(encoding="utf-8")
    table = text.partition(hardware.END)[0]
    assert table.count("\n| ") == 1 + len(hardware.WIRES) * len(hardware.MAPS) * len(hardware.LEVELS)
    copy = tmp_path / "page.md"
    copy.write_text(text, encoding="utf-8")
    assert hardware.main(["--wires", "2", "--output", str(copy)]) == 0
    written = copy.read_text(encoding="utf-8")
    assert written.count("\n| 2 |") == len(hardware.MAPS) * len(hardware.LEVELS) and "\n| 10 |" not in written
    assert written.partition(hardware.BEGIN)[0] == text.partition(hardware.BEGIN)[0]
    assert written.partition(hardware.END)[2] == text.partition(hardware.END)[2]
    with pytest.raises(ValueError, match="expected a document with the marks"):
        hardware.put_between("no marks", [])


def test_a_vector_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "x.npy", np.arange(1.0, 6.0))
    assert hardware.main(["--input", str(tmp_path / "x.npy")]) == 0
    assert capsys.readouterr().out.count("\n| 3 |") == len(hardware.MAPS) * len(hardware.LEVELS)
