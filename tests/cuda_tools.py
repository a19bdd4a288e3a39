"""Compilers of the CUDA tests: the host's, which runs kernels on an emulated device, and nvcc where there is one."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

from filelock import FileLock

ROOT = Path(__file__).parents[1]

#: Compiler options of each way to run emulated kernels. Unrolled loops under ASan and UBSan take minutes to optimise.
SANITIZERS = {
    "plain": ("-O1",),
    "asan": ("-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "tsan": ("-O1", "-fsanitize=thread"),
}
_RUNTIMES = {"plain": (), "asan": ("libasan.so", "libubsan.so"), "tsan": ("libtsan.so",)}

COMPILER = os.environ.get("CXX", "g++")
_WARNINGS = ("-Wall", "-Wextra", "-Wno-unknown-pragmas")
_FLAGS = ("-std=c++20", "-g", "-fPIC", *_WARNINGS, "-DQAA_CUDA_EMULATED", "-DQAA_MAX_BLOCKS=3")
_FOLDERS = tuple(f"-I{ROOT / folder}" for folder in ("tests/cuda", "csrc", "csrc/cuda"))


def run(command: list[str | Path], **options: object) -> subprocess.CompletedProcess[str]:
    """The finished process; whoever needs a return code of zero says so with ``check``."""
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, **options)  # type: ignore


def compile_emulated(source: Path, target: Path, sanitizer: str = "plain") -> Path:
    """An object file of a source with kernels, or of the emulator, which never has a sanitizer; made once."""
    with FileLock(target.with_suffix(".lock")):  # by the first of several processes that want it
        if not target.exists():
            unfinished = target.with_suffix(".unfinished")
            flags = (*_FLAGS, *_FOLDERS, *SANITIZERS[sanitizer])
            result = run([COMPILER, *flags, "-c", "-x", "c++", source, "-o", unfinished])
            assert result.returncode == 0, result.stderr[-3000:]
            assert "warning" not in result.stderr, result.stderr[-3000:]
            unfinished.rename(target)
    return target


def link(objects: list[Path], target: Path, sanitizer: str = "plain") -> Path:
    kind = ["-shared"] if target.suffix == ".so" else []
    result = run([COMPILER, *kind, *SANITIZERS[sanitizer], *objects, "-o", target])
    assert result.returncode == 0, result.stderr[-3000:]
    return target


def compile_hosts(folder: Path) -> list[Path]:
    """Object files of everything that a library of tests/cuda/driver.cpp needs but the kernels."""
    sources = ["csrc/plan.cpp", "csrc/layout.cpp", "csrc/cuda/program.cpp", "csrc/cuda/specialize.cpp"]
    sources += ["tests/cuda/driver.cpp", "tests/cuda/emulator.cpp"]
    return [compile_emulated(ROOT / source, folder / f"{Path(source).stem}.o") for source in sources]


def link_kernels(hosts: list[Path], folder: Path, sanitizer: str = "plain") -> Path:
    """The library whose kernels run on the emulated device."""
    kernels = compile_emulated(ROOT / "csrc/cuda/launch.cu", hosts[0].with_name(f"{sanitizer}.o"), sanitizer)
    return link([*hosts, kernels], folder / f"{sanitizer}.so", sanitizer)


def compile_known(source: str, library: Path, folder: Path) -> Path:
    """A library with the kernel of one circuit, for calls of the library with all others; made once."""
    target = folder / f"{hashlib.sha256(source.encode()).hexdigest()}.so"
    if not target.exists():
        text = target.with_suffix(".cpp")
        text.write_text(f'#include "kernels.cuh"\n{source}')
        object_file = compile_emulated(text, target.with_suffix(".o"))
        result = run([COMPILER, "-shared", object_file, library, "-o", target])
        assert result.returncode == 0, result.stderr[-3000:]
    return target


def link_traced(hosts: list[Path], folder: Path) -> Path:
    """The library that tells of every access to memory, see tests/cuda/trace.cpp."""
    kernels = compile_emulated(ROOT / "csrc/cuda/launch.cu", hosts[0].with_name("tsan.o"), "tsan")
    trace = compile_emulated(ROOT / "tests/cuda/trace.cpp", folder / "trace.o")
    return link([*hosts, kernels, trace], folder / "traced.so")


def sanitized(command: list[str | Path], sanitizer: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """Runs a program that loads sanitized code, with the sanitizers' runtimes in place before anything else.

    ThreadSanitizer wants a fixed layout of the address space (``setarch -R``) and stops at the first race.
    """
    paths = [run([COMPILER, f"-print-file-name={name}"]).stdout.strip() for name in _RUNTIMES[sanitizer]]
    preload = {"LD_PRELOAD": " ".join(paths)} if paths else {}
    options = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1 report_signal_unsafe=0"}
    fixed = ["setarch", "-R", "env"] if shutil.which("setarch") else ["env"]
    words = [f"{name}={value}" for name, value in {**options, **preload}.items()]
    return run([*fixed, *words, *command], timeout=timeout)
