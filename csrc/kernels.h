// The kernels: one group of rows at a time, from numbers in memory to features, and back to gradients.
//
// A state is an array of vectors (layout.h), the real and the imaginary parts apart. A rotation is real, so it treats
// the two parts as two independent real states; only diagonals mix them, and as long as the state is real the second
// array is not touched at all. A number that belongs to a row is the same in all its lanes, 2^lane_bits neighbours.
#pragma once

#include <limits>
#include <utility>

#include "bound.h"
#include "lanes.h"
#include "qaa.h"

namespace qaa::QAA_ISA {

constexpr int max_sums = 17;  // of a tree over at most 16 bits
template <class T>
constexpr int all_lane_bits = __builtin_ctz(unsigned(width<T>));

// A state, or the adjoint's bra: n_vectors each.
template <class T>
struct State {
  Vec<T>*re, *im;
};

template <class T>
struct Workspace {
  State<T> ket, bra;
  State<T> kept[Layout::max_kept];  // kets from before a stage, in the order of the stages
  Vec<T>* scratch;  // for sums and for weights of a tree: 2 * scratch_size
  Vec<T>* strings;  // values of the strings, lane by lane without the lanes' signs, then their weights: 2 * n_strings
  Vec<T>* gathers;  // weights of gathers: n_gather_weights
  Vec<T>* columns;  // features, or their gradients: n_columns
  Wide<T>* slots;   // derivatives, lane by lane: n_slots
  mutable Prefetch soon;

  // Between the arrays of states, which the same index would otherwise find in one set of a cache.
  static constexpr std::size_t gap = 9 * 64 / sizeof(Vec<T>);

