"""Whether the CUDA kernels are there, and kernels that are compiled for one circuit while the program runs.

The kernels run wherever a CUDA tensor is passed in; there is nothing to switch on. Those of the build serve any
circuit. For circuits of 9 to 13 wires and float16, bfloat16 or float32 rows, the first call compiles kernels with the
circuit as constants, by NVRTC, which comes with torch.
``QAA_CUDA_COMPILE=0`` in the environment leaves that out, and so do calls of fewer than 256 rows.
"""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
from functools import cache
from pathlib import Path

from qaa import _core

HOW_TO_BUILD = "a build that has CUDA kernels (pip install . -Ccmake.define.QAA_CUDA=ON)"


def is_built() -> bool:
    """Whether this build of qaa has CUDA kernels.

    Example:
        >>> import qaa
        >>> isinstance(qaa.cuda.is_built(), bool)
        True
    """
    return _core.cuda_is_built()


def is_available() -> bool:
    """Whether this build has CUDA kernels and there is a driver with at least one device."""
    return _core.cuda_is_available()


@cache
def compiler() -> str | None:
    """The path or name of the NVRTC library that compiles kernels for single circuits; None where there is none.

    Looked for in the packages that torch depends on, then where the system keeps libraries.
    """
    names = [f"libnvrtc.so.{major}" for major in (13, 12)]
    for folder in filter(None, sys.path):
        for name in names:
            for path in sorted(Path(folder).glob(f"nvidia/*/lib/{name}")):
                return str(path)
    for name in names:
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return name
    return None


def compile_source(source: str, capability: tuple[int, int]) -> bytes:
    """Machine code for devices of this compute capability.

    Raises:
        RuntimeError: there is no compiler, or it refuses the source; its log is in the message.
    """
    path = compiler()
    if path is None:
        raise RuntimeError("expected the library NVRTC (libnvrtc.so.13 or libnvrtc.so.12), found none")
    for builtins in Path(path).parent.glob("libnvrtc-builtins.so.*") if "/" in path else ():
        ctypes.CDLL(str(builtins))  # NVRTC asks for it by name, and not where it lies itself
    nvrtc = ctypes.CDLL(path)
    program = ctypes.c_void_p()
    architecture = f"--gpu-architecture=sm_{capability[0]}{capability[1]}"
    options = (ctypes.c_char_p * 3)(architecture.encode(), b"--std=c++20", b"--device-as-default-execution-space")
    text = source.encode()
    _succeed(nvrtc, nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, b"qaa_known.cu", 0, None, None))
    try:
        status = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if status != 0:
            log = _output(nvrtc, program, "ProgramLog").decode(errors="replace").rstrip("\0")
            raise RuntimeError(f"expected NVRTC to compile a kernel for {architecture}, received:\n{log[-2000:]}")
        return _output(nvrtc, program, "CUBIN")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _succeed(nvrtc: ctypes.CDLL, status: int) -> None:
    if status != 0:
        nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise RuntimeError(f"expected NVRTC to work, received: {nvrtc.nvrtcGetErrorString(status).decode()}")


def _output(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _succeed(nvrtc, getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _succeed(nvrtc, getattr(nvrtc, f"nvrtcGet{what}")(program, buffer))
    return buffer.raw


def known_kernel(
    plan: _core.Plan, scalar: _core.Scalar, backward: bool, capability: tuple[int, int]
) -> tuple[_core.CudaProgram, int] | None:
    """A program and the kernel of this circuit alone, for the current device; None where there is none.

    A compiler that fails is a warning, not an error: the build's kernels do the same.
    """
    if os.environ.get("QAA_CUDA_COMPILE") == "0" or compiler() is None or not _core.CudaProgram.can_be_known(plan):
        return None
    program = _core.CudaProgram(plan, is_known=True)
    source = program.known_source(scalar, backward)
    if not source:
        return None
    try:
        image = compile_source(_core.cuda_kernel_headers() + source, capability)
        kernel: int = _core.cuda_load_kernel(image)
    except RuntimeError as error:
        warnings.warn(f"kernels for any circuit are used: {error}", stacklevel=2)
        return None
    return program, kernel
