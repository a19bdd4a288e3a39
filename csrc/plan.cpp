#include "plan.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <complex>
#include <numbers>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <tuple>
#include <utility>

#include "checks.h"
#include "gates.h"
#include "gf2.h"
#include "layout.h"
#include "trees.h"

namespace qaa {
namespace {

// ------------------------------------------------------------------------------------------------ frame

// The logical amplitude at logical index b is (-1)^parity(sign & b) times the stored one at M^-1 (b ^ flip).
// `row[w]` is the mask of stored bits whose parity is logical bit w (before `flip`); `column[w]` is M^-1 e_w.
struct Frame {
  std::uint32_t n;
  std::vector<Index> row, column;
  std::vector<bool> flip, sign;

  // The state is numbered in swizzled order from the start: index bit b >= 6 also toggles bit b - 6. CUDA programs keep
  // this order; the layouts for vectors have their own (layout.cpp, Coordinates), for the same reason.
  explicit Frame(std::uint32_t n_wires) : n(n_wires), row(n), column(n), flip(n), sign(n) {
    for (std::uint32_t bit = 0; bit < n; ++bit) {
      const std::uint32_t w = n - 1 - bit;
      column[w] = Index{1} << bit;
      if (bit >= swizzle) column[w] |= Index{1} << (bit - swizzle);
      for (std::uint32_t higher = bit; higher < n; higher += swizzle) row[w] |= Index{1} << higher;
    }
  }
  static constexpr std::uint32_t swizzle = 6;
  // Returns true if the state changes sign.
  bool x(std::uint32_t w) {
    flip[w] = !flip[w];
    return sign[w];
  }
  void z(std::uint32_t w) { sign[w] = !sign[w]; }
  void cnot(std::uint32_t control, std::uint32_t target) {
    row[target] ^= row[control];
    column[control] ^= column[target];
    flip[target] = flip[target] != flip[control];
    sign[control] = sign[control] != sign[target];
  }
  void swap(std::uint32_t a, std::uint32_t b) {
    std::swap(row[a], row[b]);
    std::swap(column[a], column[b]);
    std::vector<bool>::swap(flip[a], flip[b]);
    std::vector<bool>::swap(sign[a], sign[b]);
  }
  Index stored_index(Index logical) const {
    Index stored = 0;
    for (std::uint32_t w = 0; w < n; ++w) {
      if (((logical >> (n - 1 - w)) & 1) != Index{flip[w]}) stored ^= column[w];
    }
    return stored;
  }
  bool sign_of(Index logical) const {
    bool negative = false;
    for (std::uint32_t w = 0; w < n; ++w) negative ^= sign[w] && ((logical >> (n - 1 - w)) & 1);
    return negative;
  }
};

// ------------------------------------------------------------------------------------------------ scheduling

bool is_rotation_stage(const Stage& stage) { return !stage.is_diagonal(); }

bool commutes(const Rotation& a, const Rotation& b) { return parity(a.x & b.z) == parity(b.x & a.z); }
bool commutes(const Phase& a, const Rotation& b) { return !parity(a.z & b.x); }

bool commutes(const Stage& stage, const Rotation& rotation) {
  return std::ranges::all_of(stage.rotations, [&](const auto& r) { return commutes(r, rotation); }) &&
         std::ranges::all_of(stage.phases, [&](const auto& p) { return commutes(p, rotation); });
}
bool commutes(const Stage& stage, const Phase& phase) {
  return std::ranges::all_of(stage.rotations, [&](const auto& r) { return commutes(phase, r); });
}

// Can `rotation` be one of the independent rotations of this stage, or be added to one of them?
bool fits(const Stage& stage, const Rotation& rotation) {
  return is_rotation_stage(stage) && std::ranges::all_of(stage.rotations, [&](const auto& r) {
           const bool same = r.x == rotation.x && r.z == rotation.z;
           return same || (!parity(r.x & rotation.z) && !parity(r.z & rotation.x));
         });
}
bool fits(const Stage& stage, const Phase&) { return stage.is_diagonal(); }

void put(Stage& stage, const Rotation& rotation, bool fuse) {
  for (Rotation& r : stage.rotations) {
    if (fuse && r.x == rotation.x && r.z == rotation.z) return r.angle.add(rotation.angle, 1);
  }
  stage.rotations.push_back(rotation);
}
void put(Stage& stage, const Phase& phase, bool fuse) {
  for (Phase& p : stage.phases) {
    if (fuse && p.z == phase.z) return p.angle.add(phase.angle, 1);
  }
  stage.phases.push_back(phase);
}

// Puts an operation into the earliest stage that it commutes back to; without `fuse`, into a stage of its own.
template <class Operation>
void schedule(std::vector<Stage>& stages, const Operation& operation, bool fuse) {
  std::size_t at = stages.size();
  if (fuse) {
    for (std::size_t s = stages.size(); s-- > 0;) {
      if (fits(stages[s], operation)) at = s;
      if (!commutes(stages[s], operation)) break;
    }
  }
  if (at == stages.size()) stages.emplace_back();
  put(stages[at], operation, fuse);
}

// If the product of these phases is constant and real at every index, zero; with `any_global_phase`, or the angle of
// its first entry if it is real after a division by that.
std::optional<double> real_up_to(const std::vector<Phase>& phases, std::uint32_t n_wires, bool any_global_phase) {
  if (!std::ranges::all_of(phases, [](const Phase& p) { return p.angle.is_constant(); })) return std::nullopt;
  auto angle_at = [&](Index i) {
    double angle = 0;
    for (const Phase& p : phases) angle += (parity(p.z & i) ? 0.5 : -0.5) * p.angle.constant;
    return angle;
  };
  const double global = any_global_phase ? angle_at(0) : 0;
  for (Index i = 0; i < (Index{1} << n_wires); ++i) {
    if (std::abs(std::sin(angle_at(i) - global)) > 1e-12) return std::nullopt;
  }
  return global;
}

// ------------------------------------------------------------------------------------------------ observables

// -i P G for anticommuting Hermitian strings P and G, as sign * string.
struct SignedString {
  String string;
  double sign;
};
SignedString turned(const String& p, const Rotation& g) {
  return {{p.x ^ g.x, p.z ^ g.z}, parity(g.z & p.x) ? 1.0 : -1.0};
}
SignedString turned(const String& p, const Phase& g) {
  return {{p.x, p.z ^ g.z}, parity(p.x & p.z) ? 1.0 : -1.0};
}
bool commutes(const String& p, const Rotation& g) { return parity(p.x & g.z) == parity(g.x & p.z); }
bool commutes(const String& p, const Phase& g) { return !parity(p.x & g.z); }

class Observables {
 public:
  explicit Observables(Plan& plan) : plan_(plan) {}

