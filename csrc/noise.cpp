#include "noise.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

#include "checks.h"
#include "cpu.h"
#include "gates.h"
#include "threads.h"

namespace qaa {
namespace {

using Kind = NoisyStep::Kind;

void add_primitive(const GateCall& gate, const Step& step, std::uint32_t n_wires, NoisyPlan& plan) {
  auto bit = [&](int position) { return std::uint8_t(n_wires - 1 - gate.wires[std::size_t(position)]); };
  Angle angle;
  if (step.parameter < 0) {
    angle.constant = step.factor;
  } else {
    angle.terms = {{gate.parameters[std::size_t(step.parameter)], step.factor}};
  }
  auto add = [&](Kind kind, int a, int b = -1) {
    plan.steps.push_back({kind, bit(a), b < 0 ? std::uint8_t(0) : bit(b), angle});
  };
  switch (step.primitive) {
    case Primitive::ry: return add(Kind::ry, step.a);
    case Primitive::rz: return add(Kind::rz, step.a);
    case Primitive::rzz: return add(Kind::rzz, step.a, step.b);
    case Primitive::x: return add(Kind::flip_x, step.a);
    case Primitive::z: return add(Kind::flip_z, step.a);
    case Primitive::cnot: return add(Kind::cnot, step.a, step.b);
    case Primitive::swap:
      add(Kind::cnot, step.a, step.b);
      add(Kind::cnot, step.b, step.a);
      return add(Kind::cnot, step.a, step.b);
    case Primitive::phase:  // of the whole state
    case Primitive::none: return;
  }
}

NoisyString string_of(const std::string& paulis, double wrong_bit) {
  NoisyString out;
  for (const char letter : paulis) {
    out.x = out.x << 1 | (letter == 'X' || letter == 'Y');
    out.z = out.z << 1 | (letter == 'Z' || letter == 'Y');
    out.n_y += letter == 'Y';
    if (letter != 'I') out.factor *= 1 - 2 * wrong_bit;
  }
  return out;
}

void check_probability(const char* what, double value) {
  if (!(value >= 0 && value <= 1)) {
    throw std::invalid_argument(std::string("expected ") + what + " from 0 to 1, received " + std::to_string(value));
  }
}

// How many of the 2^32 values of 32 random bits.
std::uint64_t share(double probability) { return std::uint64_t(std::llround(probability * 4294967296.0)); }

template <class T>
std::vector<BoundNoisyStep<T>> bound_steps(const NoisyPlan& plan, const double* theta) {
  std::vector<BoundNoisyStep<T>> out;
  for (const NoisyStep& step : plan.steps) {
    const double angle = step.angle.value(theta) * (step.kind == Kind::ry ? 0.5 : 1.0);
    out.push_back({step.kind, step.a, step.b, T(std::cos(angle)), T(std::sin(angle))});
  }
  return out;
}

template <class T>
const NoisyKernels<T>& kernels_of(const InstructionSet& set) {
  if constexpr (sizeof(T) == 8) {
    return set.noisy->f64;
  } else {
    return set.noisy->f32;
  }
}

template <class T>
void store_means(const NoisyCall& call, std::int64_t first_row, std::int64_t n_rows, const double* sums) {
  const std::int64_t k = call.plan.n_outputs;
  const double n = double(call.trajectories);
  for (std::int64_t r = 0; r < n_rows; ++r) {
    T* features = static_cast<T*>(call.features.data) + (first_row + r) * call.features.row_stride;
    const double* row = sums + 2 * r * k;
    for (std::int64_t o = 0; o < k; ++o) features[o] = T(row[2 * o] / n);
    if (call.errors.data == nullptr) continue;
    T* errors = static_cast<T*>(call.errors.data) + (first_row + r) * call.errors.row_stride;
    for (std::int64_t o = 0; o < k; ++o) {
      const double mean = row[2 * o] / n, variance = row[2 * o + 1] / n - mean * mean;
      const double error = std::sqrt((variance > 0 ? variance : variance - variance) / (n - 1));
      errors[o] = n > 1 ? T(error) : std::numeric_limits<T>::quiet_NaN();
    }
  }
}

template <class T>
void forward_as(const NoisyCall& call) {
  const NoisyPlan& plan = call.plan;
  const std::vector<BoundNoisyStep<T>> steps = bound_steps<T>(plan, call.theta);
  const Noise& noise = plan.noise;
  const BoundNoisyPlan<T> bound{plan.n_wires,
                                plan.n_amplitudes(),
                                plan.normalize,
                                plan.readout,
                                plan.n_outputs,
                                steps.data(),
                                std::uint32_t(steps.size()),
                                plan.strings.data(),
                                plan.outputs.data(),
                                {share(noise.x), share(noise.x + noise.y), share(noise.x + noise.y + noise.z)},
                                T(1 - 2 * noise.readout),
                                T(noise.damping),
                                T(std::sqrt(1 - noise.damping))};
  const InstructionSet& set = chosen_instruction_set();
  const NoisyKernels<T>& kernel = kernels_of<T>(set);
  // A few groups of rows at a time, so that the sums stay small. One or two groups alone are cut along the trajectories
  // as well, by rules that do not ask for the number of threads: sums are added in the same order for any.
  const std::int64_t k = plan.n_outputs, w = set.vector_bytes / std::int64_t(sizeof(T));
  const std::int64_t block = std::max(w, (std::int64_t{1} << 20) / k / w * w);
  for (std::int64_t first_row = 0; first_row < call.x.rows; first_row += block) {
    const std::int64_t rows = std::min(block, call.x.rows - first_row), n_groups = (rows + w - 1) / w;
    const std::int64_t n_parts = n_groups > 2 ? 1 : std::clamp<std::int64_t>(call.trajectories / 256, 1, 8);
    std::vector<double> sums(std::size_t(2 * k * rows * n_parts), 0.0);
    const std::int64_t amplitudes = rows * call.trajectories * std::int64_t{plan.n_amplitudes()};
    const int threads = int(std::min<std::int64_t>(call.threads, 1 + amplitudes / (1 << 14)));
    parallel_for(int(n_groups * n_parts), threads, [&](int task) {
      const std::int64_t group = task % n_groups, part = task / n_groups;
      const std::int64_t row = group * w;
      const NoisyRange range{first_row + row, int(std::min(w, rows - row)), part * call.trajectories / n_parts,
                             (part + 1) * call.trajectories / n_parts,
                             sums.data() + 2 * k * (part * rows + row)};
      kernel.group(bound, call, range,
                   scratch_memory(kernel.workspace_vectors(bound) * std::size_t(set.vector_bytes)));
    });
    const std::size_t size = std::size_t(2 * k * rows);
    for (std::size_t i = size; i < sums.size(); ++i) sums[i % size] += sums[i];
    store_means<T>(call, first_row, rows, sums.data());
  }
}

}  // namespace

NoisyPlan compile_noisy(std::uint32_t n_wires, std::uint32_t n_parameters, const std::vector<GateCall>& gates,
                        const ReadoutSpec& readout, bool normalize, const Noise& noise) {
  check_circuit(n_wires, n_parameters, gates, readout);
  if (readout.kind == ReadoutKind::state) {
    throw std::invalid_argument("expected a readout of expectation values or probabilities with noise, received "
                                "amplitudes");
  }
  check_probability("a probability of X", noise.x);
  check_probability("a probability of Y", noise.y);
  check_probability("a probability of Z", noise.z);
  if (const double sum = noise.x + noise.y + noise.z; sum > 1 + 1e-12) {
    throw std::invalid_argument("expected probabilities of X, Y and Z whose sum is at most 1, received " +
                                std::to_string(sum));
  }
  check_probability("a probability of damping", noise.damping);
  check_probability("a probability of wrong bits", noise.readout);
  NoisyPlan plan;
  plan.n_wires = n_wires;
  plan.n_parameters = n_parameters;
  plan.normalize = normalize;
  plan.noise = noise;
  plan.readout = readout.kind;
  plan.n_outputs = readout.n_outputs;
  for (const GateCall& gate : gates) {
    for (const Step& step : find_gate(gate.name)->steps) {
      if (step.primitive == Primitive::none) break;
      add_primitive(gate, step, n_wires, plan);
    }
    for (const std::uint32_t wire : gate.wires) {
      const auto bit = std::uint8_t(n_wires - 1 - wire);
      if (noise.x + noise.y + noise.z > 0) plan.steps.push_back({Kind::pauli, bit, 0, {}});
      if (noise.damping > 0) plan.steps.push_back({Kind::damping, bit, 0, {}});
    }
  }
  if (readout.kind == ReadoutKind::expval) {
    for (const std::string& paulis : readout.paulis) plan.strings.push_back(string_of(paulis, noise.readout));
    return plan;
  }
  for (Index b = 0; b < readout.n_outputs; ++b) plan.outputs.push_back(b);
  return plan;
}

void forward(const NoisyCall& call) {
  const NoisyPlan& plan = call.plan;
  check_rows(call.x.rows);
  check_angles(plan.n_parameters, call.theta, "theta");
  if (call.x.columns < 1 || call.x.columns > std::int64_t{plan.n_amplitudes()}) {
    throw std::invalid_argument("expected x with 1 to " + std::to_string(plan.n_amplitudes()) + " columns, received " +
                                std::to_string(call.x.columns));
  }
  if (call.trajectories < 1 || call.trajectories > std::int64_t{1} << 32) {
    throw std::invalid_argument("expected 1 to 2^32 trajectories, received " + std::to_string(call.trajectories));
  }
  if (call.x.scalar != Scalar::float32 && call.x.scalar != Scalar::float64) {
    throw std::invalid_argument("expected x of float32 or float64 with noise, received " + name_of(call.x.scalar));
  }
  const Numbers same{call.x.scalar, "x", true};
  check(call.x, "x", call.x.rows, call.x.columns, same);
  check(call.features, "features", call.x.rows, plan.n_outputs, same);
  if (call.errors.data != nullptr) check(call.errors, "errors", call.x.rows, plan.n_outputs, same);
  const DefaultArithmetic here;
  call.x.scalar == Scalar::float64 ? forward_as<double>(call) : forward_as<float>(call);
}

}  // namespace qaa
