// What the translation unit of each instruction set exports: the kernels over a range of groups of rows.
#pragma once

#include "bound.h"
#include "qaa.h"

namespace qaa {

// Groups [first, last) of `width` >> lane_bits rows each. `memory` holds `workspace_vectors` vectors, aligned to one.
template <class T>
struct CpuKernels {
  int width;
  std::size_t (*workspace_vectors)(const BoundPlan<T>&);
  void (*forward)(const BoundPlan<T>&, const ForwardCall&, std::int64_t first, std::int64_t last, void* memory);
  void (*backward)(const BoundPlan<T>&, const BackwardCall&, std::int64_t first, std::int64_t last, void* memory,
                   double* slots);
  // Rows [first, last). up, bias and their gradients are transposed and padded to `width`: (k, padded columns).
  void (*project)(const ProjectCall&, const T* up, const T* bias, std::int64_t first, std::int64_t last);
  void (*project_backward)(const ProjectBackwardCall&, const T* up, std::int64_t first, std::int64_t last, T* grad_up,
                           T* grad_bias);
};

struct NoisyInstructionSet;  // noise.h

struct InstructionSet {
  const char* name;
  int vector_bytes;
  int rotate_radix, unwind_radix;
  CpuKernels<float> f32;
  CpuKernels<double> f64;
  const NoisyInstructionSet* noisy;
};

// The best of this machine, or the one that the environment variable QAA_ISA names.
const InstructionSet& chosen_instruction_set();

// Memory that this thread keeps between calls, aligned to a page.
void* scratch_memory(std::size_t bytes);

}  // namespace qaa
