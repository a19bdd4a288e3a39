// Small kernels, each with one bug that is planted by name; without a name they are right. `planted_bugs NAME` runs
// under eight seeds and exits with 0 if it saw nothing wrong.
//
// The work: row sums of a matrix. A block takes a row in slices of its width; it puts a slice into shared memory in
// reverse order, adds it up in a tree (or by shuffles, in the second kernel), and goes on to the next one.
#include <cstdio>
#include <string_view>
#include <vector>

#include "cuda/portable.cuh"

enum class Bug {
  none,
  no_barrier_before_read,
  no_barrier_after_read,
  no_barrier_in_reduction,
  no_warp_barrier,
  shuffle_for_barrier,
  shared_out_of_bounds,
  static_shared_out_of_bounds,
  global_out_of_bounds,
  misaligned_vector,
  exit_before_barrier,
  divergent_barrier,
  mask_without_caller,
  mask_without_source,
  lane_stays_away,
  masks_differ,
  uninitialised_slot,
  race_between_blocks,
  race_without_consequence,
  too_many_threads,
  too_much_shared_memory,
  too_much_static_shared_memory,
};
constexpr const char* names[] = {
    "none", "no_barrier_before_read", "no_barrier_after_read", "no_barrier_in_reduction", "no_warp_barrier",
    "shuffle_for_barrier",
    "shared_out_of_bounds", "static_shared_out_of_bounds", "global_out_of_bounds", "misaligned_vector",
    "exit_before_barrier", "divergent_barrier", "mask_without_caller", "mask_without_source", "lane_stays_away",
    "masks_differ", "uninitialised_slot", "race_between_blocks", "race_without_consequence", "too_many_threads",
    "too_much_shared_memory", "too_much_static_shared_memory",
};

constexpr int threads = 64, slices = 3, rows = 4, columns = slices * threads;

struct Arguments {
  const float* matrix;  // (rows, columns)
  float* sums;          // of each row
  Bug bug;
};

__global__ void __launch_bounds__(threads) add_by_tree(const Arguments a) {
  QAA_DYNAMIC_SHARED(float, slice);
  QAA_SHARED(float, total, 1);
  const int t = threadIdx.x;
  const Bug bug = a.bug;
  if (t == 0 && bug != Bug::uninitialised_slot) total[bug == Bug::static_shared_out_of_bounds ? 1 : 0] = 0;
  if (bug == Bug::exit_before_barrier && t == 5) return;
  for (int s = 0; s < slices; ++s) {
    const int from = blockIdx.x * columns + s * threads + t;
    slice[bug == Bug::shared_out_of_bounds ? threads - t : threads - 1 - t] =
        a.matrix[bug == Bug::global_out_of_bounds ? from + 1 : from];
    if (bug == Bug::divergent_barrier && t < threads / 2) {
      __syncthreads();
    } else if (bug != Bug::no_barrier_before_read) {
      __syncthreads();
    }
    for (int step = threads / 2; step > 0; step /= 2) {
      if (t < step) slice[t] += slice[t + step];
      if (bug != Bug::no_barrier_in_reduction) __syncthreads();
    }
    if (t == 0) total[0] += slice[0];
    if (bug != Bug::no_barrier_after_read) __syncthreads();
  }
  if (t == 0 && bug == Bug::race_without_consequence) total[0] += 0 * a.sums[rows - 1 - blockIdx.x];
  if (t == 0) a.sums[bug == Bug::race_between_blocks ? 0 : blockIdx.x] = total[0];
}

// One warp for each row.
__global__ void __launch_bounds__(threads) add_by_shuffles(const Arguments a) {
  QAA_DYNAMIC_SHARED(float, shared);
  const int lane = threadIdx.x % 32, row = 2 * blockIdx.x + threadIdx.x / 32;
  const Bug bug = a.bug;
  float* of_warp = shared + threadIdx.x - lane;
  float sum = 0;
  for (int c = lane; c < columns / 4; c += 32) {
    const float* from = a.matrix + row * columns + 4 * c + (bug == Bug::misaligned_vector ? 1 : 0);
    if (4 * c + 4 < columns || bug != Bug::misaligned_vector) {
      const float4 four = *reinterpret_cast<const float4*>(from);
      sum += four.x + four.y + four.z + four.w;
    }
  }
  const unsigned whole = 0xffffffff;
  if (bug == Bug::mask_without_caller) {
    sum += __shfl_xor_sync(whole >> 1, sum, 16);
  } else if (bug == Bug::mask_without_source) {
    if (lane < 16) sum += __shfl_xor_sync(whole >> 16, sum, 16);
  } else if (bug == Bug::lane_stays_away) {
    if (lane != 3) sum += __shfl_xor_sync(whole, sum, 16);
  } else if (bug == Bug::masks_differ) {
    sum += __shfl_xor_sync(lane % 16 == 3 ? 0x00080008 : whole, sum, 16);
  } else {
    sum += __shfl_xor_sync(whole, sum, 16);
  }
  for (int step = 8; step > 1; step /= 2) sum += __shfl_xor_sync(whole, sum, step);
  of_warp[31 - lane] = sum;
  if (bug == Bug::shuffle_for_barrier) {
    __shfl_xor_sync(whole, sum, 1);
  } else if (bug != Bug::no_warp_barrier) {
    __syncwarp();
  }
  if (lane == 0) a.sums[row] = of_warp[0] + of_warp[1];
}

__global__ void needs_static_shared_memory(const Arguments) {
  QAA_SHARED(double, first, 4096);
  QAA_SHARED(double, second, 4096);
  first[threadIdx.x] = second[threadIdx.x] = 0;
}

bool is_right(Bug bug) {
  std::vector<float> matrix(rows * columns), sums(rows, -1);
  for (int i = 0; i < rows * columns; ++i) matrix[i] = float(i % 17 - i % 5);
  const Arguments arguments{matrix.data(), sums.data(), bug};
  if (bug == Bug::too_much_static_shared_memory) {
    QAA_LAUNCH(needs_static_shared_memory, 1, threads, 0, nullptr, arguments);
  } else {
    const std::size_t bytes = bug == Bug::too_much_shared_memory ? 48 * 1024 + 4 : threads * sizeof(float);
    QAA_LAUNCH(add_by_tree, rows, bug == Bug::too_many_threads ? 1025 : threads, bytes, nullptr, arguments);
  }
  bool right = true;
  auto check = [&](const char* kernel) {
    if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) {
      std::printf("%s: %s\n", kernel, cudaGetErrorString(error));
      right = false;
    }
    for (int r = 0; r < rows; ++r) {
      float expected = 0;
      for (int c = 0; c < columns; ++c) expected += matrix[r * columns + c];
      if (sums[r] == expected) continue;
      std::printf("%s: expected %g as the sum of row %d, received %g\n", kernel, expected, r, sums[r]);
      right = false;
    }
  };
  check("add_by_tree");
  sums.assign(rows, -1);
  QAA_LAUNCH(add_by_shuffles, rows / 2, threads, threads * sizeof(float), nullptr, arguments);
  check("add_by_shuffles");
  return right;
}

int main(int, char** arguments) {
  for (int bug = 0; bug < int(std::size(names)); ++bug) {
    if (std::string_view(arguments[1]) != names[bug]) continue;
    int n_right = 0;
    for (int seed = 0; seed < 8; ++seed) {
      qaa_emulator_seed(seed);
      n_right += is_right(Bug(bug));
    }
    std::printf("%d of 8 seeds saw nothing wrong\n", n_right);
    return n_right < 8;
  }
  for (const char* name : names) std::puts(name);
  return 2;
}
