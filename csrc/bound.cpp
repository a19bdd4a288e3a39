#include "bound.h"

#include <algorithm>
#include <cmath>

namespace qaa {
namespace {

// Below this cosine a pass keeps its cosines instead of owing them; the scale owed never falls below min_scale.
constexpr double min_cosine = 1.0 / 64;
constexpr double min_scale = 1.0 / (1 << 24);

constexpr std::size_t cache_line = 64;

// Rotations of `count` slots, or of none: cosines and sines of half their angles are in `halves`, by slot. Returns whether
// cosines are owed.
template <class T>
bool turn(std::uint32_t count, const std::uint32_t* slots, const std::vector<std::complex<double>>& halves,
          bool allow_tangent, double& scale, T* keep, T* mix) {
  auto half = [&](std::uint32_t k) { return slots[k] != StageLayout::none ? halves[slots[k]] : 1.0; };
  double product = 1;
  bool tangent = allow_tangent;
  for (std::uint32_t k = 0; k < count; ++k) {
    const double cosine = half(k).real();
    product *= cosine;
    tangent &= std::abs(cosine) >= min_cosine;
  }
  tangent &= std::abs(product * scale) >= min_scale;
  for (std::uint32_t k = 0; k < count; ++k) {
    const std::complex<double> of = half(k);
    keep[k] = T(of.real());
    mix[k] = T(tangent ? of.imag() / of.real() : of.imag());
  }
  if (tangent) scale *= product;
  return tangent;
}

template <class T>
RotatePass<T> rotate_pass(const Pass& pass, std::uint32_t first_slot, std::int64_t columns) {
  RotatePass<T> out{};
  out.radix = pass.radix();
  out.extra = pass.extra;
  out.links = pass.links.empty() ? nullptr : pass.links.data();
  out.representatives = pass.representatives.data();
  out.n_representatives = std::uint32_t(pass.representatives.size());
  out.n_reached = pass.first_columns.empty() ? out.n_representatives
                                             : std::uint32_t(std::ranges::lower_bound(pass.first_columns, columns) -
                                                             pass.first_columns.begin());
  std::ranges::copy(pass.masks, out.masks);
  for (std::uint32_t k = 0; k < out.radix; ++k) out.slots[k] = first_slot + pass.rotations[k];
  return out;
}

template <class T>
void bind_pass(RotatePass<T>& pass, const std::vector<std::complex<double>>& halves, bool allow_tangent, double& scale) {
  pass.overlap_scale = scale * scale;
  pass.tangent = turn(pass.radix, pass.slots, halves, allow_tangent, scale, pass.keep, pass.mix);
  pass.link_scale = T(scale);  // over the scale at the end of the stage, squared, when that is known
}

template <class T>
LanePass<T> lane_pass(const std::vector<std::uint32_t>& lanes, std::uint32_t first_slot) {
  LanePass<T> out{};
  for (std::uint32_t bit = 0; bit < lanes.size(); ++bit) {
    const bool turned = lanes[bit] != StageLayout::none;
    out.slots[bit] = turned ? first_slot + lanes[bit] : StageLayout::none;
    if (turned) out.n_bits = bit + 1;
  }
  return out;
}

template <class T>
void bind_lanes(LanePass<T>& pass, const std::vector<std::complex<double>>& halves, bool allow_tangent, double& scale) {
  double before = scale;
  pass.tangent = turn(pass.n_bits, pass.slots, halves, allow_tangent, scale, pass.keep, pass.mix);
  for (std::uint32_t bit = 0; bit < pass.n_bits; ++bit) {
    pass.overlap_scale[bit] = before * before;
    if (pass.tangent && pass.slots[bit] != StageLayout::none) before *= halves[pass.slots[bit]].real();
  }
}

// A diagonal, its real and imaginary parts apart so that compilers vectorize what is done with it.
struct Diagonal {
  double *re, *im;
  std::size_t size;
};

// product[b] = product over j of the phase of slot j, or its conjugate where bit j of b is set.
void multiply_out(const Stage& stage, const Tree& tree, const double* theta, const Diagonal& product) {
  auto phase_of = [&](std::uint32_t slot) -> std::complex<double> {
    return slot == Tree::unused ? 1.0 : std::polar(1.0, -stage.phases[slot].angle.value(theta) / 2);
  };
  const std::size_t n_wires = tree.slots.size() - 1;
  const std::complex<double> all = phase_of(tree.slots[n_wires]);
  double *re = product.re, *im = product.im;
  re[0] = all.real();
  im[0] = all.imag();
  for (std::size_t j = 0; j < n_wires; ++j) {
    const std::complex<double> even = phase_of(tree.slots[j]);
    const double c = even.real(), s = even.imag();
    const std::size_t half = std::size_t{1} << j;
    for (std::size_t b = 0; b < half; ++b) {
      const double cr = c * re[b], si = s * im[b], ci = c * im[b], sr = s * re[b];
      re[half + b] = cr + si;
      im[half + b] = ci - sr;
      re[b] = cr - si;
      im[b] = ci + sr;
    }
  }
}

// The diagonal of a stage at every place.
void fill(const Stage& stage, const StageLayout& layout, const double* theta, const Diagonal& table,
          const Diagonal& product) {
  for (std::size_t i = 0; i < layout.constant.size(); ++i) {
    table.re[i] = layout.constant[i].real();
    table.im[i] = layout.constant[i].imag();
  }
  for (std::size_t t = 0; t < stage.trees.size(); ++t) {
    multiply_out(stage, stage.trees[t], theta, product);
    const std::vector<Index>& order = layout.orders[t];
    const bool first = t == 0 && layout.constant.empty();
    for (std::size_t b = 0; b < table.size; ++b) {
      const double re = product.re[b], im = product.im[b];
      double &to_re = table.re[order[b]], &to_im = table.im[order[b]];
      const double new_re = first ? re : to_re * re - to_im * im;
      to_im = first ? im : to_re * im + to_im * re;
      to_re = new_re;
    }
  }
}

// Real parts, then imaginary parts.
template <class T>
void store(T* out, const Diagonal& table, double scale, bool conjugate) {
  const std::size_t size = table.size;
  const double imaginary = conjugate ? -scale : scale;
  for (std::size_t i = 0; i < size; ++i) out[i] = T(scale * table.re[i]);
  for (std::size_t i = 0; i < size; ++i) out[size + i] = T(imaginary * table.im[i]);
}

// The first entry of a table on a cache line of its own. Another line behind the last one may be read.
template <class T>
T* on_line(T* data) {
  return reinterpret_cast<T*>((reinterpret_cast<std::uintptr_t>(data) + cache_line - 1) / cache_line * cache_line);
}

// The coefficient of a term, or its derivative with respect to the angle of one of its factors.
double coefficient(const Term& term, const std::vector<std::complex<double>>& absorbed,
                   std::size_t derivative_of = SIZE_MAX) {
  double value = term.sign;
  for (std::size_t f = 0; f < term.factors.size(); ++f) {
    const std::complex<double> turn = absorbed[term.factors[f].absorbed];
    const bool sine = term.factors[f].sine;
    if (f == derivative_of) {
      value *= sine ? turn.real() : -turn.imag();
    } else {
      value *= sine ? turn.imag() : turn.real();
    }
  }
  return value;
}

std::size_t n_diagonals(const Plan& plan) {
  return std::size_t(std::ranges::count_if(plan.stages, &Stage::is_diagonal));
}

void add_to(double* grad_theta, const Angle& angle, double derivative) {
  for (const AngleTerm& term : angle.terms) grad_theta[term.parameter] += term.coefficient * derivative;
}

}  // namespace

// Everything that does not depend on angles.
template <class T>
BoundPlanStorage<T>::BoundPlanStorage(const Plan& plan, const Layout& layout, const double* theta, std::int64_t columns,
                                      bool with_adjoint, bool reads_strings)
    : plan_(plan),
      layout_(layout),
      with_adjoint_(with_adjoint),
      stages_(plan.stages.size()),
      tables_((with_adjoint ? 4 : 2) * plan.n_amplitudes() * n_diagonals(plan) + 2 * cache_line / sizeof(T)) {
  const std::size_t n_stages = plan.stages.size(), size = plan.n_amplitudes();
  std::size_t n_passes = 0, n_trees = layout.trees.size();
  for (const StageLayout& stage : layout.stages) {
    n_passes += std::max(stage.rotate.size(), stage.reading.size()) + stage.unwind.size() + stage.overlap.size();
    n_trees += stage.trees.size();
  }
  passes_.reserve(n_passes);
  trees_.reserve(n_trees);
  auto add_passes = [&](const std::vector<Pass>& passes, std::uint32_t first_slot) {
    const RotatePass<T>* first = passes_.data() + passes_.size();
    for (const Pass& pass : passes) passes_.push_back(rotate_pass<T>(pass, first_slot, columns));
    return first;
  };
  auto add_trees = [&](const std::vector<LaneTree>& trees) {
    const SumTree* first = trees_.data() + trees_.size();
    for (const LaneTree& tree : trees) {
      trees_.push_back({tree.order.data(), tree.members.data(), std::uint32_t(tree.members.size())});
    }
    return first;
  };

  const T* next_table = on_line(tables_.data());
  std::uint32_t slot = 0;
  bool complex = !plan.options.real;
  for (std::size_t s = 0; s < n_stages; ++s) {
    const Stage& stage = plan.stages[s];
    const StageLayout& laid_out = layout.stages[s];
    BoundStage<T>& out = stages_[s];
    out.diagonal = stage.is_diagonal();
    out.real = stage.real;
    out.moves = laid_out.moves.data();
    out.n_moves = std::uint32_t(laid_out.moves.size());
    out.from_complex = complex;
    complex |= !stage.real;
    out.first_slot = slot;
    if (stage.is_diagonal()) {
      out.re = next_table;
      out.im = next_table + size;
      next_table += 2 * size;
      out.trees = add_trees(laid_out.trees);
      out.n_trees = std::uint32_t(laid_out.trees.size());
      slot_lanes_.resize(slot + stage.phases.size(), 0);
      for (const LaneTree& tree : laid_out.trees) {
        for (const LaneTree::Member& member : tree.members) slot_lanes_[slot + member.item] = member.lanes;
      }
      slot += std::uint32_t(stage.phases.size());
    } else {
      out.kept = laid_out.kept;
      bound_.n_kept += out.kept;
      out.lanes = lane_pass<T>(laid_out.lanes, slot);
      const std::vector<Pass>& rotate = reads_strings && !laid_out.reading.empty() ? laid_out.reading : laid_out.rotate;
      out.rotate = add_passes(rotate, slot);
      out.n_rotate = std::uint32_t(rotate.size());
      slot_lanes_.resize(slot + stage.rotations.size(), 0);
      for (std::uint32_t bit = 0; bit < out.lanes.n_bits; ++bit) {
        if (laid_out.lanes[bit] != StageLayout::none) slot_lanes_[slot + laid_out.lanes[bit]] = 1u << bit;
      }
      slot += std::uint32_t(stage.rotations.size());
    }
  }
  halves_.resize(slot);
  for (std::size_t s = with_adjoint ? n_stages : 0; s-- > 0;) {
    BoundStage<T>& out = stages_[s];
    if (out.diagonal) {
      out.back_re = next_table;
      out.back_im = next_table + size;
      next_table += 2 * size;
    } else {
      const StageLayout& laid_out = layout.stages[s];
      out.unwind = out.overlap = add_passes(laid_out.unwind, out.first_slot);
      out.n_unwind = out.n_overlap = std::uint32_t(laid_out.unwind.size());
      if (!laid_out.overlap.empty()) {
        out.overlap = add_passes(laid_out.overlap, out.first_slot);
        out.n_overlap = std::uint32_t(laid_out.overlap.size());
      }
      out.unwind_lanes = lane_pass<T>(laid_out.lanes, out.first_slot);
    }
  }

  for (const Pass& pass : layout.flips) {
    flips_.push_back({pass.radix(), std::uint32_t(pass.representatives.size()), pass.representatives.data(), {}, {}});
    std::ranges::copy(pass.masks, flips_.back().masks);
    std::ranges::copy(pass.rotations, flips_.back().strings);
  }
  for (const Correlation& c : layout.correlations) {
    correlations_.push_back({c.vectors, c.lanes, c.imaginary, c.is_gathered, c.n_bits, std::uint32_t(c.members.size()),
                             c.order.data(), std::uint32_t(c.order.size()), c.members.data()});
  }
  for (std::size_t k = 0; with_adjoint && k < layout.gathers.size(); ++k) {
    const Gather& g = layout.gathers[k];
    gathers_.push_back({g.vectors, g.n_bits, std::uint32_t(g.members.size()), g.members.data(), g.classes.data(),
                        g.of_eight.data(), bound_.n_gather_weights});
    bound_.n_gather_weights += g.n_weights();
  }
  absorbed_.resize(plan.absorbed.size());
  for (const Term& term : plan.terms) {
    terms_.push_back({term.output, term.string, T(0), !term.factors.empty()});
    slot_lanes_.push_back(layout.string_lanes[term.string]);
  }

  bound_.lane_bits = layout.lane_bits;
  bound_.n_bits = plan.n_wires - layout.lane_bits;
  bound_.n_vectors = layout.n_vectors;
  bound_.normalize = plan.normalize;
  bound_.readout = plan.readout;
  bound_.n_outputs = plan.n_outputs;
  bound_.n_columns = plan.n_columns();
  bound_.starts_real = plan.options.real;
  bound_.ends_complex = complex;
  bound_.loads_lanes = layout.loads_lanes;
  bound_.starts_low = layout.starts_low;
  bound_.inputs = layout.inputs.data();
  bound_.stages = stages_.data();
  bound_.n_stages = std::uint32_t(n_stages);
  bound_.n_strings = std::uint32_t(plan.strings.size());
  bound_.terms = terms_.data();
  bound_.n_terms = std::uint32_t(terms_.size());
  bound_.string_lanes = layout.string_lanes.data();
  bound_.trees = add_trees(layout.trees);
  bound_.n_trees = std::uint32_t(layout.trees.size());
  bound_.flips = flips_.data();
  bound_.n_flips = std::uint32_t(flips_.size());
  bound_.correlations = correlations_.data();
  bound_.n_correlations = std::uint32_t(correlations_.size());
  bound_.gathers = gathers_.data();
  bound_.n_gathers = std::uint32_t(gathers_.size());
  bound_.outputs = layout.outputs.data();
  bound_.signs = plan.signs.data();
  bound_.first_term_slot = slot;
  bound_.n_slots = slot + std::uint32_t(plan.terms.size());
  bound_.slot_lanes = slot_lanes_.data();
  bind(theta);
}

template <class T>
void BoundPlanStorage<T>::bind(const double* theta) {
  const std::size_t n_stages = plan_.stages.size(), size = plan_.n_amplitudes(), n_made = n_diagonals(plan_);
  const bool tangent = plan_.options.tangent;
  // The diagonals are computed once and stored twice, with the scales owed in either direction.
  Spare<double> numbers(2 * size * (n_made + 1));
  auto diagonal = [&](std::size_t k) {
    double* const first = numbers.data() + 2 * size * k;
    return Diagonal{first, first + size, size};
  };
  // Tables and passes lie in the order in which they are bound.
  T* table = on_line(tables_.data());
  RotatePass<T>* pass = passes_.data();
  std::size_t made = 0;

  double scale = 1;
  for (std::size_t s = 0; s < n_stages; ++s) {
    const Stage& stage = plan_.stages[s];
    BoundStage<T>& out = stages_[s];
    if (out.diagonal) {
      fill(stage, layout_.stages[s], theta, diagonal(made), diagonal(n_made));
      store(table, diagonal(made++), scale, false);
      table += 2 * size;
      scale = 1;
    } else {
      out.scale_before = scale;
      for (std::size_t r = 0; r < stage.rotations.size(); ++r) {
        halves_[out.first_slot + r] = std::polar(1.0, stage.rotations[r].angle.value(theta) / 2);
      }
      const bool lanes_first = s == 0 && bound_.loads_lanes;
      if (lanes_first) bind_lanes(out.lanes, halves_, tangent, scale);
      RotatePass<T>* const first = pass;
      for (; pass < first + out.n_rotate; ++pass) bind_pass(*pass, halves_, tangent, scale);
      if (!lanes_first) bind_lanes(out.lanes, halves_, tangent, scale);
      for (RotatePass<T>* p = first; p < pass; ++p) p->link_scale *= p->link_scale / T(scale * scale);
    }
  }
  bound_.scale = T(scale);
  double ratio = 1;  // of the ket's scale to the bra's, which is `scale`
  for (std::size_t s = with_adjoint_ ? n_stages : 0; s-- > 0;) {
    BoundStage<T>& out = stages_[s];
    if (out.diagonal) {
      out.overlap_scale = ratio * scale * scale;
      out.undone_scale = ratio;
      store(table, diagonal(--made), scale, true);
      table += 2 * size;
      scale = 1;
    } else {
      const double scale_before = scale;
      RotatePass<T>* const first = pass;
      for (; pass < first + out.n_unwind; ++pass) {
        bind_pass(*pass, halves_, tangent, scale);
        pass->overlap_scale *= ratio;
      }
      bind_lanes(out.unwind_lanes, halves_, tangent, scale);
      for (double& of_lane : out.unwind_lanes.overlap_scale) of_lane *= ratio;
      if (out.kept) ratio = out.scale_before / scale;
      // Overlaps after all rotations of the bra where the ket was kept, and before them at the first stage.
      if (out.overlap != out.unwind) pass += out.n_overlap;
      if (out.kept || s == 0) {
        const double of_overlaps = out.kept ? scale : scale_before;
        const double both = ratio * of_overlaps * of_overlaps;
        for (RotatePass<T>* p = first; p < pass; ++p) p->overlap_scale = both;
        std::ranges::fill(out.unwind_lanes.overlap_scale, both);
      }
    }
  }
  bound_.unwound_scale = T(scale);

  for (std::size_t k = 0; k < absorbed_.size(); ++k) absorbed_[k] = std::polar(1.0, plan_.absorbed[k].value(theta));
  for (std::size_t k = 0; k < terms_.size(); ++k) terms_[k].coefficient = T(coefficient(plan_.terms[k], absorbed_));
}

template <class T>
void BoundPlanStorage<T>::chain_rule(const double* slots, double* grad_theta) const {
  // d/da of exp(-i a G/2) is -i G/2; a quadratic readout counts it twice, for bra and ket.
  const double half = plan_.is_quadratic() ? 1.0 : 0.5;
  const double* slot = slots;
  for (const Stage& stage : plan_.stages) {
    for (const Rotation& rotation : stage.rotations) add_to(grad_theta, rotation.angle, half * *slot++);
    for (const Phase& phase : stage.phases) add_to(grad_theta, phase.angle, half * *slot++);
  }
  for (const Term& term : plan_.terms) {
    for (std::size_t f = 0; f < term.factors.size(); ++f) {
      add_to(grad_theta, plan_.absorbed[term.factors[f].absorbed], coefficient(term, absorbed_, f) * *slot);
    }
    ++slot;
  }
}

template class BoundPlanStorage<float>;
template class BoundPlanStorage<double>;

}  // namespace qaa
