// What every part of the core speaks of, on the host and on the GPU, where a kernel may be compiled at run time without
// any header of the standard library.
#pragma once

#ifdef __CUDACC_RTC__
namespace std {
using size_t = decltype(sizeof(0));
using uintptr_t = unsigned long long;
using int64_t = long long;
using uint8_t = unsigned char;
using uint32_t = unsigned;
}  // namespace std
#else
#include <cstddef>
#include <cstdint>
#endif

namespace qaa {

// An amplitude's index, or a set of index bits. Wire w of n is bit n-1-w: wire 0 is the most significant bit.
using Index = std::uint32_t;

// What is computed from the final state phi: <phi| P_k |phi> (expval), |phi_b|^2 (probs) or phi_b (state).
enum class ReadoutKind : std::uint8_t { expval, probs, state };

// angle = constant + sum of coefficient * theta[parameter]
struct AngleTerm {
  std::uint32_t parameter;
  double coefficient;
  bool operator==(const AngleTerm&) const = default;
};

// How numbers are stored. Arithmetic is float64 for float64, else float32.
enum class Scalar : std::uint8_t { float16, bfloat16, float32, float64 };

// `rows` vectors of `columns` adjacent numbers; row r starts at data + r * row_stride numbers. Data must be aligned to
// one number. row_stride may be anything for an input, 0 and negative values included: left out it is 0, and every row of
// an input is the first one. Rows of an output must not overlap.
struct Matrix {
  void* data = nullptr;
  std::int64_t rows = 0, columns = 0, row_stride = 0;
  Scalar scalar = Scalar::float32;
};
struct ConstMatrix {
  const void* data = nullptr;
  std::int64_t rows = 0, columns = 0, row_stride = 0;
  Scalar scalar = Scalar::float32;
};

}  // namespace qaa
