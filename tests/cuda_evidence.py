"""What compiled CUDA kernels tell without a GPU: registers, spills, occupancy and instructions.

``python tests/cuda_evidence.py`` (``make cuda-evidence``) writes ``tests/cuda/resources.json``, with the digest of the
sources that it is of. ``test_cuda_static`` holds that digest to today's sources, and the float kernels of one
architecture to the table. Kernels become PTX once and machine code for each architecture. To ptxas spills, local memory
and double arithmetic in float kernels are errors.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import cuda_tools

ARCHITECTURES = ("sm_80", "sm_90", "sm_120")
CASES = [(architecture, number) for number in ("float", "double") for architecture in ARCHITECTURES]
TABLE = cuda_tools.ROOT / "tests/cuda/resources.json"
SHARED_KIB = {"sm_80": 163, "sm_90": 227, "sm_120": 99}
WIRES = (4, 8, 9, 10, 11, 12, 13, 14)

Resources = dict[str, dict[str, int]]  # of each kernel

#: what tests/cuda/instances.cu is made of
SOURCES = (
    "tests/cuda/instances.cu",
    *(f"csrc/{name}" for name in ("basic.h", "cuda/kernels.cuh", "cuda/layout.h", "cuda/portable.cuh")),
)


def digest() -> str:
    """Changes with every source of the kernels."""
    return hashlib.sha256(b"".join((cuda_tools.ROOT / name).read_bytes() for name in SOURCES)).hexdigest()


def included() -> set[str]:
    """The files of this repository that the preprocessor reads."""
    nvcc = find("nvcc")
    assert nvcc is not None
    options = [f"-I{cuda_tools.ROOT / 'csrc'}", "-DQAA_NUMBER=float", "-std=c++20"]
    words = _checked(nvcc, "-M", *options, cuda_tools.ROOT / SOURCES[0]).split()
    ours = (Path(word).resolve() for word in words if Path(word).is_file())
    folders = [cuda_tools.ROOT / name for name in ("csrc", "tests")]
    return {str(f.relative_to(cuda_tools.ROOT)) for f in ours if any(f.is_relative_to(folder) for folder in folders)}


@cache
def find(tool: str) -> Path | None:
    """A tool of the CUDA toolkit: of the system, or from the wheels nvidia-cuda-nvcc, nvidia-cuda-nvdisasm, ..."""
    folders = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"]
    folders += [Path(path) / "nvidia/cu13/bin" for path in sys.path]
    found = shutil.which(tool) or next((f"{f}/{tool}" for f in folders if (f / tool).is_file()), None)
    return Path(found) if found else None


def _checked(*command: str | Path, **options: Any) -> str:
    result = cuda_tools.run(list(command), **options)
    output = result.stdout + result.stderr
    errors = "\n".join(line for line in output.splitlines() if "error" in line)
    assert result.returncode == 0, f"{command[0]}: {errors or output[-2000:]}"
    return output


def compile_ptx(number: str, folder: Path) -> Path:
    """The PTX of the kernels of one precision; those that compute in double on purpose come with ``double``."""
    nvcc = find("nvcc")
    assert nvcc is not None
    target = folder / f"{number}.ptx"
    options = [f"-I{cuda_tools.ROOT / 'csrc'}", f"-DQAA_NUMBER={number}"]
    if number == "double":
        options.append("-DQAA_AT_THE_ENDS")
    source = cuda_tools.ROOT / "tests/cuda/instances.cu"
    flags = ["-std=c++20", "-O3", "-Werror", "all-warnings", "-arch=compute_80", "-ptx"]
    _checked(nvcc, *flags, *options, source, "-o", target)
    return target


def assemble(ptx: Path, architecture: str) -> tuple[Path, Resources]:
    """Machine code, and what each kernel needs; spills, and double arithmetic in float kernels, are refused."""
    nvcc = find("nvcc")
    assert nvcc is not None
    target = ptx.with_suffix(f".{architecture}.cubin")
    options = "-v,-warn-spills,-warn-lmem-usage" + (",-warn-double-usage" if ptx.stem == "float" else "") + ",-Werror"
    log = _checked(nvcc, f"-arch={architecture}", "-cubin", "-Xptxas", options, ptx, "-o", target)
    pattern = (
        r"Compiling entry function '(\w+)' for '\w+'\n.*\n\s*(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads\n.*Used (\d+) registers(?:.*?(\d+) bytes smem)?"
    )
    resources = {}
    for name, stack, stores, loads, registers, shared in re.findall(pattern, log):
        resources[_demangled(name)] = {
            "registers": int(registers),
            "static_shared_bytes": int(shared or 0),
            "stack_bytes": int(stack),
            "spill_bytes": int(stores) + int(loads),
        }
    return target, dict(sorted(resources.items()))


def _demangled(name: str) -> str:
    """``forward_kernel<float, true, false>``; names of C stay what they are."""
    text = _checked("c++filt", name).strip()
    if "cuda::" not in text:
        return text
    return text[text.index("cuda::") + 6 : text.index(">(") + 1].replace("qaa::cuda::", "")


def instructions(cubin: Path) -> dict[str, list[str]]:
    """Opcodes of each kernel, with their modifiers: ``LDG.E.128``."""
    nvdisasm = find("nvdisasm")
    assert nvdisasm is not None
    kernels: dict[str, list[str]] = {}
    for part in re.split(r"^\.text\.", _checked(nvdisasm, "-c", cubin), flags=re.MULTILINE)[1:]:
        name = _demangled(part[: part.index(":")])
        kernels[name] = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]+)", part, re.MULTILINE)
    return kernels


def check_instructions(cubin: Path) -> None:
    """No double arithmetic, no local memory, rows in 16-byte loads and stores, barriers where a block has one state."""
    kernels = instructions(cubin)
    assert len(kernels) == 8
    for name, opcodes in kernels.items():
        assert len(opcodes) > 500, f"{name}: too short to be the kernel"
        forbidden = [o for o in opcodes if re.match(r"(DADD|DMUL|DFMA|DMMA|DSETP|LDL|STL)\b|.*\.F64", o)]
        assert not forbidden, f"{name} in {cubin.name} has {sorted(set(forbidden))}"
        wide = [sum(opcode.startswith(f"{kind}.E.128") for opcode in opcodes) for kind in ("LDG", "STG")]
        assert min(wide) >= 3, f"{name} in {cubin.name}: (LDG.E.128, STG.E.128) = {wide}, one for each dtype of a row"
        if "<float, false" in name:
            assert any(opcode.startswith("BAR.SYNC") for opcode in opcodes), name


# ------------------------------------------------------------------------------------------------- occupancy


def launches(library: Path) -> dict[str, Any]:
    """How float kernels of the default circuit are launched, for each architecture's shared memory."""
    import numpy as np

    from emulated import Device, draw, rounded
    from qaa.circuit import ansatz

    device = Device(library)
    found: dict[str, Any] = {}
    for architecture, kib in SHARED_KIB.items():
        for n_wires in WIRES:
            problem = draw(0, n_wires, "z", circuit=ansatz("ring", n_wires, 1), batch=1)
            device.schedule(0, kib * 1024)
            device.launches()
            device.solve(rounded(problem, np.float32), np.float32)
            for kernel, threads, shared in device.launches():
                name = kernel[kernel.index("cuda::") + 6 : kernel.index(">(") + 1]
                if name.startswith(("forward", "backward")):
                    case = f"{architecture} {name.split('_')[0]}, {n_wires} wires"
                    found[case] = (architecture, name, threads, shared)
    return found


