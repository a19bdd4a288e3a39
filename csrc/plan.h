// Circuit and readout -> plan.
//
// A plan is a sequence of stages, each either a set of commuting real rotations or one diagonal, followed by a
// readout. Wires, controlled NOTs, swaps, X and Z do not appear in it: they only rename amplitudes, and the plan
// keeps the renaming as a linear map over GF(2) (`Frame`).
#pragma once

#include <complex>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "basic.h"

// What a shared library of the core lets others see.
#define QAA_API __attribute__((visibility("default")))

namespace qaa {

// One gate of a circuit. The names and their numbers of wires and parameters are the table of gates.h: X Y Z H S T
// RX RY RZ PhaseShift Rot CNOT CZ SWAP CRX CRY CRZ.
struct GateCall {
  std::string name;
  std::vector<std::uint32_t> wires;
  std::vector<std::uint32_t> parameters;  // entries of theta
};

struct ReadoutSpec {
  ReadoutKind kind = ReadoutKind::expval;
  std::uint32_t n_outputs = 0;      // Pauli strings, or the first so many of b
  std::vector<std::string> paulis;  // for expval: one string of I, X, Y, Z per output, wire 0 first
};

// Rewrites that tests switch off one by one, and the widths that the instruction set asks for.
struct PlanOptions {
  bool fuse = true;      // move gates back to the earliest stage that they commute into, and add equal ones up
  bool rename = true;    // X, Z, CNOT and SWAP rename amplitudes; otherwise they are rotations and diagonals
  bool absorb = true;    // move trailing gates into the observables (Heisenberg picture)
  bool expand = true;    // and the diagonal that makes a real state complex, at the price of more strings
  bool real = true;      // leave the imaginary part out while the state is real
  bool tangent = true;   // rotate with one multiply-add per amplitude, the cosines collected in one scalar
  bool link = true;      // read strings of two neighbouring rotations in the pass that turns them
  int load_radix = 3;    // wires of the columns' lowest bits, whose rotations come first in the first stage
  int rotate_radix = 3;  // wires per pass of a rotation, or one more where that saves a pass
  int unwind_radix = 2;  // wires per pass of the adjoint, which holds two states
};

struct Angle {
  double constant = 0;
  std::vector<AngleTerm> terms;
  bool operator==(const Angle&) const = default;
  bool is_constant() const { return terms.empty(); }
  QAA_API double value(const double* theta) const;
  QAA_API void add(const Angle& other, double sign);
};

// [a; b] <- [cos -sin; sin cos](angle / 2) [a; b] for every pair a = psi[i], b = psi[i ^ x] with parity(z & i) = 0.
struct Rotation {
  Index x, z;
  Angle angle;
  bool operator==(const Rotation&) const = default;
};

// psi[i] <- exp(-i angle/2 (-1)^parity(z & i)) psi[i]
struct Phase {
  Index z;
  Angle angle;
  bool operator==(const Phase&) const = default;
};

// Signed sums S_j = sum_i (-1)^parity(z_j & i) v_i for n independent masks z_j at once, by halving: order[b] is the
// index i with parity(z_j & i) = bit j of b. Slots that nobody asked for complete the basis; the last slot, one past
// the basis, is the plain sum, which is the mask z = 0.
struct Tree {
  static constexpr std::uint32_t unused = ~0u;
  std::vector<Index> order;
  std::vector<std::uint32_t> slots;  // j -> phase of the stage or string of the readout, or `unused`; n_wires + 1
};

struct Stage {
  std::vector<Rotation> rotations;    // mutually commuting: parity(z_r & x_s) = (r == s)
  std::vector<Phase> phases;          // or a diagonal: the product of all these
  std::vector<Tree> trees;            // sums for the derivatives; every phase that depends on theta is in one slot
  std::vector<std::complex<double>> constant;  // product of the phases that do not depend on theta, if any
  bool real = true;                   // the state is real after this stage if it was before
  bool is_diagonal() const { return !phases.empty(); }
};

// The expectation of a Hermitian string: with p = parity(x & z),
//   p = 0: sum_i (-1)^parity(z & i) Re(conj(psi_i) psi_{i^x}),  p = 1: the same with Im.
struct String {
  Index x, z;
  bool operator==(const String&) const = default;
};

// output += sign * prod(cos or sin of absorbed angles) * <string>
struct Factor {
  std::uint32_t absorbed;
  bool sine;
};
struct Term {
  std::uint32_t output, string;
  double sign;
  std::vector<Factor> factors;
};

struct Layout;
struct Layouts;

// A compiled circuit and readout. It never changes after it was made, so that any number of threads may use one plan at
// once; it is a value, and no call keeps it. One that was made without compile(), or moved from, is refused. Callers want n_wires, n_parameters, n_columns() and str(); the rest is for
// the kernels.
struct Plan {
  std::uint32_t n_wires = 0;
  std::uint32_t n_parameters = 0;
  bool normalize = true;
  PlanOptions options;
  ReadoutKind readout = ReadoutKind::expval;
  std::uint32_t n_outputs = 0;  // outputs per state; for `state` each is a pair (real, imaginary)

  std::vector<Index> inputs;  // column of x -> where its amplitude is stored
  std::vector<Stage> stages;
  std::uint32_t n_low = 0;  // so many first rotations of the first stage are on the lowest bits of the columns, lowest first

  // expval
  std::vector<String> strings;
  std::vector<Term> terms;
  std::vector<Angle> absorbed;         // angles of the rotations that the observables took in
  std::vector<Tree> trees;             // strings with x = 0

  // probs and state
  std::vector<Index> outputs;      // output b -> amplitude index
  std::vector<std::int8_t> signs;  // output b -> sign of the amplitude (state)

  std::shared_ptr<Layouts> layouts;  // each is made when it is first asked for; copies of a plan share them
  QAA_API const Layout& layout(std::uint32_t lane_bits, std::uint32_t low_bits) const;

  Index n_amplitudes() const { return Index{1} << n_wires; }
  std::uint32_t n_columns() const { return readout == ReadoutKind::state ? 2 * n_outputs : n_outputs; }
  std::uint32_t n_strings() const { return std::uint32_t(strings.size()); }  // none but for expval
  bool is_quadratic() const { return readout != ReadoutKind::state; }
  QAA_API std::string str() const;
};

// Arithmetic of the kernels for one state whose row has `columns` numbers. A multiply-add counts as one operation, as
// do a lone multiplication and a lone addition; loads, stores, conversions and transposes count as none. `backward` is
// of a call that is given the values of the strings (qaa.h); one that is not does `reading` more.
struct Operations {
  double forward, backward, reading;
};
QAA_API Operations count_operations(const Plan& plan, std::uint32_t columns);

// The plan of a circuit of 1 to 16 wires and a readout; gates are applied first to last. With `normalize` rows are
// divided by their norm, without it they go through the circuit as they are. `options` are best default_options()
// (qaa.h).
// Throws std::invalid_argument with one sentence that names what was expected and what was received.
QAA_API Plan compile(std::uint32_t n_wires, std::uint32_t n_parameters, const std::vector<GateCall>& gates,
                     const ReadoutSpec& readout, bool normalize, const PlanOptions& options);

}  // namespace qaa
