#include "threads.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <optional>
#include <system_error>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#include <pthread.h>
#include <sys/stat.h>
#endif

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace qaa {
namespace {

// The register that controls rounding, subnormal numbers and exceptions, and its default value.
#if defined(__SSE__)
constexpr std::uint64_t default_control = 0x1F80;  // MXCSR, all exceptions masked
std::uint64_t control() { return _mm_getcsr(); }
void set_control(std::uint64_t value) { _mm_setcsr(unsigned(value)); }
#elif defined(__aarch64__)
constexpr std::uint64_t default_control = 0;  // FPCR
std::uint64_t control() {
  std::uint64_t value;
  asm volatile("mrs %0, fpcr" : "=r"(value));
  return value;
}
void set_control(std::uint64_t value) { asm volatile("msr fpcr, %0" : : "r"(value)); }
#else
constexpr std::uint64_t default_control = 0;
std::uint64_t control() { return default_control; }
void set_control(std::uint64_t) {}
#endif

// One parallel loop: whoever comes takes the next task.
struct Loop {
  const std::function<void(int)>& task;
  const int n_tasks;
  std::atomic<int> next{0};
  std::mutex failure_mutex;
  std::exception_ptr failure;

  void work() {
    const DefaultArithmetic here;
    for (int t; (t = next.fetch_add(1)) < n_tasks;) {
      try {
        task(t);
      } catch (...) {
        const std::lock_guard lock(failure_mutex);
        if (!failure) failure = std::current_exception();
      }
    }
  }
};

// How many threads the process has; nothing where the system does not tell.
std::optional<int> process_threads() {
#if defined(__linux__)
  struct stat tasks;
  if (stat("/proc/self/task", &tasks) == 0) return int(tasks.st_nlink) - 2;
#endif
  return {};
}

// The threads of OpenMP go on spinning for a while after a loop, as torch's do after each operation, and would share the
// cores with threads of ours. Where the process shows such a runtime, GNU's or LLVM's, its threads do the work.
class OpenMp {
 public:
  // Whether it has been found, which may be after the first call, and gives so many threads to this one. `others` are
  // threads that are none of its own. A child that loaded this library after its fork may have a runtime whose threads
  // were the parent's and are waited for in vain: hence not before the process has as many threads as it would use.
  bool has(int threads, int others) {
#if defined(__unix__) || defined(__APPLE__)
    if (region_ == nullptr) {
      max_threads_ = reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, "omp_get_max_threads"));
      if (max_threads_ != nullptr) region_ = reinterpret_cast<Region>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    }
#endif
    if (region_ == nullptr || max_threads_() < threads) return false;
    if (!is_alive_) {
      const std::optional<int> known = process_threads();
      is_alive_ = !known || *known - others >= max_threads_();
    }
    return is_alive_;
  }

  // All of its threads come, since a smaller team would make it end the others; only so many work.
  void run(Loop& loop, int threads) {
    struct Team {
      Loop& loop;
      std::atomic<int> places;
    } team{loop, threads};
    auto join = [](void* it) {
      Team& team = *static_cast<Team*>(it);
      if (team.places.fetch_sub(1) > 0) team.loop.work();
    };
    region_(join, &team, 0, 0);
  }

 private:
  // What compilers call for a parallel region: the function on so many threads, 0 for the usual number.
  using Region = void (*)(void (*function)(void*), void* argument, unsigned threads, unsigned flags);

  bool is_alive_ = false;
  Region region_ = nullptr;
  int (*max_threads_)() = nullptr;
};

class Pool {
 public:
  explicit Pool(bool is_forked) : is_forked_(is_forked) {}

  void run(Loop& loop, int helpers) {
    const std::unique_lock in_use(in_use_, std::try_to_lock);
    if (!in_use) return loop.work();
    if (!is_forked_ && openmp_.has(helpers + 1, n_workers_)) return openmp_.run(loop, helpers + 1);
    {
      const std::lock_guard lock(mutex_);
      for (; n_workers_ < helpers; ++n_workers_) {
        try {
          std::thread([this, id = n_workers_] { serve(id); }).detach();
        } catch (const std::system_error&) {
          break;  // no more threads to be had: fewer helpers, the same result
        }
      }
      loop_ = &loop;
      invited_ = std::min(helpers, n_workers_);
      busy_ = invited_;
      ++generation_;
    }
    wake_.notify_all();
    loop.work();
    std::unique_lock lock(mutex_);
    done_.wait(lock, [this] { return busy_ == 0; });
    loop_ = nullptr;
  }

 private:
  void serve(int id) {
    std::uint64_t seen = 0;
    std::unique_lock lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return generation_ != seen && loop_ != nullptr; });
      seen = generation_;
      if (id >= invited_) continue;
      Loop* loop = loop_;
      lock.unlock();
      loop->work();
      lock.lock();
      if (--busy_ == 0) done_.notify_one();
    }
  }

  const bool is_forked_;
  OpenMp openmp_;
  std::mutex in_use_, mutex_;
  std::condition_variable wake_, done_;
  Loop* loop_ = nullptr;
  std::uint64_t generation_ = 0;
  int n_workers_ = 0, invited_ = 0, busy_ = 0;
};

// Leaked on purpose: its threads may outlive static destructors. After fork() the child has none of the threads, neither
// of a pool nor of OpenMP, and perhaps a locked mutex, so it gets a new pool; also where the parent had not used its own.
Pool*& pool() {
  static Pool* current = [] {
#if defined(__unix__) || defined(__APPLE__)
    pthread_atfork(nullptr, nullptr, [] { pool() = new Pool(true); });
#endif
    return new Pool(false);
  }();
  return current;
}

[[maybe_unused]] const Pool* const made_when_loaded = pool();

}  // namespace

// Not inline, so that no arithmetic is moved across.
DefaultArithmetic::DefaultArithmetic() : before_(control()) { set_control(default_control); }
DefaultArithmetic::~DefaultArithmetic() { set_control(before_); }

void parallel_for(int n_tasks, int threads, const std::function<void(int)>& task) {
  Loop loop{task, n_tasks, {}, {}, {}};
  const int helpers = std::min(threads, n_tasks) - 1;
  if (helpers > 0) {
    pool()->run(loop, helpers);
  } else {
    loop.work();
  }
  if (loop.failure) std::rethrow_exception(loop.failure);
}

}  // namespace qaa
