#include "emulator.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <new>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

// Present when the program runs under a sanitizer, else null.
extern "C" {
#define QAA_IF_PRESENT __attribute__((weak))
QAA_IF_PRESENT void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, std::size_t size);
QAA_IF_PRESENT void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, std::size_t* size);
QAA_IF_PRESENT void __asan_unpoison_memory_region(const volatile void* address, std::size_t size);
QAA_IF_PRESENT void* __tsan_get_current_fiber();
QAA_IF_PRESENT void* __tsan_create_fiber(unsigned flags);
QAA_IF_PRESENT void __tsan_destroy_fiber(void* fiber);
QAA_IF_PRESENT void __tsan_switch_to_fiber(void* fiber, unsigned flags);
QAA_IF_PRESENT void __tsan_acquire(void* address);
QAA_IF_PRESENT void __tsan_release(void* address);
QAA_IF_PRESENT void __tsan_atomic32_store(volatile int* address, int value, int memory_order);
QAA_IF_PRESENT void AnnotateIgnoreWritesBegin(const char* file, int line);
QAA_IF_PRESENT void AnnotateIgnoreWritesEnd(const char* file, int line);
#undef QAA_IF_PRESENT
}

// ------------------------------------------------------------------------------------------------ changing stacks

// Saves what a call preserves on this stack, stores the stack's top in *from, and goes on from the top `to`.
extern "C" void qaa_emulator_switch(void** from, void* to);

