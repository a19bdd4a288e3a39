// The kernels: one group of W states at a time, from rows in memory to features, and back to gradients.
//
// States are arrays of vectors, amplitude by amplitude, the real and the imaginary parts apart. A rotation is real, so
// it treats the two parts as two independent real states; only diagonals mix them, and as long as the state is real
// the second array is not touched at all.
#pragma once

#include <limits>

#include "bound.h"
#include "lanes.h"
#include "qaa.h"

namespace qaa::QAA_ISA {

constexpr int max_sums = 17;  // of a tree over at most 16 wires

// A state, or the adjoint's bra: n_amplitudes vectors each.
template <class T>
struct State {
  Vec<T>*re, *im;
};

template <class T>
struct Workspace {
  State<T> ket, bra;
  State<T> kept[Plan::max_kept];  // kets from before a stage, in the order of the stages
  Vec<T>* scratch;  // for sums and for weights of a tree: 2 * scratch_size
  Vec<T>* strings;  // values of the strings, then their weights: 2 * n_strings
  Vec<T>* columns;  // features, or their gradients: n_columns
  Wide<T>* slots;   // derivatives, lane by lane: n_slots
  mutable Prefetch soon;

  static std::size_t scratch_size(const BoundPlan<T>& p) { return p.n_amplitudes / 8 + 8; }
  static std::size_t vectors(const BoundPlan<T>& p) {
    const std::size_t states = std::size_t{2} + p.n_kept;
    return 2 * states * p.n_amplitudes + 2 * scratch_size(p) + 2 * std::size_t{p.n_strings} + p.n_columns +
           sizeof(Wide<T>) / sizeof(Vec<T>) * p.n_slots;
  }
  Workspace(const BoundPlan<T>& p, void* memory) {
    auto* next = static_cast<Vec<T>*>(memory);
    auto take = [&](std::size_t n) { return next += n, next - n; };
    ket = {take(p.n_amplitudes), take(p.n_amplitudes)};
    bra = {take(p.n_amplitudes), take(p.n_amplitudes)};
    for (std::uint32_t k = 0; k < p.n_kept; ++k) kept[k] = {take(p.n_amplitudes), take(p.n_amplitudes)};
    scratch = take(2 * scratch_size(p));
    strings = take(2 * std::size_t{p.n_strings});
    columns = take(p.n_columns);
    slots = reinterpret_cast<Wide<T>*>(next);
  }
  void add_to_slot(std::uint32_t slot, const Vec<T>& derivative, double scale) const {
    slots[slot] += widen<T>(derivative) * scale;
  }
};

// ------------------------------------------------------------------------------------------------ rows <-> lanes

// Calls put(c, block, n) for every w columns: block[k] is column c + k of the rows as lanes, for k < n, and zero for
// other k. Returns the sums of squares of the rows.
template <class T, class In, class Put>
Vec<T> load_rows(const In* data, std::int64_t stride, int n_rows, std::int64_t columns, Put put) {
  constexpr int w = width<T>;
  Vec<T> squares[2] = {};  // of the even and the odd columns, whatever the width
  std::int64_t c = 0;
  for (; c + w <= columns; c += w) {
    Vec<T> block[w];
    if (n_rows == w) {
      load_transposed<T>(data + c, stride, block);
    } else {
      for (int r = 0; r < w; ++r) block[r] = r < n_rows ? load_row<T>(data + r * stride + c) : Vec<T>{};
      transpose<T>(block);
    }
#pragma GCC unroll 16
    for (int k = 0; k < w; ++k) squares[k & 1] += block[k] * block[k];
    put(c, block, w);
  }
  if (c < columns) {
    Vec<T> block[w] = {};
    const int left = int(columns - c);
    for (int k = 0; k < left; ++k) {
      for (int r = 0; r < n_rows; ++r) block[k][r] = to_float(data[r * stride + c + k]);
      squares[k & 1] += block[k] * block[k];
    }
    put(c, block, left);
  }
  return squares[0] + squares[1];
}

// Stores what get(c, block, n) puts into block[k] for k < n: the lanes of column c + k.
template <class T, class Out, class Get>
void store_rows(Get get, std::int64_t columns, Out* data, std::int64_t stride, int n_rows) {
  constexpr int w = width<T>;
  std::int64_t c = 0;
  for (; c + w <= columns; c += w) {
    Vec<T> block[w];
    get(c, block, w);
    if (n_rows == w) {
      store_transposed<T>(block, data + c, stride);
    } else {
      transpose<T>(block);
      for (int r = 0; r < n_rows; ++r) store_row<T>(data + r * stride + c, block[r]);
    }
  }
  if (c < columns) {
    Vec<T> block[w] = {};
    const int left = int(columns - c);
    get(c, block, left);
    for (int k = 0; k < left; ++k) {
      for (int r = 0; r < n_rows; ++r) data[r * stride + c + k] = from_float<Out, T>(block[k][r]);
    }
  }
}

template <class In>
const In* data_of(const ConstMatrix& m) {
  return static_cast<const In*>(m.data);
}
template <class Out>
Out* data_of(const Matrix& m) {
  return static_cast<Out*>(m.data);
}
// Calls f(pointer to the numbers of a matrix): the one place where storage types are told apart.
template <class T, class M, class F>
auto with_data(const M& m, F&& f) {
  if constexpr (sizeof(T) == 8) {
    return f(data_of<double>(m));
  } else {
    switch (m.scalar) {
      case Scalar::float16: return f(data_of<Half>(m));
      case Scalar::bfloat16: return f(data_of<Bf16>(m));
      default: return f(data_of<float>(m));
    }
  }
}
template <class T, class Put>
Vec<T> load_matrix(const ConstMatrix& m, std::int64_t first_row, int n_rows, Put put) {
  return with_data<T>(m, [&](auto* data) {
    return load_rows<T>(data + first_row * m.row_stride, m.row_stride, n_rows, m.columns, put);
  });
}
template <class T, class Get>
void store_matrix(const Matrix& m, std::int64_t first_row, int n_rows, Get get) {
  with_data<T>(m, [&](auto* data) {
    store_rows<T>(get, m.columns, data + first_row * m.row_stride, m.row_stride, n_rows);
  });
}

// ------------------------------------------------------------------------------------------------ passes

// The amplitude at an address in bytes.
template <class V>
QAA_INLINE V& at(V* state, std::size_t address) {
  return *reinterpret_cast<V*>(reinterpret_cast<std::conditional_t<std::is_const_v<V>, const char*, char*>>(state) +
                               address);
}

// The amplitudes that a pass works on together: base xor every subset v of the masks. They are
// visited in the order of a Gray code, so that each address is the one before it xor one mask that is in a register.
template <class T, int radix>
struct Block {
  static constexpr int size = 1 << radix;
  std::size_t masks[radix];  // in bytes

  explicit Block(const Index* index_masks) {
    for (int k = 0; k < radix; ++k) masks[k] = base(index_masks[k]);
  }
  static std::size_t base(Index representative) { return std::size_t{representative} * sizeof(Vec<T>); }

