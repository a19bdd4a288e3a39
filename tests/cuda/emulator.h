// A GPU on the CPU, for tests: kernel source compiled by the host's compiler, a fiber for every CUDA thread.
//
// A launch runs its grid to the end before it returns. Threads run one at a time, each up to its next barrier or
// shuffle; which one is next, and which blocks are in flight, a seed decides (QAA_EMULATOR_SEED). Shared memory is NaN
// when a block starts. A launch that CUDA would refuse or leave undefined (limits, a barrier that some threads never
// reach, a lane that its mask does not name) fails as a launch does, and cudaGetErrorString tells what happened.
//
// With the address sanitizer, every shared array is an allocation of its own. With the thread sanitizer, every CUDA
// thread is a thread, and nothing but barriers orders what two of them do; shuffles do not. emulator.cpp itself is
// always compiled without sanitizers. What this is not: a model of the memory hierarchy, of time or of streams.
#pragma once

#include <math.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <tuple>
#include <type_traits>

// ------------------------------------------------------------------------------------------------ the language

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __align__(n) alignas(n)
#define __launch_bounds__(...)
#define __grid_constant__

#define QAA_DYNAMIC_SHARED(T, name) T* const name = static_cast<T*>(emulator::dynamic_shared())
#define QAA_SHARED(T, name, size) T(&name)[size] = emulator::static_shared<T[size]>([] {})
#define QAA_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  emulator::launch(kernel, grid, block, shared_bytes, stream, __VA_ARGS__)

#define QAA_EMULATED_VECTOR(T, name)                                                                       \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };                                                       \
  struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) name##4 { T x, y, z, w; };                       \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                                               \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
QAA_EMULATED_VECTOR(float, float)
QAA_EMULATED_VECTOR(double, double)
QAA_EMULATED_VECTOR(int, int)
QAA_EMULATED_VECTOR(unsigned, uint)
#undef QAA_EMULATED_VECTOR

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  unsigned x, y, z;
};

// Of the thread that runs.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

// ------------------------------------------------------------------------------------------------ the runtime

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
using cudaStream_t = struct CUstream_st*;

cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);  // for the newest error, the emulator's own words
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);

namespace emulator {

cudaError_t allow_shared(const void* kernel, cudaFuncAttribute attribute, int bytes);

}  // namespace emulator

inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int bytes) {
  return emulator::allow_shared(kernel, attribute, bytes);
}

// For tests.
extern "C" void qaa_emulator_seed(std::uint64_t seed);
extern "C" void qaa_emulator_shared_limit(std::size_t bytes);  // per block, for kernels that ask for more than 48 KiB
extern "C" const char* qaa_emulator_launches();  // since the last call: lines of kernel, threads, dynamic shared bytes

// ------------------------------------------------------------------------------------------------ threads together

namespace emulator {

using Site = std::source_location;

// Waits for all threads of the block, or for the lanes that `mask` names.
void block_barrier(const char* name, const Site& site);
void warp_barrier(const char* name, const Site& site, unsigned mask);

// Waits for them, too, but orders no memory; the answer is what lane `source` brought, and which lanes brought more
// than zero.
struct Answer {
  std::uint64_t value;
  unsigned non_zero;
};
Answer exchange(const char* name, const Site& site, unsigned mask, std::uint64_t value, unsigned source);

// What a CUDA thread finds at an address; outside of launches everything is the host's.
enum class Memory { host, local, shared, global };
Memory memory_of(const void* address);

unsigned lane();
void* dynamic_shared();
void* static_shared(const void* which, std::size_t bytes);

template <class Array, class Place>
Array& static_shared(Place) {
  static const char which = 0;  // one for every type of `Place`: for every declaration
  return *static_cast<Array*>(static_shared(&which, sizeof(Array)));
}

struct Launch {
  const void* kernel;
  dim3 grid, block;
  std::size_t shared_bytes;
  void (*run)(const void* arguments);
  const void* arguments;
};
void launch(const Launch& launch);

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared_bytes, cudaStream_t,
            const Arguments&... arguments) {
  static_assert((std::is_trivially_copyable_v<Parameters> && ...), "arguments are copied as bytes");
  static_assert((sizeof(Parameters) + ... + 0) <= 4096, "arguments have room for 4 KiB");
  using Call = std::tuple<void (*)(Parameters...), std::remove_const_t<Parameters>...>;
  const Call call{kernel, arguments...};
  auto run = [](const void* call) {
    std::apply([](auto kernel, const auto&... each) { kernel(each...); }, *static_cast<const Call*>(call));
  };
  launch(Launch{reinterpret_cast<const void*>(kernel), grid, block, shared_bytes, run, &call});
}

