// A plan as flat data for the GPU: what a circuit and its readout look like before any angle is known.
//
// The kernels walk through a list of passes. In every pass each thread holds tiles of 2^tile_bits amplitudes in registers:
// the indices base ^ (xor of a subset of that many masks). One table gives the bases, chosen so that the lanes of a warp always
// touch different banks of shared memory. A description is made once per plan, lies on the device as one block of bytes
// and is addressed by offsets.
#pragma once

#include "../basic.h"

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define QAA_ANYWHERE __host__ __device__
#else
#define QAA_ANYWHERE
#endif

namespace qaa::cuda {

constexpr std::uint32_t warp_bits = 5;
constexpr std::uint32_t common_tile_bits = 4, max_tile_bits = 5;  // of kernels for any circuit, and of those for one
constexpr std::uint32_t max_items = 17;  // of a pass: a mask for each of 16 wires, and the mask without any
constexpr std::uint32_t sine_values = 0, cosine_values = 8, scale_value = 16, turn_values = 20;  // of up to 8 angles
constexpr std::uint32_t strings_of_mask = 2, max_strings = strings_of_mask * max_tile_bits;  // of a pass with masks x
constexpr std::uint32_t unused = ~0u;

enum class PassKind : std::uint32_t {
  rotations,  // up to tile_bits commuting rotations
  phases,     // a diagonal with angles; its items have independent masks z
  constants,  // a diagonal without, as a table
  z_strings,  // strings with x = 0, independent masks z
  x_strings,  // strings with up to tile_bits independent masks x, two for each: items 2 k and 2 k + 1 have mask k
};

// A tile's base in the lower half; above it bit 16 + k, the parity of the k-th item's z and the base, for
// the first tile_bits items, or twice as many strings with masks x.
using Tile = std::uint32_t;

struct alignas(16) Pass {
  PassKind kind;
  std::uint32_t n_items;             // the first tile_bits of them tell amplitudes of a tile apart, the others do not
  std::uint32_t first_item;          // in `items`; for constants, in `constants`
  std::uint32_t tiles;               // in `tiles`: where this pass's table starts
  Index masks[max_tile_bits];
  Index signs[max_strings];          // x_strings: bit k, the parity of the item's z and mask k
  std::uint32_t values;              // in the bound values: where this pass's numbers start
  std::uint32_t complex_before, complex_after;  // whether the state has an imaginary part
  std::uint32_t mirrored;            // x_strings: bit k, the parity of the k-th item's x and z: it reads Im, not Re
};

struct Item {
  Index z;
  std::uint32_t angle;  // of a rotation or phase, else `unused`
  std::uint32_t id;     // the slot of a derivative, or the string; `unused` where nobody asked
};

struct BoundAngle {
  double constant;
  std::uint32_t first_term, n_terms;
};

// A term of the readout; terms are sorted by output.
struct ReadoutTerm {
  double sign;
  std::uint32_t output, string, first_factor, n_factors;
  std::uint32_t slot;  // of the derivative with respect to its coefficient; `unused` if that is constant
};
struct Complex {
  double re, im;
};
struct AngleFactor {
  std::uint32_t angle, sine;
};

// dE/dparameter += coefficient * dE/dslot, times the derivative of a term's coefficient where there is a term.
struct Contribution {
  double coefficient;
  std::uint32_t slot, term, factor;
};

// A chunk of columns of a row, 16 bytes wide: its first column, and the address of that column's number. The address is
// the amplitude's index; for the readout `state` bit n_wires tells imaginary from real parts, and bit 31 is a sign.
struct alignas(8) Chunk {
  std::uint32_t column, address;
};
constexpr std::uint32_t negative = 1u << 31;

template <class T>
struct Section {
  std::uint32_t offset = 0, size = 0;
  QAA_ANYWHERE const T* in(const unsigned char* description) const {
    return reinterpret_cast<const T*>(description + offset);
  }
};

// How the columns of a row map to addresses, for chunks of 2, 4 and 8 numbers (float64, float32, 16 bits).
struct RowMap {
  Section<Chunk> chunks[3];
  std::uint32_t next[3];  // address of column c ^ (1 << b) = address of c ^ next[b]
};

struct Layout {
  std::uint32_t n_wires;  // after padding
  std::uint32_t tile_bits;
  std::uint32_t normalize;
  ReadoutKind readout;
  std::uint32_t starts_complex, ends_complex;
  std::uint32_t n_columns, n_strings, n_slots, n_parameters;
  std::uint32_t n_values;  // numbers that are computed from the angles once per call
  std::uint32_t coefficient_values, contribution_values;
  Section<Pass> passes;    // of the circuit, then of the readout
  std::uint32_t n_circuit_passes;
  Section<Tile> tiles;
  Section<Item> items;
  Section<BoundAngle> angles;
  Section<AngleTerm> angle_terms;
  Section<Complex> constants;
  Section<ReadoutTerm> terms;
  Section<AngleFactor> factors;
  Section<std::uint32_t> first_term;          // of each output, and the end
  Section<std::uint32_t> first_string_term;   // of each string, and the end: positions in `string_terms`
  Section<std::uint32_t> string_terms;
  Section<std::uint32_t> first_contribution;  // of each parameter, and the end
  Section<Contribution> contributions;
  RowMap inputs, outputs;

  QAA_ANYWHERE constexpr std::uint32_t n_tiles() const { return 1u << (n_wires - tile_bits); }
  // Whether a warp holds whole states, one or several; and the lanes that share one.
  QAA_ANYWHERE constexpr bool in_warp() const { return n_wires - tile_bits <= warp_bits; }
  QAA_ANYWHERE constexpr std::uint32_t lane_bits() const { return in_warp() ? n_wires - tile_bits : warp_bits; }
};

}  // namespace qaa::cuda