  // Calls f(v, address of amplitude v in bytes).
  template <class F>
  QAA_INLINE void each(std::size_t address, F&& f) const {
    f(0, address);
#pragma GCC unroll 16
    for (int i = 1; i < size; ++i) {
      address ^= masks[__builtin_ctz(unsigned(i))];
      asm("" : "+r"(address));  // no compiler keeps them all, which would take more registers than there are
      f(i ^ (i >> 1), address);
    }
  }
  QAA_INLINE void load(const Vec<T>* state, std::size_t base, Vec<T>* block) const {
    each(base, [&](int v, std::size_t address) {
      block[v] = at(state, address);
      if constexpr (radix == 4) hold(block[v]);  // 4 % there, nothing or a loss for smaller blocks
    });
  }
  QAA_INLINE void store(Vec<T>* state, std::size_t base, const Vec<T>* block) const {
    // Addresses once more, where keeping all of them from the loads takes more registers or time than it saves.
    if constexpr (radix == 4 || sizeof(Vec<T>) == 64) asm volatile("" : "+r"(base));
    each(base, [&](int v, std::size_t address) { at(state, address) = block[v]; });
  }
};

// ------------------------------------------------------------------------------------------------ rotations

// [a; b] <- [keep -mix; mix keep] [a; b], or its transpose.
template <class T, bool tangent, bool inverse>
QAA_INLINE void rotate_pair(Vec<T>& a, Vec<T>& b, T keep, T mix) {
  const Vec<T> a0 = a, b0 = b;
  if constexpr (tangent && !inverse) {
    a = a0 - mix * b0;
    b = b0 + mix * a0;
  } else if constexpr (tangent) {
    a = a0 + mix * b0;
    b = b0 - mix * a0;
  } else if constexpr (!inverse) {
    a = keep * a0 - mix * b0;
    b = keep * b0 + mix * a0;
  } else {
    a = keep * a0 + mix * b0;
    b = keep * b0 - mix * a0;
  }
}

// The first `extra` bits of v are left alone.
template <class T, int radix, int extra, bool tangent, bool inverse>
QAA_INLINE void rotate_block(Vec<T>* block, const RotatePass<T>& pass) {
#pragma GCC unroll 4
  for (int k = 0; k < radix; ++k) {
    const int bit = 1 << (k + extra);
#pragma GCC unroll 16
    for (int v = 0; v < (1 << (radix + extra)); ++v) {
      if (!(v & bit)) rotate_pair<T, tangent, inverse>(block[v], block[v | bit], pass.keep[k], pass.mix[k]);
    }
  }
}

// The class of the pair v, v ^ (3 << k) of link k: 0 where bits k and k + 1 are equal, and the twisted string has a plus;
// 1 where not.
QAA_INLINE constexpr int link_class(int k, int v) { return ((v >> k) ^ (v >> (k + 1))) & 1; }
// Whether link k of a pass can be asked for: one that turns nothing reads the links of two separate pairs.
template <int radix, int extra>
constexpr bool has_link(int k) {
  return k + 1 < radix + extra && !(extra == 4 && k == 1);
}

template <class T, int radix, int extra>
struct LinkSums {
  Vec<T> sum[max_radix - 1][2] = {};

