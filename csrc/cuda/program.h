// A plan as the CUDA kernels read it; layout.h has its parts.
#pragma once

#include <vector>

#include "layout.h"
#include "../plan.h"

namespace qaa::cuda {

// The plan must outlive it. With `is_known`, for kernels that are compiled for this circuit alone (known_source in cuda.h);
// `can_be_known` tells whether there are such.
struct Program {
  QAA_API explicit Program(const Plan& plan, bool is_known = false);
  explicit Program(Plan&&, bool = false) = delete;
  QAA_API static bool can_be_known(const Plan& plan);
  const Plan& plan;
  bool is_known;
  Layout layout{};
  std::vector<unsigned char> description;
};

}  // namespace qaa::cuda
