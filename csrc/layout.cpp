#include "layout.h"

#include <algorithm>
#include <bit>
#include <mutex>
#include <utility>

#include "gf2.h"
#include "plan.h"
#include "trees.h"

namespace qaa {
namespace {

constexpr std::uint32_t none = StageLayout::none;

// The size of the next group when `left` items go into groups evenly: as many as full groups of `radix` there are, or
// more where these would get more than `most` items.
std::uint32_t next_group(std::uint32_t left, int radix, int most) {
  const std::uint32_t groups = std::max(left / radix, (left + most - 1) / most);
  return (left + groups - 1) / groups;
}

// ------------------------------------------------------------------------------------------------ coordinates

// Where amplitudes lie: bit j of the number of amplitude i is parity(functional[j] & i), the lanes first.
class Coordinates {
 public:
  Coordinates(const std::vector<Index>& inputs, std::uint32_t n_wires, std::uint32_t lane_bits)
      : n_(n_wires), lane_bits_(lane_bits) {
    // At first by columns, but bit b of a vector's number also toggles bit b - 6: vectors that a high wire pairs lie a
    // power of two apart, which would put a whole pass into one set of the first-level cache.
    constexpr std::uint32_t swizzle = 6;
    for (std::uint32_t bit = 0; bit < n_; ++bit) {
      Index columns = Index{1} << bit;
      for (std::uint32_t b = bit; bit >= lane_bits_ && b >= lane_bits_ + swizzle; b -= swizzle) {
        columns ^= Index{1} << (b - swizzle);
      }
      vector_.push_back(inputs[columns]);
    }
    functional_ = dual_basis(vector_);
  }

  Index place(Index i) const { return parities(functional_, i); }
  // The mask z of a sign as a mask of places.
  Index mask(Index z) const { return parities(vector_, z); }
  std::uint32_t lanes(Index place_or_mask) const { return place_or_mask & ((Index{1} << lane_bits_) - 1); }
  Index vectors(Index place_or_mask) const { return place_or_mask >> lane_bits_; }

  // Goes on to coordinates in which every rotation is on one lane bit or between whole vectors. Returns what brings
  // amplitudes there, and which rotation is on which lane bit.
  std::vector<Move> adapt(const std::vector<Rotation>& rotations, std::vector<std::uint32_t>& lane_rotations) {
    if (fits(rotations, lane_rotations)) return {};
    const std::vector<std::uint32_t> chosen = choose_lanes(rotations);

    // Functionals: of the chosen rotations, of other lanes, then of everything else. Those that are no rotation's vanish
    // where rotations pair amplitudes.
    std::vector<Index> functionals, rest;
    std::vector<bool> on_lane(rotations.size(), false);
    for (const std::uint32_t r : chosen) {
      functionals.push_back(rotations[r].z);
      on_lane[r] = true;
    }
    Span span;
    for (const Rotation& r : rotations) span.extend(r.z);
    for (std::uint32_t j = 0; j < n_; ++j) {
      Index f = functional_[j];
      for (const Rotation& r : rotations) f ^= parity(functional_[j] & r.x) ? r.z : 0;
      if (!span.extend(f)) continue;
      (functionals.size() < lane_bits_ ? functionals : rest).push_back(f);
    }
    for (std::size_t r = 0; r < rotations.size(); ++r) {
      if (!on_lane[r]) functionals.push_back(rotations[r].z);
    }
    functionals.insert(functionals.end(), rest.begin(), rest.end());
    const std::vector<Index> duals = dual_basis(functionals);

    std::vector<Move> moves;
    gather_lanes(functionals, moves);
    permute_lanes(functionals, moves);
    // What is left of the lanes' vectors among vectors: vectors change places lane by lane.
    std::vector<std::pair<Index, std::uint32_t>> exchanges;
    for (std::uint32_t j = 0; j < lane_bits_; ++j) {
      const Index across = vectors(place(duals[j]));
      if (across == 0) continue;
      const auto known = std::ranges::find(exchanges, across, &std::pair<Index, std::uint32_t>::first);
      if (known == exchanges.end()) {
        exchanges.push_back({across, 1u << j});
      } else {
        known->second |= 1u << j;
      }
    }
    for (const auto& [across, lanes] : exchanges) exchange(across, lanes, moves);
    fits(rotations, lane_rotations);
    return moves;
  }

