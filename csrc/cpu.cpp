// Batches on the CPU: checks, the choice of instruction set, threads, and the order in which gradients are summed.
#include "cpu.h"

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <string>

#include "checks.h"
#include "threads.h"

#ifdef QAA_HAS_AVX2
#include <cpuid.h>
#endif

namespace qaa {

#define QAA_DECLARE_ISA(name)                     \
  namespace name {                                \
  extern const InstructionSet instruction_set;    \
  }
QAA_DECLARE_ISA(baseline)
#ifdef QAA_HAS_AVX2
QAA_DECLARE_ISA(avx2)
#endif
#ifdef QAA_HAS_AVX512
QAA_DECLARE_ISA(avx512)
#endif
#ifdef QAA_HAS_NEON
QAA_DECLARE_ISA(neon)
#endif

namespace {

// Conversions of float16 in the AVX2 and AVX-512 kernels. Not every compiler's __builtin_cpu_supports knows it.
#ifdef QAA_HAS_AVX2
bool supports_f16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}

bool supports_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && supports_f16c(); }
#endif

struct Candidate {
  const InstructionSet* set;
  bool runs_here;
};

// Best first.
std::vector<Candidate> candidates() {
  std::vector<Candidate> out;
#ifdef QAA_HAS_AVX512
  out.push_back({&avx512::instruction_set,
                 supports_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                     __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")});
#endif
#ifdef QAA_HAS_AVX2
  out.push_back({&avx2::instruction_set, supports_avx2()});
#endif
#ifdef QAA_HAS_NEON
  out.push_back({&neon::instruction_set, true});
#endif
  out.push_back({&baseline::instruction_set, true});
  return out;
}

const InstructionSet& choose() {
  const char* wanted = std::getenv("QAA_ISA");
  const std::vector<Candidate> all = candidates();
  if (wanted == nullptr || *wanted == '\0') return *std::ranges::find_if(all, &Candidate::runs_here)->set;
  std::string names;
  for (const Candidate& c : all) {
    if (!c.runs_here) continue;
    if (std::string(wanted) == c.set->name) return *c.set;
    names += (names.empty() ? "" : ", ") + std::string(c.set->name);
  }
  throw std::runtime_error("expected QAA_ISA to be one of " + names + " on this machine, received '" + wanted + "'");
}

}  // namespace

const InstructionSet& chosen_instruction_set() {
  static const InstructionSet& chosen = choose();
  return chosen;
}

namespace {

template <class T>
const CpuKernels<T>& kernels_of(const InstructionSet& set) {
  if constexpr (sizeof(T) == 8) {
    return set.f64;
  } else {
    return set.f32;
  }
}

// Aligned memory that a thread keeps between calls, so that a call neither allocates nor touches fresh pages.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  void* at_least(std::size_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      data_ = nullptr;
      size_ = 0;
      const std::size_t rounded = (bytes + 4095) / 4096 * 4096;
      data_ = std::aligned_alloc(4096, rounded);
      if (data_ == nullptr) throw std::bad_alloc();
      size_ = rounded;
    }
    return data_;
  }

 private:
  void* data_ = nullptr;
  std::size_t size_ = 0;
};

template <class T>
void* scratch(const InstructionSet& set, const BoundPlan<T>& bound) {
  return scratch_memory(kernels_of<T>(set).workspace_vectors(bound) * std::size_t(set.vector_bytes));
}

std::uint32_t bits_of(int width) { return std::uint32_t(std::countr_zero(unsigned(width))); }

// How many of the W lanes belong to one row: the more, the fewer rows there are. A group of rows takes its time however
// few of them there are.
std::uint32_t lane_bits_for(std::int64_t rows, int width, std::uint32_t n_wires) {
  const std::uint32_t all = bits_of(width);
  std::uint32_t rows_bits = 0;
  while (rows_bits < all && (std::int64_t{1} << rows_bits) < rows) ++rows_bits;
  return std::min(n_wires, all - rows_bits);
}

// The batch is cut into chunks of whole groups of rows. Their number depends on the batch alone, never on the number of
// threads, and their gradients are added in order: results are equal to the bit for any number of threads.
struct Chunks {
  static constexpr std::int64_t at_most = 64;
  std::int64_t n_groups, n_chunks;
  Chunks(std::int64_t rows, int rows_of_group)
      : n_groups((rows + rows_of_group - 1) / rows_of_group), n_chunks(std::min(n_groups, at_most)) {}
  std::int64_t first(std::int64_t chunk) const { return chunk * n_groups / n_chunks; }
};