  static std::size_t scratch_size(const BoundPlan<T>& p) { return p.n_vectors / 8 + 8; }
  static std::size_t vectors(const BoundPlan<T>& p) {
    const std::size_t states = std::size_t{2} + p.n_kept;
    return 2 * states * (p.n_vectors + gap) + 2 * scratch_size(p) + 2 * std::size_t{p.n_strings} +
           p.n_gather_weights + p.n_columns + sizeof(Wide<T>) / sizeof(Vec<T>) * p.n_slots;
  }
  Workspace(const BoundPlan<T>& p, void* memory) {
    auto* next = static_cast<Vec<T>*>(memory);
    auto take = [&](std::size_t n) { return next += n, next - n; };
    auto take_state = [&] {
      Vec<T>* const re = take(p.n_vectors + gap);
      return State<T>{re, take(p.n_vectors + gap)};
    };
    ket = take_state();
    bra = take_state();
    for (std::uint32_t k = 0; k < p.n_kept; ++k) kept[k] = take_state();
    scratch = take(2 * scratch_size(p));
    strings = take(2 * std::size_t{p.n_strings});
    gathers = take(p.n_gather_weights);
    columns = take(p.n_columns);
    slots = reinterpret_cast<Wide<T>*>(next);
  }
  void add_to_slot(std::uint32_t slot, const Vec<T>& derivative, double scale) const {
    slots[slot] += widen<T>(derivative) * scale;
  }
};

// Calls f(Constant<bits>) for the lane bits of a plan.
template <class T, class F>
QAA_INLINE auto with_lane_bits(std::uint32_t bits, F&& f) {
  if constexpr (all_lane_bits<T> >= 4) {
    if (bits == 4) return f(Constant<4>{});
  }
  if constexpr (all_lane_bits<T> >= 3) {
    if (bits == 3) return f(Constant<3>{});
  }
  if constexpr (all_lane_bits<T> >= 2) {
    if (bits == 2) return f(Constant<2>{});
  }
  return bits == 1 ? f(Constant<1>{}) : f(Constant<0>{});
}

// In every lane the sum over its row's lanes.
template <class T>
QAA_INLINE Vec<T> row_sum(Vec<T> values, std::uint32_t lane_bits) {
  for (std::uint32_t j = 0; j < lane_bits; ++j) values += shuffle<T>(values, flipped<T>(1u << j));
  return values;
}

// ------------------------------------------------------------------------------------------------ rows <-> vectors

// Calls put(v, block, n) for every W columns: block[k] is vector v + k of the columns, for k < n, and zero for other k.
// Returns, lane by lane, the sums of squares.
template <class T, int bits, class In, class Put>
Vec<T> load_rows(const In* data, std::int64_t stride, int n_rows, std::int64_t columns, Put put) {
  constexpr int w = width<T>, size = w >> bits;
  Vec<T> squares[2] = {};
  std::int64_t c = 0;
  for (; c + w <= columns; c += w) {
    Vec<T> block[size];
    if (bits == 0 && n_rows == w) {
      load_transposed<T>(data + c, stride, block);
    } else {
#pragma GCC unroll 16
      for (int r = 0; r < size; ++r) block[r] = r < n_rows ? load_row<T>(data + r * stride + c) : Vec<T>{};
      gather_rows<bits, T>(block);
    }
#pragma GCC unroll 16
    for (int k = 0; k < size; ++k) squares[k & 1] += block[k] * block[k];
    put(Index(c >> bits), block, size);
  }
  if (c < columns) {
    Vec<T> block[size] = {};
    const int left = int(columns - c), n = (left + (1 << bits) - 1) >> bits;
    for (int k = 0; k < left; ++k) {
      for (int r = 0; r < n_rows; ++r) {
        block[k >> bits][(r << bits) | (k & ((1 << bits) - 1))] = to_float(data[r * stride + c + k]);
      }
    }
    for (int k = 0; k < n; ++k) squares[k & 1] += block[k] * block[k];
    put(Index(c >> bits), block, n);
  }
  return squares[0] + squares[1];
}

// Stores what get(v, block, n) puts into block[k] for k < n: vector v + k of the columns.
template <class T, int bits, class Out, class Get>
void store_rows(Get get, std::int64_t columns, Out* data, std::int64_t stride, int n_rows) {
  constexpr int w = width<T>, size = w >> bits;
  std::int64_t c = 0;
  for (; c + w <= columns; c += w) {
    Vec<T> block[size];
    get(Index(c >> bits), block, size);
    if (bits == 0 && n_rows == w) {
      store_transposed<T>(block, data + c, stride);
    } else {
      gather_rows<bits, T>(block);
      for (int r = 0; r < n_rows; ++r) store_row<T>(data + r * stride + c, block[r]);
    }
  }
  if (c < columns) {
    Vec<T> block[size] = {};
    const int left = int(columns - c);
    get(Index(c >> bits), block, (left + (1 << bits) - 1) >> bits);
    for (int k = 0; k < left; ++k) {
      for (int r = 0; r < n_rows; ++r) {
        data[r * stride + c + k] = from_float<Out, T>(block[k >> bits][(r << bits) | (k & ((1 << bits) - 1))]);
      }
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
template <class T, int bits, class Put>
Vec<T> load_matrix(const ConstMatrix& m, std::int64_t first_row, int n_rows, Put put) {
  return with_data<T>(m, [&](auto* data) {
    return load_rows<T, bits>(data + first_row * m.row_stride, m.row_stride, n_rows, m.columns, put);
  });
}
template <class T, int bits, class Get>
void store_matrix(const Matrix& m, std::int64_t first_row, int n_rows, Get get) {
  with_data<T>(m, [&](auto* data) {
    store_rows<T, bits>(get, m.columns, data + first_row * m.row_stride, m.row_stride, n_rows);
  });
}

// Matrices of one number for every row and column, where numbers are the same in all lanes of a row.
template <class T>
void load_columns(const BoundPlan<T>& p, const ConstMatrix& m, std::int64_t first_row, int n_rows, const Vec<T>& factor,
                  Vec<T>* columns) {
  if (p.lane_bits == 0) {
    load_matrix<T, 0>(m, first_row, n_rows, [=](Index c, const Vec<T>* block, int n) {
      for (int k = 0; k < n; ++k) columns[c + k] = block[k] * factor;
    });
    return;
  }
  with_data<T>(m, [&](auto* data) {
    for (std::int64_t c = 0; c < m.columns; ++c) {
      Vec<T> column{};
      for (int l = 0; l < n_rows << p.lane_bits; ++l) {
        column[l] = to_float(data[(first_row + (l >> p.lane_bits)) * m.row_stride + c]);
      }
      columns[c] = column * factor;
    }
  });
}
template <class T>
void store_columns(const BoundPlan<T>& p, const Vec<T>* columns, const Matrix& m, std::int64_t first_row, int n_rows) {
  if (p.lane_bits == 0) {
    return store_matrix<T, 0>(m, first_row, n_rows, [=](Index c, Vec<T>* block, int n) {
      for (int k = 0; k < n; ++k) block[k] = columns[c + k];
    });
  }
  with_data<T>(m, [&]<class Out>(Out* data) {
    for (int r = 0; r < n_rows; ++r) {
      Out* row = data + (first_row + r) * m.row_stride;
      for (std::int64_t c = 0; c < m.columns; ++c) row[c] = from_float<Out, T>(columns[c][r << p.lane_bits]);
    }
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

// [a; b] <- [keep -mix; mix keep] [a; b], or its transpose; with one multiply-add instead of two where `apart`.
template <class T, bool tangent, bool inverse, bool apart>
QAA_INLINE void rotate_pair(Vec<T>& a, Vec<T>& b, T keep, T mix) {
  const Vec<T> a0 = a, b0 = b;
  if constexpr (tangent) {
    // A sum that is not folded, as zero may have a sign: the product then has a vector of its own, which compilers read
    // from memory, where every register is taken.
    const Vec<T> mixed = apart ? product(mix + Vec<T>{}, a0) : mix * a0;
    a = inverse ? a0 + mix * b0 : a0 - mix * b0;
    b = inverse ? b0 - mixed : b0 + mixed;
  } else if constexpr (!inverse) {
    a = keep * a0 - mix * b0;
    b = keep * b0 + mix * a0;
  } else {
    a = keep * a0 + mix * b0;
    b = keep * b0 - mix * a0;
  }
}

// Whether a pass over blocks of 2^bits amplitudes turns pairs so; it loses a few per cent where it should not. Rows
// are turned alike wherever that is done, or what is in one row would change how its neighbours are rounded.
template <int bits, bool link>
constexpr bool turns_apart = bits > 2 && !link;

// The first `extra` bits of v are left alone.
template <class T, int radix, int extra, bool tangent, bool inverse, bool apart = false>
QAA_INLINE void rotate_block(Vec<T>* block, const RotatePass<T>& pass) {
#pragma GCC unroll 4
  for (int k = 0; k < radix; ++k) {
    const int bit = 1 << (k + extra);
#pragma GCC unroll 16
    for (int v = 0; v < (1 << (radix + extra)); ++v) {
      if (!(v & bit)) rotate_pair<T, tangent, inverse, apart>(block[v], block[v | bit], pass.keep[k], pass.mix[k]);
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

// From one array to another, or in place.
template <class T, int radix, int extra, bool tangent, bool inverse, bool link>
void rotate_pass(const RotatePass<T>& shared, const Vec<T>* from, Vec<T>* to, Vec<T>* values, Prefetch& shared_soon) {
  constexpr int bits = radix + extra;
  const RotatePass<T> pass = shared;  // a copy that stores to the state cannot alias
  const Block<T, bits> in(pass.masks);
  LinkSums<T, radix, extra> sums;
  Prefetch soon = shared_soon;
  for (std::uint32_t r = 0; r < pass.n_reached; ++r) {
    const std::size_t base = in.base(pass.representatives[r]);
    soon.template step<1 << bits>();
    Vec<T> block[1 << bits];
    in.load(from, base, block);
    rotate_block<T, radix, extra, tangent, inverse, turns_apart<bits, link>>(block, pass);
    if constexpr (link) sums.add(block);
    if constexpr (radix > 0) in.store(to, base, block);
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
};

// Amplitudes of a block of the ket that a pass over two states keeps in registers: of sixteen half, where there are no
// more than sixteen registers.
#if defined(__AVX512F__) || defined(__aarch64__)
template <int bits>
constexpr int held_bits = bits;
#else
template <int bits>
constexpr int held_bits = bits == 4 ? 3 : bits;
#endif

template <class T, int radix, int extra, bool overlap, bool link>
void bra_pass(const RotatePass<T>& shared, const Vec<T>* ket, Vec<T>* bra, const BraTask<T>& task,
              Prefetch& shared_soon) {
  constexpr int bits = radix + extra, held = held_bits<bits>, n_chains = held < bits ? 1 : 2;
  const RotatePass<T> pass = shared;
  const Block<T, held> in(pass.masks);
  const std::size_t across = in.base(pass.masks[bits - 1]), diagonal = across ^ in.masks[held - 1];
  Vec<T> sum[max_radix][n_chains] = {}, weight[max_radix - 1][2] = {};
  for (int k = 0; link && k + 1 < bits; ++k) {
    auto of = [&](std::uint32_t string) { return string == Link::none ? Vec<T>{} : task.weights[string]; };
    const Vec<T> plain = of(pass.links[k].plain), twisted = of(pass.links[k].twisted);
    weight[k][0] = plain + twisted;
    weight[k][1] = plain - twisted;
  }
  Prefetch soon = shared_soon;
  auto work = [&]<int first>(std::size_t base, Constant<first>) {
    soon.template step<1 << held>();
    Vec<T> a[1 << held];
    in.load(ket, base, a);
    in.each(base, [&](int part, std::size_t address) {
      const int v = first + part;
      auto flipped = [&](int mask) {  // the ket's amplitude v ^ mask
        if ((mask >> held) == 0) return a[part ^ mask];
        return at(ket, address ^ (mask == 1 << held ? across : diagonal));
      };
      Vec<T> b = at(bra, address);
      if constexpr (link) {
#pragma GCC unroll 4
        for (int k = 0; k + 1 < bits; ++k) {
          const Vec<T> from = flipped(3 << k);
          // A product and a sum beside the store of b.
          b += k == 0 ? product(weight[0][link_class(0, v)], from) : weight[k][link_class(k, v)] * from;
        }
      }
      if constexpr (overlap) {
#pragma GCC unroll 4
        for (int k = 0; k < radix; ++k) {
          const int bit = 1 << (k + extra), lower = v & ~bit;
          Vec<T>& chain = sum[k][(lower >> (k + extra == 0)) & (n_chains - 1)];
          chain = v == lower ? chain - b * flipped(bit) : chain + b * flipped(bit);
        }
      }
      if constexpr (link) at(bra, address) = b;
    });
  };
  for (std::uint32_t r = 0; r < pass.n_representatives; ++r) {
    const std::size_t base = in.base(pass.representatives[r]);
    work(base, Constant<0>{});
    if constexpr (held < bits) work(base ^ across, Constant<1 << held>{});
  }
  shared_soon = soon;
  for (int k = 0; overlap && k < radix; ++k) {
    for (int chain = 0; chain < n_chains; ++chain) task.overlaps[k] += sum[k][chain];
  }
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
void rotate(const RotatePass<T>& pass, const Vec<T>* from, Vec<T>* to, Vec<T>* values, Prefetch& soon) {
  with_shape(pass, [&](auto radix, auto extra) {
    with_flags(pass.tangent, pass.links != nullptr, [&](auto tangent, auto link) {
      rotate_pass<T, radix.value, extra.value, tangent.value, false, link.value>(pass, from, to, values, soon);
    });
  });
}
template <class T>
void rotate_inverse(const RotatePass<T>& pass, Vec<T>* state, Prefetch& soon) {
  with_shape(pass, [&](auto radix, auto extra) {
    if constexpr (radix.value > 0) {
      with_flags(pass.tangent, false, [&](auto tangent, auto) {
        rotate_pass<T, radix.value, extra.value, tangent.value, true, false>(pass, state, state, nullptr, soon);
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
    if constexpr (radix.value > 0) {
      with_flags(task.overlaps != nullptr, task.weights != nullptr, [&](auto overlap, auto link) {
        if constexpr (overlap.value || link.value) {
          bra_pass<T, radix.value, extra.value, overlap.value, link.value>(pass, ket, bra, task, soon);
        }
      });
    }
  });
}

// ------------------------------------------------------------------------------------------------ lanes

// Rotations on the lowest `bits` lane bits of a vector.
template <class T, int bits, bool tangent, bool inverse>
struct LaneTurn {
  Vec<T> keep[bits > 0 ? bits : 1], mix[bits > 0 ? bits : 1];

  explicit LaneTurn(const LanePass<T>& pass) {
#pragma GCC unroll 4
    for (int k = 0; k < bits; ++k) {
      keep[k] = splat(pass.keep[k]);
      mix[k] = lane_signs<T>(1u << k) * (inverse ? pass.mix[k] : -pass.mix[k]);
    }
  }
  template <int k>
  QAA_INLINE void turn(Vec<T>& v, const Vec<T>& flipped) const {
    v = tangent ? v + mix[k] * flipped : keep[k] * v + mix[k] * flipped;
  }
  QAA_INLINE void operator()(Vec<T>& v) const {
    each([&]<int k>(Constant<k>) { turn<k>(v, flip<1 << k, T>(v)); });
  }
  template <class F>
  QAA_INLINE static void each(F&& f) {
    [&]<int... k>(std::integer_sequence<int, k...>) { (f(Constant<k>{}), ...); }(std::make_integer_sequence<int, bits>{});
  }
};

// Calls f with the number of lane bits and whether cosines are owed as compile-time constants; not at all where no lane
// is turned.
template <class T, class F>
QAA_INLINE void with_lanes(const LanePass<T>& pass, F&& f) {
  auto call = [&]<int bits>(Constant<bits>) {
    if (pass.n_bits != bits) return;
    pass.tangent ? f(Constant<bits>{}, Constant<true>{}) : f(Constant<bits>{}, Constant<false>{});
  };
  [&]<int... k>(std::integer_sequence<int, k...>) {
    (call(Constant<k + 1>{}), ...);
  }(std::make_integer_sequence<int, all_lane_bits<T>>{});
}

template <bool inverse, class T>
void turn_lanes(const LanePass<T>& pass, Index n, Vec<T>* state) {
  with_lanes<T>(pass, [&]<int bits, bool tangent>(Constant<bits>, Constant<tangent>) {
    const LaneTurn<T, bits, tangent, inverse> turn(pass);
    for (Index v = 0; v < n; ++v) {
      Vec<T> here = state[v];
      turn(here);
      state[v] = here;
    }
  });
}

// Overlaps of the rotations on lanes; with `undo` these are undone on ket and bra.
template <bool undo, class T>
void overlap_lanes(const LanePass<T>& pass, Index n, Vec<T>* ket, Vec<T>* bra, Vec<T>* overlaps) {
  with_lanes<T>(pass, [&]<int bits, bool tangent>(Constant<bits>, Constant<tangent>) {
    const LaneTurn<T, bits, tangent, true> turn(pass);
    Vec<T> sum[bits] = {};
    for (Index v = 0; v < n; ++v) {
      Vec<T> a = ket[v], b = bra[v];
      turn.each([&]<int k>(Constant<k>) {
        const Vec<T> flipped = flip<1 << k, T>(a);
        sum[k] -= b * flipped;
        if constexpr (undo) {
          turn.template turn<k>(a, flipped);
          turn.template turn<k>(b, flip<1 << k, T>(b));
        }
      });
      if constexpr (undo) {
        ket[v] = a;
        bra[v] = b;
      }
    }
    for (int k = 0; k < bits; ++k) overlaps[k] += sum[k];
  });
}

// Integers of 32 bits as lanes.
template <class T>
QAA_INLINE Integers<T> load_lanes(const std::uint32_t* from) {
  Integers<T> out;
  for (int l = 0; l < width<T>; ++l) out[l] = std::int32_t(from[l]);
  return out;
}

// A change of coordinates, or the way back.
template <bool back, class T>
void apply_move(const Move& move, Index n, Vec<T>* state) {
  if (move.vectors == 0) {
    const Integers<T> from = load_lanes<T>(back ? move.back_from.data() : move.from.data());
    const std::uint32_t* shift = back ? move.back_shift.data() : move.shift.data();
    for (Index v = 0; v < n; ++v) state[v] = shuffle<T>(state[v], from ^ std::int32_t(shift[v]));
    return;
  }
  const Integers<T> stays = lane_signs<T>(move.lanes) > 0;
  const Index across = move.vectors, low = across & (~across + 1);
  for (Index high = 0; high < n; high += 2 * low) {
    for (Index v = high; v < high + low; ++v) {
      const Vec<T> a = state[v], b = state[v ^ across];
      state[v] = stays ? a : b;
      state[v ^ across] = stays ? b : a;
    }
  }
}
template <class T>
void move_to(const BoundStage<T>& stage, Index n, Vec<T>* state) {
  for (std::uint32_t k = 0; k < stage.n_moves; ++k) apply_move<false, T>(stage.moves[k], n, state);
}
template <class T>
void move_back(const BoundStage<T>& stage, Index n, Vec<T>* state) {
  for (std::uint32_t k = stage.n_moves; k-- > 0;) apply_move<true, T>(stage.moves[k], n, state);
}

// ------------------------------------------------------------------------------------------------ embedding

template <class T>
struct Norms {
  Vec<T> squared;  // of the vector that was embedded
  Vec<T> rescale;  // the power of two that the row was multiplied by, against overflow and underflow
};

// sum over i of a[i] b[i], in four chains, lane by lane.
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

// Whether the rotations of the columns' lowest bits are done while these are in registers, as W columns of every row:
// those on lanes, and those between vectors as a pass of their own.
template <class T>
bool fits_registers(const BoundPlan<T>& p, const LanePass<T>& lanes, const RotatePass<T>* low) {
  const std::uint32_t between = all_lane_bits<T> - p.lane_bits;
  return p.loads_lanes && (p.lane_bits == 0 || (lanes.n_bits == p.lane_bits && lanes.tangent)) &&
         (between == 0 || (p.starts_low && low->radix == between && low->tangent));
}

// Rotations of the columns' lowest bits on a block of W columns.
template <class T, int bits, bool on, bool inverse, bool link>
struct ColumnTurn {
  static constexpr int between = all_lane_bits<T> - bits;
  LaneTurn<T, bits, true, inverse> lanes;
  RotatePass<T> low;

  ColumnTurn(const LanePass<T>& lane_pass, const RotatePass<T>* low_pass)
      : lanes(lane_pass), low(on && between > 0 ? *low_pass : RotatePass<T>{}) {}
  QAA_INLINE void operator()(Vec<T>* block) const {
    if constexpr (on) {
      if constexpr (bits > 0) {
#pragma GCC unroll 16
        for (int k = 0; k < (1 << between); ++k) lanes(block[k]);
      }
      if constexpr (between > 0) rotate_block<T, between, 0, true, inverse, turns_apart<between, link>>(block, low);
    }
  }
};

// Loads rows, pads them with zeros to 2^n_wires amplitudes and computes their norms. The state is left unnormalized:
// the circuit is linear, so the readout divides. Rotations of the lowest bits are done on the way where they fit, and the
// strings of their links are added to `values`.
template <class T, int bits>
Norms<T> embed(const BoundPlan<T>& p, const ConstMatrix& x, std::int64_t first_row, int n_rows, State<T> ket,
               Vec<T>* values, Prefetch& soon) {
  constexpr int w = width<T>, between = all_lane_bits<T> - bits;
  const RotatePass<T>* low = p.starts_low ? &p.stages[0].rotate[0] : nullptr;
  LinkSums<T, between, 0> sums;
  auto load = [&]<bool turn, bool link>(Constant<turn>, Constant<link>) {
    const Index* inputs = p.inputs;
    Vec<T>* re = ket.re;
    const ColumnTurn<T, bits, turn, false, link> turned(p.n_stages > 0 ? p.stages[0].lanes : LanePass<T>{}, low);
    LinkSums<T, between, 0> here;  // of its own, which nothing else refers to: it stays in registers
    const Vec<T> squared = load_matrix<T, bits>(x, first_row, n_rows, [=, &here](Index v, Vec<T>* block, int n) {
      turned(block);
      if constexpr (link) here.add(block);
      if (turn) n = w >> bits;  // zeros are turned into more than zeros never, but columns into each other
#pragma GCC unroll 16
      for (int k = 0; k < n; ++k) re[inputs[v + k]] = block[k];
    });
    sums = here;
    return squared;
  };
  bool turned = p.n_stages > 0 && fits_registers(p, p.stages[0].lanes, low);
  const bool link = turned && low != nullptr && low->links != nullptr;
  const Vec<T> squares = link     ? load(Constant<true>{}, Constant<true>{})
                         : turned ? load(Constant<true>{}, Constant<false>{})
                                  : load(Constant<false>{}, Constant<false>{});
  const Vec<T> squared = row_sum<T>(squares, bits);
  const Index per_vector = Index{1} << bits, loaded = turned ? (Index(x.columns) + w - 1) / w * w : Index(x.columns);
  auto pad = [&](Index columns) {
    for (Index v = (columns + per_vector - 1) / per_vector; v < p.n_vectors; ++v) ket.re[p.inputs[v]] = Vec<T>{};
  };
  pad(loaded);
  if (!p.starts_real) {
    for (Index v = 0; v < p.n_vectors; ++v) ket.im[v] = Vec<T>{};
  }
  Norms<T> norms{squared, splat<T>(1)};
  // Squares of amplitudes are up to 1 / min_scale^2 (bound.cpp) times as large as those of the row.
  constexpr T tiny = sizeof(T) == 8 ? T(1e-250) : T(1e-24), huge = sizeof(T) == 8 ? T(1e280) : T(1e20);
  bool extreme[w] = {}, any = false;
  const int n_lanes = n_rows << bits;
  for (int l = 0; p.normalize && l < n_lanes; ++l) any |= extreme[l] = squared[l] > huge || squared[l] < tiny;
  if (any) {
    if (turned) {
      load(Constant<false>{}, Constant<false>{});
      pad(Index(x.columns));
      turned = false;
    }
    Vec<T> largest{};
    for (Index v = 0; v < p.n_vectors; ++v) {
      const Vec<T> a = ket.re[v] < 0 ? -ket.re[v] : ket.re[v];
      largest = a > largest ? a : largest;
    }
    for (int j = 0; j < bits; ++j) {
      const Vec<T> other = shuffle<T>(largest, flipped<T>(1u << j));
      largest = other > largest ? other : largest;
    }
    for (int l = 0; l < n_lanes; ++l) {
      const T a = largest[l];
      if (!extreme[l] || !(a > 0) || a > std::numeric_limits<T>::max()) continue;  // zero, NaN, infinity: no rescue
      int exponent = 0;
      __builtin_frexp(double(a), &exponent);
      constexpr int limit = sizeof(T) == 8 ? 1020 : 126;
      exponent = exponent > limit ? limit : exponent < -limit ? -limit : exponent;
      norms.rescale[l] = T(__builtin_ldexp(1.0, -exponent));
    }
    for (Index v = 0; v < p.n_vectors; ++v) ket.re[v] *= norms.rescale;
    const Vec<T> rescaled = row_sum<T>(dot<T>(ket.re, ket.re, p.n_vectors), bits);
    norms.squared = norms.rescale == splat<T>(1) ? squared : rescaled;
  }
  if (p.n_stages > 0 && p.loads_lanes && !turned) {
    turn_lanes<false, T>(p.stages[0].lanes, p.n_vectors, ket.re);
    if (low != nullptr) rotate<T>(*low, ket.re, ket.re, values, soon);
  }
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

// Calls f(block, number of blocks) for a tree over n bits, whose blocks hold its lowest three bits or all that there are:
// block b starts at order[b << bits of a block].
template <class T, class F>
QAA_INLINE void with_tree_blocks(std::uint32_t n, const Index* order, F&& f) {
  auto call = [&]<int bits>(Constant<bits>) {
    Index masks[bits + 1] = {};
    for (int k = 0; k < bits; ++k) masks[k] = order[Index{1} << k];
    f(Block<T, bits>(masks), Index{1} << (n - bits));
  };
  switch (n) {
    case 0: return call(Constant<0>{});
    case 1: return call(Constant<1>{});
    case 2: return call(Constant<2>{});
    default: return call(Constant<3>{});
  }
}

// sums[j] = sum over b of (-1)^(bit j of b) value of amplitude order[b], for all n bits; sums[n] = the plain sum. The
// caller's value(block, v, address in bytes) is the value for b = 8 block + v.
template <class T, class Value>
void tree_sums(std::uint32_t n, const Index* order, Value&& value, Vec<T>* scratch, Vec<T>* sums) {
  std::uint32_t done = n < 3 ? n : 3;
  switch (done) {
    case 0: scratch[0] = value(0, 0, 0); break;
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
template <class T, int bits>
void multiply_diagonal(const T* table_re, const T* table_im, bool real, bool from_complex, Index n, State<T> s) {
  auto entry = [](const T* table, Index v) { return load_repeated<T, bits>(table + (std::size_t{v} << bits)); };
  if (real) {
    for (Index v = 0; v < n; ++v) s.re[v] *= entry(table_re, v);
    for (Index v = 0; from_complex && v < n; ++v) s.im[v] *= entry(table_re, v);
  } else if (!from_complex) {
    for (Index v = 0; v < n; ++v) {
      const Vec<T> re = s.re[v];
      s.re[v] = re * entry(table_re, v);
      s.im[v] = re * entry(table_im, v);
    }
  } else {
    for (Index v = 0; v < n; ++v) {
      const Vec<T> re = s.re[v], im = s.im[v], c = entry(table_re, v), d = entry(table_im, v);
      s.re[v] = re * c - im * d;
      s.im[v] = re * d + im * c;
    }
  }
}

// Undoes a diagonal on the bra, and with `both` on the ket, and adds the derivatives with respect to its phases to
// `slots`. Where the state was real before the diagonal, only the real parts are kept: nothing upstream depends on the
// bra's imaginary part.
template <class T, int bits, bool both>
void unwind_diagonal(const BoundPlan<T>& p, const BoundStage<T>& stage, const Workspace<T>& work) {
  const State<T> ket = work.ket, bra = work.bra;
  const bool was_complex = stage.from_complex;
  if (stage.real) {  // a real diagonal has no angles
    if (both) multiply_diagonal<T, bits>(stage.back_re, stage.back_im, true, was_complex, p.n_vectors, ket);
    multiply_diagonal<T, bits>(stage.back_re, stage.back_im, true, was_complex, p.n_vectors, bra);
    return;
  }
  // 2 Im(conj(bra) ket), which is the same before and after but for the pair's scale: that has been paid afterwards.
  auto overlap = [](const Vec<T>& br, const Vec<T>& bi, const Vec<T>& kr, const Vec<T>& ki) {
    return br * ki - bi * kr;
  };
  auto undo = [&](Index, int, std::size_t address) -> Vec<T> {
    const std::size_t entry = (address / sizeof(Vec<T>)) << bits;
    const Vec<T> re = load_repeated<T, bits>(stage.back_re + entry), im = load_repeated<T, bits>(stage.back_im + entry);
    const Vec<T> kr = at(ket.re, address), ki = at(ket.im, address);
    const Vec<T> br = at(bra.re, address), bi = at(bra.im, address);
    const Vec<T> new_br = br * re - bi * im, new_bi = br * im + bi * re;
    at(bra.re, address) = new_br;
    if (was_complex) at(bra.im, address) = new_bi;
    if constexpr (!both) return overlap(br, bi, kr, ki);
    const Vec<T> new_kr = kr * re - ki * im;
    at(ket.re, address) = new_kr;
    if (!was_complex) return -new_bi * new_kr;
    const Vec<T> new_ki = kr * im + ki * re;
    at(ket.im, address) = new_ki;
    return overlap(new_br, new_bi, new_kr, new_ki);
  };
  if (stage.n_trees == 0) {
    for (Index v = 0; v < p.n_vectors; ++v) undo(0, 0, v * sizeof(Vec<T>));
    return;
  }
  // More masks than fit into one tree: the overlaps first, where every tree can read them.
  Vec<T> sums[max_sums];
  for (std::uint32_t t = 0; t < stage.n_trees; ++t) {
    const SumTree& tree = stage.trees[t];
    const bool last = t + 1 == stage.n_trees;
    if (!last) {
      tree_sums<T>(p.n_bits, tree.order, [&](Index, int, std::size_t address) {
        return overlap(at(bra.re, address), at(bra.im, address), at(ket.re, address), at(ket.im, address));
      }, work.scratch, sums);
    } else {
      tree_sums<T>(p.n_bits, tree.order, undo, work.scratch, sums);
    }
    for (std::uint32_t m = 0; m < tree.n_members; ++m) {
      const LaneTree::Member& member = tree.members[m];
      work.add_to_slot(stage.first_slot + member.item, sums[member.slot], last && both ? stage.undone_scale : stage.overlap_scale);
    }
  }
}

// ------------------------------------------------------------------------------------------------ observables

template <class T>
void clear(const BoundPlan<T>& p, const State<T>& s) {
  for (Index v = 0; v < p.n_vectors; ++v) s.re[v] = Vec<T>{};
  for (Index v = 0; p.ends_complex && v < p.n_vectors; ++v) s.im[v] = Vec<T>{};
}
// bra = -along ket, or zero where nothing is normalized, whatever the ket is.
template <class T>
void start_without(const BoundPlan<T>& p, const Vec<T>& along, const State<T>& ket, const State<T>& bra) {
  if (!p.normalize) return clear<T>(p, bra);
  for (Index v = 0; v < p.n_vectors; ++v) bra.re[v] = -along * ket.re[v];
  for (Index v = 0; p.ends_complex && v < p.n_vectors; ++v) bra.im[v] = -along * ket.im[v];
}

// values[k] += <state| flip by mask k |state>.
template <class T, int radix>
void flip_pass(const FlipPass& shared, const Vec<T>* state, Vec<T>* values, Prefetch& shared_soon) {
  const FlipPass pass = shared;
  const Block<T, radix> in(pass.masks);
  Vec<T> sum[radix][2] = {};  // two chains each: one would wait for its own last result
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
  }
  shared_soon = soon;
  for (int k = 0; k < radix; ++k) values[pass.strings[k]] += 2 * (sum[k][0] + sum[k][1]);
}
template <class T>
void flip_strings(const FlipPass& pass, const Vec<T>* state, Vec<T>* values, Prefetch& soon) {
  with_radix(pass.radix, [&](auto radix) { flip_pass<T, radix.value>(pass, state, values, soon); });
}

// Of any strings with one x, values = 2 Re(conj(a_i) a_j) or 2 Im(conj(a_i) a_j), lane by lane; or with `apply`
// bra += sum over strings of weight (string ket).
template <class T, bool imaginary, bool complex, bool shuffled, bool apply>
void correlation_pass(const CorrelationPass& c, State<T> ket, Vec<T>* values, const Vec<T>* weights, State<T> bra) {
  constexpr int most_classes = 1 << Correlation::max_bits;
  const Index n_classes = Index{1} << c.n_bits, n = c.n_order >> c.n_bits, across = c.vectors;
  const Integers<T> from = flipped<T>(c.lanes);
  auto turned = [&](const Vec<T>& v) { return shuffled ? shuffle<T>(v, from) : v; };
  Vec<T> sums[most_classes];
  auto sign = [&](Index of_class, std::uint32_t m) {
    return T(__builtin_parity(of_class & c.members[m].mask) ? -1 : 1);
  };
  for (Index of_class = 0; of_class < n_classes; ++of_class) {
    Vec<T> w{};
    for (std::uint32_t m = 0; apply && m < c.n_members; ++m) {
      w += sign(of_class, m) * lane_signs<T>(c.members[m].lanes) * weights[c.members[m].string];
    }
    const Index* order = c.order + of_class * n;
    auto add_pair = [&](Index i, Vec<T>& sum) {
      const Index j = i ^ across;
      const Vec<T> re_i = ket.re[i], im_i = complex ? ket.im[i] : Vec<T>{};
      const Vec<T> re_j = turned(ket.re[j]), im_j = complex ? turned(ket.im[j]) : Vec<T>{};
      if constexpr (!apply) {
        sum += re_i * (imaginary ? im_j : re_j);
        if constexpr (complex) sum += imaginary ? -im_i * re_j : im_i * im_j;
      }
      if constexpr (apply && imaginary) {
        bra.re[i] += w * im_j;
        bra.im[i] -= w * re_j;
        if (across == 0) return;
        bra.re[j] -= turned(w * im_i);
        bra.im[j] += turned(w * re_i);
      } else if constexpr (apply) {
        bra.re[i] += w * re_j;
        if constexpr (complex) bra.im[i] += w * im_j;
        if (across == 0) return;
        bra.re[j] += turned(w * re_i);
        if constexpr (complex) bra.im[j] += turned(w * im_i);
      }
    };
    Vec<T> sum[4] = {};
    Index k = 0;
    for (; k + 4 <= n; k += 4) {
#pragma GCC unroll 4
      for (int chain = 0; chain < 4; ++chain) add_pair(order[k + chain], sum[chain]);
    }
    for (; k < n; ++k) add_pair(order[k], sum[0]);
    sums[of_class] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  }
  const T times = across == 0 ? T(1) : T(2);
  for (std::uint32_t m = 0; !apply && m < c.n_members; ++m) {
    Vec<T> value{};
    for (Index of_class = 0; of_class < n_classes; ++of_class) value += sign(of_class, m) * sums[of_class];
    values[c.members[m].string] = times * value;
  }
}
template <class T, bool apply>
void correlation(const CorrelationPass& c, bool complex, State<T> ket, Vec<T>* values, const Vec<T>* weights,
                 State<T> bra) {
  if (!complex && c.imaginary) return;  // zero
  with_flags(complex, c.lanes != 0, [&](auto is_complex, auto shuffled) {
    if constexpr (is_complex.value) {
      if (c.imaginary) return correlation_pass<T, true, true, shuffled.value, apply>(c, ket, values, weights, bra);
    }
    correlation_pass<T, false, is_complex.value, shuffled.value, apply>(c, ket, values, weights, bra);
  });
}

// Weights of the gathers' classes from those of the strings.
template <class T>
void weigh_gathers(const BoundPlan<T>& p, const Workspace<T>& work) {
  const Vec<T>* weights = work.strings + p.n_strings;
  for (std::uint32_t g = 0; g < p.n_gathers; ++g) {
    const GatherPass& gather = p.gathers[g];
    Vec<T>* to = work.gathers + gather.first_weight;
    for (std::uint32_t of_class = 0; of_class < (1u << gather.n_bits); ++of_class) {
      Vec<T> weight{};
      for (std::uint32_t m = 0; m < gather.n_members; ++m) {
        const Correlation::Member& member = gather.members[m];
        const T sign = T(__builtin_parity(of_class & member.mask) ? -1 : 1);
        weight += sign * lane_signs<T>(member.lanes) * weights[member.string];
      }
      if (gather.n_bits == 0) {
        *to = weight;
      } else {
        for (std::uint32_t k = 0; k < 8; ++k) to[8 * (of_class ^ gather.of_eight[k]) + k] = weight;
      }
    }
  }
}

// bra = (the first tree's weight + all gathers) ket, of one part of the states.
template <class T>
void gather(const BoundPlan<T>& p, const TreeWeights<T>& weight, const Vec<T>* weights, const Vec<T>* ket, Vec<T>* bra) {
  const Index* order = p.trees[0].order;
  with_tree_blocks<T>(p.n_bits, order, [&]<int bits>(const Block<T, bits>& shared, Index n_blocks) {
    const Block<T, bits> in = shared;
    for (Index b = 0; b < n_blocks; ++b) {
      const std::size_t base = in.base(order[b << bits]);
      Vec<T> out[1 << bits];
      in.each(base, [&](int v, std::size_t address) { out[v] = weight(b, v) * at(ket, address); });
      for (std::uint32_t g = 0; g < p.n_gathers; ++g) {
        const GatherPass& gather = p.gathers[g];
        const std::size_t from = base ^ in.base(gather.vectors);
        const Vec<T>* w = weights + gather.first_weight;
        if (gather.n_bits == 0) {
          in.each(from, [&, all = *w](int v, std::size_t address) { out[v] += all * at(ket, address); });
        } else {
          w += 8 * std::size_t{gather.classes[b]};
          in.each(from, [&](int v, std::size_t address) { out[v] += w[v] * at(ket, address); });
        }
      }
      in.each(base, [&](int v, std::size_t address) { at(bra, address) = out[v]; });
    }
  });
}

// work.strings[s] = <stored ket| string s |stored ket>, lane by lane, without the lanes' signs; those of links are there
// already.
template <class T>
void measure_strings(const BoundPlan<T>& p, const Workspace<T>& work) {
  const State<T> ket = work.ket;
  const bool complex = p.ends_complex;
  Vec<T>* values = work.strings;
  for (std::uint32_t t = 0; t < p.n_trees; ++t) {
    const SumTree& tree = p.trees[t];
    if (tree.n_members == 0) continue;
    Vec<T> sums[max_sums];
    auto measure = [&](auto is_complex) {
      tree_sums<T>(p.n_bits, tree.order, [&](Index, int, std::size_t address) {
        const Vec<T> re = at(ket.re, address), im = is_complex.value ? at(ket.im, address) : Vec<T>{};
        return is_complex.value ? re * re + im * im : re * re;
      }, work.scratch, sums);
    };
    complex ? measure(Constant<true>{}) : measure(Constant<false>{});
    for (std::uint32_t m = 0; m < tree.n_members; ++m) values[tree.members[m].item] = sums[tree.members[m].slot];
  }
  for (std::uint32_t f = 0; f < p.n_flips; ++f) {
    flip_strings<T>(p.flips[f], ket.re, values, work.soon);
    if (complex) flip_strings<T>(p.flips[f], ket.im, values, work.soon);
  }
  for (std::uint32_t c = 0; c < p.n_correlations; ++c) {
    correlation<T, false>(p.correlations[c], complex, ket, values, nullptr, {});
  }
}

// bra = (sum over s of weights[s] string s - along) ket without the strings of links, where the weights follow the values.
template <class T>
void apply_strings(const BoundPlan<T>& p, const Vec<T>& along, const Workspace<T>& work) {
  const State<T> ket = work.ket, bra = work.bra;
  const bool complex = p.ends_complex;
  const Vec<T>* weights = work.strings + p.n_strings;
  weigh_gathers<T>(p, work);
  for (std::uint32_t t = 0; t < p.n_trees; ++t) {
    const SumTree& tree = p.trees[t];
    Vec<T> of_slots[max_sums] = {};
    if (t == 0) of_slots[p.n_bits] = -along;
    for (std::uint32_t m = 0; m < tree.n_members; ++m) {
      const LaneTree::Member& member = tree.members[m];
      of_slots[member.slot] += lane_signs<T>(member.lanes) * weights[member.item];
    }
    const TreeWeights<T> weight(p.n_bits, of_slots, work.scratch);
    if (t == 0) {
      gather<T>(p, weight, work.gathers, ket.re, bra.re);
      if (complex) gather<T>(p, weight, work.gathers, ket.im, bra.im);
    } else {
      with_tree_blocks<T>(p.n_bits, tree.order, [&]<int bits>(const Block<T, bits>& in, Index n_blocks) {
        for (Index b = 0; b < n_blocks; ++b) {
          in.each(in.base(tree.order[b << bits]), [&](int v, std::size_t address) {
            const Vec<T> w = weight(b, v);
            at(bra.re, address) += w * at(ket.re, address);
            if (complex) at(bra.im, address) += w * at(ket.im, address);
          });
        }
      });
    }
  }
  for (std::uint32_t c = 0; c < p.n_correlations; ++c) {
    if (!p.correlations[c].is_gathered) correlation<T, true>(p.correlations[c], complex, ket, nullptr, weights, bra);
  }
}

// ------------------------------------------------------------------------------------------------ groups of rows

// Loads rows and runs all stages on them, which reads the strings of links that the passes have. Keeps the ket where the
// adjoint will want it: there the first pass of a stage goes from one state to another.
template <bool keep, class T>
Norms<T> run_stages(const BoundPlan<T>& p, const ConstMatrix& x, std::int64_t first_row, int n_rows, Workspace<T>& work) {
  State<T>& ket = work.ket;
  Prefetch& soon = work.soon;
  Vec<T>* values = work.strings;
  for (std::uint32_t s = 0; s < p.n_strings; ++s) values[s] = Vec<T>{};
  const Norms<T> norms = with_lane_bits<T>(p.lane_bits, [&]<int bits>(Constant<bits>) {
    return embed<T, bits>(p, x, first_row, n_rows, ket, values, soon);
  });
  State<T>* kept = work.kept;
  for (std::uint32_t s = 0; s < p.n_stages; ++s) {
    const BoundStage<T>& stage = p.stages[s];
    if (stage.diagonal) {
      with_lane_bits<T>(p.lane_bits, [&]<int bits>(Constant<bits>) {
        multiply_diagonal<T, bits>(stage.re, stage.im, stage.real, stage.from_complex, p.n_vectors, ket);
      });
      continue;
    }
    move_to<T>(stage, p.n_vectors, ket.re);
    if (stage.from_complex) move_to<T>(stage, p.n_vectors, ket.im);
    const State<T> before = ket;
    if (keep && stage.kept) std::swap(ket, *kept++);
    const bool embedded = s == 0 && p.loads_lanes;  // and with that turned on the lowest bits
    auto turn = [&](const Vec<T>* from, Vec<T>* to, std::uint32_t first) {
      for (Index v = 0; from != to && stage.n_rotate == 0 && v < p.n_vectors; ++v) to[v] = from[v];
      for (std::uint32_t k = first; k < stage.n_rotate; ++k) rotate<T>(stage.rotate[k], k == 0 ? from : to, to, values, soon);
    };
    turn(before.re, ket.re, embedded && p.starts_low);
    if (!embedded) turn_lanes<false, T>(stage.lanes, p.n_vectors, ket.re);
    if (!stage.from_complex) continue;
    turn(before.im, ket.im, 0);
    turn_lanes<false, T>(stage.lanes, p.n_vectors, ket.im);
  }
  return norms;
}

// In every lane the number of its row's lane `lane`.
template <class T>
QAA_INLINE Vec<T> spread(const Vec<T>& values, std::uint32_t lane, std::uint32_t lane_bits) {
  if (lane_bits == 0) return values;
  const std::uint32_t below = (1u << lane_bits) - 1;
  return shuffle<T>(values, (flipped<T>(0) & ~std::int32_t(below)) | std::int32_t(lane));
}

template <class T>
void forward_group(const BoundPlan<T>& p, const ForwardCall& call, std::int64_t first_row, int n_rows,
                   Workspace<T> work) {
  const Norms<T> norms = run_stages<false>(p, call.x, first_row, n_rows, work);
  const bool complex = p.ends_complex;
  const Vec<T> inverse = inverse_norm<T>(p, norms);
  const State<T> ket = work.ket;
  Vec<T>* columns = work.columns;
  const std::uint32_t lane_bits = p.lane_bits, lanes = (1u << lane_bits) - 1;
  if (p.readout == ReadoutKind::expval) {
    measure_strings<T>(p, work);
    for (std::uint32_t s = 0; lane_bits > 0 && s < p.n_strings; ++s) {
      work.strings[s] *= lane_signs<T>(p.string_lanes[s]);
    }
    for (std::uint32_t k = 0; k < p.n_outputs; ++k) columns[k] = Vec<T>{};
    for (std::uint32_t t = 0; t < p.n_terms; ++t) {
      columns[p.terms[t].output] += p.terms[t].coefficient * work.strings[p.terms[t].string];
    }
    const Vec<T> scale = inverse * (p.scale * p.scale);
    for (std::uint32_t k = 0; k < p.n_outputs; ++k) columns[k] = row_sum<T>(columns[k], lane_bits) * scale;
    if (call.strings.data != nullptr) {
      Vec<T>* values = work.strings + p.n_strings;  // where the adjoint has weights
      for (std::uint32_t s = 0; s < p.n_strings; ++s) values[s] = row_sum<T>(work.strings[s], lane_bits) * scale;
      store_columns<T>(p, values, call.strings, first_row, n_rows);
    }
  } else if (p.readout == ReadoutKind::probs) {
    const Vec<T> scale = inverse * (p.scale * p.scale);
    for (std::uint32_t k = 0; k < p.n_outputs; ++k) {
      const Index v = p.outputs[k] >> lane_bits;
      Vec<T> square = ket.re[v] * ket.re[v];
      if (complex) square += ket.im[v] * ket.im[v];
      columns[k] = spread<T>(square, p.outputs[k] & lanes, lane_bits) * scale;
    }
  } else {
    const Vec<T> scale = inverse * p.scale;
    for (std::uint32_t k = 0; k < p.n_outputs; ++k) {
      const Vec<T> signed_scale = p.signs[k] < 0 ? -scale : scale;
      const Index v = p.outputs[k] >> lane_bits, lane = p.outputs[k] & lanes;
      columns[2 * k] = spread<T>(ket.re[v], lane, lane_bits) * signed_scale;
      columns[2 * k + 1] = complex ? spread<T>(ket.im[v], lane, lane_bits) * signed_scale : Vec<T>{};
    }
  }
  store_columns<T>(p, columns, call.features, first_row, n_rows);
}

// Numbers that are the same in all lanes of a row, in the lane of an amplitude's place alone.
template <class T>
QAA_INLINE Vec<T> in_lane(const BoundPlan<T>& p, Index place, const Vec<T>& numbers) {
  if (p.lane_bits == 0) return numbers;
  const std::int32_t below = (1 << p.lane_bits) - 1, lane = std::int32_t(place) & below;
  return (flipped<T>(0) & below) == lane ? numbers : Vec<T>{};
}

// Calls f(place, real part, imaginary part) for the incoming gradient of the readout "state", in the ket's scale.
template <class T, class F>
void each_linear_grad(const BoundPlan<T>& p, const Vec<T>* grad, F&& f) {
  for (std::uint32_t k = 0; k < p.n_outputs; ++k) {
    const Index place = p.outputs[k];
    const T scale = p.signs[k] / p.scale;
    f(place >> p.lane_bits, in_lane<T>(p, place, grad[2 * k] * scale), in_lane<T>(p, place, grad[2 * k + 1] * scale));
  }
}
template <class T>
void add_linear_bra(const BoundPlan<T>& p, const Workspace<T>& work) {
  each_linear_grad<T>(p, work.columns, [&](Index v, const Vec<T>& re, const Vec<T>& im) {
    work.bra.re[v] += re;
    if (p.ends_complex) work.bra.im[v] += im;
  });
}

// bra += (sum over the strings s of links of weights[s] string s) ket.
template <class T>
void apply_links(const BoundPlan<T>& p, const Workspace<T>& work) {
  const BoundStage<T>& last = p.stages[p.n_stages - 1];
  const BraTask<T> task{nullptr, work.strings + p.n_strings};
  for (std::uint32_t k = 0; !last.diagonal && k < last.n_overlap; ++k) {
    const RotatePass<T>& pass = last.overlap[k];
    if (pass.links == nullptr) continue;
    work_on_bra<T>(pass, work.ket.re, work.bra.re, task, work.soon);
    if (p.ends_complex) work_on_bra<T>(pass, work.ket.im, work.bra.im, task, work.soon);
  }
}

// The values of the strings as the forward call has written them, in the stored ket's scale; each in equal parts in all
// lanes of a row.
template <class T>
void load_strings(const BoundPlan<T>& p, const ConstMatrix& m, std::int64_t first_row, int n_rows,
                  const Norms<T>& norms, const Workspace<T>& work) {
  const T part = 1 / (p.scale * p.scale * T(1u << p.lane_bits));
  load_columns<T>(p, m, first_row, n_rows, p.normalize ? norms.squared * part : splat(part), work.strings);
  for (std::uint32_t s = 0; p.lane_bits > 0 && s < p.n_strings; ++s) {
    work.strings[s] *= lane_signs<T>(p.string_lanes[s]);
  }
}

// What the normalization takes from the bra: d/dx of q(x) / |x|^2, or of phi(x) / |x|, has nothing along x, which is along
// the ket. `overlap` is Re<bra|ket> lane by lane, in the stored ket's scale, which the adjoint does not change.
template <class T>
Vec<T> along_ket(const BoundPlan<T>& p, const Norms<T>& norms, const Vec<T>& overlap) {
  Vec<T> along{};
  if (!p.normalize) return along;
  const Vec<T> of_rows = row_sum<T>(overlap, p.lane_bits);
  for (int l = 0; l < width<T>; ++l) {
    along[l] = norms.squared[l] == 0 ? T(0) : of_rows[l] * (p.scale * p.scale) / norms.squared[l];
  }
  return along;
}

// The bra M ket, in the ket's scale and without what lies along the ket, where M is the readout weighted by the incoming
// gradient. With strings of links yet to come where there is one stage, whose overlaps take them along.
template <class T>
void start_bra(const BoundPlan<T>& p, const BackwardCall& call, std::int64_t first_row, int n_rows,
               const Norms<T>& norms, const Workspace<T>& work) {
  const State<T> ket = work.ket, bra = work.bra;
  const bool complex = p.ends_complex;
  const Vec<T>* grad = work.columns;
  Vec<T> overlap{};
  if (p.readout == ReadoutKind::expval) {
    const Vec<T>* values = work.strings;
    Vec<T>* weights = work.strings + p.n_strings;
    if (call.strings.data != nullptr) {
      load_strings<T>(p, call.strings, first_row, n_rows, norms, work);
    } else {
      measure_strings<T>(p, work);
    }
    for (std::uint32_t s = 0; s < p.n_strings; ++s) weights[s] = Vec<T>{};
    const double scale = double(p.scale) * double(p.scale);
    for (std::uint32_t t = 0; t < p.n_terms; ++t) {
      const BoundTerm<T>& term = p.terms[t];
      weights[term.string] += term.coefficient * grad[term.output];
      const Vec<T> product = grad[term.output] * values[term.string];
      overlap += term.coefficient * (p.lane_bits == 0 ? product : lane_signs<T>(p.string_lanes[term.string]) * product);
      if (term.varies) work.add_to_slot(p.first_term_slot + t, product, scale);
    }
    apply_strings<T>(p, along_ket<T>(p, norms, overlap), work);
    if (p.n_stages > 1) apply_links(p, work);
    return;
  }
  if (p.readout == ReadoutKind::state) {
    each_linear_grad<T>(p, grad, [&](Index v, const Vec<T>& re, const Vec<T>& im) {
      overlap += re * ket.re[v];
      if (complex) overlap += im * ket.im[v];
    });
    start_without<T>(p, along_ket<T>(p, norms, overlap), ket, bra);
    return add_linear_bra<T>(p, work);
  }
  auto each_grad = [&](auto&& f) {
    for (std::uint32_t k = 0; k < p.n_outputs; ++k) {
      f(p.outputs[k] >> p.lane_bits, in_lane<T>(p, p.outputs[k], grad[k]));
    }
  };
  each_grad([&](Index v, const Vec<T>& g) {
    Vec<T> square = ket.re[v] * ket.re[v];
    if (complex) square += ket.im[v] * ket.im[v];
    overlap += g * square;
  });
  start_without<T>(p, along_ket<T>(p, norms, overlap), ket, bra);
  each_grad([&](Index v, const Vec<T>& g) {
    bra.re[v] += g * ket.re[v];
    if (complex) bra.im[v] += g * ket.im[v];
  });
}

// Undoes a stage's rotations on the bra alone: those between vectors, the last pass first, down to pass `first`.
template <class T>
void rotate_back(const BoundStage<T>& stage, std::uint32_t first, const Workspace<T>& work) {
  for (std::uint32_t k = stage.n_unwind; k-- > first;) {
    rotate_inverse<T>(stage.unwind[k], work.bra.re, work.soon);
    if (stage.from_complex) rotate_inverse<T>(stage.unwind[k], work.bra.im, work.soon);
  }
}
template <class T>
void turn_lanes_back(const BoundPlan<T>& p, const BoundStage<T>& stage, const Workspace<T>& work) {
  turn_lanes<true, T>(stage.unwind_lanes, p.n_vectors, work.bra.re);
  if (stage.from_complex) turn_lanes<true, T>(stage.unwind_lanes, p.n_vectors, work.bra.im);
}
template <class T>
void move_back(const BoundPlan<T>& p, const BoundStage<T>& stage, const State<T>& state) {
  move_back<T>(stage, p.n_vectors, state.re);
  if (stage.from_complex) move_back<T>(stage, p.n_vectors, state.im);
}

// Undoes the first stage on the bra, if it is one of rotations, and stores factor * bra as the gradient of the rows.
template <class T>
void store_gradient(const BoundPlan<T>& p, const Matrix& grad_x, std::int64_t first_row, int n_rows,
                    const Vec<T>& factor, const Workspace<T>& work) {
  const BoundStage<T>* first = p.n_stages > 0 && !p.stages[0].diagonal ? &p.stages[0] : nullptr;
  const RotatePass<T>* low = p.starts_low ? &first->unwind[0] : nullptr;
  const bool turned = first != nullptr && fits_registers(p, first->unwind_lanes, low);
  if (first != nullptr) {
    rotate_back<T>(*first, turned && low != nullptr, work);
    if (!turned) turn_lanes<true, T>(first->unwind_lanes, p.n_vectors, work.bra.re);
    move_back<T>(*first, p.n_vectors, work.bra.re);
  }
  with_lane_bits<T>(p.lane_bits, [&]<int bits>(Constant<bits>) {
    auto store = [&]<bool turn>(Constant<turn>) {
      const Index* inputs = p.inputs;
      const Vec<T>* bra = work.bra.re;
      const ColumnTurn<T, bits, turn, true, false> back(first != nullptr ? first->unwind_lanes : LanePass<T>{}, low);
      store_matrix<T, bits>(grad_x, first_row, n_rows, [=](Index v, Vec<T>* block, int n) {
        if (turn) n = width<T> >> bits;
#pragma GCC unroll 16
        for (int k = 0; k < n; ++k) block[k] = bra[inputs[v + k]];
        back(block);
#pragma GCC unroll 16
        for (int k = 0; k < n; ++k) block[k] *= factor;
      });
    };
    turned ? store(Constant<true>{}) : store(Constant<false>{});
  });
}

// Overlaps of a stage's rotations, added to their slots. With `undo` the rotations are undone on ket and bra. Otherwise
// the last pass comes first, since a pass may hold a rotation of the pass before it, whose overlaps want the links of
// both.
template <class T>
void add_overlaps(const BoundPlan<T>& p, const BoundStage<T>& stage, bool undo, const Workspace<T>& work) {
  const State<T> ket = work.ket, bra = work.bra;
  const std::uint32_t n_passes = undo ? stage.n_unwind : stage.n_overlap;
  for (std::uint32_t n = 0; n < n_passes; ++n) {
    const std::uint32_t k = undo ? n : n_passes - 1 - n;
    const RotatePass<T>& pass = undo ? stage.unwind[k] : stage.overlap[k];
    Vec<T> overlaps[max_radix] = {};
    if (undo) {
      unwind<T>(pass, ket.re, bra.re, overlaps, work.soon);
      if (stage.from_complex) unwind<T>(pass, ket.im, bra.im, overlaps, work.soon);
    } else {
      const bool links = p.n_stages == 1 && pass.links != nullptr;
      const BraTask<T> task{overlaps, links ? work.strings + p.n_strings : nullptr};
      work_on_bra<T>(pass, ket.re, bra.re, task, work.soon);
      if (stage.from_complex) work_on_bra<T>(pass, ket.im, bra.im, task, work.soon);
    }
    for (std::uint32_t r = 0; r < pass.radix; ++r) work.add_to_slot(pass.slots[r], overlaps[r], pass.overlap_scale);
  }
  const LanePass<T>& lanes = stage.unwind_lanes;
  Vec<T> overlaps[max_lane_bits] = {};
  if (undo) {
    overlap_lanes<true, T>(lanes, p.n_vectors, ket.re, bra.re, overlaps);
    if (stage.from_complex) overlap_lanes<true, T>(lanes, p.n_vectors, ket.im, bra.im, overlaps);
  } else {
    overlap_lanes<false, T>(lanes, p.n_vectors, ket.re, bra.re, overlaps);
    if (stage.from_complex) overlap_lanes<false, T>(lanes, p.n_vectors, ket.im, bra.im, overlaps);
  }
  for (std::uint32_t k = 0; k < lanes.n_bits; ++k) {
    if (lanes.slots[k] != StageLayout::none) work.add_to_slot(lanes.slots[k], overlaps[k], lanes.overlap_scale[k]);
  }
}

template <class T>
void backward_group(const BoundPlan<T>& p, const BackwardCall& call, std::int64_t first_row, int n_rows,
                    Workspace<T> work) {
  const Norms<T> norms = run_stages<true>(p, call.x, first_row, n_rows, work);
  load_columns<T>(p, call.grad, first_row, n_rows, inverse_norm<T>(p, norms), work.columns);
  start_bra<T>(p, call, first_row, n_rows, norms, work);

  std::uint32_t n_kept = p.n_kept;
  for (std::uint32_t s = p.n_stages; s-- > 0;) {
    const BoundStage<T>& stage = p.stages[s];
    if (stage.diagonal) {
      const bool ket_ends = s > 0 && p.stages[s - 1].kept;  // the next stage takes the one that it has kept
      with_lane_bits<T>(p.lane_bits, [&]<int bits>(Constant<bits>) {
        ket_ends ? unwind_diagonal<T, bits, false>(p, stage, work) : unwind_diagonal<T, bits, true>(p, stage, work);
      });
      continue;
    }
    if (stage.kept) {
      rotate_back<T>(stage, 0, work);
      turn_lanes_back<T>(p, stage, work);
      work.ket = work.kept[--n_kept];
    }
    // Of the first stage the bra is not yet turned back: nothing before it asks for the ket.
    add_overlaps<T>(p, stage, !stage.kept && s > 0, work);
    if (s > 0) {
      move_back<T>(p, stage, work.ket);
      move_back<T>(p, stage, work.bra);
    }
  }
  if (call.grad_x.data == nullptr) return;
  const T twice = p.readout == ReadoutKind::state ? T(1) : T(2);
  store_gradient<T>(p, call.grad_x, first_row, n_rows, norms.rescale * (p.unwound_scale * twice), work);
}

// grad_x alone, of the readout "state" without normalization: the adjoint of a linear map does not need the rows.
template <class T>
void backward_linear_group(const BoundPlan<T>& p, const BackwardCall& call, std::int64_t first_row, int n_rows,
                           const Workspace<T>& work) {
  const State<T> bra = work.bra;
  load_columns<T>(p, call.grad, first_row, n_rows, splat<T>(1), work.columns);
  clear<T>(p, bra);
  add_linear_bra<T>(p, work);
  for (std::uint32_t s = p.n_stages; s-- > 0;) {
    const BoundStage<T>& stage = p.stages[s];
    if (stage.diagonal) {
      // Where the state was real before, the imaginary part that comes out is not looked at again.
      const bool complex = stage.from_complex || !stage.real;
      with_lane_bits<T>(p.lane_bits, [&]<int bits>(Constant<bits>) {
        multiply_diagonal<T, bits>(stage.back_re, stage.back_im, stage.real, complex, p.n_vectors, bra);
      });
      continue;
    }
    if (s == 0) break;
    rotate_back<T>(stage, 0, work);
    turn_lanes_back<T>(p, stage, work);
    move_back<T>(p, stage, bra);
  }
  store_gradient<T>(p, call.grad_x, first_row, n_rows, splat(p.unwound_scale), work);
}

}  // namespace qaa::QAA_ISA
