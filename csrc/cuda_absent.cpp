// Stands in for csrc/cuda/ where the build has no CUDA.
#include <stdexcept>

#include "cuda.h"

namespace qaa::cuda {
namespace {

[[noreturn]] void refuse() {
  throw std::runtime_error(
      "expected a build of qaa with CUDA kernels (pip install . -Ccmake.define.QAA_CUDA=ON), received one without");
}

}  // namespace

bool is_built() { return false; }
bool is_available() { return false; }
Program::Program(const Plan& of, bool) : plan(of) { refuse(); }
bool Program::can_be_known(const Plan&) { return false; }
std::size_t workspace_bytes(const Program&, std::int64_t, Scalar, bool, std::int64_t) { refuse(); }
void forward(const ForwardCall&) { refuse(); }
void backward(const BackwardCall&) { refuse(); }
std::string known_source(const Program&, Scalar, bool) { refuse(); }
const char* kernel_headers() { refuse(); }
const void* load_kernel(const void*) { refuse(); }

}  // namespace qaa::cuda
