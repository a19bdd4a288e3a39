// Parallel loops on the threads of the process's OpenMP, such as torch's, or on a small pool that lasts for the process,
// survives fork() and is never joined at exit.
#pragma once

#include <functional>

namespace qaa {

// Calls task(0), …, task(n_tasks - 1), each once, on at most `threads` threads including the caller's, and returns
// when all are done. The first exception of a task is thrown again here. If another thread is using the pool, the
// caller does the work alone.
void parallel_for(int n_tasks, int threads, const std::function<void(int)>& task);

}  // namespace qaa
