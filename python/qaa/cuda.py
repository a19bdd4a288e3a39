"""Whether the CUDA kernels are there. They run wherever a CUDA tensor is passed in; there is nothing to switch on."""

from __future__ import annotations

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
