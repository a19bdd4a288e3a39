"""The emulated device catches planted bugs, and finds nothing where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

import cuda_tools

#: Which builds must see a bug: wrong values under some of eight schedules ("plain"), or a sanitizer.
CAUGHT_BY = {
    "no_barrier_before_read": {"plain", "tsan"},
    "no_barrier_after_read": {"plain", "tsan"},
    "no_barrier_in_reduction": {"plain", "tsan"},
    "no_warp_barrier": {"plain", "tsan"},
    "shuffle_for_barrier": {"tsan"},
    "shared_out_of_bounds": {"plain", "asan"},
    "static_shared_out_of_bounds": {"plain", "asan"},
    "global_out_of_bounds": {"plain", "asan"},
    "misaligned_vector": {"plain", "asan"},
    "exit_before_barrier": {"plain"},
    "divergent_barrier": {"plain"},
    "mask_without_caller": {"plain"},
    "mask_without_source": {"plain"},
    "lane_stays_away": {"plain"},
    "masks_differ": {"plain"},
    "uninitialised_slot": {"plain"},
    "race_between_blocks": {"plain", "tsan"},
    "race_without_consequence": {"tsan"},
    "too_many_threads": {"plain"},
    "too_much_shared_memory": {"plain"},
    "too_much_static_shared_memory": {"plain"},
}
REPORTS = {
    "plain": ("cannot go on", "that does not name", "expected"),
    "asan": ("ERROR: AddressSanitizer", "runtime error"),
    "tsan": ("WARNING: ThreadSanitizer: data race",),
}


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("planted")
    sources = cuda_tools.ROOT / "tests/cuda"
    emulator = cuda_tools.compile_emulated(sources / "emulator.cpp", folder / "emulator.o")

    def build(sanitizer: str) -> Path:
        bugs = cuda_tools.compile_emulated(sources / "planted_bugs.cpp", folder / f"{sanitizer}.o", sanitizer)
        return cuda_tools.link([bugs, emulator], folder / sanitizer, sanitizer)

    return {sanitizer: build(sanitizer) for sanitizer in cuda_tools.SANITIZERS}


def test_every_planted_bug_is_listed(programs: dict[str, Path]) -> None:
    names = cuda_tools.run([programs["plain"], "?"]).stdout.split()
    assert names == ["none", *CAUGHT_BY]


@pytest.mark.parametrize("sanitizer", cuda_tools.SANITIZERS)
def test_right_kernels_pass(programs: dict[str, Path], sanitizer: str) -> None:
    result = cuda_tools.sanitized([programs[sanitizer], "none"], sanitizer)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout == "8 of 8 seeds saw nothing wrong\n"


@pytest.mark.parametrize("bug", CAUGHT_BY)
def test_planted_bugs_are_caught(programs: dict[str, Path], bug: str) -> None:
    for sanitizer in sorted(CAUGHT_BY[bug]):
        result = cuda_tools.sanitized([programs[sanitizer], bug], sanitizer)
        output = result.stdout + result.stderr
        assert result.returncode != 0, f"{sanitizer} saw nothing: {output}"
        assert any(report in output for report in REPORTS[sanitizer]), output
