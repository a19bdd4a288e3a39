// A plan as the CUDA kernels read it; layout.h has its parts.
#pragma once

#include <string>
#include <vector>

#include "layout.h"
#include "plan.h"

namespace qaa::cuda {

// The plan must outlive it. With `is_known`, for kernels that are compiled for this circuit alone (known_source in cuda.h);
// `can_be_known` tells whether there are such.
struct Program {
  QAA_API explicit Program(const Plan& plan, bool is_known = false);
  QAA_API static bool can_be_known(const Plan& plan);
  const Plan& plan;
  bool is_known;
  Layout layout{};
  std::vector<unsigned char> description;
};

// Of a kernel for one circuit: the type of the features and of their gradient, which is that of the rows but float32 for
// amplitudes; and its source after kernel_headers, for blocks of so many warps, so many of them at once on a multiprocessor.
Scalar known_features(const Program& program, Scalar rows);
std::string constants_of(const Program& program, Scalar rows, std::uint32_t n_warps, std::uint32_t n_blocks, bool backward);

}  // namespace qaa::cuda
