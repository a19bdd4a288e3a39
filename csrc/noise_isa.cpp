// Compiled once per instruction set, as cpu_isa.cpp is.
#include "noise_kernels.h"

namespace qaa::QAA_ISA {
namespace {

template <class T>
std::size_t workspace_vectors(const BoundNoisyPlan<T>& bound) {
  return NoisyWorkspace<T>::vectors(bound);
}

template <class T>
constexpr NoisyKernels<T> kernels{workspace_vectors<T>, noisy_group<T>};

}  // namespace

extern const NoisyInstructionSet noisy_instruction_set;
const NoisyInstructionSet noisy_instruction_set{kernels<float>, kernels<double>};

}  // namespace qaa::QAA_ISA