// What a call works with.
template <class T>
struct Setting {
  const InstructionSet& set = chosen_instruction_set();
  const CpuKernels<T>& kernel = kernels_of<T>(set);
  const std::uint32_t lane_bits;
  BoundPlanStorage<T> storage;
  const Chunks chunks;
  std::vector<double> slots;  // derivatives, of all rows and then of every chunk

  Setting(const Plan& plan, const double* theta, const ConstMatrix& x, bool with_adjoint, bool reads_strings)
      : lane_bits(lane_bits_for(x.rows, kernel.width, plan.n_wires)),
        storage(plan, plan.layout(lane_bits, bits_of(kernel.width) - lane_bits), theta, x.columns, with_adjoint,
                reads_strings),
        chunks(x.rows, kernel.width >> lane_bits) {}
};

std::int64_t rows_of(const ForwardCall& call) { return call.features.rows; }
std::int64_t rows_of(const BackwardCall& call) { return call.grad.rows; }

// Small batches are not worth waking other threads for.
template <class Call>
int useful_threads(const Call& call) {
  constexpr std::int64_t amplitudes_per_thread = 1 << 16;
  const std::int64_t useful = 1 + rows_of(call) * std::int64_t{call.plan.n_amplitudes()} / amplitudes_per_thread;
  return int(std::min<std::int64_t>(call.threads, useful));
}

template <class T>
void run(const Setting<T>& with, const ForwardCall& call) {
  const BoundPlan<T>& bound = with.storage.bound();
  const Chunks& chunks = with.chunks;
  parallel_for(int(chunks.n_chunks), useful_threads(call), [&](int c) {
    with.kernel.forward(bound, call, chunks.first(c), chunks.first(c + 1), scratch(with.set, bound));
  });
}

template <class T>
void run(Setting<T>& with, const BackwardCall& call) {
  const BoundPlan<T>& bound = with.storage.bound();
  const Chunks& chunks = with.chunks;
  const std::size_t n_slots = bound.n_slots;
  with.slots.assign(n_slots * std::size_t(1 + chunks.n_chunks), 0.0);
  double *const slots = with.slots.data(), *const partial = slots + n_slots;
  parallel_for(int(chunks.n_chunks), useful_threads(call), [&](int c) {
    with.kernel.backward(bound, call, chunks.first(c), chunks.first(c + 1), scratch(with.set, bound),
                         partial + n_slots * std::size_t(c));
  });
  for (std::size_t k = 0; k < n_slots * std::size_t(chunks.n_chunks); ++k) slots[k % n_slots] += partial[k];
  std::fill_n(call.grad_theta, call.plan.n_parameters, 0.0);
  with.storage.chain_rule(slots, call.grad_theta);
}

// The kernels have one of their own: they share no functions with code for other processors (docs/adr/0003).
std::int64_t size_of(Scalar scalar) { return scalar == Scalar::float64 ? 8 : scalar == Scalar::float32 ? 4 : 2; }

template <class M>
M cut(M m, std::int64_t first, std::int64_t count) {
  using Byte = std::conditional_t<std::is_const_v<std::remove_pointer_t<decltype(m.data)>>, const char, char>;
  if (m.data != nullptr) m.data = static_cast<Byte*>(m.data) + first * m.row_stride * size_of(m.scalar);
  m.rows = count;
  return m;
}

ForwardCall group_of(const ForwardCall& call, std::int64_t g, int threads) {
  const std::int64_t count = rows_of(call) / call.groups, first = g * count;
  const bool share = call.x.rows != rows_of(call);
  return {call.plan, call.theta + g * std::int64_t{call.plan.n_parameters}, cut(call.x, share ? 0 : first, count),
          cut(call.features, first, count), threads, 1, cut(call.strings, first, count)};
}

BackwardCall group_of(const BackwardCall& call, std::int64_t g, int threads) {
  const std::int64_t count = rows_of(call) / call.groups, first = g * count;
  const std::int64_t parameter = g * std::int64_t{call.plan.n_parameters};
  const bool share = call.x.rows != rows_of(call);
  return {call.plan, call.theta + parameter, cut(call.x, share ? 0 : first, count), cut(call.grad, first, count),
          call.grad_theta + parameter, cut(call.grad_x, first, count), threads, 1, cut(call.strings, first, count)};
}