  void add(std::uint32_t output, const String& string, double sign) {
    plan_.terms.push_back({output, id(string), sign, {}});
  }

  // Takes the trailing operations that cost less as observables than as a pass over the state.
  void absorb_trailing() {
    while (!plan_.stages.empty()) {
      Stage& last = plan_.stages.back();
      absorb_phases(last.phases);
      if (!last.phases.empty() && plan_.options.expand && is_real_before_last()) expand(last.phases);
      std::erase_if(last.rotations, [&](const Rotation& r) { return absorb(r, true); });
      if (!last.phases.empty() || !last.rotations.empty()) return;
      plan_.stages.pop_back();
    }
  }

  // Drops the strings that no term uses any longer.
  void compact() {
    std::vector<std::uint32_t> new_id(plan_.strings.size(), Tree::unused);
    std::vector<String> kept;
    for (Term& term : plan_.terms) {
      if (new_id[term.string] == Tree::unused) {
        new_id[term.string] = std::uint32_t(kept.size());
        kept.push_back(plan_.strings[term.string]);
      }
      term.string = new_id[term.string];
    }
    plan_.strings = std::move(kept);
  }

 private:
  static constexpr std::size_t max_new_strings = 2;
  static constexpr std::size_t max_terms_per_output = 8;

  std::uint32_t id(const String& string) {
    const auto at = std::ranges::find(plan_.strings, string) - plan_.strings.begin();
    if (std::size_t(at) == plan_.strings.size()) plan_.strings.push_back(string);
    return std::uint32_t(at);
  }

