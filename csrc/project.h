// The other end of an adapter: features up to the width of the layer, added to the frozen output, and the adjoint of
// that in one pass over the incoming gradient, a few rows at a time.
//
//   forward   out = base + scale (features up^T + bias)
//   backward  grad_features = scale grad up,  grad_up = scale grad^T features,  grad_bias = scale sum over rows of grad
//
// features are few (K of about 4 to 64), rows and columns many, so the weight is kept transposed, K rows of adjacent
// columns. The adjoint reads its rows of `grad` several times, from the cache.
#pragma once

#include "lanes.h"
#include "qaa.h"

namespace qaa::QAA_ISA {

template <class T>
struct Projection {
  std::int64_t columns;         // of base, out and grad
  std::int64_t padded_columns;  // rounded up to a whole number of vectors
  std::int64_t n_features;
  const T* up;    // (n_features, padded_columns), scaled
  const T* bias;  // (padded_columns), scaled
};

// Tiles that keep their sums in registers.
constexpr bool many_registers = QAA_VECTOR_BYTES == 64 || QAA_ROTATE_RADIX == 4;
constexpr int tile_rows = 4, tile_vectors = many_registers ? 4 : 2, tile_features = many_registers ? 5 : 2;

// A whole vector, or the `n` numbers that are left of a row.
template <bool part, class T>
QAA_INLINE Vec<T> load(const T* row, std::int64_t n) {
  if constexpr (!part) return load_row<T>(row);
  Vec<T> out{};
  std::memcpy(&out, row, std::size_t(n) * sizeof(T));
  return out;
}
template <bool part, class T>
QAA_INLINE void store(T* row, std::int64_t n, const Vec<T>& values) {
  if constexpr (!part) return store_row<T>(row, values);
  std::memcpy(row, &values, std::size_t(n) * sizeof(T));
}

// A matrix that is read row by row.
template <class T>
struct Rows {
  T* data;
  std::int64_t stride;
  QAA_INLINE T* operator[](std::int64_t r) const { return data + r * stride; }
};
template <class T>
Rows<const T> rows_of(const ConstMatrix& m) {
  return {static_cast<const T*>(m.data), m.row_stride};
}
template <class T>
Rows<T> rows_of(const Matrix& m) {
  return {static_cast<T*>(m.data), m.row_stride};
}

// Calls f(Constant, row) for `size` rows at a time, then one by one.
template <int size, class F>
QAA_INLINE void row_tiles(std::int64_t first, std::int64_t last, F&& f) {
  for (; first + size <= last; first += size) f(Constant<size>{}, first);
  for (; first < last; ++first) f(Constant<1>{}, first);
}

// Calls f(Constant, part, column) for `size` vectors of columns at a time, then one by one, then for what is left.
template <class T, int size, class F>
QAA_INLINE void column_tiles(std::int64_t columns, F&& f) {
  constexpr int w = width<T>;
  std::int64_t c = 0;
  for (; c + size * w <= columns; c += size * w) f(Constant<size>{}, Constant<false>{}, c);
  for (; c + w <= columns; c += w) f(Constant<1>{}, Constant<false>{}, c);
  if (c < columns) f(Constant<1>{}, Constant<true>{}, c);
}

// Calls f(Constant, first) for groups of at most `size` of n, as even as they can be.
template <int size, class F>
QAA_INLINE void even_groups(std::int64_t n, F&& f) {
  for (std::int64_t first = 0; first < n;) {
    const std::int64_t left = n - first, groups = (left + size - 1) / size;
    const int here = int((left + groups - 1) / groups);
    auto call = [&]<int... k>(std::integer_sequence<int, k...>) {
      ((here == k + 1 ? f(Constant<k + 1>{}, first) : void()), ...);
    };
    call(std::make_integer_sequence<int, size>{});
    first += here;
  }
}

template <class T>
void project_rows_forward(const Projection<T>& p, const ProjectCall& call, std::int64_t first, std::int64_t last) {
  constexpr int w = width<T>;
  const Rows<const T> features = rows_of<T>(call.features), base = rows_of<T>(call.base);
  const Rows<T> out = rows_of<T>(call.out);
  row_tiles<tile_rows>(first, last, [&]<int n_rows>(Constant<n_rows>, std::int64_t r) {
    column_tiles<T, tile_vectors>(p.columns, [&]<int n_vectors, bool part>(Constant<n_vectors>, Constant<part>,
                                                                          std::int64_t c) {
      Vec<T> sum[n_rows][n_vectors];
#pragma GCC unroll 4
      for (int v = 0; v < n_vectors; ++v) {
        const Vec<T> bias = load_row<T>(p.bias + c + v * w);
#pragma GCC unroll 4
        for (int i = 0; i < n_rows; ++i) sum[i][v] = load<part>(base[r + i] + c + v * w, p.columns - c) + bias;
      }
      for (std::int64_t k = 0; k < p.n_features; ++k) {
#pragma GCC unroll 4
        for (int v = 0; v < n_vectors; ++v) {
          const Vec<T> weight = load_row<T>(p.up + k * p.padded_columns + c + v * w);
#pragma GCC unroll 4
          for (int i = 0; i < n_rows; ++i) sum[i][v] += features[r + i][k] * weight;
        }
      }
#pragma GCC unroll 4
      for (int i = 0; i < n_rows; ++i) {
#pragma GCC unroll 4
        for (int v = 0; v < n_vectors; ++v) store<part>(out[r + i] + c + v * w, p.columns - c, sum[i][v]);
      }
    });
  });
}

// grad_features of n_rows rows and n of the features: sums over all columns.
template <class T, int n_rows, int n>
void project_grad_features(const Projection<T>& p, const Rows<const T>& grad, std::int64_t r, std::int64_t k,
                           const Rows<T>& grad_features) {
  Vec<T> sum[n_rows][n] = {};
  column_tiles<T, 1>(p.columns, [&]<bool part>(Constant<1>, Constant<part>, std::int64_t c) {
    Vec<T> g[n_rows];
#pragma GCC unroll 4
    for (int i = 0; i < n_rows; ++i) g[i] = load<part>(grad[r + i] + c, p.columns - c);
#pragma GCC unroll 5
    for (int j = 0; j < n; ++j) {
      const Vec<T> weight = load_row<T>(p.up + (k + j) * p.padded_columns + c);
#pragma GCC unroll 4
      for (int i = 0; i < n_rows; ++i) sum[i][j] += g[i] * weight;
    }
  });
  Vec<T> copy[n_rows * n];  // `sum` stays in registers, as its address is not taken
#pragma GCC unroll 32
  for (int q = 0; q < n_rows * n; ++q) copy[q] = sum[q / n][q % n];
  T total[n_rows * n];
  lane_sums<T>(copy, n_rows * n, total);
  for (int i = 0; i < n_rows; ++i) {
    for (int j = 0; j < n; ++j) grad_features[r + i][k + j] = total[i * n + j];
  }
}

// grad_up of n of the features and n_vectors vectors of columns: += sums over n_rows rows.
template <class T, int n_rows, int n, int n_vectors, bool part>
void project_grad_up(const Projection<T>& p, const Rows<const T>& grad, const Rows<const T>& features, std::int64_t r,
                     std::int64_t k, std::int64_t c, T* grad_up) {
  constexpr int w = width<T>;
  T* out = grad_up + k * p.padded_columns + c;
  Vec<T> sum[n][n_vectors];
#pragma GCC unroll 5
  for (int j = 0; j < n; ++j) {
#pragma GCC unroll 4
    for (int v = 0; v < n_vectors; ++v) sum[j][v] = load_row<T>(out + j * p.padded_columns + v * w);
  }
  for (int i = 0; i < n_rows; ++i) {
    const T *g_row = grad[r + i] + c, *f_row = features[r + i] + k;
    Vec<T> g[n_vectors];
#pragma GCC unroll 4
    for (int v = 0; v < n_vectors; ++v) g[v] = load<part>(g_row + v * w, p.columns - c);
#pragma GCC unroll 5
    for (int j = 0; j < n; ++j) {
#pragma GCC unroll 4
      for (int v = 0; v < n_vectors; ++v) sum[j][v] += f_row[j] * g[v];
    }
  }
#pragma GCC unroll 5
  for (int j = 0; j < n; ++j) {
#pragma GCC unroll 4
    for (int v = 0; v < n_vectors; ++v) store_row<T>(out + j * p.padded_columns + v * w, sum[j][v]);
  }
}

// grad_up and grad_bias are this chunk's own sums, (n_features, padded_columns) and (padded_columns). Rows are taken
// some at a time, so that what the first product has read is in the cache for the second.
template <class T>
void project_rows_backward(const Projection<T>& p, const ProjectBackwardCall& call, std::int64_t first,
                           std::int64_t last, T* grad_up, T* grad_bias) {
  const Rows<const T> grad = rows_of<T>(call.grad), features = rows_of<T>(call.features);
  const Rows<T> grad_features = rows_of<T>(call.grad_features);
  row_tiles<2 * tile_rows>(first, last, [&]<int block>(Constant<block>, std::int64_t top) {
    row_tiles<tile_rows>(top, top + block, [&]<int n_rows>(Constant<n_rows>, std::int64_t r) {
      even_groups<tile_features>(p.n_features, [&]<int n>(Constant<n>, std::int64_t k) {
        project_grad_features<T, n_rows, n>(p, grad, r, k, grad_features);
      });
    });
    column_tiles<T, tile_vectors>(p.columns, [&]<int n_vectors, bool part>(Constant<n_vectors>, Constant<part>,
                                                                          std::int64_t c) {
      even_groups<tile_features>(p.n_features, [&]<int n>(Constant<n>, std::int64_t k) {
        project_grad_up<T, block, n, n_vectors, part>(p, grad, features, top, k, c, grad_up);
      });
      for (int v = 0; grad_bias != nullptr && v < n_vectors; ++v) {
        T* out = grad_bias + c + v * width<T>;
        Vec<T> sum = load_row<T>(out);
        for (int i = 0; i < block; ++i) sum += load<part>(grad[top + i] + c + v * width<T>, p.columns - c);
        store_row<T>(out, sum);
      }
    });
  });
}

}  // namespace qaa::QAA_ISA
