#include "threads.h"

#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace qaa {
namespace {

// One parallel loop: whoever comes takes the next task.
struct Loop {
  const std::function<void(int)>& task;
  const int n_tasks;
  std::atomic<int> next{0};
  std::mutex failure_mutex;
  std::exception_ptr failure;

  void work() {
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

class Pool {
 public:
  void run(Loop& loop, int helpers) {
    const std::unique_lock in_use(in_use_, std::try_to_lock);
    if (!in_use) return loop.work();
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

  std::mutex in_use_, mutex_;
  std::condition_variable wake_, done_;
  Loop* loop_ = nullptr;
  std::uint64_t generation_ = 0;
  int n_workers_ = 0, invited_ = 0, busy_ = 0;
};

// Leaked on purpose: its threads may outlive static destructors. After fork() the child has none of the threads and
// perhaps a locked mutex, so it gets a new pool.
Pool* pool = nullptr;
void new_pool() { pool = new Pool; }

Pool& get_pool() {
  static std::once_flag once;
  std::call_once(once, [] {
    new_pool();
#if defined(__unix__) || defined(__APPLE__)
    pthread_atfork(nullptr, nullptr, new_pool);
#endif
  });
  return *pool;
}

}  // namespace

void parallel_for(int n_tasks, int threads, const std::function<void(int)>& task) {
  Loop loop{task, n_tasks, {}, {}, {}};
  const int helpers = std::min(threads, n_tasks) - 1;
  if (helpers > 0) {
    get_pool().run(loop, helpers);
  } else {
    loop.work();
  }
  if (loop.failure) std::rethrow_exception(loop.failure);
}

}  // namespace qaa