  template <class Operation>
  std::vector<std::size_t> terms_hit_by(const Operation& operation) const {
    std::vector<std::size_t> hit;
    for (std::size_t t = 0; t < plan_.terms.size(); ++t) {
      if (!commutes(plan_.strings[plan_.terms[t].string], operation)) hit.push_back(t);
    }
    return hit;
  }

  // Phases that commute with every string vanish. The others make one pass over the state however many they are, and
  // strings with signs are dearer than strings without: quarter turns go only if all that is left of the stage goes.
  void absorb_phases(std::vector<Phase>& phases) {
    std::erase_if(phases, [&](const Phase& p) { return terms_hit_by(p).empty(); });
    if (!std::ranges::all_of(phases, [](const Phase& p) { return quarter_turns(p.angle) >= 0; })) return;
    for (const Phase& phase : phases) absorb(phase, true);
    phases.clear();
  }

  bool is_real_before_last() const {
    return plan_.options.real && std::all_of(plan_.stages.begin(), plan_.stages.end() - 1, [&](const Stage& s) {
             return !s.is_diagonal() || real_up_to(s.phases, plan_.n_wires, true).has_value();
           });
  }

  // Moves the phases that turn a real state complex into the strings: of a string that k of them hit, 2^k are left, and
  // half of these are imaginary, which a real state does not have. All of them or none.
  void expand(std::vector<Phase>& phases) {
    for (const String& string : plan_.strings) {
      const auto hits = std::ranges::count_if(phases, [&](const Phase& p) { return !commutes(string, p); });
      if (hits > Correlation::max_bits + 1) return;
    }
    for (const Phase& phase : phases) absorb(phase, false);
    phases.clear();
    std::erase_if(plan_.terms, [&](const Term& term) {
      const String& string = plan_.strings[term.string];
      return parity(string.x & string.z);
    });
    compact();
  }

  // U^dagger P U = cos(a) P + sin(a) (-i P G) for U = exp(-i a G / 2) and P that anticommutes with G. If `limited`,
  // nothing is done, and false returned, where that would make too many strings or terms.
  template <class Operation>
  bool absorb(const Operation& operation, bool limited) {
    const std::vector<std::size_t> hit = terms_hit_by(operation);
    if (hit.empty()) return true;
    if (const int quarters = quarter_turns(operation.angle); quarters >= 0) {
      for (const std::size_t t : hit) quarter_turn(plan_.terms[t], operation, quarters);
      return true;
    }
    if (limited && plan_.terms.size() + hit.size() > max_terms_per_output * plan_.n_outputs) return false;
    std::vector<String> added;
    for (const std::size_t t : hit) {
      const String string = turned(plan_.strings[plan_.terms[t].string], operation).string;
      if (std::ranges::find(plan_.strings, string) == plan_.strings.end() &&
          std::ranges::find(added, string) == added.end()) {
        added.push_back(string);
      }
    }
    if (limited && added.size() > max_new_strings) return false;
    const auto angle = std::uint32_t(plan_.absorbed.size());
    plan_.absorbed.push_back(operation.angle);
    for (const std::size_t t : hit) {
      Term sine = plan_.terms[t];
      const SignedString next = turned(plan_.strings[sine.string], operation);
      sine.string = id(next.string);
      sine.sign *= next.sign;
      sine.factors.push_back({angle, true});
      plan_.terms[t].factors.push_back({angle, false});
      plan_.terms.push_back(std::move(sine));
    }
    return true;
  }

  // 0 to 3 if the angle is that many quarter turns for every theta, else -1.
  static int quarter_turns(const Angle& angle) {
    if (!angle.is_constant()) return -1;
    const double quarters = angle.constant / (std::numbers::pi / 2);
    if (std::abs(quarters - std::round(quarters)) > 1e-12) return -1;
    return int((std::llround(quarters) % 4 + 4) % 4);
  }

  template <class Operation>
  void quarter_turn(Term& term, const Operation& operation, int quarters) {
    if (quarters & 1) {
      const SignedString next = turned(plan_.strings[term.string], operation);
      term.string = id(next.string);
      term.sign *= next.sign;
    }
    if (quarters & 2) term.sign = -term.sign;
  }

