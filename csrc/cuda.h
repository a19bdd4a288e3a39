// The same calls as in qaa.h for arrays on a CUDA device: asynchronous on the caller's stream, without allocations and
// without synchronisation, so that they can be captured into a graph. Where the build has no CUDA, every call but
// `is_built`, `is_available` and `Program::can_be_known` throws std::runtime_error.
#pragma once

#include <cstddef>
#include <string>

#include "cuda/program.h"
#include "qaa.h"

namespace qaa::cuda {

// Whether this build has CUDA kernels, and whether there is also a driver with a device.
QAA_API bool is_built();
QAA_API bool is_available();

// Bytes of scratch memory on the current device for a call with so many rows of features, in so many groups; aligned to 256
// bytes.
QAA_API std::size_t workspace_bytes(const Program& program, std::int64_t rows, Scalar scalar, bool backward,
                                    std::int64_t groups = 1);

// As qaa::ForwardCall. All pointers are to memory of the current device; `theta` has float32 or float64 numbers.
struct ForwardCall {
  const Program& program;
  const void* description;  // a copy of program.description, aligned to 16 bytes
  const void* theta;
  Scalar theta_scalar;
  ConstMatrix x;
  Matrix features;
  void* workspace;
  void* stream;  // a cudaStream_t
  const void* kernel = nullptr;  // of load_kernel, with a program that is_known and one group
  std::int64_t groups = 1;       // at most 65,535
};
QAA_API void forward(const ForwardCall& call);

// As qaa::BackwardCall. grad_theta has theta's type; the order of every sum depends on the number of a group's rows alone.
struct BackwardCall {
  const Program& program;
  const void* description;
  const void* theta;
  Scalar theta_scalar;
  ConstMatrix x;
  ConstMatrix grad;
  void* grad_theta;
  Matrix grad_x;
  void* workspace;
  void* stream;
  const void* kernel = nullptr;
  std::int64_t groups = 1;
};
QAA_API void backward(const BackwardCall& call);

// Kernels for one circuit. What a compiler for the current device (NVRTC) is to be given after `kernel_headers`: a kernel of
// the circuit as constants, named qaa_known_kernel, for rows of this type; empty where there can be none, as for float64.
QAA_API std::string known_source(const Program& program, Scalar scalar, bool backward);
QAA_API const char* kernel_headers();

// The kernel from its machine code, for `kernel` in calls with that program, type and direction; it stays loaded.
QAA_API const void* load_kernel(const void* image);

}  // namespace qaa::cuda