 private:
  bool fits(const std::vector<Rotation>& rotations, std::vector<std::uint32_t>& lane_rotations) const {
    lane_rotations.assign(lane_bits_, none);
    for (std::uint32_t r = 0; r < rotations.size(); ++r) {
      const Index x = place(rotations[r].x), z = mask(rotations[r].z);
      if (lanes(x) == 0 && lanes(z) == 0) continue;
      if (vectors(x) != 0 || x != z || !std::has_single_bit(x)) return false;
      lane_rotations[std::size_t(std::countr_zero(x))] = r;
    }
    return true;
  }

  // As many rotations as there are lane bits: first those whose functionals the lanes tell apart already, the fewest
  // vectors involved first.
  std::vector<std::uint32_t> choose_lanes(const std::vector<Rotation>& rotations) const {
    std::vector<std::uint32_t> order(rotations.size()), chosen, left;
    for (std::uint32_t r = 0; r < order.size(); ++r) order[r] = r;
    std::ranges::stable_sort(order, std::less{}, [&](std::uint32_t r) {
      return std::pair(std::popcount(vectors(place(rotations[r].x))), std::popcount(vectors(mask(rotations[r].z))));
    });
    Span span;
    for (const std::uint32_t r : order) {
      const bool good = chosen.size() < lane_bits_ && span.extend(lanes(mask(rotations[r].z)));
      (good ? chosen : left).push_back(r);
    }
    for (std::size_t k = 0; k < left.size() && chosen.size() < lane_bits_; ++k) chosen.push_back(left[k]);
    return chosen;
  }

  // Brings into the lanes what the new lanes' functionals want of vectors: exchanges until their parts on lanes are
  // independent.
  void gather_lanes(const std::vector<Index>& functionals, std::vector<Move>& moves) {
    for (;;) {
      // A combination of functionals that no lane sees, and a lane that none of them tells apart from lane 0.
      std::vector<std::pair<Index, Index>> rows;  // eliminated: mask, combination
      Index unseen = 0;
      for (std::uint32_t j = 0; j < lane_bits_ && unseen == 0; ++j) {
        Index lane_part = lanes(mask(functionals[j])), combined = functionals[j];
        for (const auto& [part, f] : rows) {
          if ((lane_part ^ part) < lane_part) {
            lane_part ^= part;
            combined ^= f;
          }
        }
        if (lane_part == 0) {
          unseen = combined;
        } else {
          rows.push_back({lane_part, combined});
          std::ranges::sort(rows, std::greater{});
        }
      }
      if (unseen == 0) return;
      std::uint32_t lane = 1;
      auto is_seen = [&](std::uint32_t l) {
        for (std::uint32_t j = 0; j < lane_bits_; ++j) {
          if (parity(lanes(mask(functionals[j])) & l)) return true;
        }
        return false;
      };
      while (is_seen(lane)) ++lane;
      const Index seen_by = vectors(mask(unseen));
      exchange(seen_by & (~seen_by + 1), lane & (~lane + 1), moves);
    }
  }