  QAA_INLINE void add(const Vec<T>* block) {
#pragma GCC unroll 4
    for (int k = 0; k + 1 < radix + extra; ++k) {
      if (!has_link<radix, extra>(k)) continue;
#pragma GCC unroll 16
      for (int v = 0; v < (1 << (radix + extra)); ++v) {
        if (!(v & (1 << k))) sum[k][link_class(k, v)] += block[v] * block[v ^ (3 << k)];
      }
    }
  }
  // values[s] += <state| string s |state>, in the scale that the state will have at the end of the stage.
  void add_to(Vec<T>* values, const RotatePass<T>& pass) const {
    const T twice = 2 * pass.link_scale;
    for (int k = 0; k + 1 < radix + extra; ++k) {
      if (pass.links[k].plain != Link::none) values[pass.links[k].plain] += twice * (sum[k][0] + sum[k][1]);
      if (pass.links[k].twisted != Link::none) values[pass.links[k].twisted] += twice * (sum[k][0] - sum[k][1]);
    }
  }
};

template <class T, int radix, int extra, bool tangent, bool inverse, bool link>
void rotate_pass(const RotatePass<T>& shared, Vec<T>* state, Vec<T>* values, Prefetch& shared_soon) {
  constexpr int bits = radix + extra;
  const RotatePass<T> pass = shared;  // a copy that stores to the state cannot alias
  const Block<T, bits> in(pass.masks);
  LinkSums<T, radix, extra> sums;
  Prefetch soon = shared_soon;
  for (std::uint32_t r = 0; r < pass.n_reached; ++r) {
    const std::size_t base = in.base(pass.representatives[r]);
    soon.template step<1 << bits>();
    Vec<T> block[1 << bits];
    in.load(state, base, block);
    rotate_block<T, radix, extra, tangent, inverse>(block, pass);
    if constexpr (link) sums.add(block);
    if constexpr (radix > 0) in.store(state, base, block);
  }
  shared_soon = soon;
  if constexpr (link) sums.add_to(values, pass);
}

// Undoes the rotations on ket and bra; overlaps[k] += sum over pairs of bra_b ket_a - bra_a ket_b, which is the same
// before and after (the rotations commute).
template <class T, int radix, bool tangent>
void unwind_pass(const RotatePass<T>& shared, Vec<T>* ket, Vec<T>* bra, Vec<T>* overlaps, Prefetch& shared_soon) {
  constexpr int size = 1 << radix;
  const RotatePass<T> pass = shared;
  const Block<T, radix> in(pass.masks);
  Vec<T> sum[radix][2] = {};
  Prefetch soon = shared_soon;
  for (std::uint32_t r = 0; r < pass.n_representatives; ++r) {
    const std::size_t base = in.base(pass.representatives[r]);
    soon.template step<size>();
    Vec<T> a[size], b[size];
    in.each(base, [&](int v, std::size_t address) {
      a[v] = at(ket, address);
      b[v] = at(bra, address);
    });
#pragma GCC unroll 4
    for (int k = 0; k < radix; ++k) {
#pragma GCC unroll 16
      for (int v = 0; v < size; ++v) {
        if (v & (1 << k)) continue;
        const int u = v | (1 << k);
        Vec<T>& chain = sum[k][(v >> (k == 0)) & 1];
        chain += b[u] * a[v];
        chain -= b[v] * a[u];
      }
    }
    rotate_block<T, radix, 0, tangent, true>(a, pass);
    rotate_block<T, radix, 0, tangent, true>(b, pass);
    in.each(base, [&](int v, std::size_t address) {
      at(ket, address) = a[v];
      at(bra, address) = b[v];
    });
  }
  shared_soon = soon;
  for (int k = 0; k < radix; ++k) overlaps[k] += sum[k][0] + sum[k][1];
}

// What a pass does to the bra M ket while neither state is turned.
template <class T>
struct BraTask {
  Vec<T>* overlaps = nullptr;       // overlaps[k] += the same sums as above
  const Vec<T>* weights = nullptr;  // bra += (sum over strings s of the pass's links of weights[s] string s) ket
  const Vec<T>* along = nullptr;    // bra -= along ket, after that
};

template <class T, int radix, int extra, bool overlap, bool link, bool project>
void bra_pass(const RotatePass<T>& shared, const Vec<T>* ket, Vec<T>* bra, const BraTask<T>& task,
              Prefetch& shared_soon) {
  constexpr int bits = radix + extra;
  const RotatePass<T> pass = shared;
  const Block<T, bits> in(pass.masks);
  Vec<T> sum[max_radix][2] = {}, weight[max_radix - 1][2] = {};
  for (int k = 0; link && k + 1 < bits; ++k) {
    auto of = [&](std::uint32_t string) { return string == Link::none ? Vec<T>{} : task.weights[string]; };
    const Vec<T> plain = of(pass.links[k].plain), twisted = of(pass.links[k].twisted);
    weight[k][0] = plain + twisted;
    weight[k][1] = plain - twisted;
  }
  const Vec<T> along = project ? *task.along : Vec<T>{};
  Prefetch soon = shared_soon;
  for (std::uint32_t r = 0; r < pass.n_representatives; ++r) {
    const std::size_t base = in.base(pass.representatives[r]);
    soon.template step<1 << bits>();
    Vec<T> a[1 << bits];
    in.load(ket, base, a);
    in.each(base, [&](int v, std::size_t address) {
      Vec<T> b = at(bra, address);
      if constexpr (link) {
#pragma GCC unroll 4
        for (int k = 0; k + 1 < bits; ++k) {
          if (has_link<radix, extra>(k)) b += weight[k][link_class(k, v)] * a[v ^ (3 << k)];
        }
      }
      if constexpr (overlap) {
#pragma GCC unroll 4
        for (int k = 0; k < radix; ++k) {
          const int bit = 1 << (k + extra), lower = v & ~bit;
          Vec<T>& chain = sum[k][(lower >> (k + extra == 0)) & 1];
          chain = v == lower ? chain - b * a[v ^ bit] : chain + b * a[v ^ bit];
        }
      }
      if constexpr (project) b -= along * a[v];
      if constexpr (link || project) at(bra, address) = b;
    });
  }
  shared_soon = soon;
  for (int k = 0; overlap && k < radix; ++k) task.overlaps[k] += sum[k][0] + sum[k][1];
}

// Calls f with the pass's radix as a compile-time constant.
template <class F>
QAA_INLINE void with_radix(std::uint32_t radix, F&& f) {
  switch (radix) {
    case 1: return f(Constant<1>{});
    case 2: return f(Constant<2>{});
    case 3: return f(Constant<3>{});
    case 4: return f(Constant<4>{});
  }
  __builtin_unreachable();
}

// Calls f with two truths as compile-time constants.
template <class F>
QAA_INLINE void with_flags(bool a, bool b, F&& f) {
  if (a) {
    b ? f(Constant<true>{}, Constant<true>{}) : f(Constant<true>{}, Constant<false>{});
  } else {
    b ? f(Constant<false>{}, Constant<true>{}) : f(Constant<false>{}, Constant<false>{});
  }
}

// Calls f with radix and extra as compile-time constants.
template <class T, class F>
QAA_INLINE void with_shape(const RotatePass<T>& pass, F&& f) {
  if (pass.radix == 0) return pass.extra == 4 ? f(Constant<0>{}, Constant<4>{}) : f(Constant<0>{}, Constant<2>{});
  if (pass.extra == 0) return with_radix(pass.radix, [&](auto radix) { f(radix, Constant<0>{}); });
  switch (pass.radix) {
    case 1: return f(Constant<1>{}, Constant<1>{});
    case 2: return f(Constant<2>{}, Constant<1>{});
    case 3: return f(Constant<3>{}, Constant<1>{});
  }
  __builtin_unreachable();
}

// Adds the strings of the pass's links to `values`.
template <class T>
void rotate(const RotatePass<T>& pass, Vec<T>* state, Vec<T>* values, Prefetch& soon) {
  with_shape(pass, [&](auto radix, auto extra) {
    with_flags(pass.tangent, pass.links != nullptr, [&](auto tangent, auto link) {
      rotate_pass<T, radix.value, extra.value, tangent.value, false, link.value>(pass, state, values, soon);
    });
  });
}
template <class T>
void rotate_inverse(const RotatePass<T>& pass, Vec<T>* state, Prefetch& soon) {
  with_shape(pass, [&](auto radix, auto extra) {
    if constexpr (radix.value > 0) {
      with_flags(pass.tangent, false, [&](auto tangent, auto) {
        rotate_pass<T, radix.value, extra.value, tangent.value, true, false>(pass, state, nullptr, soon);
      });
    }
  });
}
template <class T>
void unwind(const RotatePass<T>& pass, Vec<T>* ket, Vec<T>* bra, Vec<T>* overlaps, Prefetch& soon) {
  with_radix(pass.radix, [&](auto radix) {
    if (pass.tangent) {
      unwind_pass<T, radix.value, true>(pass, ket, bra, overlaps, soon);
    } else {
      unwind_pass<T, radix.value, false>(pass, ket, bra, overlaps, soon);
    }
  });
}
template <class T>
void work_on_bra(const RotatePass<T>& pass, const Vec<T>* ket, Vec<T>* bra, const BraTask<T>& task, Prefetch& soon) {
  with_shape(pass, [&](auto radix, auto extra) {
    with_flags(task.weights != nullptr, task.along != nullptr, [&](auto link, auto project) {
      if (radix.value > 0 && task.overlaps != nullptr) {
        bra_pass<T, radix.value, extra.value, (radix.value > 0), link.value, project.value>(pass, ket, bra, task, soon);
      } else if constexpr (link.value && !project.value) {
        bra_pass<T, radix.value, extra.value, false, true, false>(pass, ket, bra, task, soon);
      }
    });
  });
}

// ------------------------------------------------------------------------------------------------ embedding

template <class T>
struct Norms {
  Vec<T> squared;  // of the vector that was embedded
  Vec<T> rescale;  // the power of two that the row was multiplied by, against overflow and underflow
};

// sum over i of a[i] b[i], in four chains.
template <class T>
Vec<T> dot(const Vec<T>* a, const Vec<T>* b, Index n) {
  Vec<T> sum[4] = {};
  Index i = 0;
  for (; i + 4 <= n; i += 4) {
    for (int k = 0; k < 4; ++k) sum[k] += a[i + k] * b[i + k];
  }
  for (; i < n; ++i) sum[0] += a[i] * b[i];
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// How the pass on the lowest bits of the columns is done: while columns are in registers, or on the stored state.
template <class T>
bool fits_registers(const RotatePass<T>& low) {
  return (1 << low.radix) == width<T>;
}
enum class Turn { none, keep, tangent };
template <Turn turn, bool inverse, class T>
QAA_INLINE void turn_columns(Vec<T>* block, const RotatePass<T>& low) {
  if constexpr (turn != Turn::none) {
    rotate_block<T, __builtin_ctz(unsigned(width<T>)), 0, turn == Turn::tangent, inverse>(block, low);
  }
}
// Calls f(Constant<turn>) for the rotations that can be done in registers.
template <class T, class F>
auto with_turn(const RotatePass<T>* low, F&& f) {
  if (low == nullptr || !fits_registers(*low)) return f(Constant<Turn::none>{});
  return low->tangent ? f(Constant<Turn::tangent>{}) : f(Constant<Turn::keep>{});
}

// Loads rows, pads them with zeros to 2^n_wires amplitudes and computes their norms. The state is left unnormalized:
// the circuit is linear, so the readout divides. Rotations of the lowest bits are done on the way, and the strings of
// their links are added to `values`.
template <class T>
Norms<T> embed(const BoundPlan<T>& p, const ConstMatrix& x, std::int64_t first_row, int n_rows, State<T> ket,
               Vec<T>* values, Prefetch& soon) {
  constexpr int w = width<T>;
  const RotatePass<T>* low = p.starts_low ? &p.stages[0].rotate[0] : nullptr;
  LinkSums<T, __builtin_ctz(unsigned(w)), 0> sums;
  auto load = [&]<Turn turn, bool link>(Constant<turn>, Constant<link>) {
    const Index* inputs = p.inputs;
    Vec<T>* re = ket.re;
    const RotatePass<T> pass = turn == Turn::none ? RotatePass<T>{} : *low;
    LinkSums<T, __builtin_ctz(unsigned(w)), 0> here;  // of its own, which nothing else refers to: it stays in registers
    const Vec<T> squared = load_matrix<T>(x, first_row, n_rows, [=, &here](std::int64_t c, Vec<T>* block, int n) {
      turn_columns<turn, false>(block, pass);
      if constexpr (link) here.add(block);
      if (turn != Turn::none) n = w;  // zeros are turned into more than zeros never, but columns into each other
#pragma GCC unroll 16
      for (int k = 0; k < n; ++k) re[inputs[c + k]] = block[k];
    });
    sums = here;
    return squared;
  };
  bool turned = low != nullptr && fits_registers(*low);
  const bool link = turned && low->links != nullptr;
  const Vec<T> squared = with_turn(low, [&]<Turn turn>(Constant<turn>) {
    return link && turn != Turn::none ? load(Constant<turn>{}, Constant<turn != Turn::none>{})
                                      : load(Constant<turn>{}, Constant<false>{});
  });
  const Index loaded = turned ? (Index(x.columns) + w - 1) / w * w : Index(x.columns);
  auto pad = [&](Index first) {
    for (Index i = first; i < p.n_amplitudes; ++i) ket.re[p.inputs[i]] = Vec<T>{};
  };
  pad(loaded);
  if (!p.starts_real) {
    for (Index i = 0; i < p.n_amplitudes; ++i) ket.im[i] = Vec<T>{};
  }
  Norms<T> norms{squared, splat<T>(1)};
  // Squares of amplitudes are up to 1 / min_scale^2 (bound.cpp) times as large as those of the row.
  constexpr T tiny = sizeof(T) == 8 ? T(1e-250) : T(1e-24), huge = sizeof(T) == 8 ? T(1e280) : T(1e20);
  bool extreme[w] = {}, any = false;
  for (int l = 0; p.normalize && l < n_rows; ++l) any |= extreme[l] = squared[l] > huge || squared[l] < tiny;
  if (any) {
    if (turned) {
      load(Constant<Turn::none>{}, Constant<false>{});
      pad(Index(x.columns));
      turned = false;
    }
    Vec<T> largest{};
    for (Index i = 0; i < p.n_amplitudes; ++i) {
      const Vec<T> a = ket.re[i] < 0 ? -ket.re[i] : ket.re[i];
      largest = a > largest ? a : largest;
    }
    for (int l = 0; l < n_rows; ++l) {
      const T a = largest[l];
      if (!extreme[l] || !(a > 0) || a > std::numeric_limits<T>::max()) continue;  // zero, NaN, infinity: no rescue
      int exponent = 0;
      __builtin_frexp(double(a), &exponent);
      constexpr int limit = sizeof(T) == 8 ? 1020 : 126;
      exponent = exponent > limit ? limit : exponent < -limit ? -limit : exponent;
      norms.rescale[l] = T(__builtin_ldexp(1.0, -exponent));
    }
    for (Index i = 0; i < p.n_amplitudes; ++i) ket.re[i] *= norms.rescale;
    const Vec<T> rescaled = dot<T>(ket.re, ket.re, p.n_amplitudes);
    norms.squared = norms.rescale == splat<T>(1) ? squared : rescaled;
  }
  if (low != nullptr && !turned) rotate<T>(*low, ket.re, values, soon);
  if (link && turned) sums.add_to(values, *low);
  return norms;
}

// 1 / squared norm, or 1 / norm for the state itself; zero for a zero row; one where nothing is normalized.
template <class T>
Vec<T> inverse_norm(const BoundPlan<T>& p, const Norms<T>& norms) {
  if (!p.normalize) return splat<T>(1);
  Vec<T> out{};
  for (int l = 0; l < width<T>; ++l) {
    const T s = norms.squared[l];
    out[l] = s == 0 ? T(0) : T(1) / (p.readout == ReadoutKind::state ? T(__builtin_sqrt(double(s))) : s);
  }
  return out;
}

// ------------------------------------------------------------------------------------------------ signed sums

// Sums over one block of a tree: sums[k] += sum of (-1)^(bit k of v) value[v]; returns the plain sum.
template <class T, int bits>
QAA_INLINE Vec<T> sum_block(Vec<T>* value, Vec<T>* sums) {
#pragma GCC unroll 3
  for (int k = 0; k < bits; ++k) {
    Vec<T> difference{};
#pragma GCC unroll 4
    for (int v = 0; v < (1 << (bits - 1 - k)); ++v) {
      const Vec<T> even = value[2 * v], odd = value[2 * v + 1];
      difference = v == 0 ? even - odd : difference + (even - odd);
      value[v] = even + odd;
    }
    sums[k] += difference;
  }
  return value[0];
}

// One more level: totals[b] becomes the sum over block b of totals.
template <class T, int bits>
void sum_level(Index n_blocks, Vec<T>* totals, Vec<T>* sums) {
  Vec<T> sum[bits] = {};
  for (Index b = 0; b < n_blocks; ++b) {
    Vec<T> block[1 << bits];
#pragma GCC unroll 8
    for (int v = 0; v < (1 << bits); ++v) block[v] = totals[(b << bits) | Index(v)];
    totals[b] = sum_block<T, bits>(block, sum);
  }
  for (int k = 0; k < bits; ++k) sums[k] = sum[k];
}

// The first level: sums[k] = sum over b of (-1)^(bit k of b) value(b) for the lowest bits, and the sums over each block
// of them as totals. Signs are taken every so many blocks only: a number is added twice and subtracted never.
template <class T, int bits, class Value>
void first_level(const Index* order, Index n_blocks, Value&& value, Vec<T>* totals, Vec<T>* sums) {
  constexpr Index blocks_per_sum = 64;
  Index masks[bits];
  for (int k = 0; k < bits; ++k) masks[k] = order[Index{1} << k];
  const Block<T, bits> in(masks);
  Vec<T> sum[bits] = {};
  for (Index first = 0; first < n_blocks; first += blocks_per_sum) {
    const Index last = first + blocks_per_sum < n_blocks ? first + blocks_per_sum : n_blocks;
    Vec<T> marginal[1 << bits] = {};
    for (Index b = first; b < last; ++b) {
      Vec<T> total[2] = {};
      in.each(in.base(order[b << bits]), [&](int v, std::size_t address) {
        const Vec<T> x = value(b, v, address);
        marginal[v] += x;
        total[v & 1] += x;
      });
      totals[b] = total[0] + total[1];
    }
    sum_block<T, bits>(marginal, sum);
  }
  for (int k = 0; k < bits; ++k) sums[k] = sum[k];
}

// sums[j] = sum over b of (-1)^(bit j of b) value of amplitude order[b], for all n bits; sums[n] = the plain sum. The
// caller's value(block, v, address in bytes) is the value for b = 8 block + v.
template <class T, class Value>
void tree_sums(std::uint32_t n, const Index* order, Value&& value, Vec<T>* scratch, Vec<T>* sums) {
  std::uint32_t done = n < 3 ? n : 3;
  switch (done) {
    case 1: first_level<T, 1>(order, 1, value, scratch, sums); break;
    case 2: first_level<T, 2>(order, 1, value, scratch, sums); break;
    default: first_level<T, 3>(order, Index{1} << (n - 3), value, scratch, sums); break;
  }
  while (done < n) {
    const std::uint32_t bits = n - done < 3 ? n - done : 3;
    const Index n_blocks = Index{1} << (n - done - bits);
    switch (bits) {
      case 1: sum_level<T, 1>(n_blocks, scratch, sums + done); break;
      case 2: sum_level<T, 2>(n_blocks, scratch, sums + done); break;
      default: sum_level<T, 3>(n_blocks, scratch, sums + done); break;
    }
    done += bits;
  }
  sums[n] = scratch[0];
}

// weight(block, v) = weights[n] + sum over j of (-1)^(bit j of b) weights[j] for b = 8 block + v: the transpose of
// tree_sums.
template <class T>
struct TreeWeights {
  Vec<T> lower[8];  // all combinations of the lowest bits
  Vec<T>* upper;    // and of the others

  TreeWeights(std::uint32_t n, const Vec<T>* weights, Vec<T>* scratch) : upper(scratch) {
    const std::uint32_t low = n < 3 ? n : 3;
    lower[0] = Vec<T>{};
    upper[0] = weights[n];
    double_up(lower, weights, low);
    double_up(upper, weights + low, n - low);
    for (std::uint32_t v = 1u << low; v < 8; ++v) lower[v] = Vec<T>{};
  }
  QAA_INLINE Vec<T> operator()(Index block, int v) const { return upper[block] + lower[v]; }

 private:
  static void double_up(Vec<T>* sums, const Vec<T>* weights, std::uint32_t bits) {
    for (std::uint32_t j = 0; j < bits; ++j) {
      const Index half = Index{1} << j;
      for (Index b = 0; b < half; ++b) {
        sums[b | half] = sums[b] - weights[j];
        sums[b] += weights[j];
      }
    }
  }
};

// ------------------------------------------------------------------------------------------------ diagonals

// Multiplies by a stage's table or by that of the other direction; the state is complex before it or not.
template <class T>
void multiply_diagonal(const T* table_re, const T* table_im, bool real, bool from_complex, Index n, State<T> s) {
  if (real) {
    for (Index i = 0; i < n; ++i) s.re[i] *= table_re[i];
    if (from_complex) {
      for (Index i = 0; i < n; ++i) s.im[i] *= table_re[i];
    }
  } else if (!from_complex) {
    for (Index i = 0; i < n; ++i) {
      const Vec<T> re = s.re[i];
      s.re[i] = re * table_re[i];
      s.im[i] = re * table_im[i];
    }
  } else {
    for (Index i = 0; i < n; ++i) {
      const Vec<T> re = s.re[i], im = s.im[i];
      s.re[i] = re * table_re[i] - im * table_im[i];
      s.im[i] = re * table_im[i] + im * table_re[i];
    }
  }
}

// Undoes a diagonal on ket and bra and adds the derivatives with respect to its phases to `slots`. Where the state
// was real before the diagonal, only the real parts are kept: nothing upstream depends on the bra's imaginary part.
template <class T>
void unwind_diagonal(const BoundPlan<T>& p, const BoundStage<T>& stage, const Workspace<T>& work) {
  const State<T> ket = work.ket, bra = work.bra;
  const bool was_complex = stage.from_complex;
  if (stage.real) {
    for (Index i = 0; i < p.n_amplitudes; ++i) {
      ket.re[i] *= stage.back_re[i];
      bra.re[i] *= stage.back_re[i];
    }
    if (was_complex) {
      for (Index i = 0; i < p.n_amplitudes; ++i) {
        ket.im[i] *= stage.back_re[i];
        bra.im[i] *= stage.back_re[i];
      }
    }
    return;  // a real diagonal has no angles
  }
  // 2 Im(conj(bra) ket) after undoing; the pair's common scale has been paid by then.
  auto undo = [&](Index, int, std::size_t address) -> Vec<T> {
    const T re = stage.back_re[address / sizeof(Vec<T>)], im = stage.back_im[address / sizeof(Vec<T>)];
    const Vec<T> kr = at(ket.re, address), ki = at(ket.im, address);
    const Vec<T> br = at(bra.re, address), bi = at(bra.im, address);
    const Vec<T> new_kr = kr * re - ki * im, new_br = br * re - bi * im, new_bi = br * im + bi * re;
    at(ket.re, address) = new_kr;
    at(bra.re, address) = new_br;
    if (!was_complex) return -new_bi * new_kr;
    const Vec<T> new_ki = kr * im + ki * re;
    at(ket.im, address) = new_ki;
    at(bra.im, address) = new_bi;
    return new_br * new_ki - new_bi * new_kr;
  };
  if (stage.n_trees == 0) {
    for (Index i = 0; i < p.n_amplitudes; ++i) undo(0, 0, i * sizeof(Vec<T>));
    return;
  }
  auto add_sums = [&](const SumTree& tree, const Vec<T>* sums, double scale) {
    for (std::uint32_t j = 0; j <= p.n_wires; ++j) {
      if (tree.slots[j] != Tree::unused) work.add_to_slot(stage.first_slot + tree.slots[j], sums[j], scale);
    }
  };
  Vec<T> sums[max_sums];
  if (stage.n_trees == 1) {
    tree_sums<T>(p.n_wires, stage.trees[0].order, undo, work.scratch, sums);
    add_sums(stage.trees[0], sums, 1);
    return;
  }
  // More masks than wires: the overlaps first, where every tree can read them.
  for (std::uint32_t t = 0; t < stage.n_trees; ++t) {
    const Index* order = stage.trees[t].order;
    const bool last = t + 1 == stage.n_trees;
    if (!last) {
      tree_sums<T>(p.n_wires, order, [&](Index, int, std::size_t address) {
        return at(bra.re, address) * at(ket.im, address) - at(bra.im, address) * at(ket.re, address);
      }, work.scratch, sums);
    } else {
      tree_sums<T>(p.n_wires, order, undo, work.scratch, sums);
    }
    add_sums(stage.trees[t], sums, last ? 1 : stage.overlap_scale);
  }
}

// ------------------------------------------------------------------------------------------------ observables

// values[k] += <state| flip by mask k |state>; with `apply` also bra += sum over k of weights[k] (state flipped by
// mask k).
template <class T, int radix, bool apply>
void flip_pass(const FlipPass& shared, const Vec<T>* state, Vec<T>* values, const Vec<T>* weights,
               Vec<T>* bra, Prefetch& shared_soon) {
  const FlipPass pass = shared;
  const Block<T, radix> in(pass.masks);
  Vec<T> sum[radix][2] = {}, weight[radix];  // two chains each: one would wait for its own last result
  for (int k = 0; apply && k < radix; ++k) weight[k] = weights[pass.first + k];
  Prefetch soon = shared_soon;
  for (std::uint32_t r = 0; r < pass.n_representatives; ++r) {
    const std::size_t base = in.base(pass.representatives[r]);
    soon.template step<1 << radix>();
    Vec<T> block[1 << radix];
    in.load(state, base, block);
#pragma GCC unroll 4
    for (int k = 0; k < radix; ++k) {
#pragma GCC unroll 16
      for (int v = 0; v < (1 << radix); ++v) {
        if (!(v & (1 << k))) sum[k][(v >> (k == 0)) & 1] += block[v] * block[v | (1 << k)];
      }
    }
    if constexpr (apply) {
      in.each(base, [&](int v, std::size_t address) {
        Vec<T> out = at(bra, address);
#pragma GCC unroll 4
        for (int k = 0; k < radix; ++k) out += weight[k] * block[v ^ (1 << k)];
        at(bra, address) = out;
      });
    }
  }
  shared_soon = soon;
  for (int k = 0; k < radix; ++k) values[pass.first + k] += 2 * (sum[k][0] + sum[k][1]);
}
template <class T, bool apply>
void flip(const FlipPass& pass, const Vec<T>* state, Vec<T>* values, const Vec<T>* weights, Vec<T>* bra,
          Prefetch& soon) {
  with_radix(pass.radix,
             [&](auto radix) { flip_pass<T, radix.value, apply>(pass, state, values, weights, bra, soon); });
}

// The same for any strings with one x: values = 2 Re(conj(a_i) a_j) or 2 Im(conj(a_i) a_j), summed with signs.
template <class T, bool imaginary, bool complex, bool apply>
void correlation_pass(const CorrelationPass& c, Index n, State<T> ket, Vec<T>* values, const Vec<T>* weights,
                      State<T> bra) {
  constexpr int most_classes = 1 << Correlation::max_bits;
  const Index n_classes = Index{1} << c.n_bits, pairs = (n / 2) >> c.n_bits;
  Vec<T> sums[most_classes], weight[most_classes] = {};
  auto sign = [&](Index of_class, std::uint32_t m) {
    return T(__builtin_parity(of_class & c.members[m].mask) ? -1 : 1);
  };
  for (Index of_class = 0; of_class < n_classes; ++of_class) {
    for (std::uint32_t m = 0; apply && m < c.n_members; ++m) {
      weight[of_class] += sign(of_class, m) * weights[c.members[m].string];
    }
    const Vec<T> w = weight[of_class];
    const Index* order = c.order + of_class * pairs;
    auto add_pair = [&](Index i, Vec<T>& sum) {
      const Index j = i ^ c.x;
      const Vec<T> re_i = ket.re[i], re_j = ket.re[j], im_i = complex ? ket.im[i] : Vec<T>{},
                   im_j = complex ? ket.im[j] : Vec<T>{};
      sum += re_i * (imaginary ? im_j : re_j);
      if constexpr (complex) sum += imaginary ? -im_i * re_j : im_i * im_j;
      if constexpr (apply && imaginary) {
        bra.re[i] += w * im_j;
        bra.im[i] -= w * re_j;
        bra.re[j] -= w * im_i;
        bra.im[j] += w * re_i;
      } else if constexpr (apply) {
        bra.re[i] += w * re_j;
        bra.re[j] += w * re_i;
        if constexpr (complex) {
          bra.im[i] += w * im_j;
          bra.im[j] += w * im_i;
        }
      }
    };
    Vec<T> sum[4] = {};
    Index k = 0;
    for (; k + 4 <= pairs; k += 4) {
      for (int chain = 0; chain < 4; ++chain) add_pair(order[k + chain], sum[chain]);
    }
    for (; k < pairs; ++k) add_pair(order[k], sum[0]);
    sums[of_class] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  }
  for (std::uint32_t m = 0; m < c.n_members; ++m) {
    Vec<T> value{};
    for (Index of_class = 0; of_class < n_classes; ++of_class) value += sign(of_class, m) * sums[of_class];
    values[c.members[m].string] = 2 * value;
  }
}
template <class T, bool apply>
void correlation(const CorrelationPass& c, Index n, bool complex, State<T> ket, Vec<T>* values, const Vec<T>* weights,
                 State<T> bra) {
  if (!complex && !c.imaginary) return correlation_pass<T, false, false, apply>(c, n, ket, values, weights, bra);
  if (!complex) return;  // zero
  if (c.imaginary) return correlation_pass<T, true, true, apply>(c, n, ket, values, weights, bra);
  correlation_pass<T, false, true, apply>(c, n, ket, values, weights, bra);
}

// work.strings[s] = <stored ket| string s |stored ket>; with `apply` also bra = (sum over s of weights[s] string s)
// ket. Either without the strings of links.
template <class T, bool apply>
void measure_strings(const BoundPlan<T>& p, bool complex, const Vec<T>* weights, const Workspace<T>& work) {
  Vec<T>* values = work.strings;
  const State<T> ket = work.ket, bra = work.bra;
  for (std::uint32_t t = 0; t < p.n_trees; ++t) {
    const SumTree& tree = p.trees[t];
    Vec<T> sums[max_sums], tree_weight[max_sums];
    for (std::uint32_t j = 0; apply && j <= p.n_wires; ++j) {
      tree_weight[j] = tree.slots[j] != Tree::unused ? weights[tree.slots[j]] : Vec<T>{};
    }
    auto measure = [&](auto is_complex, auto first, auto&& weight) {
      tree_sums<T>(p.n_wires, tree.order, [&](Index block, int v, std::size_t address) {
        const Vec<T> re = at(ket.re, address), im = is_complex.value ? at(ket.im, address) : Vec<T>{};
        if constexpr (apply) {
          const Vec<T> w = weight(block, v);
          Vec<T>&to_re = at(bra.re, address), &to_im = at(bra.im, address);
          to_re = first.value ? w * re : to_re + w * re;
          if constexpr (is_complex.value) to_im = first.value ? w * im : to_im + w * im;
        }
        if constexpr (is_complex.value) return re * re + im * im;
        return re * re;
      }, work.scratch, sums);
    };
    with_flags(complex, t == 0, [&](auto is_complex, auto first) {
      if constexpr (apply) {
        measure(is_complex, first, TreeWeights<T>(p.n_wires, tree_weight, work.scratch + work.scratch_size(p)));
      } else {
        measure(is_complex, first, 0);
      }
    });
    for (std::uint32_t j = 0; j <= p.n_wires; ++j) {
      if (tree.slots[j] != Tree::unused) values[tree.slots[j]] = sums[j];
    }
  }
  if (apply && p.n_trees == 0) {
    for (Index i = 0; i < p.n_amplitudes; ++i) bra.re[i] = Vec<T>{};
    for (Index i = 0; complex && i < p.n_amplitudes; ++i) bra.im[i] = Vec<T>{};
  }
  for (std::uint32_t f = 0; f < p.n_flips; ++f) {
    flip<T, apply>(p.flips[f], ket.re, values, weights, bra.re, work.soon);
    if (complex) flip<T, apply>(p.flips[f], ket.im, values, weights, bra.im, work.soon);
  }
  for (std::uint32_t c = 0; c < p.n_correlations; ++c) {
    correlation<T, apply>(p.correlations[c], p.n_amplitudes, complex, ket, values, weights, bra);
  }
}

// ------------------------------------------------------------------------------------------------ groups

// Loads rows and runs all stages on them, which reads the strings of links. Keeps the ket where the adjoint will want
// it.
template <bool keep, class T>
Norms<T> run_stages(const BoundPlan<T>& p, const ConstMatrix& x, std::int64_t first_row, int n_rows,
                    const Workspace<T>& work) {
  const State<T> ket = work.ket;
  Prefetch& soon = work.soon;
  Vec<T>* values = work.strings;
  for (std::uint32_t s = 0; s < p.n_strings; ++s) values[s] = Vec<T>{};
  const Norms<T> norms = embed<T>(p, x, first_row, n_rows, ket, values, soon);
  const State<T>* kept = work.kept;
  for (std::uint32_t s = 0; s < p.n_stages; ++s) {
    const BoundStage<T>& stage = p.stages[s];
    if (keep && stage.kept) {
      for (Index i = 0; i < p.n_amplitudes; ++i) kept->re[i] = stage.keep * ket.re[i];
      for (Index i = 0; stage.from_complex && i < p.n_amplitudes; ++i) kept->im[i] = stage.keep * ket.im[i];
      ++kept;
    }
    if (stage.diagonal) {
      multiply_diagonal<T>(stage.re, stage.im, stage.real, stage.from_complex, p.n_amplitudes, ket);
      continue;
    }
    const std::uint32_t first = s == 0 && p.starts_low, n_complex = stage.from_complex ? stage.n_rotate : 0;
    for (std::uint32_t k = first; k < stage.n_rotate; ++k) rotate<T>(stage.rotate[k], ket.re, values, soon);
    for (std::uint32_t k = 0; k < n_complex; ++k) rotate<T>(stage.rotate[k], ket.im, values, soon);
  }
  return norms;
}

template <class T>
void forward_group(const BoundPlan<T>& p, const ForwardCall& call, std::int64_t first_row, int n_rows,
                   const Workspace<T>& work) {
  const Norms<T> norms = run_stages<false>(p, call.x, first_row, n_rows, work);
  const bool complex = p.ends_complex;
  const Vec<T> inverse = inverse_norm<T>(p, norms);
  const State<T> ket = work.ket;
  Vec<T>* columns = work.columns;
  if (p.readout == ReadoutKind::expval) {
    measure_strings<T, false>(p, complex, nullptr, work);
    for (std::uint32_t k = 0; k < p.n_outputs; ++k) columns[k] = Vec<T>{};
    for (std::uint32_t t = 0; t < p.n_terms; ++t) {
      columns[p.terms[t].output] += p.terms[t].coefficient * work.strings[p.terms[t].string];
    }
    const Vec<T> scale = inverse * (p.scale * p.scale);
    for (std::uint32_t k = 0; k < p.n_outputs; ++k) columns[k] *= scale;
  } else if (p.readout == ReadoutKind::probs) {
    const Vec<T> scale = inverse * (p.scale * p.scale);
    for (std::uint32_t k = 0; k < p.n_outputs; ++k) {
      const Index i = p.outputs[k];
      Vec<T> square = ket.re[i] * ket.re[i];
      if (complex) square += ket.im[i] * ket.im[i];
      columns[k] = square * scale;
    }
  } else {
    const Vec<T> scale = inverse * p.scale;
    for (std::uint32_t k = 0; k < p.n_outputs; ++k) {
      const Vec<T> signed_scale = p.signs[k] < 0 ? -scale : scale;
      columns[2 * k] = ket.re[p.outputs[k]] * signed_scale;
      columns[2 * k + 1] = complex ? ket.im[p.outputs[k]] * signed_scale : Vec<T>{};
    }
  }
  store_matrix<T>(call.features, first_row, n_rows, [=](std::int64_t c, Vec<T>* block, int n) {
    for (int k = 0; k < n; ++k) block[k] = columns[c + k];
  });
}

template <class T>
void clear(const BoundPlan<T>& p, bool complex, State<T> s) {
  for (Index i = 0; i < p.n_amplitudes; ++i) s.re[i] = Vec<T>{};
  for (Index i = 0; complex && i < p.n_amplitudes; ++i) s.im[i] = Vec<T>{};
}

// The bra of the readout "state": the incoming gradient itself, in the ket's scale.
template <class T>
void start_linear_bra(const BoundPlan<T>& p, const Workspace<T>& work) {
  const State<T> bra = work.bra;
  const Vec<T>* grad = work.columns;
  clear<T>(p, p.ends_complex, bra);
  for (std::uint32_t k = 0; k < p.n_outputs; ++k) {
    const T scale = p.signs[k] / p.scale;
    bra.re[p.outputs[k]] = grad[2 * k] * scale;
    if (p.ends_complex) bra.im[p.outputs[k]] = grad[2 * k + 1] * scale;
  }
}

// bra += (sum over the strings s of links of weights[s] string s) ket.
template <class T>
void apply_links(const BoundPlan<T>& p, const Workspace<T>& work) {
  const BoundStage<T>& last = p.stages[p.n_stages - 1];
  const BraTask<T> task{nullptr, work.strings + p.n_strings, nullptr};
  for (std::uint32_t k = 0; !last.diagonal && k < last.n_rotate; ++k) {
    if (last.rotate[k].links == nullptr) continue;
    work_on_bra<T>(last.rotate[k], work.ket.re, work.bra.re, task, work.soon);
    if (p.ends_complex) work_on_bra<T>(last.rotate[k], work.ket.im, work.bra.im, task, work.soon);
  }
}

// The bra M ket, in the ket's scale, where M is the readout weighted by the incoming gradient. Returns Re<bra|ket>,
// which the adjoint does not change.
template <class T>
Vec<T> start_bra(const BoundPlan<T>& p, const Workspace<T>& work) {
  const State<T> ket = work.ket, bra = work.bra;
  const bool complex = p.ends_complex;
  const Vec<T>* grad = work.columns;
  Vec<T> overlap{};
  if (p.readout == ReadoutKind::expval) {
    const Vec<T>* values = work.strings;
    Vec<T>* weights = work.strings + p.n_strings;
    for (std::uint32_t s = 0; s < p.n_strings; ++s) weights[s] = Vec<T>{};
    for (std::uint32_t t = 0; t < p.n_terms; ++t) {
      weights[p.terms[t].string] += p.terms[t].coefficient * grad[p.terms[t].output];
    }
    measure_strings<T, true>(p, complex, weights, work);
    if (p.n_stages > 1) apply_links(p, work);  // otherwise with the overlaps
    const double scale = double(p.scale) * double(p.scale);
    for (std::uint32_t t = 0; t < p.n_terms; ++t) {
      const BoundTerm<T>& term = p.terms[t];
      const Vec<T> product = grad[term.output] * values[term.string];
      overlap += term.coefficient * product;
      if (term.varies) work.add_to_slot(p.first_term_slot + t, product, scale);
    }
    return overlap;
  }
  if (p.readout == ReadoutKind::state) {
    start_linear_bra<T>(p, work);
  } else {
    clear<T>(p, complex, bra);
  }
  for (std::uint32_t k = 0; k < p.n_outputs; ++k) {
    const Index i = p.outputs[k];
    if (p.readout == ReadoutKind::probs) {
      bra.re[i] = grad[k] * ket.re[i];
      if (complex) bra.im[i] = grad[k] * ket.im[i];
    }
    overlap += bra.re[i] * ket.re[i];
    if (complex) overlap += bra.im[i] * ket.im[i];
  }
  return overlap;
}

// Undoes rotations on the bra alone, the last pass first, down to pass `first`.
template <class T>
void rotate_back(const BoundStage<T>& stage, std::uint32_t first, const Workspace<T>& work) {
  for (std::uint32_t k = stage.n_unwind; k-- > first;) {
    rotate_inverse<T>(stage.unwind[k], work.bra.re, work.soon);
    if (stage.from_complex) rotate_inverse<T>(stage.unwind[k], work.bra.im, work.soon);
  }
}

// Undoes the first stage on the bra, if it is one of rotations, and stores factor * bra as the gradient of the rows.
template <class T>
void store_gradient(const BoundPlan<T>& p, const Matrix& grad_x, std::int64_t first_row, int n_rows,
                    const Vec<T>& factor, const Workspace<T>& work) {
  const RotatePass<T>* low = p.starts_low ? &p.stages[0].unwind[0] : nullptr;
  if (p.n_stages > 0 && !p.stages[0].diagonal) {
    rotate_back<T>(p.stages[0], low != nullptr && fits_registers(*low), work);
  }
  with_turn(low, [&]<Turn turn>(Constant<turn>) {
    const Index* inputs = p.inputs;
    const Vec<T>* bra = work.bra.re;
    const RotatePass<T> pass = turn == Turn::none ? RotatePass<T>{} : *low;
    store_matrix<T>(grad_x, first_row, n_rows, [=](std::int64_t c, Vec<T>* block, int n) {
      if (turn != Turn::none) n = width<T>;
#pragma GCC unroll 16
      for (int k = 0; k < n; ++k) block[k] = bra[inputs[c + k]];
      turn_columns<turn, true>(block, pass);
#pragma GCC unroll 16
      for (int k = 0; k < n; ++k) block[k] *= factor;
    });
  });
}

template <class T>
void backward_group(const BoundPlan<T>& p, const BackwardCall& call, std::int64_t first_row, int n_rows,
                    Workspace<T> work) {
  const Norms<T> norms = run_stages<true>(p, call.x, first_row, n_rows, work);
  const Vec<T> inverse = inverse_norm<T>(p, norms);
  Vec<T>* columns = work.columns;
  load_matrix<T>(call.grad, first_row, n_rows,
                 [=](std::int64_t c, const Vec<T>* block, int n) {
                   for (int k = 0; k < n; ++k) columns[c + k] = block[k] * inverse;
                 });
  const Vec<T> overlap = start_bra<T>(p, work);

  // d/dx of q(x) / |x|^2, or of phi(x) / |x|: what lies along x drops out, which is what lies along the ket.
  Vec<T> along{};
  const bool project = p.normalize && call.grad_x.data != nullptr;
  for (int l = 0; project && l < width<T>; ++l) {
    along[l] = norms.squared[l] == 0 ? T(0) : overlap[l] * (p.scale * p.scale) / norms.squared[l];
  }

  std::uint32_t n_kept = p.n_kept;
  for (std::uint32_t s = p.n_stages; s-- > 0;) {
    const BoundStage<T>& stage = p.stages[s];
    if (stage.diagonal) {
      unwind_diagonal<T>(p, stage, work);
      continue;
    }
    if (stage.kept) {
      rotate_back<T>(stage, 0, work);
      work.ket = work.kept[--n_kept];
    }
    // Of the first stage the bra is not yet turned back: nothing before it asks for the ket. There the last pass comes
    // first, since a pass may hold a rotation of the pass before it, whose overlaps want the links of both.
    const bool at_start = s == 0, undo = !stage.kept && !at_start;
    for (std::uint32_t n = 0; n < stage.n_unwind; ++n) {
      const std::uint32_t k = undo ? n : stage.n_unwind - 1 - n;
      const RotatePass<T>& pass = stage.unwind[k];
      Vec<T> overlaps[max_radix] = {};
      const bool links = p.n_stages == 1 && pass.links != nullptr;
      BraTask<T> task{overlaps, links ? work.strings + p.n_strings : nullptr,
                      at_start && k == 0 && project ? &along : nullptr};
      if (undo) {
        unwind<T>(pass, work.ket.re, work.bra.re, overlaps, work.soon);
        if (stage.from_complex) unwind<T>(pass, work.ket.im, work.bra.im, overlaps, work.soon);
      } else {
        work_on_bra<T>(pass, work.ket.re, work.bra.re, task, work.soon);
        task.along = nullptr;
        if (stage.from_complex) work_on_bra<T>(pass, work.ket.im, work.bra.im, task, work.soon);
      }
      for (std::uint32_t r = 0; r < pass.radix; ++r) {
        work.add_to_slot(pass.first_slot + r, overlaps[r], pass.overlap_scale);
      }
    }
  }
  if (call.grad_x.data == nullptr) return;

  if (project && (p.n_stages == 0 || p.stages[0].diagonal)) {
    for (Index i = 0; i < p.n_amplitudes; ++i) work.bra.re[i] -= along * work.ket.re[i];
  }
  const T twice = p.readout == ReadoutKind::state ? T(1) : T(2);
  store_gradient<T>(p, call.grad_x, first_row, n_rows, norms.rescale * (p.unwound_scale * twice), work);
}

// grad_x alone, of the readout "state" without normalization: the adjoint of a linear map does not need the rows.
template <class T>
void backward_linear_group(const BoundPlan<T>& p, const BackwardCall& call, std::int64_t first_row, int n_rows,
                           const Workspace<T>& work) {
  Vec<T>* columns = work.columns;
  const State<T> bra = work.bra;
  load_matrix<T>(call.grad, first_row, n_rows, [=](std::int64_t c, const Vec<T>* block, int n) {
    for (int k = 0; k < n; ++k) columns[c + k] = block[k];
  });
  start_linear_bra<T>(p, work);
  for (std::uint32_t s = p.n_stages; s-- > 0;) {
    const BoundStage<T>& stage = p.stages[s];
    if (stage.diagonal) {
      // Where the state was real before, the imaginary part that comes out is not looked at again.
      const bool complex = stage.from_complex || !stage.real;
      multiply_diagonal<T>(stage.back_re, stage.back_im, stage.real, complex, p.n_amplitudes, bra);
      continue;
    }
    if (s > 0) rotate_back<T>(stage, 0, work);
  }
  store_gradient<T>(p, call.grad_x, first_row, n_rows, splat(p.unwound_scale), work);
}

}  // namespace qaa::QAA_ISA
