// qaa: batched simulation and adjoint differentiation of parameterized quantum circuits on amplitude-embedded vectors.
//
// The public C++ interface: compile a circuit once, then run batches through it.
//
//   qaa::Plan plan = qaa::compile("wires 2; theta 1; RY 0 t0; CNOT 0 1 | ZI,IZ | normalize");
//   qaa::forward({plan, theta, {x, rows, 4, 4, qaa::Scalar::float32}, {features, rows, 2, 2, qaa::Scalar::float32}});
//
// Conventions. Wire 0 is the most significant bit of an amplitude's index; angles are radians; RX, RY, RZ are
// exp(-i theta P / 2). Arrays are described by pointers, shapes and strides; nothing is copied, kept or freed.
//
// Errors. A call checks everything that it can see before it touches memory, and throws std::invalid_argument with one
// sentence, "expected ..., received ...". std::bad_alloc is possible, and std::runtime_error if the
// environment variable QAA_ISA names an instruction set that this machine or build lacks.
// A call that throws std::bad_alloc may have written part of its outputs, any other one has written nothing.
//
// Threads. Every function may be called from any thread at any time; outputs of calls that run at once must not
// overlap, nor may an output overlap an input unless it is said below. `threads` is the most that work on a
// call, the caller's included, at least 1. The others are those of the process's OpenMP where it has a runtime, whose threads then all
// wake up, and of one pool of the core otherwise and in a child after fork(); a call that finds them busy works alone.
// Results are the same bits for any number of threads. While a call runs, its threads compute by IEEE's rules, subnormal
// numbers included, whatever they were set to (flush to zero, another rounding); the setting is back afterwards.
//
// No function here knows of Python or of any framework.
#pragma once

#include <string_view>

#include "basic.h"
#include "plan.h"

namespace qaa {

// features[r] = readout of U(theta) applied to the state that x[r], padded with zeros, is (or is normalized to).
//   plan      from compile(), and not moved from
//   theta     plan.n_parameters angles; may be null if there are none
//   x         (batch, d), 1 <= d <= 2^n_wires, any scalar; batch may be 0
//   features  (batch, plan.n_columns()), float64 if x is, else any narrower scalar; for `state` each output is a pair
//             (real, imaginary)
//   groups    into which neighbouring rows of the features fall, equally many into each; every group has angles of its
//             own, theta is (groups, plan.n_parameters), and x has as many rows as the features, or those of one group,
//             which all groups then share
//   strings   (batch, plan.n_strings()), float64 if x is, else float32: the expectation values of the Hermitian strings
//             that the readout comes down to, whose sums with coefficients the features are, for BackwardCall::strings;
//             left out if its data is null
// A zero row is no state: its features are zero. NaN and infinity stay in their row.
// Throws std::invalid_argument for other shapes or scalars, or null data in a batch that is not empty.
struct ForwardCall {
  const Plan& plan;
  const double* theta;
  ConstMatrix x;
  Matrix features;
  int threads = 1;
  std::int64_t groups = 1;
  Matrix strings{};
};
QAA_API void forward(const ForwardCall& call);

// The vector-Jacobian product of forward by adjoint differentiation: with E = sum(grad * features),
//   grad_theta[p] = dE/dtheta[p], overwritten: plan.n_parameters doubles, for each group where there are several
//   grad_x[r]     = dE/dx[r], overwritten: the shape of x, and as many rows as the features where groups share x; left
//                   out if grad_x.data is null
//   grad          (batch, plan.n_columns())
//   strings       what forward has written there for the same plan, angles and x; a backward call whose data is null
//                 measures them once more, which costs up to a fifth of its time
// Scalars: as for features. The memory that it needs does not grow with the batch. It does with the circuit: by up to 64
// sums for each angle of a gate, and by a few tables of 2^n_wires numbers for each diagonal stage of the plan, which
// forward makes as well.
// A zero row has zero gradients where rows are normalized. A row with NaN or infinity makes grad_theta NaN, and no
// other row of grad_x.
// For `state` without normalization, which is linear in x, x.data may be null: grad_x does not depend on it, and
// grad_theta is what it is for zeros.
// Throws as forward does.
struct BackwardCall {
  const Plan& plan;
  const double* theta;
  ConstMatrix x;
  ConstMatrix grad;
  double* grad_theta;
  Matrix grad_x;
  int threads = 1;
  std::int64_t groups = 1;
  ConstMatrix strings{};
};
QAA_API void backward(const BackwardCall& call);

// out = base + scale (features up^T + bias): features back to the width of the layer, onto its frozen output.
//   features (rows, k), up (columns, k), base and out (rows, columns; out may be base), bias (1, columns) or null
// All float32 or all float64. Throws std::invalid_argument for other shapes or scalars.
struct ProjectCall {
  ConstMatrix features, up, bias, base;
  double scale;
  Matrix out;
  int threads = 1;
};
QAA_API void project(const ProjectCall& call);

// The adjoint of project for an incoming gradient (rows, columns), in one pass over it. grad_features (rows, k),
// grad_up (columns, k) and grad_bias (1, columns; left out if its data is null) are overwritten; the gradient with
// respect to base is the incoming one. Throws as project does.
struct ProjectBackwardCall {
  ConstMatrix grad, features, up;
  double scale;
  Matrix grad_features, grad_up, grad_bias;
  int threads = 1;
};
QAA_API void project_backward(const ProjectBackwardCall& call);

// The instruction set in use: "avx512", "avx2", "neon" or "baseline". The environment variable QAA_ISA forces one.
// Throws std::runtime_error if it names one that this build or machine lacks.
QAA_API const char* instruction_set();

// The options that suit that instruction set. Throws as instruction_set does.
QAA_API PlanOptions default_options();

// The plan of a program in one line, as Python writes it (`str(qaa.program.program(circuit, "z", True))`), so that a
// circuit can be trained there and run here:
//   wires N; theta SHAPE; GATE WIRE ... tPARAMETER ...; ... | READOUT | normalize
// SHAPE is "2x4x3" for 24 parameters, READOUT is "ZI,IZ" (Pauli strings, wire 0 first), "probs[:K]" or "state[:K]", and
// the last part is "normalize" or "as is". Throws std::invalid_argument naming what it does not understand.
QAA_API Plan compile(std::string_view program, const PlanOptions& options = default_options());

}  // namespace qaa
