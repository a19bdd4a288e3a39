"""The trainability study runs, and its variances are those that can be computed on paper."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import trainability
from benchmarks.trainability import Norm, Point, Setting, slope, variances

import compare_tiny


def test_one_wire_by_hand():
    """``<Z> = cos a cos c - cos b sin a sin c`` on |0>: mean squares of its derivatives over uniform angles."""
    setting = Setting("ring", 1, 1, "uniform", "0…0")
    (point,) = trainability.points(setting, ["local"], draws=2000, rng=np.random.default_rng(0))
    exact = ((1 / 4 + 1 / 8) + 1 / 8 + (1 / 4 + 1 / 8)) / 3
    assert abs(point.variance - exact) < 4 * point.error < 0.1 * exact
    assert len(list(variances([2], [1], draws=2))) == 5 * 4 + 2


def test_a_known_plateau_and_a_known_absence_of_one():
    """One layer of gates on neighbours from a basis state: <Z...Z> vanishes exponentially, <Z_0> does not."""
    points = [p for p in variances([4, 6, 8], [1], draws=100) if p.ansatz == trainability.CONTROL]
    fitted = {name: slope([p for p in points if p.quantity == name]) for name in ("local", "global")}
    assert fitted["global"] < -0.6
    per_wire = [p.variance * p.n_wires for p in points if p.quantity == "local"]  # a few angles reach wire 0
    assert max(per_wire) < 2 * min(per_wire)


@pytest.mark.parametrize("init", trainability.INIT_ANGLES)
def test_no_circuit_beats_the_bound_of_the_embedding(init):
    """For x uniform on the sphere, ``Var <x|A|x> <= 2 / (2**n + 2)`` for each derivative A of a Pauli string."""
    rng = np.random.default_rng(1)
    for n, depth in ((3, 1), (5, 3)):
        setting = Setting("ring", n, depth, init, "random")
        for point in trainability.points(setting, ["local", "global"], draws=300, rng=rng):
            assert 0 < point.variance < 2 / (2**n + 2) + 4 * point.error


def test_slope_of_a_known_line():
    line = [Point("ring", n, 1, "uniform", "random", "z", 3 * 0.5**n, 0.0) for n in (2, 4, 6)]
    assert slope(line) == pytest.approx(-1)
    assert slope([line[0], line[2]]) is None  # too few wires


def test_the_study_from_command_to_figures(tmp_path, capsys):
    model, data = compare_tiny.write_model(tmp_path / "model"), compare_tiny.write_data(tmp_path / "data.json")
    folder = tmp_path / "out"
    arguments = ["--quick", "--model", str(model), "--data", str(data), "--folder", str(folder)]
    trainability.main(arguments)
    printed = capsys.readouterr().out
    for name in ("gradient_variance.svg", "gradient_flow.svg"):
        assert (folder / name).read_text(encoding="utf-8").count("<path") > 20
    assert (folder / "flow.md").read_text(encoding="utf-8") in printed + "\n"
    found = json.loads((folder / "flow.json").read_text(encoding="utf-8"))
    norms = [Norm(**norm) for norm in found["norms"]]
    for row in found["hidden"]:  # four layers of width 32
        assert row["n_wires"] == 5 and all(value > 0 for key in row if "," in key for value in row[key])
    methods = {norm.method for norm in norms}
    assert "LoRA" in methods and sum(name.startswith("QAA") for name in methods) >= 2
    assert {norm.layer for norm in norms} == set(range(4)) and {norm.module for norm in norms} == {"q_proj", "v_proj"}
    for norm in norms:  # V = 0 and B = 0 stop every gradient behind them, exactly
        assert (norm.norm == 0) == (norm.step == 0 and norm.part in ("angles", "M", "A")), norm
    trainability.main([*arguments, "--draw"])
    assert (folder / "flow.md").read_text(encoding="utf-8").count("\n") == 2 + len(
        {(norm.method, norm.part, norm.step) for norm in norms}
    )
