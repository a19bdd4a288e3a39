// The instances of the kernels that launch.cu uses, for tests/cuda_evidence.py. Those of float (QAA_NUMBER=float) have
// no double arithmetic; the two small kernels at the ends of a call have, on purpose, and are compiled with double.
#include "cuda/kernels.cuh"

namespace qaa::cuda {

#define QAA_CIRCUIT_KERNELS(T, in_warp, in_shared)                                                 \
  template __global__ void forward_kernel<T, in_warp, in_shared>(const __grid_constant__ Arguments<T>); \
  template __global__ void backward_kernel<T, in_warp, in_shared>(const __grid_constant__ Arguments<T>);
QAA_CIRCUIT_KERNELS(QAA_NUMBER, true, true)
QAA_CIRCUIT_KERNELS(QAA_NUMBER, true, false)
QAA_CIRCUIT_KERNELS(QAA_NUMBER, false, true)
QAA_CIRCUIT_KERNELS(QAA_NUMBER, false, false)

#define QAA_KERNELS_AT_THE_ENDS(T)                                                    \
  template __global__ void bind_kernel<T>(const __grid_constant__ Arguments<T>, T*); \
  template __global__ void chain_rule_kernel<T>(const __grid_constant__ Arguments<T>);
#ifdef QAA_AT_THE_ENDS
QAA_KERNELS_AT_THE_ENDS(float)
QAA_KERNELS_AT_THE_ENDS(double)
#endif

}  // namespace qaa::cuda