// Shared memory starts at an address that no part of a state is aligned to.
constexpr unsigned shared_start = 1040;

template <class T>
T shuffle(const char* name, const Site& site, unsigned mask, T value, unsigned source) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(name, site, mask, bits, source).value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace emulator

template <class A>
cudaError_t launch_function(const void* function, dim3 grid, unsigned block, unsigned shared_bytes, cudaStream_t stream,
                            A argument) {
  auto* kernel = reinterpret_cast<void (*)(const A)>(const_cast<void*>(function));
  emulator::launch(kernel, grid, block, shared_bytes, stream, argument);
  return cudaGetLastError();
}
inline void prefetch_line(const void*) {}
inline unsigned shared_address(const void* pointer) {
  const auto* start = static_cast<const unsigned char*>(emulator::dynamic_shared());
  return emulator::shared_start + unsigned(static_cast<const unsigned char*>(pointer) - start);
}
inline void* at_shared_address(void* start, unsigned address) {
  return static_cast<unsigned char*>(start) + (address - emulator::shared_start);
}

inline void __syncthreads(const emulator::Site& site = emulator::Site::current()) {
  emulator::block_barrier("__syncthreads", site);
}
inline void __syncwarp(unsigned mask = ~0u, const emulator::Site& site = emulator::Site::current()) {
  emulator::warp_barrier("__syncwarp", site, mask);
}

// A lane whose partner would lie outside of its group of `width` lanes keeps its own value.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              const emulator::Site& site = emulator::Site::current()) {
  const unsigned group = emulator::lane() & -width;
  return emulator::shuffle("__shfl_sync", site, mask, value, group | (source & (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32,
                  const emulator::Site& site = emulator::Site::current()) {
  const unsigned lane = emulator::lane(), source = lane ^ bits, last = lane | (width - 1);
  return emulator::shuffle("__shfl_xor_sync", site, mask, value, source <= last ? source : lane);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned step, int width = 32,
                   const emulator::Site& site = emulator::Site::current()) {
  const unsigned lane = emulator::lane(), source = lane + step, last = lane | (width - 1);
  return emulator::shuffle("__shfl_down_sync", site, mask, value, source <= last ? source : lane);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, const emulator::Site& site = emulator::Site::current()) {
  return emulator::exchange("__ballot_sync", site, mask, predicate != 0, emulator::lane()).non_zero;
}
inline int __any_sync(unsigned mask, int predicate, const emulator::Site& site = emulator::Site::current()) {
  return emulator::exchange("__any_sync", site, mask, predicate != 0, emulator::lane()).non_zero != 0;
}
inline int __all_sync(unsigned mask, int predicate, const emulator::Site& site = emulator::Site::current()) {
  return emulator::exchange("__all_sync", site, mask, predicate != 0, emulator::lane()).non_zero == mask;
}

// ------------------------------------------------------------------------------------------------ numbers

template <class T>
T __ldg(const T* address) {
  return *address;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(unsigned(bits)); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline float rsqrtf(float value) { return 1 / sqrtf(value); }
inline double rsqrt(double value) { return 1 / sqrt(value); }
inline void sincospi(double turns, double* sine, double* cosine) {  // half turns; as exact as the sine near zero
  const double quarters = nearbyint(2 * turns), rest = 3.141592653589793 * (turns - quarters / 2);
  const double s = sin(rest), c = cos(rest);
  const int quadrant = int(quarters - 4 * floor(quarters / 4));
  *sine = quadrant == 0 ? s : quadrant == 1 ? c : quadrant == 2 ? -s : -c;
  *cosine = quadrant == 0 ? c : quadrant == 1 ? -s : quadrant == 2 ? -c : s;
}

struct __half {
  _Float16 value;
};
inline float __half2float(__half half) { return float(half.value); }
inline __half __float2half_rn(float number) { return {_Float16(number)}; }

struct __nv_bfloat16 {
  std::uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 number) {
  const std::uint32_t bits = std::uint32_t{number.bits} << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline __nv_bfloat16 __float2bfloat16_rn(float number) {
  if (number != number) return {0x7fff};
  std::uint32_t bits;
  std::memcpy(&bits, &number, 4);
  return {std::uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};  // the nearest, and of two as near the even one
}
