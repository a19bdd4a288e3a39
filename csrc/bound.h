// Plan and angles -> bound plan: the numbers that the kernels read, computed in double once per call.
//
// Everything here is plain pointers and values, so that the kernels, which are compiled once per instruction set,
// share no inline library code with the rest (and a GPU could read the same arrays).
//
// Scale. A rotation [c -s; s c] = c [1 -t; t 1] is applied without its cosine. The bound plan keeps the product of the
// cosines that are still owed, `scale`: true amplitude = scale * stored amplitude, the same for every state of the
// batch. The next diagonal pays it off; what remains at the end is `BoundPlan::scale`.
#pragma once

#include <utility>
#include <vector>

#include "layout.h"
#include "plan.h"

namespace qaa {

template <class T>
struct RotatePass {
  std::uint32_t radix, extra;
  std::uint32_t n_representatives;
  std::uint32_t n_reached;  // by the rows' columns: later blocks are zero before the pass and unused after its inverse
  const Index* representatives;
  Index masks[max_radix];  // extra + radix
  const Link* links;       // of masks k and k + 1, or null where this pass reads no string
  T link_scale;            // turns products of amplitudes after this pass into those after the last pass
  bool tangent;            // a - mix b, b + mix a; else keep a - mix b, keep b + mix a
  T keep[max_radix], mix[max_radix];
  std::uint32_t slots[max_radix];  // where the derivatives with respect to the angles go
  double overlap_scale;            // product of the two states' scales when the overlaps of this pass are taken
};

// Rotations on lane bits. Bits that have none are left as they are: keep = 1, mix = 0.
template <class T>
struct LanePass {
  std::uint32_t n_bits;  // one past the highest bit that has a rotation; 0: there is nothing to do
  bool tangent;
  T keep[max_lane_bits], mix[max_lane_bits];
  std::uint32_t slots[max_lane_bits];   // or StageLayout::none
  double overlap_scale[max_lane_bits];  // when the overlap of each is taken, before it is undone and after those below
};

struct SumTree {
  const Index* order;
  const LaneTree::Member* members;
  std::uint32_t n_members;
};

template <class T>
struct BoundStage {
  bool diagonal, real;
  bool from_complex;  // the state is complex before this stage
  const Move* moves;
  std::uint32_t n_moves;
  LanePass<T> lanes, unwind_lanes;
  const RotatePass<T>*rotate, *unwind, *overlap;
  std::uint32_t n_rotate, n_unwind, n_overlap;
  bool kept;      // the adjoint keeps the ket from before this stage
  double scale_before;  // owed by it
  const T *re, *im;            // the diagonal times the scale owed in the forward direction, amplitude by amplitude
  const T *back_re, *back_im;  // its conjugate times the scale owed in the adjoint direction
  const SumTree* trees;
  std::uint32_t n_trees;
  std::uint32_t first_slot;
  double overlap_scale;  // product of the two states' scales when the adjoint reaches this stage
  double undone_scale;   // and after it has been undone on both
};

struct FlipPass {
  std::uint32_t radix, n_representatives;
  const Index* representatives;
  Index masks[max_radix];
  std::uint32_t strings[max_radix];
};

struct CorrelationPass {
  Index vectors;
  std::uint32_t lanes;
  bool imaginary, is_gathered;
  std::uint32_t n_bits, n_members;
  const Index* order;
  std::uint32_t n_order;
  const Correlation::Member* members;
};

struct GatherPass {
  Index vectors;
  std::uint32_t n_bits, n_members;
  const Correlation::Member* members;
  const std::uint8_t *classes, *of_eight;
  std::uint32_t first_weight;  // of eight for each class, or of one where there is one class
};

template <class T>
struct BoundTerm {
  std::uint32_t output, string;
  T coefficient;
  bool varies;  // the coefficient depends on an angle
};

// What a kernel needs to know of a circuit, its readout and its angles.
template <class T>
struct BoundPlan {
  std::uint32_t lane_bits;  // that number the amplitudes of one row in a vector
  std::uint32_t n_bits;     // that number the vectors
  Index n_vectors;
  bool normalize;
  ReadoutKind readout;
  std::uint32_t n_outputs, n_columns;
  bool starts_real, ends_complex;
  bool loads_lanes;     // the first stage's lanes are the columns', as rows are loaded
  bool starts_low;      // and its first pass is on the lowest bits of the vectors of columns, lowest first
  const Index* inputs;  // vector of columns of x -> where it is stored
  const BoundStage<T>* stages;
  std::uint32_t n_stages, n_kept;
  T scale;          // owed after the last stage
  T unwound_scale;  // owed by both states after the adjoint has reached the input

  std::uint32_t n_strings;
  const std::uint32_t* string_lanes;  // the lanes of each string's sign
  const BoundTerm<T>* terms;
  std::uint32_t n_terms;
  const SumTree* trees;
  std::uint32_t n_trees;
  const FlipPass* flips;
  std::uint32_t n_flips;
  const CorrelationPass* correlations;
  std::uint32_t n_correlations;
  const GatherPass* gathers;
  std::uint32_t n_gathers, n_gather_weights;
  const Index* outputs;  // vector and lane of the amplitude, the lane in the lowest bits
  const std::int8_t* signs;

  std::uint32_t n_slots;          // derivatives with respect to angles of stages, then one per term
  std::uint32_t first_term_slot;  // the derivative with respect to each term's coefficient
  const std::uint32_t* slot_lanes;  // a slot is a sum over lanes with the signs of these
};

// A vector that a thread keeps from call to call while it is small, as plans may be of any depth: memory that is freed
// goes back to the system and comes again as fresh pages, which cost as much as filling it.
template <class T>
class Spare {
 public:
  explicit Spare(std::size_t size) : vector_(std::move(kept())) { vector_.resize(size); }
  ~Spare() {
    constexpr std::size_t most = std::size_t{1} << 20;
    if (vector_.capacity() * sizeof(T) <= most) kept() = std::move(vector_);
  }
  Spare(const Spare&) = delete;
  T* data() { return vector_.data(); }

 private:
  static std::vector<T>& kept() {
    thread_local std::vector<T> vector;
    return vector;
  }
  std::vector<T> vector_;
};

// Owns what a BoundPlan for rows of so many columns points to, with the adjoint's part of it or without, and with passes
// that read strings or without. The plan, whose layout it is, must outlive it.
template <class T>
class BoundPlanStorage {
 public:
  BoundPlanStorage(const Plan& plan, const Layout& layout, const double* theta, std::int64_t columns,
                   bool with_adjoint, bool reads_strings);
  // From now on with other angles, in the same memory.
  void bind(const double* theta);
  const BoundPlan<T>& bound() const { return bound_; }
  // theta's gradient from the derivatives with respect to slots.
  void chain_rule(const double* slots, double* grad_theta) const;

 private:
  const Plan& plan_;
  const Layout& layout_;
  const bool with_adjoint_;
  BoundPlan<T> bound_{};
  std::vector<BoundStage<T>> stages_;
  std::vector<RotatePass<T>> passes_;
  Spare<T> tables_;
  std::vector<SumTree> trees_;
  std::vector<FlipPass> flips_;
  std::vector<CorrelationPass> correlations_;
  std::vector<GatherPass> gathers_;
  std::vector<BoundTerm<T>> terms_;
  std::vector<std::uint32_t> slot_lanes_;
  std::vector<std::complex<double>> absorbed_;  // cosine and sine of every absorbed angle
  std::vector<std::complex<double>> halves_;    // cosine and sine of half the angle of every rotation, by its slot
};

}  // namespace qaa
