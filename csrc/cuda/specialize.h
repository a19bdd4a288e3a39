// Kernels for one circuit; cuda.h tells what they are for.
#pragma once

#include <string>

#include "program.h"

namespace qaa::cuda {

// The type of the features and of their gradient, which is that of the rows but float32 for amplitudes.
Scalar known_features(const Program& program, Scalar rows);

// The source after kernel_headers, for blocks of so many warps, so many of them at once on a multiprocessor.
std::string constants_of(const Program& program, Scalar rows, std::uint32_t n_warps, std::uint32_t n_blocks, bool backward);

}  // namespace qaa::cuda
