#include "program.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <functional>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>

#include "../gf2.h"

namespace qaa::cuda {
namespace {

// Vectors that complete `masks` to a basis of GF(2)^n, the ones for the lanes first. The lowest `lanes` bits of lane
// vector j are the unit vector e_j, so that the lanes of a warp differ in the bits that choose a bank whatever is
// xored onto them.
std::vector<Index> lane_basis(const std::vector<Index>& masks, std::uint32_t n, std::uint32_t lanes) {
  const Index low = (Index{1} << lanes) - 1;
  std::vector<Index> pivots(lanes, 0);  // lane vector whose lowest set bit below `lanes` is the position
  auto reduced = [&](Index v) {
    for (std::uint32_t bit = 0; bit < lanes; ++bit) {
      if (((v >> bit) & 1) && pivots[bit] != 0) v ^= pivots[bit];
    }
    return v;
  };
  auto add = [&](Index v) { pivots[std::countr_zero(v & low)] = v; };
  // A mask with bits among the lowest is what a lane vector must not be: those bits go to lane vectors that differ from
  // the masks by directions of their own above.
  std::vector<Index> high, mixed;
  for (const Index mask : masks) {
    const Index rest = reduced(mask);
    if ((rest & low) == 0) {
      high.push_back(rest);
    } else {
      add(rest);
      mixed.push_back(std::uint32_t(std::countr_zero(rest & low)));
    }
  }
  Span taken(high);
  for (const Index position : mixed) {
    for (std::uint32_t bit = lanes; bit < n; ++bit) {
      if (taken.extend(Index{1} << bit)) {
        pivots[position] ^= Index{1} << bit;
        break;
      }
    }
  }
  for (std::uint32_t bit = 0; bit < lanes; ++bit) {
    if (pivots[bit] == 0) pivots[bit] = Index{1} << bit;
  }
  for (std::uint32_t bit = lanes; bit-- > 0;) {  // from triangular to unit form
    for (std::uint32_t other = 0; other < bit; ++other) {
      if ((pivots[other] >> bit) & 1) pivots[other] ^= pivots[bit];
    }
  }
  std::vector<Index> basis = pivots;
  Span all(masks);
  for (const Index v : basis) all.extend(v);
  for (std::uint32_t bit = lanes; bit < n; ++bit) {
    if (all.extend(Index{1} << bit)) basis.push_back(Index{1} << bit);
  }
  return basis;
}

class Builder {
 public:
  Builder(const Plan& plan, std::uint32_t tile_bits, Program& program)
      : plan_(plan), layout_(program.layout), bytes_(program.description) {
    layout_.tile_bits = tile_bits;
    layout_.n_wires = std::max(plan.n_wires, tile_bits + 2);
    layout_.normalize = plan.normalize;
    layout_.readout = plan.readout;
    layout_.n_columns = plan.n_columns();
    layout_.n_strings = std::uint32_t(plan.strings.size());
    layout_.n_parameters = plan.n_parameters;
    layout_.starts_complex = !plan.options.real;
  }

  void build() {
    bool complex = !plan_.options.real;
    for (const Stage& stage : plan_.stages) add_stage(stage, complex);
    layout_.n_circuit_passes = std::uint32_t(passes_.size());
    layout_.ends_complex = complex;
    add_strings();
    add_terms();
    add_contributions();
    layout_.inputs = row_map(images(plan_.inputs), 0, layout_.n_wires);
    add_outputs();
    put(layout_.passes, passes_);
    put(layout_.tiles, tiles_);
    put(layout_.items, items_);
    put(layout_.angles, angles_);
    put(layout_.angle_terms, angle_terms_);
    put(layout_.constants, constants_);
    layout_.n_slots = n_slots_;
    layout_.n_values = n_values_;
  }

