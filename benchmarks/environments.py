"""Rivals pin each other's requirements away, so each group of them has a virtual environment under ``.venv-bench``.

``python -m benchmarks.environments`` makes those that are missing; names make only these. The rival "own" needs none:
it runs where the driver runs. torch comes first and constrained, so that nothing replaces it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".venv-bench"


@dataclass(frozen=True)
class Environment:
    """Pinned packages, and those whose own requirements cannot be met as they are written."""

    packages: tuple[str, ...]
    without_requirements: tuple[str, ...] = ()
    torch: bool = False


ENVIRONMENTS = {
    "jax": Environment(("jax==0.10.0", "tensorcircuit-ng==1.10.0")),
    # qandle requires a distribution named "python", which is on no index; the rest of its requirements is listed here.
    "torch-libraries": Environment(
        (
            "deepquantum==4.5.0",
            "pyqtorch==1.7.8",
            "qw-map==0.1.2",
            "networkx>=3",
            "einops>=0.8",
            "openqasm3[parser]>=1",
        ),
        without_requirements=("qandle==0.1.10",),
        torch=True,
    ),
    # Of torchquantum's requirements those that are imported; tensorflow, pyscf and torchvision are not needed here.
    "torchquantum": Environment(
        (
            "numpy<2",
            "qiskit<1",
            "qiskit-ibm-runtime==0.20.0",
            "qiskit-aer==0.13.3",
            "setuptools<80",
            "dill",
            "matplotlib",
            "opt-einsum",
            "pathos",
            "pylatexenc",
            "scipy",
            "torchdiffeq",
            "torchpack",
            "tqdm",
        ),
        without_requirements=("torchquantum==0.1.8",),
        torch=True,
    ),
    "qulacs": Environment(("qulacs==0.6.14",)),
    "qiskit-aer": Environment(("qiskit-aer==0.18.2", "qiskit==2.6.2")),
}


def python_of(name: str) -> Path | None:
    """The interpreter of an environment, or None if it has not been made."""
    if name == "own":
        return Path(sys.executable)
    folder = FOLDER / name
    return folder / "bin" / "python" if (folder / "made").exists() else None


def make(name: str) -> None:
    """Makes an environment; one that was left half made is completed."""
    environment, folder = ENVIRONMENTS[name], FOLDER / name
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch==")]
    constraint = folder / "constraints.txt"
    constraint.write_text("\n".join(pins) + "\n")

    def install(*arguments: str) -> None:
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--constraint", str(constraint)]
        subprocess.run([*pip, *arguments], check=True)

    if environment.torch:
        install("torch")
    install(*environment.packages)
    if environment.without_requirements:
        install("--no-deps", *environment.without_requirements)
    (folder / "made").touch()


def make_missing(names: list[str] | None = None) -> None:
    """Makes what is missing, one after another; what cannot be made is named and left out."""
    for name in names or ENVIRONMENTS:
        if python_of(name) is not None:
            continue
        print(f"making {FOLDER.name}/{name}", flush=True)
        try:
            make(name)
        except subprocess.CalledProcessError as error:
            print(f"left out: {name}: pip ended with {error.returncode}", file=sys.stderr)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.environments", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(ENVIRONMENTS)} (default: all)")
    chosen = parser.parse_args().names
    if unknown := set(chosen) - set(ENVIRONMENTS):
        parser.error(f"expected names among {', '.join(ENVIRONMENTS)}, received {', '.join(sorted(unknown))}")
    make_missing(chosen)
