// The other end of an adapter: features up to the width of the layer, added to the frozen output, and the adjoint of
// that in one pass over the incoming gradient.
//
//   forward   out = base + scale (features up^T + bias)
//   backward  grad_features = scale grad up,  grad_up = scale grad^T features,  grad_bias = scale sum over rows of grad
//
// features are few (K of about 4 to 64), rows and columns many: both directions move far more bytes than they compute,
// so the weight is kept transposed, K rows of adjacent columns, and every number of `base` and `grad` is touched once.
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

constexpr int project_rows = 4;

template <class T, int n_rows>
void project_block(const Projection<T>& p, const T* const* features, const T* const* base, T* const* out) {
  constexpr int w = width<T>;
  for (std::int64_t c = 0; c < p.columns; c += w) {
    const bool whole = c + w <= p.columns;
    const std::size_t bytes = std::size_t(whole ? w : p.columns - c) * sizeof(T);
    Vec<T> sum[n_rows];
    for (int r = 0; r < n_rows; ++r) {
      sum[r] = Vec<T>{};
      if (whole) {
        std::memcpy(&sum[r], base[r] + c, sizeof(Vec<T>));
      } else {
        std::memcpy(&sum[r], base[r] + c, bytes);
      }
    }
    const Vec<T> bias = load_row<T>(p.bias + c);
    for (int r = 0; r < n_rows; ++r) sum[r] += bias;
    const T* up = p.up + c;
    for (std::int64_t k = 0; k < p.n_features; ++k, up += p.padded_columns) {
      const Vec<T> weight = load_row<T>(up);
#pragma GCC unroll 4
      for (int r = 0; r < n_rows; ++r) sum[r] += features[r][k] * weight;
    }
    for (int r = 0; r < n_rows; ++r) {
      if (whole) {
        std::memcpy(out[r] + c, &sum[r], sizeof(Vec<T>));
      } else {
        std::memcpy(out[r] + c, &sum[r], bytes);
      }
    }
  }
}

template <class T>
void project_rows_forward(const Projection<T>& p, const ProjectCall& call, std::int64_t first, std::int64_t last) {
  auto row = [](const auto& m, std::int64_t r) {
    return static_cast<const T*>(static_cast<const void*>(m.data)) + r * m.row_stride;
  };
  for (std::int64_t r = first; r < last;) {
    const T *features[project_rows], *base[project_rows];
    T* out[project_rows];
    const int n = last - r >= project_rows ? project_rows : 1;
    for (int k = 0; k < n; ++k) {
      features[k] = row(call.features, r + k);
      base[k] = row(call.base, r + k);
      out[k] = static_cast<T*>(call.out.data) + (r + k) * call.out.row_stride;
    }
    if (n == project_rows) {
      project_block<T, project_rows>(p, features, base, out);
    } else {
      project_block<T, 1>(p, features, base, out);
    }
    r += n;
  }
}

// A block of rows against all columns, `n_features` features at a time in registers:
//   sums[r][k] += sum over columns of grad[r] up[k]        (grad_features)
//   grad_up[k] += sum over rows of features[r][k] grad[r]
template <class T, int n_rows, int n_features>
QAA_INLINE void project_adjoint_block(const Projection<T>& p, const T* const* grad, const T* const* features,
                                      std::int64_t first_feature, T* const* grad_features, T* grad_up) {
  constexpr int w = width<T>;
  Vec<T> sum[n_rows][n_features] = {};
  T feature[n_rows][n_features];
  for (int r = 0; r < n_rows; ++r) {
    for (int k = 0; k < n_features; ++k) feature[r][k] = features[r][first_feature + k];
  }
  const T* up = p.up + first_feature * p.padded_columns;
  T* out = grad_up + first_feature * p.padded_columns;
  for (std::int64_t c = 0; c < p.columns; c += w) {
    Vec<T> g[n_rows];
    if (c + w <= p.columns) {
#pragma GCC unroll 4
      for (int r = 0; r < n_rows; ++r) std::memcpy(&g[r], grad[r] + c, sizeof(Vec<T>));
    } else {
      for (int r = 0; r < n_rows; ++r) {
        g[r] = Vec<T>{};
        std::memcpy(&g[r], grad[r] + c, std::size_t(p.columns - c) * sizeof(T));
      }
    }
#pragma GCC unroll 8
    for (int k = 0; k < n_features; ++k) {
      const Vec<T> weight = load_row<T>(up + k * p.padded_columns + c);
      Vec<T> outer = load_row<T>(out + k * p.padded_columns + c);
#pragma GCC unroll 4
      for (int r = 0; r < n_rows; ++r) {
        sum[r][k] += g[r] * weight;
        outer += feature[r][k] * g[r];
      }
      store_row<T>(out + k * p.padded_columns + c, outer);
    }
  }
  for (int r = 0; r < n_rows; ++r) {
    for (int k = 0; k < n_features; ++k) grad_features[r][first_feature + k] = T(lane_sum<T>(sum[r][k]));
  }
}

template <class T, int n_rows>
void project_adjoint_rows(const Projection<T>& p, const T* const* grad, const T* const* features,
                          T* const* grad_features, T* grad_up, T* grad_bias) {
  constexpr int together = QAA_VECTOR_BYTES == 64 || QAA_ROTATE_RADIX == 4 ? 5 : 2;  // sums that fit into registers
  std::int64_t k = 0;
  for (; k + together <= p.n_features; k += together) {
    project_adjoint_block<T, n_rows, together>(p, grad, features, k, grad_features, grad_up);
  }
  for (; k < p.n_features; ++k) {
    project_adjoint_block<T, n_rows, 1>(p, grad, features, k, grad_features, grad_up);
  }
  if (grad_bias == nullptr) return;
  for (std::int64_t c = 0; c < p.columns; ++c) {
    for (int r = 0; r < n_rows; ++r) grad_bias[c] += grad[r][c];
  }
}

// grad_up and grad_bias are this chunk's own sums, (n_features, padded_columns) and (padded_columns).
template <class T>
void project_rows_backward(const Projection<T>& p, const ProjectBackwardCall& call, std::int64_t first,
                           std::int64_t last, T* grad_up, T* grad_bias) {
  auto row = [](const ConstMatrix& m, std::int64_t r) { return static_cast<const T*>(m.data) + r * m.row_stride; };
  for (std::int64_t r = first; r < last;) {
    const T *grad[project_rows], *features[project_rows];
    T* grad_features[project_rows];
    const int n = last - r >= project_rows ? project_rows : 1;
    for (int k = 0; k < n; ++k) {
      grad[k] = row(call.grad, r + k);
      features[k] = row(call.features, r + k);
      grad_features[k] = static_cast<T*>(call.grad_features.data) + (r + k) * call.grad_features.row_stride;
    }
    if (n == project_rows) {
      project_adjoint_rows<T, project_rows>(p, grad, features, grad_features, grad_up, grad_bias);
    } else {
      project_adjoint_rows<T, 1>(p, grad, features, grad_features, grad_up, grad_bias);
    }
    r += n;
  }
}

}  // namespace qaa::QAA_ISA