  void permute_lanes(const std::vector<Index>& functionals, std::vector<Move>& moves) {
    Move move;
    const std::uint32_t n_lanes = 1u << lane_bits_;
    const Index n_vectors = Index{1} << (n_ - lane_bits_);
    // lane' = A lane ^ B vector
    std::vector<Index> on_lanes, on_vectors;
    bool trivial = true;
    for (std::uint32_t j = 0; j < lane_bits_; ++j) {
      const Index m = mask(functionals[j]);
      on_lanes.push_back(lanes(m));
      on_vectors.push_back(vectors(m));
      trivial &= m == Index{1} << j;
    }
    if (trivial) return;
    for (std::uint32_t l = 0; l < n_lanes; ++l) {
      const std::uint32_t to = parities(on_lanes, l);
      move.back_from[l] = to;
      move.from[to] = l;
    }
    for (Index v = 0; v < n_vectors; ++v) {
      const std::uint32_t shift = parities(on_vectors, v);
      move.back_shift.push_back(shift);
      move.shift.push_back(move.from[shift]);
    }
    for (std::uint32_t l = n_lanes; l < max_lanes; ++l) {  // of the other rows
      move.from[l] = move.from[l % n_lanes] + l / n_lanes * n_lanes;
      move.back_from[l] = move.back_from[l % n_lanes] + l / n_lanes * n_lanes;
    }
    moves.push_back(std::move(move));
    for (std::uint32_t j = 0; j < lane_bits_; ++j) functional_[j] = functionals[j];
    vector_ = dual_basis(functional_);
  }

  void exchange(Index across, std::uint32_t lanes, std::vector<Move>& moves) {
    Move move;
    move.vectors = across;
    move.lanes = lanes;
    moves.push_back(std::move(move));
    const Index of_lanes = combination(functional_, lanes);
    for (std::uint32_t j = lane_bits_; j < n_; ++j) {
      if ((across >> (j - lane_bits_)) & 1) functional_[j] ^= of_lanes;
    }
    vector_ = dual_basis(functional_);
  }