 private:
  template <class T>
  void put(Section<T>& section, const std::vector<T>& items) {
    bytes_.resize((bytes_.size() + 15) / 16 * 16);
    section = {std::uint32_t(bytes_.size()), std::uint32_t(items.size())};
    if (items.empty()) return;
    bytes_.resize(bytes_.size() + items.size() * sizeof(T));
    std::memcpy(bytes_.data() + section.offset, items.data(), items.size() * sizeof(T));
  }

  std::uint32_t n_tiles() const { return layout_.n_tiles(); }

  std::uint32_t take_values(std::uint32_t n) {
    return std::exchange(n_values_, (n_values_ + n + 3) / 4 * 4);  // 16-byte loads, whatever the type
  }

  std::uint32_t add_angle(const Angle& angle) {
    angles_.push_back({angle.constant, std::uint32_t(angle_terms_.size()), std::uint32_t(angle.terms.size())});
    angle_terms_.insert(angle_terms_.end(), angle.terms.begin(), angle.terms.end());
    return std::uint32_t(angles_.size() - 1);
  }

  // ---------------------------------------------------------------------------------------------- passes

  // A pass over the items, which have the first of the masks each; fewer than four masks are completed.
  void add_pass(PassKind kind, const std::vector<Item>& items, std::vector<Index> masks, std::uint32_t n_values,
                bool before, bool after) {
    Pass pass{};
    pass.kind = kind;
    pass.n_items = std::uint32_t(items.size());
    pass.first_item = std::uint32_t(items_.size());
    const std::size_t n_own = masks.size();
    Span span(masks);
    for (std::uint32_t bit = layout_.n_wires; masks.size() < layout_.tile_bits; --bit) {
      Index mask = Index{1} << (bit - 1);
      // Rotations and phases must not tell amplitudes apart by a mask that is not theirs.
      if (kind != PassKind::x_strings) {
        for (std::size_t k = 0; k < n_own; ++k) {
          if (parity(items[k].z & mask)) mask ^= masks[k];
        }
      }
      if (span.extend(mask)) masks.push_back(mask);
    }
    std::ranges::copy(masks, pass.masks);
    pass.tiles = std::uint32_t(tiles_.size());
    const std::vector<Index> basis = lane_basis(masks, layout_.n_wires, layout_.lane_bits());
    for (Index t = 0; t < n_tiles(); ++t) {
      Tile tile = 0;
      for (std::uint32_t j = 0; j < basis.size(); ++j) tile ^= (t >> j) & 1 ? basis[j] : 0;
      const Index base = tile;
      const std::size_t n_marked = kind == PassKind::x_strings ? strings_of_mask * layout_.tile_bits : layout_.tile_bits;
      for (std::size_t k = 0; k < std::min(items.size(), n_marked); ++k) {
        tile |= Tile{parity(items[k].z & base)} << (16 + k);
      }
      tiles_.push_back(tile);
    }
    pass.values = take_values(n_values);
    pass.complex_before = before;
    pass.complex_after = after;
    if (kind == PassKind::x_strings) {
      for (std::size_t k = 0; k < items.size(); ++k) {
        for (std::uint32_t m = 0; m < layout_.tile_bits; ++m) pass.signs[k] |= Index{parity(items[k].z & masks[m])} << m;
        pass.mirrored |= Index{parity(items[k].z & masks[k / strings_of_mask])} << k;
      }
    }
    items_.insert(items_.end(), items.begin(), items.end());
    passes_.push_back(pass);
  }

  // A tree's masks z come with dual masks x: the first four of those make up a tile, and the signs of the others are the
  // same all over it.
  template <class MakeItem>
  void add_tree(PassKind kind, const Tree& tree, std::uint32_t n_values, bool before, bool after, MakeItem make_item) {
    std::vector<Item> items;
    std::vector<Index> masks;
    for (std::uint32_t j = 0; j <= plan_.n_wires; ++j) {
      const bool plain_sum = j == plan_.n_wires;
      if (plain_sum) items.resize(std::max<std::size_t>(items.size(), layout_.tile_bits), Item{0, unused, unused});
      if (tree.slots[j] != Tree::unused) {
        items.push_back(make_item(tree.slots[j]));
      } else if (j < layout_.tile_bits) {
        items.push_back({0, unused, unused});
      }
      if (j < std::min(layout_.tile_bits, plan_.n_wires)) masks.push_back(tree.order[Index{1} << j]);
    }
    for (std::uint32_t bit = plan_.n_wires; masks.size() < layout_.tile_bits; ++bit) masks.push_back(Index{1} << bit);
    add_pass(kind, items, std::move(masks), n_values, before, after);
  }

