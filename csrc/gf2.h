// Vectors over GF(2), as bits of an index: what renames amplitudes, and which of them change sign, is linear in these.
#pragma once

#include <algorithm>
#include <bit>
#include <functional>
#include <utility>
#include <vector>

#include "basic.h"

namespace qaa {

inline bool parity(Index bits) { return std::popcount(bits) & 1; }

// A space of vectors, as a reduced basis.
class Span {
 public:
  Span() = default;
  explicit Span(const std::vector<Index>& vectors) {
    for (const Index v : vectors) extend(v);
  }
  // The smallest vector of v's coset; zero means that v is in the span.
  Index reduce(Index v) const {
    for (const Index b : basis_) v = std::min(v, v ^ b);
    return v;
  }
  // Returns false if the vector was in it already.
  bool extend(Index v) {
    v = reduce(v);
    if (v == 0) return false;
    for (Index& b : basis_) b = std::min(b, b ^ v);
    basis_.push_back(v);
    std::ranges::sort(basis_, std::greater{});
    return true;
  }

 private:
  std::vector<Index> basis_;
};

// Vectors d with parity(masks[j] & d[k]) = (j == k), for n independent masks of n bits: Gauss-Jordan elimination.
inline std::vector<Index> dual_basis(std::vector<Index> masks) {
  const auto n = std::uint32_t(masks.size());
  std::vector<Index> inverse(n);  // which of the masks add up to each row of the elimination
  for (std::uint32_t j = 0; j < n; ++j) inverse[j] = Index{1} << j;
  for (std::uint32_t bit = 0; bit < n; ++bit) {
    std::uint32_t pivot = bit;
    while (!((masks[pivot] >> bit) & 1)) ++pivot;
    std::swap(masks[pivot], masks[bit]);
    std::swap(inverse[pivot], inverse[bit]);
    for (std::uint32_t j = 0; j < n; ++j) {
      if (j != bit && ((masks[j] >> bit) & 1)) {
        masks[j] ^= masks[bit];
        inverse[j] ^= inverse[bit];
      }
    }
  }
  std::vector<Index> dual(n, 0);
  for (std::uint32_t bit = 0; bit < n; ++bit) {
    for (std::uint32_t j = 0; j < n; ++j) dual[j] |= ((inverse[bit] >> j) & 1) << bit;
  }
  return dual;
}

// Bit j of the result is the parity of masks[j] & v: the matrix with the rows `masks` times v.
inline Index parities(const std::vector<Index>& masks, Index v) {
  Index out = 0;
  for (std::size_t j = 0; j < masks.size(); ++j) out |= Index{parity(masks[j] & v)} << j;
  return out;
}

// The sum of the vectors that the bits of `chosen` choose.
inline Index combination(const std::vector<Index>& vectors, Index chosen) {
  Index sum = 0;
  for (; chosen != 0; chosen &= chosen - 1) sum ^= vectors[std::size_t(std::countr_zero(chosen))];
  return sum;
}

}  // namespace qaa
