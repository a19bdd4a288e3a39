// Theoretical occupancy by NVIDIA's own formulas. Reads lines "architecture registers static_shared threads
// dynamic_shared" and prints the percentage of a multiprocessor's warps that can be resident.
#include <cuda_occupancy.h>

#include <cstddef>
#include <iostream>
#include <string>

// Of one multiprocessor, from the table of technical specifications in the CUDA programming guide.
struct Limits {
  const char* architecture;
  int major, minor, threads, shared_kib, shared_kib_of_block;
};
constexpr Limits all_limits[] = {
    {"sm_80", 8, 0, 2048, 164, 163},
    {"sm_90", 9, 0, 2048, 228, 227},
    {"sm_120", 12, 0, 1536, 100, 99},
};

int main() {
  std::string architecture;
  std::size_t registers, shared, threads, dynamic;
  while (std::cin >> architecture >> registers >> shared >> threads >> dynamic) {
    for (const Limits& limits : all_limits) {
      if (architecture != limits.architecture) continue;
      cudaOccDeviceProp device{};
      device.computeMajor = limits.major;
      device.computeMinor = limits.minor;
      device.maxThreadsPerBlock = 1024;
      device.maxThreadsPerMultiprocessor = limits.threads;
      device.regsPerBlock = device.regsPerMultiprocessor = 65536;
      device.warpSize = 32;
      device.sharedMemPerBlock = 48 << 10;
      device.sharedMemPerMultiprocessor = std::size_t(limits.shared_kib) << 10;
      device.sharedMemPerBlockOptin = std::size_t(limits.shared_kib_of_block) << 10;
      device.reservedSharedMemPerBlock = 1 << 10;
      device.numSms = 1;
      cudaOccFuncAttributes kernel{};
      kernel.maxThreadsPerBlock = 1024;
      kernel.numRegs = int(registers);
      kernel.sharedSizeBytes = shared;
      kernel.maxDynamicSharedSizeBytes = device.sharedMemPerBlockOptin;
      kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
      const cudaOccDeviceState state{};
      cudaOccResult result{};
      if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, int(threads), dynamic) !=
          CUDA_OCC_SUCCESS) {
        return 1;
      }
      std::cout << 100 * result.activeBlocksPerMultiprocessor * int(threads) / limits.threads << '\n';
    }
  }
}
