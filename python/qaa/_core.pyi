"""
Compiled core of qaa: circuits to plans, and batches of states through them.
"""

from __future__ import annotations

import collections.abc
import typing

__all__: list[str] = [
    "ConstMatrix",
    "CudaProgram",
    "Matrix",
    "NoisyPlan",
    "Plan",
    "ReadoutKind",
    "Scalar",
    "backward",
    "cuda_backward",
    "cuda_forward",
    "cuda_is_available",
    "cuda_is_built",
    "forward",
    "gate_table",
    "instruction_set",
    "noisy_forward",
    "project",
    "project_backward",
    "xla_handlers",
]

class Scalar:
    """
    Storage type of an array's numbers.

    Members:

      float16

      bfloat16

      float32

      float64
    """

    __members__: typing.ClassVar[dict[str, Scalar]]
    bfloat16: typing.ClassVar[Scalar]
    float16: typing.ClassVar[Scalar]
    float32: typing.ClassVar[Scalar]
    float64: typing.ClassVar[Scalar]
    @typing.overload
    def __eq__(self, other: Scalar) -> bool: ...
    @typing.overload
    def __eq__(self, other: typing.Any) -> bool: ...
    def __getstate__(self) -> int: ...
    def __hash__(self) -> int: ...
    def __index__(self) -> int: ...
    def __init__(self, value: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def __int__(self) -> int: ...
    @typing.overload
    def __ne__(self, other: Scalar) -> bool: ...
    @typing.overload
    def __ne__(self, other: typing.Any) -> bool: ...
    def __repr__(self) -> str: ...
    def __setstate__(self, state: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def __str__(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> int: ...

class ReadoutKind:
    """
    What is computed from the final state.

    Members:

      expval

      probs

      state
    """

    __members__: typing.ClassVar[dict[str, ReadoutKind]]
    expval: typing.ClassVar[ReadoutKind]
    probs: typing.ClassVar[ReadoutKind]
    state: typing.ClassVar[ReadoutKind]
    @typing.overload
    def __eq__(self, other: ReadoutKind) -> bool: ...
    @typing.overload
    def __eq__(self, other: typing.Any) -> bool: ...
    def __getstate__(self) -> int: ...
    def __hash__(self) -> int: ...
    def __index__(self) -> int: ...
    def __init__(self, value: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def __int__(self) -> int: ...
    @typing.overload
    def __ne__(self, other: ReadoutKind) -> bool: ...
    @typing.overload
    def __ne__(self, other: typing.Any) -> bool: ...
    def __repr__(self) -> str: ...
    def __setstate__(self, state: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def __str__(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> int: ...

class Matrix:
    """
    A writable array: rows of adjacent numbers, row_stride numbers apart.
    """
    def __init__(
        self,
        address: typing.SupportsInt | typing.SupportsIndex,
        rows: typing.SupportsInt | typing.SupportsIndex,
        columns: typing.SupportsInt | typing.SupportsIndex,
        row_stride: typing.SupportsInt | typing.SupportsIndex,
        scalar: Scalar,
    ) -> None: ...

class ConstMatrix:
    """
    A read-only array: rows of adjacent numbers, row_stride numbers apart.
    """
    def __init__(
        self,
        address: typing.SupportsInt | typing.SupportsIndex,
        rows: typing.SupportsInt | typing.SupportsIndex,
        columns: typing.SupportsInt | typing.SupportsIndex,
        row_stride: typing.SupportsInt | typing.SupportsIndex,
        scalar: Scalar,
    ) -> None: ...

class CudaProgram:
    """
    A plan as the CUDA kernels read it.
    """
    @staticmethod
    def can_be_known(plan: Plan) -> bool:
        """
        Whether kernels can be compiled for this circuit alone.
        """
    def __init__(self, plan: Plan, is_known: bool = False) -> None:
        """
        With is_known, for kernels that are compiled for this circuit alone.
        """
    def known_source(self, scalar: Scalar, backward: bool) -> str:
        """
        What follows kernel_headers() in the source of such a kernel; empty where there is none.
        """
    def workspace_bytes(
        self,
        rows: typing.SupportsInt | typing.SupportsIndex,
        scalar: Scalar,
        backward: bool,
        groups: typing.SupportsInt | typing.SupportsIndex = 1,
    ) -> int:
        """
        Scratch memory of a call on the current device.
        """
    @property
    def description(self) -> bytes:
        """
        Bytes that a call wants in device memory.
        """

class Plan:
    """
    A compiled circuit and readout.
    """
    def __init__(
        self,
        n_wires: typing.SupportsInt | typing.SupportsIndex,
        n_parameters: typing.SupportsInt | typing.SupportsIndex,
        gates: collections.abc.Sequence[
            tuple[
                str,
                collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
                collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
            ]
        ],
        kind: ReadoutKind,
        n_outputs: typing.SupportsInt | typing.SupportsIndex,
        paulis: collections.abc.Sequence[str],
        normalize: bool = True,
        *,
        fuse: bool = True,
        rename: bool = True,
        absorb: bool = True,
        expand: bool = True,
        real: bool = True,
        tangent: bool = True,
        link: bool = True,
        rotate_radix: typing.SupportsInt | typing.SupportsIndex | None = None,
        unwind_radix: typing.SupportsInt | typing.SupportsIndex | None = None,
    ) -> None: ...
    def __str__(self) -> str: ...
    def operations(self, columns: typing.SupportsInt | typing.SupportsIndex) -> tuple[float, float, float]:
        """
        Arithmetic operations for one state; a multiply-add counts as one: (forward, backward with the strings' values, more without them).
        """

    @property
    def n_columns(self) -> int:
        """
        Numbers per state that a readout yields.
        """

    @property
    def n_strings(self) -> int:
        """
        Hermitian strings that a readout of expvals comes down to.
        """

class NoisyPlan:
    """
    A circuit with noise after every gate, and a readout.
    """
    def __init__(
        self,
        n_wires: typing.SupportsInt | typing.SupportsIndex,
        n_parameters: typing.SupportsInt | typing.SupportsIndex,
        gates: collections.abc.Sequence[
            tuple[
                str,
                collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
                collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
            ]
        ],
        kind: ReadoutKind,
        n_outputs: typing.SupportsInt | typing.SupportsIndex,
        paulis: collections.abc.Sequence[str],
        normalize: bool,
        pauli: typing.Annotated[collections.abc.Sequence[typing.SupportsFloat | typing.SupportsIndex], "FixedSize(3)"],
        damping: typing.SupportsFloat | typing.SupportsIndex,
        readout: typing.SupportsFloat | typing.SupportsIndex,
    ) -> None: ...

def backward(
    plan: Plan,
    theta_address: typing.SupportsInt | typing.SupportsIndex,
    theta_scalar: Scalar,
    x: ConstMatrix,
    grad: ConstMatrix,
    grad_theta_address: typing.SupportsInt | typing.SupportsIndex,
    grad_x: Matrix,
    threads: typing.SupportsInt | typing.SupportsIndex,
    groups: typing.SupportsInt | typing.SupportsIndex = 1,
    strings: ConstMatrix | None = None,
) -> None:
    """
    The vector-Jacobian product of forward, which takes less time with the strings' values that it has written; releases the GIL.
    """

def forward(
    plan: Plan,
    theta_address: typing.SupportsInt | typing.SupportsIndex,
    theta_scalar: Scalar,
    x: ConstMatrix,
    features: Matrix,
    threads: typing.SupportsInt | typing.SupportsIndex,
    groups: typing.SupportsInt | typing.SupportsIndex = 1,
    strings: Matrix | None = None,
) -> None:
    """
    features = readout(U(theta) x), of equal groups of rows with angles of their own; releases the GIL.
    """

def gate_table() -> list[tuple[str, int, int]]:
    """
    (name, wires, parameters) of every gate.
    """

def instruction_set() -> str:
    """
    The instruction set in use; QAA_ISA forces one.
    """

def noisy_forward(
    plan: NoisyPlan,
    theta_address: typing.SupportsInt | typing.SupportsIndex,
    theta_scalar: Scalar,
    x: ConstMatrix,
    trajectories: typing.SupportsInt | typing.SupportsIndex,
    seed: typing.SupportsInt | typing.SupportsIndex,
    features: Matrix,
    errors: Matrix,
    threads: typing.SupportsInt | typing.SupportsIndex,
) -> None:
    """
    Means over trajectories and their standard errors; releases the GIL.
    """

def project(
    features: ConstMatrix,
    up: ConstMatrix,
    bias: ConstMatrix,
    base: ConstMatrix,
    scale: typing.SupportsFloat | typing.SupportsIndex,
    out: Matrix,
    threads: typing.SupportsInt | typing.SupportsIndex,
) -> None:
    """
    out = base + scale (features up^T + bias); releases the GIL.
    """

def project_backward(
    grad: ConstMatrix,
    features: ConstMatrix,
    up: ConstMatrix,
    scale: typing.SupportsFloat | typing.SupportsIndex,
    grad_features: Matrix,
    grad_up: Matrix,
    grad_bias: Matrix,
    threads: typing.SupportsInt | typing.SupportsIndex,
) -> None:
    """
    The adjoint of project in one pass over grad; releases the GIL.
    """

def xla_handlers() -> dict[str, typing.Any]:
    """
    XLA's custom calls by name, as capsules for jax.ffi.register_ffi_target.
    """

def cuda_is_built() -> bool:
    """
    Whether this build has CUDA kernels.
    """

def cuda_kernel_headers() -> str:
    """
    The source of the kernels without what one circuit makes of them, for a compiler at run time.
    """

def cuda_load_kernel(image: bytes) -> int:
    """
    A kernel from its machine code, as an address.
    """

def cuda_is_available() -> bool:
    """
    Whether it has, and there is a driver with a device.
    """

def cuda_forward(
    program: CudaProgram,
    description_address: typing.SupportsInt | typing.SupportsIndex,
    theta_address: typing.SupportsInt | typing.SupportsIndex,
    theta_scalar: Scalar,
    x: ConstMatrix,
    features: Matrix,
    workspace_address: typing.SupportsInt | typing.SupportsIndex,
    stream: typing.SupportsInt | typing.SupportsIndex,
    kernel: typing.SupportsInt | typing.SupportsIndex = 0,
    groups: typing.SupportsInt | typing.SupportsIndex = 1,
) -> None:
    """
    As forward, on the current device and asynchronous on the stream.
    """

def cuda_backward(
    program: CudaProgram,
    description_address: typing.SupportsInt | typing.SupportsIndex,
    theta_address: typing.SupportsInt | typing.SupportsIndex,
    theta_scalar: Scalar,
    x: ConstMatrix,
    grad: ConstMatrix,
    grad_theta_address: typing.SupportsInt | typing.SupportsIndex,
    grad_x: Matrix,
    workspace_address: typing.SupportsInt | typing.SupportsIndex,
    stream: typing.SupportsInt | typing.SupportsIndex,
    kernel: typing.SupportsInt | typing.SupportsIndex = 0,
    groups: typing.SupportsInt | typing.SupportsIndex = 1,
) -> None:
    """
    As backward, on the current device and asynchronous on the stream.
    """
