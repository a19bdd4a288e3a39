"""What the machine could do: fused multiply-adds and memory traffic, by a small C++ program made for this machine."""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_CHAINS = r"""
#if defined(__AVX512F__)
constexpr int bytes = 64;
#elif defined(__AVX__)
constexpr int bytes = 32;
#else
constexpr int bytes = 16;
#endif
typedef float vector __attribute__((vector_size(bytes)));
constexpr int lanes = bytes / sizeof(float), chains = 12;  // enough chains to hide the latency of a multiply-add

volatile float sink;

// steps * chains * lanes multiply-adds.
void multiply_add(long steps, int t) {
    vector a[chains], m = vector{} + (0.999f + 1e-6f * t), c = vector{} + 0.1f;
    for (int i = 0; i < chains; ++i) a[i] = vector{} + float(i);
    for (long k = 0; k < steps; ++k)
        for (int i = 0; i < chains; ++i) a[i] = a[i] * m + c;
    vector total = a[0];
    for (int i = 1; i < chains; ++i) total += a[i];
    sink = total[0];
}
"""

_LIBRARY = (
    _CHAINS
    + r"""
extern "C" void multiply_adds(double count) { multiply_add(long(count / (chains * lanes)), 0); }
"""
)

_PROGRAM = (
    r"""
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>
"""
    + _CHAINS
    + r"""
template <class Function> double fastest(int threads, Function work) {
    double best = 1e30;
    for (int repeat = 0; repeat < 9; ++repeat) {
        auto start = std::chrono::steady_clock::now();
        std::vector<std::thread> others;
        for (int t = 1; t < threads; ++t) others.emplace_back(work, t);
        work(0);
        for (auto& other : others) other.join();
        double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
        if (seconds < best) best = seconds;
    }
    return best;
}

int main(int, char** arguments) {
    int threads = std::atoi(arguments[1]);
    constexpr long steps = 4000000;
    double multiply_adds = fastest(threads, [](int t) { multiply_add(steps, t); });
    long length = (64l << 20) / sizeof(float) / threads;  // 64 MiB an array, beyond the caches
    std::vector<std::vector<float>> x(threads), y(threads), z(threads);
    for (int t = 0; t < threads; ++t) x[t].assign(length, 1), y[t].assign(length, 2), z[t].assign(length, 3);
    double read = fastest(threads, [&](int t) {
        size_t aligned = (reinterpret_cast<size_t>(x[t].data()) + bytes) & -size_t(bytes);
        const vector* p = reinterpret_cast<const vector*>(aligned);
        vector a[8] = {};
        for (long i = 0; i + 8 <= length / lanes - 1; i += 8)
            for (int j = 0; j < 8; ++j) a[j] += p[i + j];
        sink = (a[0] + a[1] + a[2] + a[3] + a[4] + a[5] + a[6] + a[7])[0];
    });
    double triad = fastest(threads, [&](int t) {
        float *px = x[t].data(), *py = y[t].data(), *pz = z[t].data();
        for (long i = 0; i < length; ++i) pz[i] = px[i] + 1.5f * py[i];
        sink = pz[length / 2];
    });
    double moved = double(length) * threads * sizeof(float);
    std::printf("{\"multiply_adds_per_second\": %g, \"read_bytes_per_second\": %g, \"triad_bytes_per_second\": %g}\n",
                double(steps) * chains * lanes * threads / multiply_adds, moved / read, 3 * moved / triad);
}
"""
)


@dataclass(frozen=True)
class Peak:
    """The most that a number of threads reach: float32 multiply-adds, bytes read, bytes moved by a triad."""

    multiply_adds_per_second: float
    read_bytes_per_second: float
    triad_bytes_per_second: float


def peak(threads: int) -> Peak | None:
    """Measured now; None where there is no C++ compiler. Takes some seconds."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            program = _compiled(_PROGRAM, Path(folder))
            output = subprocess.run([str(program), str(threads)], check=True, capture_output=True, text=True).stdout
        except (OSError, subprocess.CalledProcessError):
            return None
    return Peak(**json.loads(output))


def multiply_adds() -> Callable[[float], None]:
    """A function that makes so many float32 multiply-adds, in registers, on all processors that this process may use.

    Raises:
        OSError: if there is no C++ compiler.
    """
    with tempfile.TemporaryDirectory() as folder:
        function = ctypes.CDLL(str(_compiled(_LIBRARY, Path(folder), "-shared", "-fPIC"))).multiply_adds
    function.argtypes, function.restype = [ctypes.c_double], None
    threads = processors()
    pool = ThreadPoolExecutor(threads)

    def call(count: float) -> None:
        if threads == 1:
            function(count)
        else:
            list(pool.map(function, [count / threads] * threads))

    return call


def _compiled(source: str, folder: Path, *options: str) -> Path:
    """A C++ program or library for this very processor."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise FileNotFoundError("expected a C++ compiler, found none")
    text, result = folder / "source.cpp", folder / "compiled"
    text.write_text(source)
    flags = ["-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-pthread", *options]
    subprocess.run([compiler, *flags, str(text), "-o", str(result)], check=True, capture_output=True)
    return result


def processors() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe() -> dict[str, Any]:
    """Processor, system and Python."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    from qaa import _core

    return {
        "processor": model,
        "processors": processors(),
        "instruction_set": _core.instruction_set(),
        "system": platform.system(),
        "python": platform.python_version(),
        "qaa": importlib.metadata.version("qaa") if _installed("qaa") else "not installed, from the source tree",
    }


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
