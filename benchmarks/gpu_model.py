"""What the CUDA kernels should cost, on paper: ``python -m benchmarks.gpu_model`` prints the table in ``docs/cuda.md``.

The default circuit with one layer and ``<Z>`` on every wire, bfloat16 rows, float32 states. Counted per row: 128-byte
transactions of shared memory and the first-level cache, which go through one pipe at one per cycle; arithmetic and
address instructions; bytes of device memory. The kernels' time is at least that of the busiest of the three.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

TILE = 16  # amplitudes of a thread
TABLES = 8  # transactions of a warp in a pass besides its tile: the pass, its table of tiles, its sines and cosines
SUM = 6  # shuffles for four sums over a warp


@dataclass(frozen=True)
class Device:
    name: str
    processors: int
    gigahertz: float
    terabytes_per_second: float


DEVICES = [
    Device("A100 SXM 80 GB", 108, 1.41, 2.04),
    Device("H100 SXM", 132, 1.755, 3.35),
    Device("RTX 4090", 128, 2.52, 1.01),
]


@dataclass(frozen=True)
class Cost:
    """Of one row."""

    sweeps: float  # reads or writes of 2**n numbers in shared memory
    sums: int  # groups of four sums over a warp
    passes: int
    instructions: float  # arithmetic, per amplitude
    bytes: float
    n_wires: int

    @property
    def transactions(self) -> float:
        warps = float(2**self.n_wires) / TILE / 32
        return self.sweeps * float(2**self.n_wires) / 32 + warps * (SUM * self.sums + TABLES * self.passes + 5)

    @property
    def slots(self) -> float:
        """Warp instructions: arithmetic, an access and its address for every 32 numbers swept, other transactions."""
        swept = self.sweeps * float(2**self.n_wires) / 32
        return self.instructions * float(2**self.n_wires) / 32 + 2 * swept + (self.transactions - swept)

    def microseconds(self, rows: int, device: Device) -> dict[str, float]:
        cycles = rows / device.processors / (device.gigahertz * 1e3)
        return {
            "shared memory": self.transactions * cycles,
            "instructions": self.slots / 4 * cycles,
            "device memory": rows * self.bytes / (device.terabytes_per_second * 1e6),
        }


def costs(n: int, width: int) -> dict[str, Cost]:
    """Forward and adjoint. With one layer the phases are in the observables, and the state stays real."""
    turns = ceil(n / 4)  # passes of rotations
    strings = 2 * n + 2  # with X: pairs of <X...X> and the same with two Y, and four strings where the ring closes
    pairs = ceil(strings / 4)
    z_sums = 1 + ceil((n - 4) / 4)
    rotate = n + turns  # a multiply-add for each rotation, a multiplication for each pass
    measure = 4 + strings
    forward = Cost(
        sweeps=2 + 2 * turns + pairs,
        sums=z_sums + pairs,
        passes=turns + 1 + pairs,
        instructions=2 + rotate + measure,
        bytes=2 * width + 2 * n,
        n_wires=n,
    )
    adjoint = Cost(
        sweeps=5 + 6 * turns + 3 * pairs,
        sums=z_sums + pairs + turns,
        passes=2 * turns + 1 + pairs,
        instructions=4 + rotate + measure + 2 * strings + 2 * rotate + n,
        bytes=2 * width + 2 * n + 2 * width,
        n_wires=n,
    )
    return {"forward": forward, "adjoint": adjoint}


def main() -> None:
    rows = 8192
    print("| | | transactions | instructions / 4 | bytes |" + "".join(f" {d.name} |" for d in DEVICES))
    print("|---|---|---:|---:|---:|" + "---:|" * len(DEVICES))
    for n, width in ((10, 768), (11, 2048), (12, 4096), (13, 8192)):
        for direction, cost in costs(n, width).items():
            cells = [f"{max(cost.microseconds(rows, device).values()):.0f} µs" for device in DEVICES]
            print(
                f"| n = {n}, d = {width} | {direction} | {cost.transactions:.0f} | {cost.slots / 4:.0f} "
                f"| {cost.bytes:.0f} | " + " | ".join(cells) + " |"
            )


if __name__ == "__main__":
    main()
