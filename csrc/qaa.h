// qaa: batched simulation and adjoint differentiation of parameterized quantum circuits on amplitude-embedded vectors.
//
// The public C++ interface: compile a circuit once (`plan.h`), then run batches through it. Arrays are described by
// pointers, shapes and strides; nothing is copied or kept. No function here knows of Python or of any framework.
#pragma once

#include <cstddef>
#include <cstdint>

#include "plan.h"

namespace qaa {

enum class Scalar : std::uint8_t { float16, bfloat16, float32, float64 };

// `rows` vectors of `columns` adjacent numbers; row r starts at data + r * row_stride numbers.
struct Matrix {
  void* data = nullptr;
  std::int64_t rows = 0, columns = 0, row_stride = 0;
  Scalar scalar = Scalar::float32;
};
struct ConstMatrix {
  const void* data = nullptr;
  std::int64_t rows = 0, columns = 0, row_stride = 0;
  Scalar scalar = Scalar::float32;
};

// features[r] = readout of U(theta) applied to the state that x[r], padded with zeros, is (or is normalized to).
//   x         (batch, d), 1 <= d <= 2^n_wires
//   features  (batch, plan.n_columns()); for `state` pairs (real, imaginary)
// States are float64 if x is float64, else float32. Zero rows give zero features.
struct ForwardCall {
  const Plan& plan;
  const double* theta;  // plan.n_parameters angles in radians
  ConstMatrix x;
  Matrix features;
  int threads = 1;
};
void forward(const ForwardCall& call);

// The vector-Jacobian product: with E = sum(grad * features),
//   grad_theta[p] = dE/dtheta[p], overwritten (plan.n_parameters doubles)
//   grad_x[r]     = dE/dx[r], overwritten; left out if grad_x.data is null
// For `state` without normalization, which is linear in x, x.data may be null: grad_x does not depend on it, and
// grad_theta is what it is for zeros.
// The same thread-independent order of summation is used for any number of threads.
struct BackwardCall {
  const Plan& plan;
  const double* theta;
  ConstMatrix x;
  ConstMatrix grad;
  double* grad_theta;
  Matrix grad_x;
  int threads = 1;
};
void backward(const BackwardCall& call);

// out = base + scale (features up^T + bias): features back to the width of the layer, onto its frozen output.
//   features (rows, k), up (columns, k), base and out (rows, columns; out may be base), bias (1, columns) or null
// All float32 or all float64.
struct ProjectCall {
  ConstMatrix features, up, bias, base;
  double scale;
  Matrix out;
  int threads = 1;
};
void project(const ProjectCall& call);

// The adjoint of project for an incoming gradient (rows, columns), in one pass over it. grad_features (rows, k),
// grad_up (columns, k) and grad_bias (1, columns; left out if its data is null) are overwritten; the gradient with
// respect to base is the incoming one. Results do not depend on the number of threads.
struct ProjectBackwardCall {
  ConstMatrix grad, features, up;
  double scale;
  Matrix grad_features, grad_up, grad_bias;
  int threads = 1;
};
void project_backward(const ProjectBackwardCall& call);

// The instruction set in use: "avx512", "avx2", "neon" or "baseline". The environment variable QAA_ISA forces one.
// Throws std::runtime_error if it names one that this build or machine lacks.
const char* instruction_set();

// The options that suit that instruction set.
PlanOptions default_options();

}  // namespace qaa
