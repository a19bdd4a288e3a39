// Vectors of W numbers, their lanes, and what moves numbers between lanes. Compiled once per instruction set, in a
// namespace of its own: nothing here may be shared with code that another instruction set compiles.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#ifndef QAA_ISA
#error "compile through the build system, which defines QAA_ISA and QAA_VECTOR_BYTES"
#endif

#define QAA_INLINE inline __attribute__((always_inline))

namespace qaa::QAA_ISA {

typedef float vec_f32 __attribute__((vector_size(QAA_VECTOR_BYTES)));
typedef double vec_f64 __attribute__((vector_size(QAA_VECTOR_BYTES)));
typedef std::uint32_t vec_u32 __attribute__((vector_size(QAA_VECTOR_BYTES)));
typedef std::uint16_t vec_u16 __attribute__((vector_size(QAA_VECTOR_BYTES / 2)));

typedef double vec_f64_of_f32 __attribute__((vector_size(2 * QAA_VECTOR_BYTES), aligned(QAA_VECTOR_BYTES)));

template <class T>
struct LaneTypes;
template <>
struct LaneTypes<float> {
  using Vec = vec_f32;
  using Wide = vec_f64_of_f32;
};
template <>
struct LaneTypes<double> {
  using Vec = vec_f64;
  using Wide = vec_f64;
};
template <class T>
using Vec = typename LaneTypes<T>::Vec;
template <class T>
using Wide = typename LaneTypes<T>::Wide;  // the same lanes in double
template <class T>
inline constexpr int width = QAA_VECTOR_BYTES / int(sizeof(T));

// A number or a truth as a type, for a generic lambda to unpack.
template <auto constant>
struct Constant {
  static constexpr auto value = constant;
};

template <class T>
QAA_INLINE Vec<T> splat(T value) {
  return value - Vec<T>{};  // value - 0 in every lane, also for a negative zero
}

// bfloat16 and IEEE half as storage types.
struct Bf16 {
  std::uint16_t bits;
};
#if defined(__aarch64__)
using Half = __fp16;  // GCC knows _Float16 in C++ only from 13 on
#else
using Half = _Float16;
#endif

QAA_INLINE float to_float(Bf16 value) {
  const std::uint32_t bits = std::uint32_t(value.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}
QAA_INLINE float to_float(Half value) { return float(value); }
QAA_INLINE float to_float(float value) { return value; }
QAA_INLINE double to_float(double value) { return value; }

template <class Out, class T>
QAA_INLINE Out from_float(T value) {
  return Out(value);
}
template <>
QAA_INLINE Bf16 from_float<Bf16, float>(float value) {  // round to nearest, ties to even; NaN stays NaN
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (value != value) return {std::uint16_t((bits >> 16) | 0x40)};
  return {std::uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

// width<T> consecutive numbers of a row.
template <class T, class In>
QAA_INLINE Vec<T> load_row(const In* row) {
  Vec<T> out;
  for (int l = 0; l < width<T>; ++l) out[l] = to_float(row[l]);
  return out;
}
template <>
QAA_INLINE vec_f32 load_row<float, float>(const float* row) {
  vec_f32 out;
  std::memcpy(&out, row, sizeof out);
  return out;
}
template <>
QAA_INLINE vec_f64 load_row<double, double>(const double* row) {
  vec_f64 out;
  std::memcpy(&out, row, sizeof out);
  return out;
}
template <>
QAA_INLINE vec_f32 load_row<float, Bf16>(const Bf16* row) {
  vec_u16 bits;
  std::memcpy(&bits, row, sizeof bits);
  const vec_u32 wide = __builtin_convertvector(bits, vec_u32) << 16;
  vec_f32 out;
  std::memcpy(&out, &wide, sizeof out);
  return out;
}

template <class T, class Out>
QAA_INLINE void store_row(Out* row, const Vec<T>& values) {
  for (int l = 0; l < width<T>; ++l) row[l] = from_float<Out, T>(values[l]);
}
template <>
QAA_INLINE void store_row<float, float>(float* row, const vec_f32& values) {
  std::memcpy(row, &values, sizeof values);
}
template <>
QAA_INLINE void store_row<double, double>(double* row, const vec_f64& values) {
  std::memcpy(row, &values, sizeof values);
}

// Half vectors: what memory holds of one row in front of, or behind, the same of another row.
template <class T>
struct HalfLanes {
  typedef T type __attribute__((vector_size(QAA_VECTOR_BYTES / 2)));
};
template <class T>
using HalfVec = typename HalfLanes<T>::type;
template <class T>
QAA_INLINE HalfVec<T> load_half(const T* row) {
  HalfVec<T> out;
  std::memcpy(&out, row, sizeof out);
  return out;
}
template <class T, int... l>
QAA_INLINE Vec<T> join(const HalfVec<T>& low, const HalfVec<T>& high, std::integer_sequence<int, l...>) {
  return __builtin_shufflevector(low, high, l...);
}
template <class T, int... l>
QAA_INLINE HalfVec<T> half_of(const Vec<T>& values, int first, std::integer_sequence<int, l...>) {
  return first == 0 ? __builtin_shufflevector(values, values, l...)
                    : __builtin_shufflevector(values, values, (l + width<T> / 2)...);
}
template <class T>
QAA_INLINE void store_halves(const Vec<T>& values, T* low_to, T* high_to) {
  constexpr std::make_integer_sequence<int, width<T> / 2> lanes;
  const HalfVec<T> low = half_of<T>(values, 0, lanes), high = half_of<T>(values, 1, lanes);
  std::memcpy(low_to, &low, sizeof low);
  std::memcpy(high_to, &high, sizeof high);
}

// One step of a transpose: swaps the off-diagonal blocks of size s between rows a and b = a + s.
template <int s, class T, int... l>
QAA_INLINE void exchange(Vec<T>& a, Vec<T>& b, std::integer_sequence<int, l...>) {
  constexpr int w = width<T>;
  const Vec<T> low = __builtin_shufflevector(a, b, ((l & s) ? w + (l ^ s) : l)...);
  const Vec<T> high = __builtin_shufflevector(a, b, ((l & s) ? w + l : (l ^ s))...);
  a = low;
  b = high;
}
// rows[r], lane (k, l) <-> rows[k], lane (r, l), where l is `bits` bits: from W columns of each of W >> bits rows to
// vectors of neighbouring columns of all these rows, and back; with fewer steps where `end` is less.
template <int bits, class T, int end = (width<T> >> bits), int s = 1>
QAA_INLINE void gather_rows(Vec<T>* rows) {
  constexpr int w = width<T>, n = w >> bits;
  if constexpr (s < end) {
#pragma GCC unroll 16
    for (int r = 0; r < n; ++r) {
      if (!(r & s)) exchange<(s << bits), T>(rows[r], rows[r + s], std::make_integer_sequence<int, w>{});
    }
    gather_rows<bits, T, end, 2 * s>(rows);
  }
}

// The same between memory and registers: block[c] = column c of w rows. Loads and stores of half vectors do the last
// step, which some processors are slow at in registers.
template <class T, class In>
QAA_INLINE void load_transposed(const In* data, std::int64_t stride, Vec<T>* block) {
  constexpr int w = width<T>, half = w / 2;
  constexpr bool by_halves = std::is_same_v<In, T> && (half > 1);
#pragma GCC unroll 8
  for (int r = 0; r < half; ++r) {
    const In* a = data + r * stride;
    const In* b = a + half * stride;
    if constexpr (by_halves) {
      block[r] = join<T>(load_half<T>(a), load_half<T>(b), std::make_integer_sequence<int, w>{});
      block[r + half] = join<T>(load_half<T>(a + half), load_half<T>(b + half), std::make_integer_sequence<int, w>{});
    } else {
      block[r] = load_row<T>(a);
      block[r + half] = load_row<T>(b);
    }
  }
  gather_rows<0, T, (by_halves ? half : w)>(block);
}
template <class T, class Out>
QAA_INLINE void store_transposed(Vec<T>* block, Out* data, std::int64_t stride) {
  constexpr int w = width<T>, half = w / 2;
  constexpr bool by_halves = std::is_same_v<Out, T> && (half > 1);
  gather_rows<0, T, (by_halves ? half : w)>(block);
#pragma GCC unroll 8
  for (int r = 0; r < half; ++r) {
    Out* a = data + r * stride;
    Out* b = a + half * stride;
    if constexpr (by_halves) {
      store_halves<T>(block[r], a, b);
      store_halves<T>(block[r + half], a + half, b + half);
    } else {
      store_row<T>(a, block[r]);
      store_row<T>(b, block[r + half]);
    }
  }
}

template <class T>
QAA_INLINE Wide<T> widen(const Vec<T>& values) {
  return __builtin_convertvector(values, Wide<T>);
}
// out[k] = sum over the lanes of values[k], for n at a time as columns of a transpose.
template <class T>
QAA_INLINE void lane_sums(const Vec<T>* values, int n, T* out) {
  constexpr int w = width<T>;
  for (int first = 0; first < n; first += w) {
    const int here = n - first < w ? n - first : w;
    Vec<T> block[w];
    for (int k = 0; k < w; ++k) block[k] = k < here ? values[first + k] : Vec<T>{};
    gather_rows<0, T>(block);
#pragma GCC unroll 4
    for (int half = w / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
      for (int k = 0; k < half; ++k) block[k] += block[k + half];
    }
    std::memcpy(out + first, &block[0], std::size_t(here) * sizeof(T));
  }
}

// ------------------------------------------------------------------------------------------------ lanes of one vector

template <class T>
struct IntegerLanes {
  typedef std::int32_t type __attribute__((vector_size(QAA_VECTOR_BYTES)));
};
template <>
struct IntegerLanes<double> {
  typedef std::int64_t type __attribute__((vector_size(QAA_VECTOR_BYTES)));
};
template <class T>
using Integers = typename IntegerLanes<T>::type;

// Lane l of the result is lane from[l].
template <class T>
QAA_INLINE Vec<T> shuffle(const Vec<T>& values, const Integers<T>& from) {
#ifdef __clang__
  Vec<T> out;
  for (int l = 0; l < width<T>; ++l) out[l] = values[from[l]];
  return out;
#else
  return __builtin_shuffle(values, from);
#endif
}
// from[l] = l ^ mask.
template <class T>
QAA_INLINE Integers<T> flipped(std::uint32_t mask) {
  Integers<T> out;
  for (int l = 0; l < width<T>; ++l) out[l] = l ^ int(mask);
  return out;
}
// The lanes l and l ^ mask change places.
template <int mask, class T, int... l>
QAA_INLINE Vec<T> flip(const Vec<T>& values, std::integer_sequence<int, l...>) {
  return __builtin_shufflevector(values, values, (l ^ mask)...);
}
template <int mask, class T>
QAA_INLINE Vec<T> flip(const Vec<T>& values) {
  return flip<mask, T>(values, std::make_integer_sequence<int, width<T>>{});
}

template <class T>
struct SignTable {
  alignas(QAA_VECTOR_BYTES) T sign[width<T>][width<T>];
  constexpr SignTable() : sign() {
    for (int mask = 0; mask < width<T>; ++mask) {
      for (int l = 0; l < width<T>; ++l) sign[mask][l] = __builtin_parity(unsigned(mask & l)) ? T(-1) : T(1);
    }
  }
};
template <class T>
inline constexpr SignTable<T> sign_table{};
// (-1)^parity(mask & l) in lane l.
template <class T>
QAA_INLINE Vec<T> lane_signs(std::uint32_t mask) {
  return load_row<T>(sign_table<T>.sign[mask]);
}

// 2^bits numbers, again and again. Reads a whole vector.
template <class T, int bits>
QAA_INLINE Vec<T> load_repeated(const T* data) {
  if constexpr (bits == 0) return splat(*data);
  Integers<T> from;
  for (int l = 0; l < width<T>; ++l) from[l] = l & ((1 << bits) - 1);
  const Vec<T> numbers = load_row<T>(data);
  return (1 << bits) == width<T> ? numbers : shuffle<T>(numbers, from);
}

// The sum over lanes l of (-1)^parity(mask & l) values[l], always in the same order.
template <class T>
QAA_INLINE double signed_lane_sum(Wide<T> values, std::uint32_t mask) {
  if (mask != 0) values *= widen<T>(lane_signs<T>(mask));
  double sum[2] = {};
  for (int l = 0; l < width<T>; l += 2) {
    sum[0] += values[l];
    sum[1] += values[l + 1];
  }
  return sum[0] + sum[1];
}

// Keeps a vector that was loaded in a register: GCC reads it from memory once more for each use that can.
template <class V>
QAA_INLINE void hold([[maybe_unused]] V& vector) {
#ifdef __AVX512F__
  asm("" : "+v"(vector));
#endif
}

// a b on its own, for a sum that stays one: with AVX2 the two are two operations, elsewhere compilers make a
// multiply-add of them. On Zen 3 a vector that is stored takes the place of two multiply-adds, but not of a product or of
// a sum.
template <class V>
QAA_INLINE V product(const V& a, const V& b) {
  V out = a * b;
#if defined(__AVX2__) && !defined(__AVX512F__)
  asm("" : "+x"(out));
#endif
  return out;
}

// Memory that will be needed soon, brought to the cache a line at a time from within the loops of a pass: rows are too
// short for the processor to foresee the next ones, and a burst would hold up the pass. First what will be written.
struct Prefetch {
  const char *write = nullptr, *write_end = nullptr, *read = nullptr, *read_end = nullptr;
  // The step of a loop that works on so many amplitudes: a line for every four, so that all rows have come after three
  // or four sweeps over the states.
  template <int amplitudes>
  QAA_INLINE void step() {
    constexpr int n_lines = amplitudes < 4 ? 1 : amplitudes / 4;
    if (write < write_end) {
#pragma GCC unroll 4
      for (int i = 0; i < n_lines; ++i) __builtin_prefetch(write + 64 * i, 1);
      write += 64 * n_lines;
    } else if (read < read_end) {
#pragma GCC unroll 4
      for (int i = 0; i < n_lines; ++i) __builtin_prefetch(read + 64 * i, 0, 2);
      read += 64 * n_lines;
    }
  }
};

}  // namespace qaa::QAA_ISA