  void add_stage(const Stage& stage, bool& complex) {
    const std::uint32_t first_slot = n_slots_;
    if (!stage.is_diagonal()) {
      n_slots_ += std::uint32_t(stage.rotations.size());
      // The wires of the columns' lowest bits, which the plan has put first, then the highest amplitudes' first.
      std::vector<std::size_t> order(stage.rotations.size());
      std::iota(order.begin(), order.end(), 0);
      const std::size_t n_low = &stage == &plan_.stages.front() ? plan_.n_low : 0;
      std::ranges::stable_sort(order.begin() + std::ptrdiff_t(n_low), order.end(), std::greater{},
                               [&](std::size_t r) { return stage.rotations[r].x; });
      for (std::size_t first = 0; first < order.size(); first += layout_.tile_bits) {
        std::vector<Item> items;
        std::vector<Index> masks;
        for (std::size_t k = first; k < std::min(order.size(), first + layout_.tile_bits); ++k) {
          const std::size_t r = order[k];
          const Rotation& rotation = stage.rotations[r];
          items.push_back({rotation.z, add_angle(rotation.angle), first_slot + std::uint32_t(r)});
          note(rotation.angle, first_slot + std::uint32_t(r));
          masks.push_back(rotation.x);
        }
        add_pass(PassKind::rotations, items, std::move(masks), turn_values, complex, complex);
      }
      return;
    }
    n_slots_ += std::uint32_t(stage.phases.size());
    const bool after = complex || !stage.real;
    if (!stage.constant.empty()) {
      std::vector<Index> masks;
      for (std::uint32_t k = 1; k <= layout_.tile_bits; ++k) masks.push_back(Index{1} << (layout_.n_wires - k));
      add_pass(PassKind::constants, {}, std::move(masks), 2u << layout_.n_wires, complex, after);
      passes_.back().first_item = std::uint32_t(constants_.size());
      for (const std::complex<double>& c : stage.constant) constants_.push_back({c.real(), c.imag()});
      constants_.resize(passes_.back().first_item + (std::size_t{1} << layout_.n_wires));  // padding
      complex = after;
    }
    for (const Tree& tree : stage.trees) {
      add_tree(PassKind::phases, tree, turn_values + 2 * n_tiles(), complex, after, [&](std::uint32_t k) {
        note(stage.phases[k].angle, first_slot + k);
        return Item{stage.phases[k].z, add_angle(stage.phases[k].angle), first_slot + k};
      });
      complex = after;
    }
  }

  void add_strings() {
    const bool complex = layout_.ends_complex;
    for (const Tree& tree : plan_.trees) {
      add_tree(PassKind::z_strings, tree, 0, complex, complex,
               [&](std::uint32_t s) { return Item{plan_.strings[s].z, unused, s}; });
    }
    std::vector<std::uint32_t> left;
    for (std::uint32_t s = 0; s < plan_.strings.size(); ++s) {
      if (plan_.strings[s].x != 0) left.push_back(s);
    }
    // Strings with one x read the same pairs of amplitudes: two of them lie side by side.
    while (!left.empty()) {
      std::vector<std::uint32_t> rest;
      std::vector<Item> items;
      std::vector<Index> masks;
      Span span;
      for (const std::uint32_t s : left) {
        const auto [x, z] = plan_.strings[s];
        const auto known = std::size_t(std::ranges::find(masks, x) - masks.begin());
        if (known < masks.size() && items[strings_of_mask * known + 1].id == unused) {
          items[strings_of_mask * known + 1] = {z, unused, s};
        } else if (known == masks.size() && masks.size() < layout_.tile_bits && span.extend(x)) {
          masks.push_back(x);
          items.push_back({z, unused, s});
          items.push_back({0, unused, unused});
        } else {
          rest.push_back(s);
        }
      }
      add_pass(PassKind::x_strings, items, std::move(masks), 0, complex, complex);
      left = std::move(rest);
    }
  }

