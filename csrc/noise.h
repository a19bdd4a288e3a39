// Circuits with noise, by Monte-Carlo trajectories.
//
// After every gate, on each of its wires, stand a Pauli channel and then amplitude damping. A trajectory draws what
// happens there; the mean over trajectories is the expectation value of the density matrix.
//
// Paulis never touch the state. The true state is P times the stored one, where P is a product of X and Z on the wires
// (the frame, one per trajectory): a rotation about an axis that anticommutes with P is stored with the opposite angle,
// a controlled NOT maps P to another product, and the readout takes P in as a sign.
//
// For the Python module: not among the headers that are installed.
#pragma once

#include "plan.h"
#include "qaa.h"

namespace qaa {

// Probabilities after every gate, on each of its wires, and of a flip of each measured bit.
struct Noise {
  double x = 0, y = 0, z = 0;
  double damping = 0;  // of |1> to |0>
  double readout = 0;
};

struct NoisyStep {
  enum class Kind : std::uint8_t {
    flip_x,  // of the frame, for certain
    flip_z,
    ry,      // exp(-i angle Y/2) on bit a
    rz,      // diag(1, exp(i angle)) on bit a
    rzz,     // exp(i angle) where bits a and b differ
    cnot,    // control a, target b
    pauli,   // X, Y or Z on bit a by chance
    damping, // on bit a
  };
  Kind kind;
  std::uint8_t a = 0, b = 0;  // bits of an amplitude's index
  Angle angle;
};

// A Pauli string as masks of index bits, n_y of whose letters are Y.
struct NoisyString {
  Index x = 0, z = 0;
  std::uint32_t n_y = 0;
  double factor = 1;  // what wrong bits leave of it
};

struct NoisyPlan {
  std::uint32_t n_wires = 0, n_parameters = 0;
  bool normalize = true;
  Noise noise;
  ReadoutKind readout = ReadoutKind::expval;
  std::uint32_t n_outputs = 0;
  std::vector<NoisyStep> steps;
  std::vector<NoisyString> strings;  // for expval
  std::vector<Index> outputs;        // for probs: output -> amplitude index
  Index n_amplitudes() const { return Index{1} << n_wires; }
};

// Throws std::invalid_argument as compile() does; amplitudes are not observable, so there is no readout `state`.
QAA_API NoisyPlan compile_noisy(std::uint32_t n_wires, std::uint32_t n_parameters, const std::vector<GateCall>& gates,
                                const ReadoutSpec& readout, bool normalize, const Noise& noise);

// features[r] = mean over trajectories, errors[r] = its standard error (NaN for a single trajectory).
//   x         (batch, d), 1 <= d <= 2^n_wires, float32 or float64, in which states are computed
//   features, errors  (batch, n_outputs) of the same type; errors are left out if their data is null
// What is drawn for trajectory t of row r depends on the seed, r and t alone. Zero rows give zero features, rows with
// NaN or infinity NaN.
struct NoisyCall {
  const NoisyPlan& plan;
  const double* theta;
  ConstMatrix x;
  std::int64_t trajectories;
  std::uint64_t seed;
  Matrix features, errors;
  int threads = 1;
};
QAA_API void forward(const NoisyCall& call);

// A plan with numbers in place of angles, for the kernels.
template <class T>
struct BoundNoisyStep {
  NoisyStep::Kind kind;
  std::uint8_t a, b;
  T cosine, sine;
};

template <class T>
struct BoundNoisyPlan {
  std::uint32_t n_wires;
  Index n_amplitudes;
  bool normalize;
  ReadoutKind readout;
  std::uint32_t n_outputs;
  const BoundNoisyStep<T>* steps;
  std::uint32_t n_steps;
  const NoisyString* strings;
  const Index* outputs;
  std::uint64_t pauli[3];  // u < pauli[0]: X, else u < pauli[1]: Y, else u < pauli[2]: Z, for 32 random bits u
  T right;  // 1 - 2 (probability of a wrong bit), what is left of a sign that a bit of `probs` gives
  T damping, keep;  // the probability, and what damping leaves of the amplitude of |1> otherwise
};

// Rows [first_row, first_row + n_rows) and trajectories [first, last). sums: for every row and output the sum of the
// values, then that of their squares.
struct NoisyRange {
  std::int64_t first_row;
  int n_rows;
  std::int64_t first, last;
  double* sums;
};

// What the translation unit of each instruction set exports; as many rows as its vectors have lanes.
template <class T>
struct NoisyKernels {
  std::size_t (*workspace_vectors)(const BoundNoisyPlan<T>&);
  void (*group)(const BoundNoisyPlan<T>&, const NoisyCall&, const NoisyRange&, void* memory);
};
struct NoisyInstructionSet {
  NoisyKernels<float> f32;
  NoisyKernels<double> f64;
};

}  // namespace qaa
