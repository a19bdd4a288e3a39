// Plan -> how the kernels walk through it.
//
// A vector holds 2^lane_bits neighbouring amplitudes of each of several rows: of as many rows as it has lanes where the
// batch is large, and all neighbours of one row where that is alone. The bits of an amplitude's index so fall into lanes
// and the bits that number the vectors. Gates on the latter treat whole vectors alike; gates on lanes need shuffles, and
// gates on both at once would need many. So each stage of rotations has coordinates of its own, in which every rotation
// lies either on one lane bit or between whole vectors, and the state moves from one stage's coordinates to the next
// one's: lanes change places within a vector, or between two of them.
#pragma once

#include <array>
#include <complex>
#include <cstdint>
#include <vector>

#include "basic.h"

namespace qaa {

constexpr int max_radix = 4;
constexpr int max_lane_bits = 4;
constexpr std::uint32_t max_lanes = 1u << max_lane_bits;

// A change of coordinates, in place. Either vectors v and v ^ vectors exchange the lanes l with parity(l & lanes) = 1,
// or lane l of vector v comes from its lane from[l] ^ shift[v] (undone by the same with back_from and back_shift). What
// belongs to one row stays there.
struct Move {
  Index vectors = 0;  // 0 for lanes within a vector
  std::uint32_t lanes = 0;
  std::array<std::uint32_t, max_lanes> from{}, back_from{};
  std::vector<std::uint32_t> shift, back_shift;
};

// Strings of two neighbouring rotations a and b of the last stage that are between vectors: (x, 0) and (x, z) with
// x = a.x ^ b.x, z = a.z ^ b.z. No other rotation of the stage changes what is read of them, so that any pass that
// holds the vectors of both may read them.
struct Link {
  static constexpr std::uint32_t none = ~0u;
  std::uint32_t plain = none, twisted = none;
  bool is_asked_for() const { return plain != none || twisted != none; }
};

// At most max_radix commuting rotations, or strings, between vectors, done in registers: for every representative r, the
// vectors r ^ (xor of a subset of masks) are loaded, worked on and stored.
struct Pass {
  std::vector<std::uint32_t> rotations;  // of the stage; or strings
  std::uint32_t extra = 0;               // of the masks, the first so many belong to rotations that are left alone
  std::vector<Index> masks;              // extra + rotations
  std::vector<Index> representatives;
  std::vector<Index> first_columns;  // in the first stage, ascending: the first column that reaches each block
  std::vector<Link> links;           // of masks k and k + 1; empty where no string is read in this pass
  std::uint32_t radix() const { return std::uint32_t(rotations.size()); }
};

// Sums with signs over the vectors (plan.h, Tree) and what becomes of them: item = the sum over lanes l of
// (-1)^parity(lanes & l) sums[slot].
struct LaneTree {
  struct Member {
    std::uint32_t slot, item, lanes;
  };
  std::vector<Index> order;
  std::vector<Member> members;
};

// Strings with one x = (vectors, lanes), read together: vectors v of pairs (v, v ^ vectors), or all of them where
// `vectors` is zero, fall into 2^n_bits classes of one sign for each string.
//   <string> = (2 or 1) sum over lanes l and classes c of (-1)^parity(lanes & l) (-1)^parity(mask & c) (products)
struct Correlation {
  struct Member {
    std::uint32_t string, mask, lanes;
  };
  static constexpr std::uint32_t max_bits = 3;
  Index vectors = 0;
  std::uint32_t lanes = 0;
  bool imaginary = false;  // parity(x & z)
  bool is_gathered = false;  // applied as a gather
  std::uint32_t n_bits = 0;
  std::vector<Index> order;  // v, class by class
  std::vector<Member> members;
};

// Strings with one x = (vectors, 0) and real elements as they are applied to a state: vector v of the result takes vector
// v ^ vectors, with the weight of v's class, while a tree's vectors are visited eight by eight.
struct Gather {
  Index vectors = 0;
  std::uint32_t n_bits = 0;
  std::vector<std::uint8_t> classes;       // of the first vector of every eight
  std::array<std::uint8_t, 8> of_eight{};  // of vector k of eight: that of the first, xor this
  std::vector<Correlation::Member> members;
  static constexpr std::uint32_t max_weights = 512;  // in all, which stay in the first-level cache; flips apart
  std::uint32_t n_weights() const { return n_bits == 0 ? 1 : 8u << n_bits; }
};

struct StageLayout {
  std::vector<Move> moves;                                  // into the coordinates of this stage
  std::vector<std::uint32_t> lanes;                         // lane bit -> rotation of the stage, or `none`
  std::vector<Pass> rotate, unwind;                         // the other rotations
  std::vector<Pass> reading;  // as `rotate`, for runs that read strings: where there are links
  std::vector<Pass> overlap;  // over ket and bra, of which neither is turned: as `unwind`, but where there are links
  bool kept = false;                                        // the adjoint keeps the ket from before these rotations
  std::vector<std::vector<Index>> orders;                   // of a diagonal: its trees' orders in coordinates
  std::vector<std::complex<double>> constant;               // and its constant part
  std::vector<LaneTree> trees;                              // sums for the derivatives
  static constexpr std::uint32_t none = ~0u;
};

struct Layout {
  static constexpr std::uint32_t max_kept = 3;  // stages, so that the adjoint's memory does not depend on the depth
  std::uint32_t lane_bits = 0;
  Index n_vectors = 1;
  std::vector<Index> inputs;  // vector of columns -> where it is stored
  std::vector<StageLayout> stages;
  bool loads_lanes = false;  // the first stage's lanes are the columns', as rows are loaded
  bool starts_low = false;   // and its first pass is on the lowest bits of the vectors of columns, lowest first

  // expval
  std::vector<std::uint32_t> string_lanes;  // the lanes of a string's sign
  std::vector<LaneTree> trees;              // strings with x = 0; there is a first tree even if there are none
  std::vector<Pass> flips;                  // strings between vectors without a sign
  std::vector<Correlation> correlations;    // every other string that no pass of the last stage reads
  std::vector<Gather> gathers;              // flips and correlations that can be, in the order of the first tree

  std::vector<Index> outputs;  // of probs and state: vector and lane of the amplitude, the lane in the lowest bits
};

}  // namespace qaa