  // ---------------------------------------------------------------------------------------------- readout

  void add_terms() {
    std::vector<Term> sorted = plan_.terms;
    std::ranges::stable_sort(sorted, std::less{}, &Term::output);
    std::vector<std::uint32_t> absorbed;
    for (const Angle& angle : plan_.absorbed) absorbed.push_back(add_angle(angle));
    std::vector<ReadoutTerm> terms;
    std::vector<AngleFactor> factors;
    for (const Term& term : sorted) {
      const auto t = std::uint32_t(terms.size());
      const std::uint32_t slot = term.factors.empty() ? unused : n_slots_++;
      terms.push_back({term.sign, term.output, term.string, std::uint32_t(factors.size()),
                       std::uint32_t(term.factors.size()), slot});
      for (std::uint32_t f = 0; f < term.factors.size(); ++f) {
        const Factor& factor = term.factors[f];
        factors.push_back({absorbed[factor.absorbed], factor.sine});
        for (const AngleTerm& angle_term : plan_.absorbed[factor.absorbed].terms) {
          by_parameter_.push_back({angle_term.parameter, {angle_term.coefficient, slot, t, f}});
        }
      }
    }
    auto starts = [](std::uint32_t n, const std::vector<std::uint32_t>& keys) {
      std::vector<std::uint32_t> out(n + 1, 0);
      for (const std::uint32_t key : keys) ++out[key + 1];
      for (std::uint32_t k = 0; k < n; ++k) out[k + 1] += out[k];
      return out;
    };
    std::vector<std::uint32_t> outputs, strings, order(terms.size());
    for (std::uint32_t t = 0; t < terms.size(); ++t) {
      outputs.push_back(terms[t].output);
      strings.push_back(terms[t].string);
      order[t] = t;
    }
    std::ranges::stable_sort(order, std::less{}, [&](std::uint32_t t) { return terms[t].string; });
    put(layout_.terms, terms);
    put(layout_.factors, factors);
    put(layout_.first_term, starts(plan_.n_outputs, outputs));
    put(layout_.first_string_term, starts(layout_.n_strings, strings));
    put(layout_.string_terms, order);
    layout_.coefficient_values = take_values(std::uint32_t(terms.size()));
  }

  // A slot's derivative goes to the parameters of its angle. d/da of exp(-i a G / 2) is -i G / 2, and a quadratic
  // readout counts it twice, for bra and ket.
  void note(const Angle& angle, std::uint32_t slot) {
    const double half = plan_.is_quadratic() ? 1.0 : 0.5;
    for (const AngleTerm& term : angle.terms) {
      by_parameter_.push_back({term.parameter, {half * term.coefficient, slot, unused, 0}});
    }
  }

  void add_contributions() {
    std::ranges::stable_sort(by_parameter_, std::less{}, [](const auto& item) { return item.first; });
    std::vector<Contribution> contributions;
    std::vector<std::uint32_t> first(plan_.n_parameters + 1, 0);
    for (const auto& [parameter, contribution] : by_parameter_) {
      contributions.push_back(contribution);
      ++first[parameter + 1];
    }
    for (std::uint32_t p = 0; p < plan_.n_parameters; ++p) first[p + 1] += first[p];
    put(layout_.first_contribution, first);
    put(layout_.contributions, contributions);
    layout_.contribution_values = take_values(std::uint32_t(contributions.size()));
  }

  // ---------------------------------------------------------------------------------------------- rows