  Plan& plan_;
};

// ------------------------------------------------------------------------------------------------ layout

// Moves the rotations of the columns' lowest bits to the front, lowest first: at most `radix` of them, which kernels do
// while they load rows. Returns how many there are.
std::uint32_t lowest_first(std::vector<Rotation>& rotations, const std::vector<Index>& inputs, std::uint32_t n_wires,
                           int radix) {
  auto is_of_bit = [&](const Rotation& r, std::uint32_t bit) {
    bool pairs = r.x == inputs[Index{1} << bit];
    for (std::uint32_t b = 0; b < n_wires; ++b) pairs &= parity(r.z & inputs[Index{1} << b]) == (b == bit);
    return pairs;
  };
  std::uint32_t n = 0;
  while (n < std::min(n_wires, std::uint32_t(radix))) {
    const auto rest = rotations.begin() + n;
    const auto found = std::find_if(rest, rotations.end(), [&](const Rotation& r) { return is_of_bit(r, n); });
    if (found == rotations.end()) break;
    std::rotate(rest, found, found + 1);
    ++n;
  }
  return n;
}

// The stage without an imaginary part where its phases are constant and allow it.
bool make_real(Stage& stage, std::uint32_t n_wires, bool any_global_phase) {
  const std::optional<double> global = real_up_to(stage.phases, n_wires, any_global_phase);
  if (global.value_or(0) != 0) put(stage, Phase{0, {2 * *global, {}}}, true);
  return global.has_value();
}

// The product of the constant phases at every index; empty where there is none.
std::vector<std::complex<double>> constant_table(const Stage& stage, std::uint32_t n_wires) {
  std::vector<std::complex<double>> table;
  for (const Phase& p : stage.phases) {
    if (!p.angle.is_constant()) continue;
    table.resize(Index{1} << n_wires, 1);
    const std::complex<double> even = std::polar(1.0, -p.angle.constant / 2);
    for (Index i = 0; i < table.size(); ++i) table[i] *= parity(p.z & i) ? std::conj(even) : even;
  }
  return table;
}

void lay_out_diagonal(Plan& plan, Stage& stage) {
  const bool quadratic = plan.is_quadratic();
  if (quadratic) std::erase_if(stage.phases, [](const Phase& p) { return p.z == 0 && !p.angle.is_constant(); });
  stage.real = plan.options.real && make_real(stage, plan.n_wires, quadratic);
  std::ranges::stable_sort(stage.phases, std::less{}, &Phase::z);
  std::vector<Index> masks;
  std::vector<std::uint32_t> items;
  for (std::uint32_t k = 0; k < stage.phases.size(); ++k) {
    if (stage.phases[k].angle.is_constant()) continue;
    masks.push_back(stage.phases[k].z);
    items.push_back(k);
  }
  stage.trees = sum_trees(masks, items, plan.n_wires);
  stage.constant = constant_table(stage, plan.n_wires);
}

void lay_out_stages(Plan& plan) {
  for (Stage& stage : plan.stages) {
    if (stage.is_diagonal()) lay_out_diagonal(plan, stage);
  }
  std::erase_if(plan.stages, [](const Stage& s) { return s.phases.empty() && s.rotations.empty(); });

  for (Stage& stage : plan.stages) std::ranges::reverse(stage.rotations);  // columns' lowest bits are the last wires
  if (plan.stages.empty()) return;
  plan.n_low = lowest_first(plan.stages.front().rotations, plan.inputs, plan.n_wires, plan.options.load_radix);
}

// Sorts the strings, so that those of one x are neighbours.
void lay_out_strings(Plan& plan) {
  std::vector<String> ordered = plan.strings;
  std::ranges::sort(ordered, std::less{}, [](const String& s) { return std::tuple(s.x, parity(s.x & s.z), s.z); });
  for (Term& term : plan.terms) {
    term.string = std::uint32_t(std::ranges::find(ordered, plan.strings[term.string]) - ordered.begin());
  }
  plan.strings = std::move(ordered);
  std::vector<Index> masks;
  std::vector<std::uint32_t> items;
  for (std::uint32_t s = 0; s < plan.strings.size() && plan.strings[s].x == 0; ++s) {
    masks.push_back(plan.strings[s].z);
    items.push_back(s);
  }
  plan.trees = sum_trees(masks, items, plan.n_wires);
}

// ------------------------------------------------------------------------------------------------ gates

[[noreturn]] void refuse(const std::string& expected, const std::string& received) {
  throw std::invalid_argument("expected " + expected + ", received " + received);
}

void check(std::uint32_t n_wires, std::uint32_t n_parameters, const GateCall& gate) {
  const GateInfo* info = find_gate(gate.name);
  if (info == nullptr) refuse("a gate of the gate table", "'" + gate.name + "'");
  if (gate.wires.size() != std::size_t(info->n_wires)) {
    refuse(std::to_string(info->n_wires) + " wire(s) for " + gate.name, std::to_string(gate.wires.size()));
  }
  if (gate.parameters.size() != std::size_t(info->n_parameters)) {
    refuse(std::to_string(info->n_parameters) + " parameter(s) for " + gate.name,
           std::to_string(gate.parameters.size()));
  }
  for (const std::uint32_t w : gate.wires) {
    if (w >= n_wires) refuse("wires below " + std::to_string(n_wires), gate.name + " on wire " + std::to_string(w));
  }
  if (gate.wires.size() == 2 && gate.wires[0] == gate.wires[1]) {
    refuse("different wires for " + gate.name, "wire " + std::to_string(gate.wires[0]) + " twice");
  }
  for (const std::uint32_t p : gate.parameters) {
    if (p >= n_parameters) {
      refuse("parameter indices below " + std::to_string(n_parameters), gate.name + " with " + std::to_string(p));
    }
  }
}

void apply(const GateCall& gate, Frame& frame, Plan& plan) {
  const bool fuse = plan.options.fuse, rename = plan.options.rename;
  auto add_phase = [&](Index z, Angle angle) { schedule(plan.stages, Phase{z, std::move(angle)}, fuse); };
  for (const Step& step : find_gate(gate.name)->steps) {
    if (step.primitive == Primitive::none) break;
    const std::uint32_t a = gate.wires[step.a];
    const std::uint32_t b = gate.wires[std::min<std::size_t>(step.b, gate.wires.size() - 1)];
    auto angle = [&](double sign) {
      Angle value;
      if (step.parameter < 0) {
        value.constant = sign * step.factor;
      } else {
        value.terms.push_back({gate.parameters[step.parameter], sign * step.factor});
      }
      return value;
    };
    auto sign = [](bool negative) { return negative ? -1.0 : 1.0; };
    auto add_rotation = [&](std::uint32_t w, Angle angle) {
      schedule(plan.stages, Rotation{frame.column[w], frame.row[w], std::move(angle)}, fuse);
    };
    // Without renaming: Z = exp(i pi/2) RZ(pi), CZ as in the gate table, and RY(pi/2) turns Z into X.
    constexpr double pi = std::numbers::pi;
    auto do_z = [&](std::uint32_t w) {
      add_phase(frame.row[w], {pi, {}});
      add_phase(0, {-pi, {}});
    };
    auto do_x = [&](std::uint32_t w) {
      add_rotation(w, {-pi / 2, {}});
      do_z(w);
      add_rotation(w, {pi / 2, {}});
    };
    auto do_cnot = [&](std::uint32_t control, std::uint32_t target) {
      add_rotation(target, {-pi / 2, {}});
      for (const std::uint32_t w : {control, target}) add_phase(frame.row[w], {pi / 2, {}});
      add_phase(frame.row[control] ^ frame.row[target], {-pi / 2, {}});
      add_phase(0, {-pi / 2, {}});
      add_rotation(target, {pi / 2, {}});
    };
    switch (step.primitive) {
      case Primitive::none: break;
      case Primitive::ry: add_rotation(a, angle(sign(frame.flip[a] != frame.sign[a]))); break;
      case Primitive::rz: add_phase(frame.row[a], angle(sign(frame.flip[a]))); break;
      case Primitive::rzz:
        add_phase(frame.row[a] ^ frame.row[b], angle(sign(frame.flip[a] != frame.flip[b])));
        break;
      case Primitive::phase: add_phase(0, angle(-2.0)); break;
      case Primitive::x:
        if (!rename) {
          do_x(a);
        } else if (frame.x(a)) {
          add_phase(0, {2 * pi, {}});
        }
        break;
      case Primitive::z: rename ? frame.z(a) : do_z(a); break;
      case Primitive::cnot: rename ? frame.cnot(a, b) : do_cnot(a, b); break;
      case Primitive::swap:
        if (rename) {
          frame.swap(a, b);
        } else {
          for (const bool back : {false, true, false}) back ? do_cnot(b, a) : do_cnot(a, b);
        }
        break;
    }
  }
}

// The logical Pauli string `letters` as a string over stored amplitudes.
SignedString stored_string(const std::string& letters, const Frame& frame) {
  String string{0, 0};
  bool negative = false;
  int n_y = 0;
  for (std::uint32_t w = 0; w < frame.n; ++w) {
    const char letter = letters[w];
    if (letter == 'X' || letter == 'Y') {
      string.x ^= frame.column[w];
      negative ^= frame.sign[w];
    }
    if (letter == 'Z' || letter == 'Y') {
      string.z ^= frame.row[w];
      negative ^= frame.flip[w];
    }
    n_y += letter == 'Y';
  }
  negative ^= (n_y / 2) & 1;
  return {string, negative ? -1.0 : 1.0};
}

void check(const ReadoutSpec& readout, std::uint32_t n_wires) {
  if (readout.kind == ReadoutKind::expval) {
    if (readout.paulis.empty() || readout.paulis.size() != readout.n_outputs) {
      refuse("one Pauli string per output, at least one",
             std::to_string(readout.paulis.size()) + " for " + std::to_string(readout.n_outputs) + " outputs");
    }
    for (const std::string& letters : readout.paulis) {
      if (letters.size() != n_wires || letters.find_first_not_of("IXYZ") != std::string::npos) {
        refuse("Pauli strings of " + std::to_string(n_wires) + " letters from I, X, Y, Z", "'" + letters + "'");
      }
    }
  } else if (readout.kind != ReadoutKind::probs && readout.kind != ReadoutKind::state) {
    refuse("a readout of expectations, probabilities or amplitudes", std::to_string(int(readout.kind)));
  } else if (readout.n_outputs < 1 || readout.n_outputs > (Index{1} << n_wires)) {
    refuse("from 1 to " + std::to_string(Index{1} << n_wires) + " outputs", std::to_string(readout.n_outputs));
  }
}

}  // namespace

std::vector<Tree> sum_trees(const std::vector<Index>& masks, const std::vector<std::uint32_t>& items,
                            std::uint32_t n) {
  std::vector<Tree> trees;
  std::vector<std::size_t> left;
  std::uint32_t plain_sum = Tree::unused;
  for (std::size_t k = 0; k < masks.size(); ++k) {
    if (masks[k] == 0) {
      plain_sum = items[k];
    } else {
      left.push_back(k);
    }
  }
  while (!left.empty() || plain_sum != Tree::unused) {
    Tree tree;
    Span span;
    std::vector<Index> chosen;
    std::vector<std::size_t> rest;
    for (const std::size_t k : left) {
      if (span.extend(masks[k])) {
        chosen.push_back(masks[k]);
        tree.slots.push_back(items[k]);
      } else {
        rest.push_back(k);
      }
    }
    for (std::uint32_t bit = 0; bit < n; ++bit) {
      if (span.extend(Index{1} << bit)) {
        chosen.push_back(Index{1} << bit);
        tree.slots.push_back(Tree::unused);
      }
    }
    tree.slots.push_back(std::exchange(plain_sum, Tree::unused));
    const std::vector<Index> dual = dual_basis(chosen);
    tree.order.resize(Index{1} << n);
    for (Index b = 1; b < tree.order.size(); ++b) {
      tree.order[b] = tree.order[b & (b - 1)] ^ dual[std::size_t(std::countr_zero(b))];
    }
    trees.push_back(std::move(tree));
    left = std::move(rest);
  }
  return trees;
}

// Large angles are reduced before they are added up, so that a sum is as exact as the sine of each of its terms.
double Angle::value(const double* theta) const {
  constexpr double period = 4 * std::numbers::pi, period_rest = 4 * 1.2246467991473532e-16;  // pi in two doubles
  double angle = constant;
  for (const AngleTerm& term : terms) {
    double part = term.coefficient * theta[term.parameter];
    if (std::abs(part) > period) {
      const double turns = std::nearbyint(part / period);
      part = std::fma(-turns, period_rest, std::fma(-turns, period, part));
    }
    angle += part;
  }
  return angle;
}

void Angle::add(const Angle& other, double sign) {
  constant += sign * other.constant;
  for (const AngleTerm& term : other.terms) {
    const auto found = std::ranges::find(terms, term.parameter, &AngleTerm::parameter);
    if (found == terms.end()) {
      terms.push_back({term.parameter, sign * term.coefficient});
    } else {
      found->coefficient += sign * term.coefficient;
    }
  }
}

void check_circuit(std::uint32_t n_wires, std::uint32_t n_parameters, const std::vector<GateCall>& gates,
                   const ReadoutSpec& readout) {
  if (n_wires < 1 || n_wires > 16) refuse("from 1 to 16 wires", std::to_string(n_wires));
  check(readout, n_wires);
  for (const GateCall& gate : gates) check(n_wires, n_parameters, gate);
}

Plan compile(std::uint32_t n_wires, std::uint32_t n_parameters, const std::vector<GateCall>& gates,
             const ReadoutSpec& readout, bool normalize, const PlanOptions& options) {
  check_circuit(n_wires, n_parameters, gates, readout);
  for (const int radix : {options.load_radix, options.rotate_radix, options.unwind_radix}) {
    if (radix < 1 || radix > 4) refuse("passes of 1 to 4 wires", std::to_string(radix));
  }
  Plan plan;
  plan.n_wires = n_wires;
  plan.n_parameters = n_parameters;
  plan.normalize = normalize;
  plan.options = options;
  plan.readout = readout.kind;
  plan.n_outputs = readout.n_outputs;

  Frame frame(n_wires);
  for (Index i = 0; i < plan.n_amplitudes(); ++i) plan.inputs.push_back(frame.stored_index(i));
  for (const GateCall& gate : gates) apply(gate, frame, plan);
  if (readout.kind == ReadoutKind::expval) {
    Observables observables(plan);
    for (std::uint32_t k = 0; k < readout.n_outputs; ++k) {
      const SignedString string = stored_string(readout.paulis[k], frame);
      observables.add(k, string.string, string.sign);
    }
    if (options.absorb) observables.absorb_trailing();
    observables.compact();
  } else {
    if (options.absorb && readout.kind == ReadoutKind::probs) {
      while (!plan.stages.empty() && plan.stages.back().is_diagonal()) plan.stages.pop_back();
    }
    for (Index b = 0; b < readout.n_outputs; ++b) {
      plan.outputs.push_back(frame.stored_index(b));
      plan.signs.push_back(frame.sign_of(b) ? -1 : 1);
    }
  }
  lay_out_stages(plan);
  if (readout.kind == ReadoutKind::expval) lay_out_strings(plan);
  plan.layouts = make_layouts();
  return plan;
}

Operations count_operations(const Plan& plan, std::uint32_t columns) {
  check_plan(plan);
  const Layout& layout = plan.layout(0, std::min(plan.n_wires, std::uint32_t(plan.options.load_radix)));
  const double n = plan.n_amplitudes();
  const std::uint32_t first_bits = std::min(plan.n_wires, 3u);
  // Of a tree: two sums for every number; then a sum, a difference and its accumulation for every pair of every level.
  const double tree_sum = 2 * n + 3 * (n / (1u << first_bits) - 1);
  const double rotation = plan.options.tangent ? 1 : 2;
  double parts = plan.options.real ? 1 : 2;  // 2 where the state is complex
  double forward = columns, back = 0;
  for (std::size_t s = 0; s < plan.stages.size(); ++s) {
    const Stage& stage = plan.stages[s];
    const StageLayout& laid_out = layout.stages[s];
    const bool ket_ends = s > 0 && layout.stages[s - 1].kept;  // before a diagonal the adjoint has the one that was kept
    if (!stage.is_diagonal()) {
      const double turned = double(stage.rotations.size()) * n * parts;
      const bool bra_alone = laid_out.kept || s == 0;
      forward += rotation * turned;
      back += (1 + (bra_alone ? 1 : 2) * rotation) * turned;  // with the overlap
    } else if (stage.real) {
      forward += n * parts;
      back += (ket_ends ? 1 : 2) * n * parts;
    } else {
      forward += 2 * n * parts;
      back += (ket_ends ? 2 * parts : 4 + 2 * parts) * n;  // the bra, and as much of the ket as was there before
      if (!stage.trees.empty()) back += double(laid_out.trees.size()) * (n * (ket_ends ? 2 : parts) + tree_sum);
      parts = 2;
    }
  }
  double reading = 0;
  if (plan.readout == ReadoutKind::expval) {
    const double n_trees = double(plan.trees.empty() ? 0 : layout.trees.size());
    double n_products = 0;  // of two amplitudes, for every pair of indices
    for (const Pass& pass : layout.flips) n_products += pass.radix() * parts;
    for (const StageLayout& stage : layout.stages) {
      for (const Pass& pass : stage.reading) {
        n_products += double(std::ranges::count_if(pass.links, &Link::is_asked_for)) * parts;
      }
    }
    for (const Correlation& c : layout.correlations) {
      n_products += (c.vectors == 0 ? 2 : 1) * (c.imaginary ? 2 * (parts - 1) : parts);
    }
    reading = n_trees * (2 * n * (parts - 1) + tree_sum) + n_products * n / 2;  // squares are added as they are made
    back += double(layout.trees.size()) * (1 + parts) * n + n_products * n;
    return {forward + reading, forward + back + 2.0 * columns, reading};
  }
  const double outputs = plan.n_outputs * 2 * parts;  // read, and once more for the overlap of bra and ket
  return {forward + outputs, forward + 2 * outputs + back + n * parts + 2.0 * columns, 0};
}

std::string Plan::str() const {
  std::ostringstream out;
  auto print_angle = [&](const Angle& angle) {
    out << angle.constant;
    for (const AngleTerm& term : angle.terms) out << (term.coefficient < 0 ? " - " : " + ")
                                                  << std::abs(term.coefficient) << " t" << term.parameter;
  };
  auto print_mask = [&](Index mask) {
    for (std::uint32_t w = 0; w < n_wires; ++w) out << ((mask >> (n_wires - 1 - w)) & 1);
  };
  out << "plan: " << n_wires << " wires, " << n_parameters << " parameters\n";
  for (const Stage& stage : stages) {
    out << (stage.is_diagonal() ? "diagonal" : "rotate") << (stage.real ? "" : " (complex)") << "\n";
    for (const Rotation& r : stage.rotations) {
      out << "  x ", print_mask(r.x), out << "  z ", print_mask(r.z), out << "  angle ", print_angle(r.angle);
      out << "\n";
    }
    for (const Phase& p : stage.phases) {
      out << "  z ", print_mask(p.z), out << "  angle ", print_angle(p.angle), out << "\n";
    }
  }
  if (readout != ReadoutKind::expval) {
    out << (readout == ReadoutKind::probs ? "probs " : "state ") << n_outputs << "\n";
    return out.str();
  }
  out << "expval " << n_outputs << "\n";
  for (const Term& term : terms) {
    out << "  output " << term.output << (term.sign < 0 ? " -= " : " += ");
    for (const Factor& f : term.factors) {
      out << (f.sine ? "sin(" : "cos("), print_angle(absorbed[f.absorbed]), out << ") ";
    }
    out << "<x ", print_mask(strings[term.string].x), out << " z ", print_mask(strings[term.string].z), out << ">\n";
  }
  return out.str();
}

}  // namespace qaa