def occupancies(launched: dict[str, Any], resources: dict[str, Resources], folder: Path) -> dict[str, Any]:
    """The percentage of a multiprocessor's warps that may be resident."""
    nvcc = find("nvcc")
    assert nvcc is not None
    places = [nvcc.resolve().parents[1] / "include", Path("/usr/local/cuda/include")]
    include = next(place for place in places if (place / "cuda_occupancy.h").is_file())
    program = folder / "occupancy"
    source = cuda_tools.ROOT / "tests/cuda/occupancy.cpp"
    _checked(cuda_tools.COMPILER, "-std=c++20", "-isystem", include, source, "-o", program)
    lines = []
    for architecture, kernel, threads, shared in launched.values():
        needs = resources[f"{architecture} float"][kernel]
        lines.append(f"{architecture} {needs['registers']} {needs['static_shared_bytes']} {threads} {shared}")
    percent = _checked(program, input="\n".join(lines)).split()
    return {
        name: {"kernel": kernel, "threads": threads, "dynamic_shared_bytes": shared, "occupancy_percent": int(value)}
        for (name, (_, kernel, threads, shared)), value in zip(launched.items(), percent, strict=True)
    }


def main() -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        ptx = {number: compile_ptx(number, folder) for number in ("float", "double")}
        code = {f"{arch} {number}": assemble(ptx[number], arch) for arch, number in CASES}
        for arch in ARCHITECTURES:
            check_instructions(code[f"{arch} float"][0])
        resources = {case: found for case, (_, found) in code.items()}
        library = cuda_tools.link_kernels(cuda_tools.compile_hosts(folder), folder)
        table = {
            "digest": digest(),
            "resources": resources,
            "occupancy": occupancies(launches(library), resources, folder),
        }
    TABLE.write_text(json.dumps(table, indent=1) + "\n")
    print(f"wrote {TABLE}")


if __name__ == "__main__":
    main()