// Threads share the groups, or each group's rows where there are fewer groups than threads. A group's bits are those
// that it has in a call of its own.
template <class T, class Call>
void run_as(const Call& call) {
  constexpr bool with_adjoint = std::is_same_v<Call, BackwardCall>;
  const bool reads_strings = !with_adjoint || call.strings.data == nullptr;
  if (call.groups == 1) {
    Setting<T> with(call.plan, call.theta, call.x, with_adjoint, reads_strings);
    return run(with, call);
  }
  const int threads = useful_threads(call);
  const bool shared = call.groups >= threads;
  const std::int64_t parts = std::min<std::int64_t>(call.groups, shared ? 8 * threads : 1);
  parallel_for(int(parts), shared ? threads : 1, [&](int part) {
    const std::int64_t first = part * call.groups / parts, last = (part + 1) * call.groups / parts;
    const Call start = group_of(call, first, 1);
    Setting<T> with(call.plan, start.theta, start.x, with_adjoint, reads_strings);
    for (std::int64_t g = first; g < last; ++g) {
      const Call group = group_of(call, g, shared ? 1 : threads);
      if (g > first) with.storage.bind(group.theta);
      run(with, group);
    }
  });
}

// A weight (columns, k) as (k, padded columns), times a factor.
template <class T>
std::vector<T> transposed(const ConstMatrix& m, double factor, int width) {
  const std::int64_t padded = (m.rows + width - 1) / width * width;
  std::vector<T> out(std::size_t(m.columns * padded), T(0));
  const T* in = static_cast<const T*>(m.data);
  for (std::int64_t c = 0; c < m.rows; ++c) {
    const T* row = in + c * m.row_stride;
    for (std::int64_t k = 0; k < m.columns; ++k) out[std::size_t(k * padded + c)] = T(factor * row[k]);
  }
  return out;
}

// Chunks for work in which every chunk has sums of the size of the weight.
std::int64_t n_projection_chunks(std::int64_t rows) { return std::clamp<std::int64_t>(rows / 64, 1, 16); }

int useful_projection_threads(int threads, std::int64_t rows, std::int64_t columns) {
  return int(std::min<std::int64_t>(threads, 1 + rows * columns / (1 << 18)));
}

template <class T>
void project_as(const ProjectCall& call) {
  const CpuKernels<T>& kernel = kernels_of<T>(chosen_instruction_set());
  const std::vector<T> up = transposed<T>(call.up, call.scale, kernel.width);
  std::vector<T> bias(up.size() / std::size_t(call.up.columns), T(0));
  if (call.bias.data != nullptr) {
    const T* in = static_cast<const T*>(call.bias.data);
    for (std::int64_t c = 0; c < call.up.rows; ++c) bias[std::size_t(c)] = T(call.scale * in[c]);
  }
  const std::int64_t rows = call.features.rows, n_chunks = n_projection_chunks(rows);
  parallel_for(int(n_chunks), useful_projection_threads(call.threads, rows, call.up.rows), [&](int c) {
    kernel.project(call, up.data(), bias.data(), c * rows / n_chunks, (c + 1) * rows / n_chunks);
  });
}

template <class T>
void project_backward_as(const ProjectBackwardCall& call) {
  const CpuKernels<T>& kernel = kernels_of<T>(chosen_instruction_set());
  const std::vector<T> up = transposed<T>(call.up, call.scale, kernel.width);
  const std::int64_t rows = call.features.rows, columns = call.up.rows, k = call.up.columns;
  const std::size_t n_chunks = std::size_t(n_projection_chunks(rows)), padded = up.size() / std::size_t(k);
  const std::size_t size = up.size() + padded;  // the weight's gradient, then the bias's
  std::vector<T> sums(n_chunks * size, T(0));
  const bool with_bias = call.grad_bias.data != nullptr;
  parallel_for(int(n_chunks), useful_projection_threads(call.threads, rows, columns), [&](int c) {
    T* grad_up = sums.data() + std::size_t(c) * size;
    const std::int64_t first = c * rows / std::int64_t(n_chunks), last = (c + 1) * rows / std::int64_t(n_chunks);
    kernel.project_backward(call, up.data(), first, last, grad_up, with_bias ? grad_up + up.size() : nullptr);
  });
  auto total = [&](std::size_t at) {
    double sum = 0;
    for (std::size_t c = 0; c < n_chunks; ++c) sum += double(sums[c * size + at]);
    return T(call.scale * sum);
  };
  T* grad_up = static_cast<T*>(call.grad_up.data);
  for (std::int64_t c = 0; c < columns; ++c) {
    for (std::int64_t j = 0; j < k; ++j) {
      grad_up[c * call.grad_up.row_stride + j] = total(std::size_t(j) * padded + std::size_t(c));
    }
    if (with_bias) static_cast<T*>(call.grad_bias.data)[c] = total(up.size() + std::size_t(c));
  }
}

}  // namespace