  std::uint32_t n_, lane_bits_;
  std::vector<Index> functional_, vector_;
};

// ------------------------------------------------------------------------------------------------ passes

// A rotation between vectors.
struct Across {
  std::uint32_t rotation;
  Index x, z;
};

// A pass over these rotations, of which it leaves the first `extra` alone.
Pass rotation_pass(const std::vector<Across>& held, std::uint32_t extra, Index n_vectors) {
  Pass pass;
  pass.extra = extra;
  for (std::uint32_t k = 0; k < held.size(); ++k) {
    if (k >= extra) pass.rotations.push_back(held[k].rotation);
    pass.masks.push_back(held[k].x);
  }
  // Where the signs of all of them are positive.
  for (Index v = 0; v < n_vectors; ++v) {
    if (std::ranges::none_of(held, [&](const Across& r) { return parity(v & r.z); })) pass.representatives.push_back(v);
  }
  return pass;
}

// The first `n_low` rotations have a pass of their own.
std::vector<Pass> rotation_passes(const std::vector<Across>& rotations, Index n_vectors, int radix, int most,
                                  std::uint32_t n_low = 0) {
  std::vector<Pass> passes;
  for (std::uint32_t first = 0, size; first < rotations.size(); first += size) {
    size = first < n_low ? n_low : next_group(std::uint32_t(rotations.size()) - first, radix, most);
    passes.push_back(rotation_pass({rotations.begin() + first, rotations.begin() + first + size}, 0, n_vectors));
  }
  return passes;
}

// Blocks of the first stage's passes in the order of the columns that reach them: what is beyond a row's end is zero
// before a pass, and nobody asks for it after the pass was undone.
void sort_by_columns(const Layout& layout, std::vector<Pass>& passes) {
  std::vector<Index> first(layout.n_vectors);  // vector of columns that reaches each vector
  for (Index c = 0; c < layout.n_vectors; ++c) first[layout.inputs[c]] = c;
  auto spread = [](std::vector<Index>& columns, Index mask) {
    for (Index v = 0; v < columns.size(); ++v) columns[v] = std::min(columns[v], columns[v ^ mask]);
  };
  for (Pass& pass : passes) {
    for (std::uint32_t k = pass.extra; k < pass.masks.size(); ++k) spread(first, pass.masks[k]);
    std::vector<Index> of_block = first;
    for (std::uint32_t k = 0; k < pass.extra; ++k) spread(of_block, pass.masks[k]);
    std::ranges::stable_sort(pass.representatives, std::less{}, [&](Index v) { return of_block[v]; });
    for (const Index v : pass.representatives) pass.first_columns.push_back(of_block[v] << layout.lane_bits);
  }
}

// The strings of rotations k and k + 1, for every k. `take` gives the number of a string of vectors, or none.
template <class Take>
std::vector<Link> find_links(const std::vector<Across>& rotations, Take&& take) {
  std::vector<Link> links;
  for (std::size_t k = 0; k + 1 < rotations.size(); ++k) {
    const Index x = rotations[k].x ^ rotations[k + 1].x, z = rotations[k].z ^ rotations[k + 1].z;
    links.push_back({take(x, Index{0}), take(x, z)});
  }
  return links;
}

// Strings of neighbouring rotations go to the pass that holds both, which may hold the last rotation of the pass before
// it for this; what is left gets passes that turn nothing.
void lay_out_links(const std::vector<Across>& rotations, const std::vector<Link>& links, Index n_vectors,
                   int rotate_radix, std::vector<Pass>& passes) {
  std::vector<std::uint32_t> left;
  std::uint32_t first = 0;
  for (Pass& pass : passes) {
    const std::uint32_t radix = pass.radix();
    if (first > 0 && links[first - 1].is_asked_for()) {
      if (radix < std::uint32_t(rotate_radix)) {
        pass = rotation_pass({rotations.begin() + first - 1, rotations.begin() + first + radix}, 1, n_vectors);
      } else {
        left.push_back(first - 1);
      }
    }
    const auto begin = links.begin() + (first - pass.extra), end = links.begin() + (first + radix - 1);
    if (std::any_of(begin, end, [](const Link& link) { return link.is_asked_for(); })) pass.links.assign(begin, end);
    first += radix;
  }
  for (std::size_t k = 0; k < left.size();) {
    std::vector<Across> others{rotations[left[k]], rotations[left[k] + 1]};
    std::vector<Link> read{links[left[k]]};
    const std::uint32_t last = left[k++] + 1;
    if (rotate_radix == 4 && k < left.size() && left[k] > last) {
      others.insert(others.end(), {rotations[left[k]], rotations[left[k] + 1]});
      read.insert(read.end(), {Link{}, links[left[k++]]});
    }
    passes.push_back(rotation_pass(others, std::uint32_t(others.size()), n_vectors));
    passes.back().links = std::move(read);
  }
}

struct Placed {
  std::uint32_t string;
  Index x, z;  // as masks of places
};

// Passes over strings that have no sign and an x of their own; the smallest vector of every
// coset is its representative.
std::vector<Pass> flip_passes(const Coordinates& at, std::vector<Placed>& strings, Index n_vectors, int radix) {
  std::vector<Across> left;
  std::erase_if(strings, [&](const Placed& s) {
    const bool fits = s.x != 0 && s.z == 0 && at.lanes(s.x) == 0 &&
                      std::ranges::count(strings, s.x, &Placed::x) == 1;
    if (fits) left.push_back({s.string, at.vectors(s.x), 0});
    return fits;
  });
  std::ranges::sort(left, std::greater{}, &Across::x);
  std::vector<Pass> passes;
  while (!left.empty()) {
    Span span;
    Pass pass;
    const std::uint32_t size = next_group(std::uint32_t(left.size()), radix, radix);
    std::erase_if(left, [&](const Across& flip) {
      const bool taken = pass.radix() < size && span.extend(flip.x);
      if (taken) {
        pass.rotations.push_back(flip.rotation);
        pass.masks.push_back(flip.x);
      }
      return taken;
    });
    for (Index v = 0; v < n_vectors; ++v) {
      if (span.reduce(v) == v) pass.representatives.push_back(v);
    }
    passes.push_back(std::move(pass));
  }
  return passes;
}

// ------------------------------------------------------------------------------------------------ sums

// Trees over vectors for sums with the signs of `places`, masks of places; items[k] is what places[k] belongs to.
std::vector<LaneTree> lane_trees(const Coordinates& at, const std::vector<Index>& places,
                                 const std::vector<std::uint32_t>& items, std::uint32_t n_bits) {
  std::vector<Index> masks;  // each once
  std::vector<std::uint32_t> numbers;
  for (const Index place : places) {
    if (std::ranges::find(masks, at.vectors(place)) != masks.end()) continue;
    numbers.push_back(std::uint32_t(masks.size()));
    masks.push_back(at.vectors(place));
  }
  std::vector<LaneTree> out;
  for (Tree& tree : sum_trees(masks, numbers, n_bits)) {
    LaneTree& to = out.emplace_back();
    to.order = std::move(tree.order);
    for (std::uint32_t slot = 0; slot < tree.slots.size(); ++slot) {
      if (tree.slots[slot] == Tree::unused) continue;
      for (std::size_t k = 0; k < places.size(); ++k) {
        if (at.vectors(places[k]) == masks[tree.slots[slot]]) to.members.push_back({slot, items[k], at.lanes(places[k])});
      }
    }
  }
  return out;
}

// Strings that all have the same x and the same parity(x & z), as few correlations as possible.
void add_correlations(const Coordinates& at, std::vector<Placed> strings, Index n_vectors,
                      std::vector<Correlation>& out) {
  const Index x = strings.front().x, across = at.vectors(x), low = across & (~across + 1);
  while (!strings.empty()) {  // a pair's first vector lacks the lowest bit of the mask between the two
    Correlation c;
    c.vectors = across;
    c.lanes = at.lanes(x);
    c.imaginary = parity(x & strings.front().z);
    std::vector<Index> basis;
    std::erase_if(strings, [&](const Placed& s) {
      const Index z = at.vectors(s.z) & ~low;
      std::uint32_t mask = 0;
      while (mask < (1u << basis.size()) && combination(basis, mask) != z) ++mask;
      if (mask == (1u << basis.size())) {
        if (basis.size() == Correlation::max_bits) return false;
        basis.push_back(z);
      }
      c.members.push_back({s.string, mask, at.lanes(s.z)});
      return true;
    });
    c.n_bits = std::uint32_t(basis.size());
    for (std::uint32_t of_class = 0; of_class < (1u << basis.size()); ++of_class) {
      for (Index v = 0; v < n_vectors; ++v) {
        bool belongs = !(v & low);
        for (std::size_t j = 0; j < basis.size(); ++j) belongs &= parity(v & basis[j]) == bool((of_class >> j) & 1);
        if (belongs) c.order.push_back(v);
      }
    }
    out.push_back(std::move(c));
  }
}

// Flips and correlations as they are applied, for vectors in the order of the first tree: correlations whose x is between
// vectors and whose elements are real, as many as are worth it.
std::vector<Gather> lay_out_gathers(Layout& layout) {
  std::vector<Gather> out;
  for (const Pass& pass : layout.flips) {
    for (std::uint32_t k = 0; k < pass.radix(); ++k) {
      Gather& gather = out.emplace_back();
      gather.vectors = pass.masks[k];
      gather.members.push_back({pass.rotations[k], 0, 0});
    }
  }
  const std::vector<Index>& order = layout.trees.front().order;
  std::uint32_t n_weights = 0;
  for (Correlation& c : layout.correlations) {
    Gather gather;
    gather.vectors = c.vectors;
    gather.n_bits = c.n_bits;
    gather.members = c.members;
    c.is_gathered = c.lanes == 0 && !c.imaginary && n_weights + gather.n_weights() <= Gather::max_weights;
    if (!c.is_gathered) continue;
    n_weights += gather.n_weights();
    std::vector<std::uint8_t> class_of(layout.n_vectors);
    for (std::size_t k = 0; k < c.order.size(); ++k) {
      class_of[c.order[k]] = class_of[c.order[k] ^ c.vectors] = std::uint8_t((k << c.n_bits) / c.order.size());
    }
    for (std::size_t b = 0; b < order.size(); b += 8) gather.classes.push_back(class_of[order[b]]);
    for (std::size_t k = 0; k < std::min<std::size_t>(8, order.size()); ++k) gather.of_eight[k] = class_of[order[k]];
    out.push_back(std::move(gather));
  }
  return out;
}

// The plan for vectors with 2^lane_bits amplitudes of a row. The rotations of the `low_bits` lowest bits of vectors have a
// pass of their own, which kernels do while they load rows.
Layout lay_out(const Plan& plan, std::uint32_t lane_bits, std::uint32_t low_bits) {
  Layout out;
  out.lane_bits = lane_bits;
  const std::uint32_t n_bits = plan.n_wires - lane_bits;
  out.n_vectors = Index{1} << n_bits;
  Coordinates at(plan.inputs, plan.n_wires, lane_bits);
  for (Index c = 0; c < out.n_vectors; ++c) out.inputs.push_back(at.vectors(at.place(plan.inputs[c << lane_bits])));

  out.stages.resize(plan.stages.size());
  std::uint32_t n_kept = 0;
  for (std::size_t s = plan.stages.size(); s-- > 1;) {
    if (plan.stages[s].is_diagonal() || n_kept == Layout::max_kept) continue;
    out.stages[s].kept = true;
    ++n_kept;
  }
  const int radix = plan.options.rotate_radix;
  std::vector<Across> across;
  std::uint32_t n_low = 0;
  for (std::size_t s = 0; s < plan.stages.size(); ++s) {
    const Stage& stage = plan.stages[s];
    StageLayout& to = out.stages[s];
    if (stage.is_diagonal()) {
      for (const Tree& tree : stage.trees) {
        std::vector<Index>& order = to.orders.emplace_back();
        for (const Index i : tree.order) order.push_back(at.place(i));
      }
      to.constant.resize(stage.constant.size());
      for (Index i = 0; i < stage.constant.size(); ++i) to.constant[at.place(i)] = stage.constant[i];
      std::vector<Index> places;
      std::vector<std::uint32_t> items;
      for (std::uint32_t k = 0; k < stage.phases.size(); ++k) {
        if (stage.phases[k].angle.is_constant()) continue;
        places.push_back(at.mask(stage.phases[k].z));
        items.push_back(k);
      }
      to.trees = lane_trees(at, places, items, n_bits);
      continue;
    }
    to.moves = at.adapt(stage.rotations, to.lanes);
    across.clear();
    for (std::uint32_t r = 0; r < stage.rotations.size(); ++r) {
      if (std::ranges::find(to.lanes, r) != to.lanes.end()) continue;
      across.push_back({r, at.vectors(at.place(stage.rotations[r].x)), at.vectors(at.mask(stage.rotations[r].z))});
    }
    n_low = 0;
    if (s == 0 && to.moves.empty()) {
      out.loads_lanes = true;
      auto is_low = [&](const Across& r, std::uint32_t bit) {
        bool pairs = r.x == out.inputs[Index{1} << bit];
        for (std::uint32_t b = 0; b < n_bits; ++b) pairs &= parity(r.z & out.inputs[Index{1} << b]) == (b == bit);
        return pairs;
      };
      const std::uint32_t most = std::min({low_bits, n_bits, std::uint32_t(across.size())});
      while (n_low < most && is_low(across[n_low], n_low)) ++n_low;
      out.starts_low = n_low > 0;
    }
    to.rotate = rotation_passes(across, out.n_vectors, radix, std::min(radix + 1, max_radix), n_low);
    // The adjoint undoes two states at once; or one, in the same passes, where it needs no other or has kept it.
    if (s > 0 && !to.kept) {
      to.unwind = rotation_passes(across, out.n_vectors, plan.options.unwind_radix, plan.options.unwind_radix);
    }
  }

  if (plan.readout == ReadoutKind::expval) {
    std::vector<Placed> left;
    for (std::uint32_t s = 0; s < plan.strings.size(); ++s) {
      left.push_back({s, at.place(plan.strings[s].x), at.mask(plan.strings[s].z)});
      out.string_lanes.push_back(at.lanes(left.back().z));
    }
    if (plan.options.link && !plan.stages.empty() && !plan.stages.back().is_diagonal()) {
      const std::vector<Link> links = find_links(across, [&](Index x, Index z) {
        const auto found = std::ranges::find_if(left, [&](const Placed& s) {
          return s.x == x << lane_bits && s.z == z << lane_bits;
        });
        if (found == left.end()) return Link::none;
        const std::uint32_t string = found->string;
        left.erase(found);
        return string;
      });
      if (std::ranges::any_of(links, &Link::is_asked_for)) {
        StageLayout& last = out.stages.back();
        last.reading = rotation_passes(across, out.n_vectors, radix, radix, n_low);  // sums take registers as well
        lay_out_links(across, links, out.n_vectors, radix, last.reading);
        constexpr std::uint32_t most = max_radix - 1;  // and a rotation of the pass before, but in the first one
        const std::uint32_t n_first = across.size() % most == 1 ? std::min(max_radix, int(across.size())) : 0;
        last.overlap = rotation_passes(across, out.n_vectors, most, most, n_first);
        lay_out_links(across, links, out.n_vectors, max_radix, last.overlap);
      }
    }
    out.flips = flip_passes(at, left, out.n_vectors, radix);
    std::vector<Index> places;
    std::vector<std::uint32_t> items;
    for (std::size_t first = 0; first < left.size();) {
      std::size_t end = first + 1;
      auto key = [&](const Placed& s) { return std::pair(s.x, parity(s.x & s.z)); };
      while (end < left.size() && key(left[end]) == key(left[first])) ++end;
      if (left[first].x != 0) {
        add_correlations(at, {left.begin() + std::ptrdiff_t(first), left.begin() + std::ptrdiff_t(end)}, out.n_vectors,
                         out.correlations);
      } else {
        for (std::size_t k = first; k < end; ++k) {
          places.push_back(left[k].z);
          items.push_back(left[k].string);
        }
      }
      first = end;
    }
    out.trees = lane_trees(at, places, items, n_bits);
    if (out.trees.empty()) {
      std::vector<Index>& order = out.trees.emplace_back().order;
      for (Index v = 0; v < out.n_vectors; ++v) order.push_back(v);
    }
    out.gathers = lay_out_gathers(out);
  }
  for (const Index b : plan.outputs) out.outputs.push_back(at.place(b));

  if (out.loads_lanes) {
    for (std::vector<Pass>* passes : {&out.stages.front().rotate, &out.stages.front().reading}) {
      sort_by_columns(out, *passes);
    }
  }
  for (StageLayout& stage : out.stages) {
    if (stage.unwind.empty()) stage.unwind = stage.rotate;
  }
  return out;
}

}  // namespace

struct Layouts {
  struct Slot {
    std::once_flag once;
    Layout layout;
  };
  Slot slots[max_lane_bits + 1][max_lane_bits + 1];
};

std::shared_ptr<Layouts> make_layouts() { return std::make_shared<Layouts>(); }

const Layout& Plan::layout(std::uint32_t lane_bits, std::uint32_t low_bits) const {
  Layouts::Slot& slot = layouts->slots[lane_bits][low_bits];
  std::call_once(slot.once, [&] { slot.layout = lay_out(*this, lane_bits, low_bits); });
  return slot.layout;
}

}  // namespace qaa
