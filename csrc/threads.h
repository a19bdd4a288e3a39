// Parallel loops on the threads of the process's OpenMP, such as torch's, or on a small pool that lasts for the process,
// survives fork() and is never joined at exit; and the arithmetic that threads compute with.
#pragma once

#include <cstdint>
#include <functional>

namespace qaa {

// IEEE arithmetic, rounding to nearest and with subnormal numbers, while it lives, whatever the thread came with: torch
// and XLA let threads take subnormal numbers for zero. What the thread came with is back afterwards.
class DefaultArithmetic {
 public:
  DefaultArithmetic();
  ~DefaultArithmetic();
  DefaultArithmetic(const DefaultArithmetic&) = delete;
  DefaultArithmetic& operator=(const DefaultArithmetic&) = delete;

 private:
  const std::uint64_t before_;
};

// Calls task(0), …, task(n_tasks - 1), each once, on at most `threads` threads including the caller's, and returns
// when all are done; they compute in DefaultArithmetic. The first exception of a task is thrown again here. If another
// thread is using the pool, the caller does the work alone.
void parallel_for(int n_tasks, int threads, const std::function<void(int)>& task);

}  // namespace qaa
