// Compiled once per instruction set, with QAA_ISA (a name), QAA_VECTOR_BYTES and the radices defined by the build.
#include <limits>

#include "cpu.h"
#include "kernels.h"

namespace qaa::QAA_ISA {
namespace {

template <class T>
std::size_t workspace_vectors(const Program<T>& program) {
  return Workspace<T>::vectors(program);
}

QAA_INLINE int rows_of_group(std::int64_t group, std::int64_t rows, int w) {
  const std::int64_t left = rows - group * w;
  return left < w ? int(left) : w;
}

template <class T>
void forward_groups(const Program<T>& program, const ForwardCall& call, std::int64_t first, std::int64_t last,
                    void* memory) {
  const Workspace<T> work(program, memory);
  constexpr int w = width<T>;
  for (std::int64_t g = first; g < last; ++g) {
    forward_group<T>(program, call, g * w, rows_of_group(g, call.x.rows, w), work);
  }
}

template <class T>
void backward_groups(const Program<T>& program, const BackwardCall& call, std::int64_t first, std::int64_t last,
                     void* memory, double* slots) {
  const Workspace<T> work(program, memory);
  constexpr int w = width<T>;
  for (std::int64_t g = first; g < last; ++g) {
    backward_group<T>(program, call, g * w, rows_of_group(g, call.x.rows, w), work, slots);
  }
}

template <class T>
constexpr CpuKernels<T> kernels{width<T>, workspace_vectors<T>, forward_groups<T>, backward_groups<T>};

}  // namespace

#define QAA_STRING_OF(x) #x
#define QAA_STRING(x) QAA_STRING_OF(x)
extern const InstructionSet instruction_set;
const InstructionSet instruction_set{QAA_STRING(QAA_ISA), QAA_VECTOR_BYTES, QAA_ROTATE_RADIX,
                                     QAA_UNWIND_RADIX,    kernels<float>,   kernels<double>};

}  // namespace qaa::QAA_ISA
