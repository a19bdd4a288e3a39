// The few macros that let one source run on a GPU (nvcc) and, in tests, on the CPU (tests/cuda/emulator.h).
//
//   QAA_DYNAMIC_SHARED(T, name)   the block's dynamic shared memory as `T* name`, 16-byte aligned
//   QAA_SHARED(T, name, size)     a static shared array
//   QAA_LAUNCH(kernel, grid, block, shared_bytes, stream, arguments...)
#pragma once

#ifdef QAA_CUDA_EMULATED
#include "emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define QAA_DYNAMIC_SHARED(T, name) extern __shared__ __align__(16) T name[]
#define QAA_SHARED(T, name, size) __shared__ T name[size]
#define QAA_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<(grid), (block), (shared_bytes), (stream)>>>(__VA_ARGS__)
#endif