#if defined(__x86_64__)
asm(R"(
  .text
  .hidden qaa_emulator_switch
  .globl qaa_emulator_switch
qaa_emulator_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");
constexpr std::size_t return_word = 6, frame_words = 8;  // one more than is taken off: a function expects that
#elif defined(__aarch64__)
asm(R"(
  .text
  .hidden qaa_emulator_switch
  .globl qaa_emulator_switch
qaa_emulator_switch:
  stp x29, x30, [sp, -160]!
  stp x19, x20, [sp, 16]
  stp x21, x22, [sp, 32]
  stp x23, x24, [sp, 48]
  stp x25, x26, [sp, 64]
  stp x27, x28, [sp, 80]
  stp d8, d9, [sp, 96]
  stp d10, d11, [sp, 112]
  stp d12, d13, [sp, 128]
  stp d14, d15, [sp, 144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, 16]
  ldp x21, x22, [sp, 32]
  ldp x23, x24, [sp, 48]
  ldp x25, x26, [sp, 64]
  ldp x27, x28, [sp, 80]
  ldp d8, d9, [sp, 96]
  ldp d10, d11, [sp, 112]
  ldp d12, d13, [sp, 128]
  ldp d14, d15, [sp, 144]
  ldp x29, x30, [sp], 160
  ret
)");
constexpr std::size_t return_word = 1, frame_words = 20;
#else
#error "the emulator can change stacks on x86-64 and aarch64"
#endif

namespace emulator {
namespace {

// To the thread sanitizer, every CUDA thread is a fiber of its own; changing from one to another orders nothing.
bool has_tsan() { return __tsan_create_fiber != nullptr; }
void tsan_switch(void* fiber) {
  constexpr unsigned no_sync = 1;
  if (has_tsan()) __tsan_switch_to_fiber(fiber, no_sync);
}

// ------------------------------------------------------------------------------------------------ state

constexpr unsigned warp_size = 32, all_lanes = ~0u;
constexpr std::size_t default_shared_limit = 48 * 1024;
constexpr unsigned max_threads_in_flight = 2048, max_blocks_in_flight = 8;

std::mt19937_64 engine{[] {
  const char* seed = std::getenv("QAA_EMULATOR_SEED");
  return seed != nullptr ? std::strtoull(seed, nullptr, 10) : 0;
}()};
std::size_t random_below(std::size_t n) { return engine() % n; }

std::size_t shared_limit = 227 * 1024;
std::map<const void*, std::size_t> allowed_shared;  // kernels that asked for more than 48 KiB

std::set<std::string> launched;  // so far

cudaError_t last_error = cudaSuccess;
std::string last_message;
cudaError_t fail(cudaError_t error, std::string message) {
  last_message = std::move(message);
  return last_error = error;
}

// Stacks with a page below them that nobody may touch, kept for the next thread that needs one.
std::vector<char*> free_stacks;
class Stack {
 public:
  Stack() {
    if (!free_stacks.empty()) {
      bottom_ = free_stacks.back();
      free_stacks.pop_back();
      if (__asan_unpoison_memory_region != nullptr) __asan_unpoison_memory_region(bottom_, size);
      return;
    }
    void* memory = mmap(nullptr, page + size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0) throw std::bad_alloc();
    bottom_ = static_cast<char*>(memory) + page;
  }
  ~Stack() { free_stacks.push_back(bottom_); }
  Stack(const Stack&) = delete;

  // What qaa_emulator_switch expects to find there, to call `function`.
  void* top_for(void (*function)()) const {
    void** frame = reinterpret_cast<void**>(bottom_ + size) - frame_words;
    frame[return_word] = reinterpret_cast<void*>(function);
    return frame;
  }
  const char* bottom() const { return bottom_; }

  static constexpr std::size_t page = 4096, size = 32 * page;

 private:
  char* bottom_;
};

// What a thread waits in. Threads meet if they wait in the same place for the same threads.
struct Wait {
  const char* name;
  Site site;
  bool whole_block, orders_memory;
  unsigned mask;         // of the lanes that meet, unless the whole block does
  std::uint64_t value;   // what this lane brings
  unsigned source;       // the lane that brings what this one takes away
  bool meets(const Wait& other) const {
    return site.line() == other.site.line() && site.column() == other.site.column() &&
           site.file_name() == other.site.file_name() && mask == other.mask && whole_block == other.whole_block;
  }
};

enum class State { ready, waiting, exited };

struct Block;
struct Thread {
  Block* block = nullptr;
  unsigned index = 0;  // in the block
  uint3 position{};
  std::uint64_t priority = 0;  // the same for a whole warp
  State state = State::ready;
  Wait wait{};
  Answer answer{};
  const char* mistake = nullptr;  // what it did wrong by itself

  Stack stack;
  void* top = nullptr;  // of the stack, while it does not run
  void* asan_stack = nullptr;
  void* tsan_fiber = nullptr;

  unsigned lane() const { return index % warp_size; }
};

struct SharedArray {
  const void* which;  // null for dynamic shared memory
  std::size_t bytes;
  std::unique_ptr<void, void (*)(void*)> memory;
};

struct Block {
  Block(const uint3& position, unsigned n_threads) : position(position), threads(n_threads), n_ready(n_threads) {}

  const uint3 position;
  std::vector<Thread> threads;
  unsigned n_ready, n_exited = 0;
  std::vector<SharedArray> shared;
  std::size_t shared_bytes = 0;

  // An allocation for each array, so that the address sanitizer sees where one ends. Other threads find it as if it had
  // always been there: to the thread sanitizer nobody wrote the NaNs.
  void* allocate(const void* which, std::size_t bytes) {
    if (AnnotateIgnoreWritesBegin != nullptr) AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
    void* memory = std::malloc(bytes);
    std::memset(memory, 0xff, bytes);
    shared.push_back({which, bytes, {memory, std::free}});
    if (AnnotateIgnoreWritesEnd != nullptr) AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    shared_bytes += bytes;
    return memory;
  }
};

// ------------------------------------------------------------------------------------------------ a grid

std::string text_of(const Site& site) {
  const std::string file = site.file_name();
  return file.substr(file.find_last_of('/') + 1) + ":" + std::to_string(site.line());
}
std::string text_of(const uint3& position) {
  return "(" + std::to_string(position.x) + ", " + std::to_string(position.y) + ", " + std::to_string(position.z) + ")";
}
std::string text_of(const Wait& wait) {
  char mask[32] = "";
  if (!wait.whole_block) std::snprintf(mask, sizeof mask, " with mask 0x%08x", wait.mask);
  return std::string("came to ") + wait.name + " at " + text_of(wait.site) + mask;
}

std::string name_of(const void* kernel) {
  Dl_info info{};
  if (dladdr(kernel, &info) == 0 || info.dli_sname == nullptr) return "unknown kernel";
  char* name = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, nullptr);
  std::string text(name != nullptr ? name : info.dli_sname);
  std::free(name);
  return text;
}

class Grid;
Grid* grid = nullptr;

class Grid {
 public:
  explicit Grid(const Launch& launch) : launch_(launch), eagerness_(1 + 7 * random_below(2)) {
    const std::size_t n_blocks = std::size_t{launch.grid.x} * launch.grid.y * launch.grid.z;
    for (std::size_t b = 0; b < n_blocks; ++b) waiting_.push_back(b);
    std::shuffle(waiting_.begin(), waiting_.end(), engine);
    n_threads_ = launch.block.x * launch.block.y * launch.block.z;
    const std::size_t most = std::max(2u, std::min(max_blocks_in_flight, max_threads_in_flight / n_threads_));
    room_ = 2 + random_below(most - 1);
  }

  // To the thread sanitizer: what the host does next comes after all that the threads did.
  ~Grid() {
    if (!has_tsan()) return;
    for (auto& block : blocks_) {
      for (Thread& thread : block->threads) {
        tsan_switch(thread.tsan_fiber);
        __tsan_release(this);
        tsan_switch(tsan_host_);
        __tsan_destroy_fiber(thread.tsan_fiber);
      }
    }
    __tsan_acquire(this);
  }

  // Throws what went wrong.
  void run() {
    for (;;) {
      while (in_flight_ < room_ && !waiting_.empty()) start_block();
      if (in_flight_ == 0) return;
      Thread& thread = next();
      Block& block = *thread.block;
      resume(thread);
      --block.n_ready;
      if (thread.mistake != nullptr) throw mistake(thread, thread.mistake);
      if (thread.state == State::exited) {
        ++block.n_exited;
      } else {
        arrive(thread);
      }
      if (block.n_exited == n_threads_) {
        finish(block);
      } else if (block.n_ready == 0) {
        throw stalled(block);
      }
    }
  }

  const Launch& launch() const { return launch_; }
  Thread& running() { return *running_; }

  // From a thread back to run().
  void suspend() {
    Thread& self = *running_;
    const bool for_good = self.state == State::exited || self.mistake != nullptr;
    if (__sanitizer_start_switch_fiber != nullptr) {
      __sanitizer_start_switch_fiber(for_good ? nullptr : &self.asan_stack, host_bottom_, host_size_);
    }
    tsan_switch(tsan_host_);
    qaa_emulator_switch(&self.top, host_top_);
    if (__sanitizer_finish_switch_fiber != nullptr) __sanitizer_finish_switch_fiber(self.asan_stack, nullptr, nullptr);
  }

 private:
  static void enter() {
    if (__sanitizer_finish_switch_fiber != nullptr) {
      __sanitizer_finish_switch_fiber(nullptr, &grid->host_bottom_, &grid->host_size_);
    }
    grid->launch_.run(grid->launch_.arguments);
    grid->running_->state = State::exited;
    grid->suspend();
  }

  void resume(Thread& thread) {
    running_ = &thread;
    threadIdx = thread.position;
    blockIdx = thread.block->position;
    blockDim = launch_.block;
    gridDim = launch_.grid;
    void* asan_stack = nullptr;
    if (__sanitizer_start_switch_fiber != nullptr) {
      __sanitizer_start_switch_fiber(&asan_stack, thread.stack.bottom(), Stack::size);
    }
    tsan_switch(thread.tsan_fiber);
    qaa_emulator_switch(&host_top_, thread.top);
    if (__sanitizer_finish_switch_fiber != nullptr) __sanitizer_finish_switch_fiber(asan_stack, nullptr, nullptr);
  }

  void start_block() {
    const dim3 &in_grid = launch_.grid, &in_block = launch_.block;
    const std::size_t b = waiting_.back();
    waiting_.pop_back();
    ++in_flight_;
    const uint3 position{unsigned(b % in_grid.x), unsigned(b / in_grid.x % in_grid.y),
                         unsigned(b / in_grid.x / in_grid.y)};
    Block& block = *blocks_.emplace_back(std::make_unique<Block>(position, n_threads_));
    block.allocate(nullptr, launch_.shared_bytes);
    std::uint64_t priority = 0;
    for (unsigned i = 0; i < n_threads_; ++i) {
      if (i % warp_size == 0) priority = engine();
      Thread& thread = block.threads[i];
      thread.block = &block;
      thread.index = i;
      thread.position = {i % in_block.x, i / in_block.x % in_block.y, i / in_block.x / in_block.y};
      thread.priority = priority;
      thread.top = thread.stack.top_for(&Grid::enter);
      if (has_tsan()) thread.tsan_fiber = __tsan_create_fiber(0);
      ready_.push_back(&thread);
    }
  }

  // Memory and stacks go to later blocks; the thread sanitizer would take that for a race.
  void finish(const Block& finished) {
    --in_flight_;
    if (has_tsan()) return;
    std::erase_if(blocks_, [&](const auto& block) { return block.get() == &finished; });
  }

  // Any thread is as likely as any other, or one out of eight whose warp goes first: then some warps run far ahead.
  Thread& next() {
    std::size_t best = random_below(ready_.size());
    for (unsigned k = 1; k < eagerness_; ++k) {
      const std::size_t other = random_below(ready_.size());
      if (ready_[other]->priority > ready_[best]->priority) best = other;
    }
    std::swap(ready_[best], ready_.back());
    Thread& thread = *ready_.back();
    ready_.pop_back();
    return thread;
  }

  // The thread came to a barrier or a shuffle; if it was the last one to come, all go on.
  void arrive(Thread& thread) {
    Block& block = *thread.block;
    const Wait& wait = thread.wait;
    if (wait.whole_block && block.n_ready > 0) return;
    if (!(wait.mask >> thread.lane() & 1)) throw mistake(thread, text_of(wait) + " that does not name it");
    if (!(wait.mask >> wait.source & 1)) throw mistake(thread, text_of(wait) + " that does not name the lane it reads");
    const unsigned first = wait.whole_block ? 0 : thread.index - thread.lane();
    const unsigned n = wait.whole_block ? n_threads_ : warp_size;
    together_.clear();
    for (unsigned i = 0; i < n; ++i) {
      if (!wait.whole_block && !(wait.mask >> i & 1)) continue;
      if (first + i >= n_threads_) return;
      Thread& other = block.threads[first + i];
      if (other.state != State::waiting || !other.wait.meets(wait)) return;
      together_.push_back(&other);
    }
    unsigned non_zero = 0;
    for (const Thread* other : together_) non_zero |= unsigned(other->wait.value != 0) << other->lane();
    for (Thread* other : together_) {
      other->answer = {block.threads[first + other->wait.source].wait.value, non_zero};
      other->state = State::ready;
      ready_.push_back(other);
    }
    block.n_ready += together_.size();
    if (wait.orders_memory) order(together_);
  }

  // To the thread sanitizer: all that these threads did comes before all that they will do.
  void order(const std::vector<Thread*>& threads) {
    if (!has_tsan()) return;
    constexpr int release = 3;
    for (const Thread* thread : threads) {
      tsan_switch(thread->tsan_fiber);
      if (thread == threads.front()) __tsan_atomic32_store(&meeting_, 0, release);  // forgets whoever met before
      __tsan_release(&meeting_);
    }
    for (const Thread* thread : threads) {
      tsan_switch(thread->tsan_fiber);
      __tsan_acquire(&meeting_);
    }
    tsan_switch(tsan_host_);
  }

  static std::string mistake(const Thread& thread, const std::string& what) {
    return "thread " + text_of(thread.position) + " of block " + text_of(thread.block->position) + " " + what;
  }

  static std::string stalled(const Block& block) {
    std::string message = "block " + text_of(block.position) + " cannot go on:";
    for (std::size_t i = 0, end = 0; i < block.threads.size(); i = end) {
      auto fate = [&](std::size_t thread) {
        const Thread& of = block.threads[thread];
        return of.state == State::exited ? "exited" : text_of(of.wait);
      };
      while (end < block.threads.size() && fate(end) == fate(i)) ++end;
      message += i > 0 ? ", threads " : " threads ";
      message += std::to_string(i) + " to " + std::to_string(end - 1) + " " + fate(i);
    }
    return message;
  }

  const Launch& launch_;
  const std::size_t eagerness_;
  unsigned n_threads_;
  std::size_t room_, in_flight_ = 0;  // for blocks
  std::vector<std::size_t> waiting_;  // blocks that have not started
  std::vector<std::unique_ptr<Block>> blocks_;
  std::vector<Thread*> ready_, together_;
  Thread* running_ = nullptr;
  void* host_top_ = nullptr;
  const void* host_bottom_ = nullptr;
  std::size_t host_size_ = 0;
  void* const tsan_host_ = has_tsan() ? __tsan_get_current_fiber() : nullptr;
  int meeting_ = 0;
};

bool within(const dim3& size, unsigned x, unsigned y, unsigned z) {
  return size.x - 1 < x && size.y - 1 < y && size.z - 1 < z;  // zero wraps around
}

}  // namespace

// ------------------------------------------------------------------------------------------------ what kernels call

unsigned lane() { return grid->running().lane(); }

namespace {

Answer meet(const Wait& wait) {
  Thread& self = grid->running();
  self.wait = wait;
  self.state = State::waiting;
  grid->suspend();
  return self.answer;
}

}  // namespace

void block_barrier(const char* name, const Site& site) { meet({name, site, true, true, all_lanes, 0, 0}); }
void warp_barrier(const char* name, const Site& site, unsigned mask) {
  meet({name, site, false, true, mask, 0, lane()});
}
Answer exchange(const char* name, const Site& site, unsigned mask, std::uint64_t value, unsigned source) {
  return meet({name, site, false, false, mask, value, source});
}

Memory memory_of(const void* address) {
  if (grid == nullptr) return Memory::host;
  auto inside = [&](const void* start, std::size_t bytes) {
    return std::uintptr_t(address) - std::uintptr_t(start) < bytes;
  };
  const Thread& self = grid->running();
  if (inside(self.stack.bottom(), Stack::size)) return Memory::local;
  for (const SharedArray& array : self.block->shared) {
    if (inside(array.memory.get(), array.bytes)) return Memory::shared;
  }
  return Memory::global;
}

void* dynamic_shared() { return grid->running().block->shared.front().memory.get(); }

void* static_shared(const void* which, std::size_t bytes) {
  Thread& self = grid->running();
  Block& block = *self.block;
  for (const SharedArray& array : block.shared) {
    if (array.which == which) return array.memory.get();
  }
  const auto allowed = allowed_shared.find(grid->launch().kernel);
  if (block.shared_bytes + bytes > (allowed != allowed_shared.end() ? shared_limit : default_shared_limit)) {
    self.mistake = "needs more shared memory than a block may have";
    grid->suspend();
  }
  return block.allocate(which, bytes);
}

// ------------------------------------------------------------------------------------------------ what hosts call

void launch(const Launch& launch) {
  if (!within(launch.grid, 0x7fffffff, 65535, 65535) || !within(launch.block, 1024, 1024, 64) ||
      launch.block.x * launch.block.y * launch.block.z > 1024) {
    fail(cudaErrorInvalidConfiguration, "expected 1 to 1024 threads in a block and at least one block");
    return;
  }
  const auto allowed = allowed_shared.find(launch.kernel);
  const std::size_t limit = allowed != allowed_shared.end() ? allowed->second : default_shared_limit;
  if (launch.shared_bytes > limit) {
    fail(cudaErrorInvalidValue, "expected at most " + std::to_string(limit) +
                                    " bytes of dynamic shared memory for this kernel, received " +
                                    std::to_string(launch.shared_bytes));
    return;
  }
  const unsigned n_threads = launch.block.x * launch.block.y * launch.block.z;
  launched.insert(name_of(launch.kernel) + '\t' + std::to_string(n_threads) + '\t' +
                  std::to_string(launch.shared_bytes));
  Grid running(launch);
  grid = &running;
  try {
    running.run();
  } catch (const std::string& message) {
    fail(cudaErrorLaunchFailure, message);
  }
  grid = nullptr;
}

cudaError_t allow_shared(const void* kernel, cudaFuncAttribute attribute, int bytes) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || bytes < 0 || std::size_t(bytes) > shared_limit) {
    return fail(cudaErrorInvalidValue, "expected at most " + std::to_string(shared_limit) +
                                           " bytes of shared memory, received " + std::to_string(bytes));
  }
  allowed_shared[kernel] = std::max(std::size_t(bytes), default_shared_limit);
  return cudaSuccess;
}

}  // namespace emulator

cudaError_t cudaGetLastError() { return std::exchange(emulator::last_error, cudaSuccess); }
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : emulator::last_message.c_str();
}
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? 2 : int(emulator::shared_limit);
  return cudaSuccess;
}

extern "C" void qaa_emulator_seed(std::uint64_t seed) { emulator::engine.seed(seed); }
extern "C" void qaa_emulator_shared_limit(std::size_t bytes) { emulator::shared_limit = bytes; }
extern "C" const char* qaa_emulator_launches() {
  static std::string lines;
  lines.clear();
  for (const std::string& launch : std::exchange(emulator::launched, {})) lines += launch + '\n';
  return lines.c_str();
}
