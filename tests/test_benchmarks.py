"""The benchmark suite runs, and what it times is right: every rival that is installed, on a task of a few states."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import __main__ as command
from benchmarks import machine
from benchmarks.cases import CASES, Case, made_small, with_rivals
from benchmarks.correctness import hold_to_oracle
from benchmarks.driver import Driver, Effort, Measurement
from benchmarks.environments import python_of
from benchmarks.goals import goals, least_seconds, multiply_adds, ratio
from benchmarks.rivals import RIVALS, SIMULATORS
from benchmarks.task import Task, blocks_of_ry, ring_of_cnots, signs_of_z
from benchmarks.worker import answer_of

from qaa import ansatz

TASK = Task(n_wires=4, width=13, batch=8, layers=2)
FAST = Effort(repeats=2, at_least=0.0005, wake_up=0.0)
GIGA = machine.Peak(1e9, 1.0, 1.0)
CHECKED = [name for name, entry in RIVALS.items() if entry.simulates and "compiled" not in name]


def test_the_task_is_qaas_ring() -> None:
    circuit = ansatz("ring", TASK.n_wires, TASK.layers)
    expected = [(gate.name, gate.wires, gate.parameters[0] if gate.parameters else -1) for gate in circuit.gates]
    assert sorted(TASK.gates) == sorted(expected)
    assert TASK.theta.shape == circuit.parameter_shape


@pytest.mark.parametrize("name", [name for name in CHECKED if RIVALS[name].environment == "own"])
def test_a_rival_of_this_environment_passes_the_oracle(name: str) -> None:
    pytest.importorskip("pennylane")
    rival = RIVALS[name].build(TASK)
    errors = hold_to_oracle(TASK, rival.rows, answer_of(rival))
    assert errors.largest < 1e-4


@pytest.mark.parametrize("name", [name for name in CHECKED if RIVALS[name].environment != "own"])
def test_a_rival_of_another_environment_passes_the_oracle(name: str) -> None:
    if python_of(RIVALS[name].environment) is None:
        pytest.skip(f"environment {RIVALS[name].environment!r} is not installed")
    with Driver(1, FAST) as driver:
        measured = driver.run("one", Case((("qaa", TASK), (name, TASK)), timed=False))
    assert driver.left_out == {}
    assert [m.rival for m in measured] == ["qaa", "qaa", name, name]


def test_one_case_from_the_command_to_the_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = Case(tuple((rival, replace(TASK, batch=4)) for rival in ("qaa", "NumPy, Kronecker")))
    found = command.run({"rivals, 4 wires": case}, [1], FAST, tmp_path / "results.json")
    printed = capsys.readouterr().out
    assert "NumPy, Kronecker" in printed and "microseconds per state" in printed
    assert [goal.detail for goal in found] == ["NumPy, Kronecker"] * 2
    assert all(goal.name.split(" (")[0] in printed for goal in found)
    report = json.loads((tmp_path / "results.json").read_text())
    assert report["machine"]["processors"] >= 1 and "numpy" in report["versions"]["own"]
    assert {(r["rival"], r["which"], len(r["samples"])) for r in report["results"]} == {
        (rival, which, 2) for rival in ("qaa", "NumPy, Kronecker") for which in ("forward", "step")
    }
    assert all(r["errors"]["largest"] < 1e-4 for r in report["results"])
    assert [goal["met"] for goal in report["goals"]] == [goal.met for goal in found]


def test_a_rival_that_breaks_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(1, replace(FAST, build_limit=0.001))
    with driver:
        assert driver.run("one", Case((("qaa", TASK),))) == []
    assert "within" in driver.left_out["qaa"]

    def missing(name: str) -> None:
        assert name == "jax"

    monkeypatch.setattr("benchmarks.driver.python_of", missing)
    with Driver(1, FAST) as driver:
        assert driver.run("one", Case((("JAX, Kronecker", TASK),))) == []
    assert "not installed" in driver.left_out["JAX, Kronecker"]


def test_a_wrong_answer_is_caught() -> None:
    answer = answer_of(RIVALS["qaa kernel"].build(TASK))
    with pytest.raises(AssertionError, match="theta is off"):
        hold_to_oracle(TASK, TASK.batch, {**answer, "theta": 1.01 * answer["theta"]})
    with pytest.raises(AssertionError, match="shape"):
        hold_to_oracle(TASK, TASK.batch, {**answer, "x": answer["x"][1:]})


def test_ratios_and_goals() -> None:
    def measured(case: str, rival: str, *samples: float | None) -> Measurement:
        return Measurement(case, rival, TASK, 1, "forward", 8, "", None, list(samples))

    qaa, numpy = measured("rivals", "qaa", 1, 2, 1), measured("rivals", "NumPy, Kronecker", 30, 40, None)
    assert ratio(numpy, qaa) == 25
    (goal,) = goals([qaa, numpy], {})
    assert (goal.measured, goal.limit, goal.met, goal.detail) == (25, 20, True, "NumPy, Kronecker")


def test_goals_say_what_is_beyond() -> None:
    """On a machine that does 1e9 multiply-adds a second."""

    def measured(case: str, rival: str, which: str, seconds: float, layers: int = TASK.layers) -> Measurement:
        return Measurement(case, rival, replace(TASK, layers=layers), 1, which, 8, "", None, [seconds] * 3)

    for which, times in (("forward", 1), ("step", 3)):
        operations = multiply_adds(TASK, which)
        assert least_seconds(GIGA, TASK, which) == pytest.approx(1e-9 * operations)
        operations += times * TASK.width * TASK.n_wires
        assert least_seconds(GIGA, TASK, which, is_adapter=True) == pytest.approx(1e-9 * operations)
        assert least_seconds(None, TASK, which) is None
    least = least_seconds(GIGA, TASK, "step")
    assert least is not None
    found = goals(
        [
            measured("rivals", "qaa", "step", 2 * least),
            measured("rivals", "NumPy, Kronecker", "step", 30 * least),
            measured("rivals", "TensorCircuit-NG", "step", 40 * least),
            measured("rivals", "PennyLane default.qubit", "step", 600 * least),
        ],
        {1: GIGA},
    )
    assert [(round(goal.measured, 6), round(goal.at_best or 0, 6), goal.verdict) for goal in found] == [
        (15, 30, "MISSED"), (20, 40, "beyond"), (300, 600, "met"),
    ]  # fmt: skip
    (further,) = goals([measured("layers", "qaa", "step", t, n) for t, n in ((1, 1), (4, 2))], {1: GIGA})
    one, two = (multiply_adds(replace(TASK, layers=layers), "step") for layers in (1, 2))
    assert further.measured == 3 and further.at_best == pytest.approx(two / one - 1)


def test_the_share_of_the_peak() -> None:
    """A machine of 1e9 multiply-adds a second, then of half of that; layers take twice the time that they could."""

    def measured(rival: str, layers: int, which: str) -> Measurement:
        task = replace(TASK, layers=layers)
        seconds = (2e-9 if rival == "qaa" else 1e-9) * multiply_adds(task, which)
        return Measurement("layers", rival, task, 1, which, 8, "", None, [seconds, 2 * seconds, None])

    everything = [
        measured(rival, layers, which)
        for rival in ("qaa", "multiply-adds alone")
        for layers in (1, 2, 4)
        for which in ("forward", "step")
    ]
    shares = [goal for goal in goals(everything, {1: None}) if "peak" in goal.name]
    assert [round(goal.measured, 6) for goal in shares] == [50, 50] and shares[0].unit == "%"
    assert shares[0].detail == "one layer with its ends: 50 %"
    for left_out in ("qaa", "multiply-adds alone"):
        some = [m for m in everything if (m.rival, m.task.layers) != (left_out, 4)]
        assert not any("peak" in goal.name for goal in goals(some, {1: GIGA}))
    one, two = (multiply_adds(replace(TASK, layers=layers), "forward") for layers in (1, 2))
    assert 0 < one < two < multiply_adds(replace(TASK, layers=2), "step")


def test_cases_name_rivals_and_can_be_narrowed() -> None:
    assert all(rival in RIVALS for case in CASES.values() for rival, _ in case.units)
    narrowed = with_rivals(CASES["rivals"], ["torch, Kronecker"])
    assert [rival for rival, _ in narrowed.units] == ["qaa", "qaa kernel", "torch, Kronecker"]
    assert made_small(narrowed).units[0][1].batch == CASES["rivals"].units[0][1].batch // 16
    assert (
        with_rivals(CASES["SQUARE"], ["torch, Kronecker"]) == CASES["SQUARE"]
    )  # no simulators, so that none are left out
    assert set(SIMULATORS) < set(RIVALS)


def test_helpers_of_the_rivals(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ring_of_cnots(2).tolist() == [0, 2, 3, 1]
    assert signs_of_z(2).tolist() == [[1, 1], [1, -1], [-1, 1], [-1, -1]]
    theta = np.arange(12.0).reshape(2, 2, 3)
    assert [block.tolist() for block in blocks_of_ry(theta)] == [[0, 3], [2 + 6, 5 + 9], [8, 11]]
    for threads in (1, 2):
        monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
        assert Task(10, batch=1024).rows(2**17) == 128 * threads
        assert Task(10, batch=1024, in_parts=False).rows(2**17) == 1024


def test_the_machine_is_measured_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    peak = machine.peak(1)
    assert peak is None or min(peak.multiply_adds_per_second, peak.read_bytes_per_second) > 1e8
    if peak is not None:
        rival = RIVALS["multiply-adds alone"].build(TASK)
        assert rival.forward is not None and rival.step is not None
        assert rival.forward() is None and rival.step() == (None, None, None)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    assert machine.peak(1) is None
    with pytest.raises(FileNotFoundError, match="C\\+\\+ compiler"):
        machine.multiply_adds()