  // What each bit of a column toggles in an amplitude's index, from the table of a plan; bits that the table does not
  // reach are completed to a basis.
  std::vector<Index> images(const std::vector<Index>& table) const {
    std::vector<Index> out;
    Span span;
    for (std::size_t column = 1; column < table.size(); column *= 2) {
      out.push_back(table[column] ^ table[0]);
      span.extend(out.back());
    }
    for (std::uint32_t bit = 0; bit < layout_.n_wires && out.size() < layout_.n_wires; ++bit) {
      if (span.extend(Index{1} << bit)) out.push_back(Index{1} << bit);
    }
    return out;
  }

  // `image[b]` is what bit b of a column toggles in its address. Chunks come in an order in which the lanes of a warp
  // write to different banks as far as the map allows it.
  RowMap row_map(const std::vector<std::uint32_t>& image, std::uint32_t first, std::uint32_t n_bits) {
    RowMap map{};
    std::copy_n(image.begin(), 3, map.next);
    const std::uint32_t lanes = layout_.lane_bits();
    for (std::uint32_t width = 1; width <= 3; ++width) {
      std::vector<std::uint32_t> order, others;
      Span banks;
      for (std::uint32_t bit = width; bit < n_bits; ++bit) {
        const bool new_bank = order.size() < lanes && banks.extend(image[bit] & ((1u << lanes) - 1));
        (new_bank ? order : others).push_back(bit);
      }
      order.insert(order.end(), others.begin(), others.end());
      std::vector<Chunk> chunks(std::size_t{1} << (n_bits - width));
      for (std::uint32_t c = 0; c < chunks.size(); ++c) {
        chunks[c] = {0, first};
        for (std::uint32_t j = 0; j < order.size(); ++j) {
          if (!((c >> j) & 1)) continue;
          chunks[c].column |= 1u << order[j];
          chunks[c].address ^= image[order[j]];
        }
      }
      put(map.chunks[width - 1], chunks);
    }
    return map;
  }

  void add_outputs() {
    if (plan_.readout == ReadoutKind::expval) return;
    std::vector<std::uint32_t> image = images(plan_.outputs);
    if (plan_.readout == ReadoutKind::probs) {
      layout_.outputs = row_map(image, plan_.outputs[0], layout_.n_wires);
      return;
    }
    for (std::uint32_t bit = 0; (std::size_t{1} << bit) < plan_.signs.size(); ++bit) {
      if (plan_.signs[std::size_t{1} << bit] != plan_.signs[0]) image[bit] |= negative;
    }
    image.insert(image.begin(), 1u << layout_.n_wires);  // columns alternate between real and imaginary parts
    layout_.outputs = row_map(image, plan_.outputs[0] | (plan_.signs[0] < 0 ? negative : 0), layout_.n_wires + 1);
  }

  const Plan& plan_;
  Layout& layout_;
  std::vector<unsigned char>& bytes_;
  std::uint32_t n_values_ = 0, n_slots_ = 0;
  std::vector<Pass> passes_;
  std::vector<Tile> tiles_;
  std::vector<Item> items_;
  std::vector<BoundAngle> angles_;
  std::vector<AngleTerm> angle_terms_;
  std::vector<Complex> constants_;
  std::vector<std::pair<std::uint32_t, Contribution>> by_parameter_;
};

}  // namespace

Program::Program(const Plan& of, bool is_known) : plan(of), is_known(is_known) {
  if (is_known && !can_be_known(of)) {
    throw std::invalid_argument("expected 9 to 13 wires and at most 64 Pauli strings for kernels of one circuit, received " +
                                std::to_string(of.n_wires) + " and " + std::to_string(of.strings.size()));
  }
  Builder(plan, is_known && of.n_wires > 9 ? max_tile_bits : common_tile_bits, *this).build();
}

// Below, several states would share a warp; above, a thread would have several tiles. Every string takes a register.
bool Program::can_be_known(const Plan& plan) {
  return plan.n_wires >= 9 && plan.n_wires <= 13 && plan.strings.size() <= 64;
}

}  // namespace qaa::cuda