void* scratch_memory(std::size_t bytes) {
  thread_local Scratch memory;
  return memory.at_least(bytes);
}

const char* instruction_set() { return chosen_instruction_set().name; }

PlanOptions default_options() {
  PlanOptions options;
  options.load_radix = int(bits_of(chosen_instruction_set().f32.width));
  options.rotate_radix = chosen_instruction_set().rotate_radix;
  options.unwind_radix = chosen_instruction_set().unwind_radix;
  return options;
}

void forward(const ForwardCall& call) {
  check_forward(call.plan, call.x, call.features, call.groups);
  if (call.strings.data != nullptr) check_strings(call.plan, call.strings, call.features.rows, call.x.scalar);
  check_threads(call.threads);
  check_angles(call.plan.n_parameters, call.theta, "theta");
  if (call.x.rows == 0) return;
  const DefaultArithmetic here;
  call.x.scalar == Scalar::float64 ? run_as<double>(call) : run_as<float>(call);
}

void backward(const BackwardCall& call) {
  check_backward(call.plan, call.x, call.grad, call.grad_x, call.groups);
  if (call.strings.data != nullptr) check_strings(call.plan, call.strings, call.grad.rows, call.x.scalar);
  check_threads(call.threads);
  check_angles(call.plan.n_parameters, call.theta, "theta");
  check_angles(call.plan.n_parameters, call.grad_theta, "grad_theta");
  if (call.x.rows == 0) {
    std::fill_n(call.grad_theta, call.groups * std::int64_t{call.plan.n_parameters}, 0.0);
    return;
  }
  const DefaultArithmetic here;
  call.x.scalar == Scalar::float64 ? run_as<double>(call) : run_as<float>(call);
}

namespace {

// Projections work on numbers as they are: float32 or float64, no narrower ones, and one type for all, which is returned.
Numbers check_projection(const ConstMatrix& features, const ConstMatrix& up) {
  constexpr std::int64_t most = std::int64_t{1} << 31;  // products of two of them do not overflow
  check_rows(features.rows);
  if (features.scalar != Scalar::float32 && features.scalar != Scalar::float64) {
    throw std::invalid_argument("expected features of float32 or float64, received " + name_of(features.scalar));
  }
  if (up.rows < 1 || up.columns < 1 || up.rows > most || up.columns > most) {
    throw std::invalid_argument("expected up with 1 to " + std::to_string(most) + " rows and columns, received " +
                                std::to_string(up.rows) + " and " + std::to_string(up.columns));
  }
  const Numbers same{features.scalar, "features", true};
  check(features, "features", features.rows, up.columns, same);
  check(up, "up", up.rows, up.columns, same);
  return same;
}

}  // namespace

void project(const ProjectCall& call) {
  const Numbers same = check_projection(call.features, call.up);
  check_threads(call.threads);
  check(call.base, "base", call.features.rows, call.up.rows, same);
  check(call.out, "out", call.features.rows, call.up.rows, same);
  if (call.bias.data != nullptr) check(call.bias, "bias", 1, call.up.rows, same);
  if (call.features.rows == 0) return;
  const DefaultArithmetic here;
  same.scalar == Scalar::float64 ? project_as<double>(call) : project_as<float>(call);
}

void project_backward(const ProjectBackwardCall& call) {
  const Numbers same = check_projection(call.features, call.up);
  check_threads(call.threads);
  check(call.grad, "grad", call.features.rows, call.up.rows, same);
  check(call.grad_features, "grad_features", call.features.rows, call.up.columns, same);
  check(call.grad_up, "grad_up", call.up.rows, call.up.columns, same);
  if (call.grad_bias.data != nullptr) check(call.grad_bias, "grad_bias", 1, call.up.rows, same);
  const DefaultArithmetic here;
  same.scalar == Scalar::float64 ? project_backward_as<double>(call) : project_backward_as<float>(call);
}

}  // namespace qaa
