// What lets one source run on a GPU, compiled by nvcc or at run time, and in tests on the CPU (tests/cuda/emulator.h).
//
//   QAA_DYNAMIC_SHARED(T, name)   the block's dynamic shared memory as `T* name`, 16-byte aligned
//   QAA_SHARED(T, name, size)     a static shared array
//   QAA_LAUNCH(kernel, grid, block, shared_bytes, stream, arguments...)
//   launch_function(function, grid, block, shared_bytes, stream, argument)   as cudaLaunchKernel
//   prefetch_line(pointer)        asks for 128 bytes of global memory
//   shared_address(pointer)       the address in shared memory, of 32 bits
//   at_shared_address(start, a)   and the pointer to address a; start is the pointer to the block's dynamic memory
#pragma once

#ifdef QAA_CUDA_EMULATED
#include "emulator.h"
#else
#ifdef __CUDACC_RTC__  // no headers are at hand there

struct __half {
  unsigned short bits;
};
__device__ __forceinline__ float __half2float(__half number) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(number.bits));
  return value;
}
__device__ __forceinline__ __half __float2half_rn(float value) {
  __half number;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(number.bits) : "f"(value));
  return number;
}
struct __nv_bfloat16 {
  unsigned short bits;
};
__device__ __forceinline__ float __bfloat162float(__nv_bfloat16 number) {
  return __uint_as_float(unsigned(number.bits) << 16);
}
__device__ __forceinline__ __nv_bfloat16 __float2bfloat16_rn(float value) {
  __nv_bfloat16 number;
#if __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(number.bits) : "f"(value));
#else
  const unsigned bits = __float_as_uint(value);
  number.bits = value != value ? 0x7fff : (unsigned short)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
#endif
  return number;
}
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#define QAA_DYNAMIC_SHARED(T, name) extern __shared__ __align__(16) T name[]
#define QAA_SHARED(T, name, size) __shared__ T name[size]
#define QAA_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<(grid), (block), (shared_bytes), (stream)>>>(__VA_ARGS__)

#ifndef __CUDACC_RTC__
template <class A>
cudaError_t launch_function(const void* function, dim3 grid, unsigned block, unsigned shared_bytes, cudaStream_t stream,
                            A argument) {
  void* arguments[] = {&argument};
  return cudaLaunchKernel(function, grid, block, arguments, shared_bytes, stream);
}
#endif

__device__ __forceinline__ void prefetch_line(const void* global) {
  asm volatile("prefetch.global.L1 [%0];" ::"l"(global));
}
__device__ __forceinline__ unsigned shared_address(const void* pointer) { return unsigned(__cvta_generic_to_shared(pointer)); }
__device__ __forceinline__ void* at_shared_address(const void*, unsigned address) {
  return __cvta_shared_to_generic(address);
}
#endif
