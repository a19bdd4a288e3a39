// Compiled once per instruction set, with QAA_ISA (a name), QAA_VECTOR_BYTES and the radices defined by the
// build.
#include <limits>

#include "cpu.h"
#include "kernels.h"
#include "project.h"

namespace qaa::QAA_ISA {
namespace {

template <class T>
std::size_t workspace_vectors(const BoundPlan<T>& bound) {
  return Workspace<T>::vectors(bound);
}

QAA_INLINE int rows_of_group(std::int64_t group, std::int64_t rows, int w) {
  const std::int64_t left = rows - group * w;
  return left < w ? int(left) : w;
}

QAA_INLINE std::int64_t size_of(Scalar scalar) {
  return scalar == Scalar::float64 ? 8 : scalar == Scalar::float32 ? 4 : 2;
}
// The rows of a group of w from `begin` to `end`, if nothing else lies between them.
template <class M>
void rows_in_memory(const M& m, std::int64_t group, int w, const char*& begin, const char*& end) {
  if (m.row_stride != m.columns) return;
  const std::int64_t row = m.row_stride * size_of(m.scalar);
  begin = static_cast<const char*>(m.data) + group * w * row;
  end = begin + rows_of_group(group, m.rows, w) * row;
}

template <class T>
void forward_groups(const BoundPlan<T>& bound, const ForwardCall& call, std::int64_t first, std::int64_t last,
                    void* memory) {
  const Workspace<T> work(bound, memory);
  const int w = width<T> >> bound.lane_bits;
  for (std::int64_t g = first; g < last; ++g) {
    if (g + 1 < last) rows_in_memory(call.x, g + 1, w, work.soon.read, work.soon.read_end);
    forward_group<T>(bound, call, g * w, rows_of_group(g, call.x.rows, w), work);
  }
}

template <class T>
void backward_groups(const BoundPlan<T>& bound, const BackwardCall& call, std::int64_t first, std::int64_t last,
                     void* memory, double* slots) {
  const Workspace<T> work(bound, memory);
  const int w = width<T> >> bound.lane_bits;
  for (std::uint32_t k = 0; k < bound.n_slots; ++k) work.slots[k] = Wide<T>{};
  for (std::int64_t g = first; g < last; ++g) {
    if (call.x.data == nullptr) {
      backward_linear_group<T>(bound, call, g * w, rows_of_group(g, call.x.rows, w), work);
      continue;
    }
    if (g + 1 < last) rows_in_memory(call.x, g + 1, w, work.soon.read, work.soon.read_end);
    if (call.grad_x.data != nullptr) rows_in_memory(call.grad_x, g, w, work.soon.write, work.soon.write_end);
    backward_group<T>(bound, call, g * w, rows_of_group(g, call.x.rows, w), work);
  }
  for (std::uint32_t k = 0; k < bound.n_slots; ++k) {
    slots[k] = signed_lane_sum<T>(work.slots[k], bound.slot_lanes[k]);
  }
}

template <class T>
Projection<T> projection(std::int64_t columns, std::int64_t n_features, const T* up, const T* bias) {
  return {columns, (columns + width<T> - 1) / width<T> * width<T>, n_features, up, bias};
}

template <class T>
void project_range(const ProjectCall& call, const T* up, const T* bias, std::int64_t first, std::int64_t last) {
  project_rows_forward<T>(projection<T>(call.up.rows, call.up.columns, up, bias), call, first, last);
}

template <class T>
void project_backward_range(const ProjectBackwardCall& call, const T* up, std::int64_t first, std::int64_t last,
                            T* grad_up, T* grad_bias) {
  const Projection<T> p = projection<T>(call.up.rows, call.up.columns, up, nullptr);
  project_rows_backward<T>(p, call, first, last, grad_up, grad_bias);
}

template <class T>
constexpr CpuKernels<T> kernels{width<T>,         workspace_vectors<T>, forward_groups<T>,
                                backward_groups<T>, project_range<T>,     project_backward_range<T>};

}  // namespace

#define QAA_STRING_OF(x) #x
#define QAA_STRING(x) QAA_STRING_OF(x)
extern const NoisyInstructionSet noisy_instruction_set;  // noise_isa.cpp
extern const InstructionSet instruction_set;
const InstructionSet instruction_set{QAA_STRING(QAA_ISA), QAA_VECTOR_BYTES, QAA_ROTATE_RADIX,      QAA_UNWIND_RADIX,
                                     kernels<float>,      kernels<double>,  &noisy_instruction_set};

}  // namespace qaa::QAA_ISA
