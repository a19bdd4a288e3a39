// Replays cases that tests/test_core.py has written from the oracle, through the public C++ header and without Python:
// the form in which the core runs under an emulator of another processor, a sanitizer or an instruction counter.
//
//   replay CASES          checks every case; prints a line per failure and "N passed, N failed"
//   replay WIRES LAYERS ROWS forward|backward   runs one call of the default circuit, for instruction counters
//   replay CALLERS ROUNDS   so many threads at once, each with calls on several threads: all get the bits of a call alone
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <string>
#include <thread>

#include "noise.h"
#include "qaa.h"

namespace {

using namespace qaa;

struct Case {
  std::vector<Plan> plans;  // of the same circuit, for passes of different widths
  std::vector<NoisyPlan> noisy;  // without noise and with all of it; none for amplitudes
  std::vector<double> theta, x, grad, features, grad_theta, grad_x;
  std::int64_t rows = 0, columns = 0;
};

std::vector<double> read_numbers(std::istream& in, std::size_t n) {
  std::vector<double> out(n);
  for (double& value : out) {
    std::string text;  // operator>> for double refuses hexadecimal numbers
    in >> text;
    value = std::strtod(text.c_str(), nullptr);
  }
  return out;
}

// n_wires n_parameters n_gates {name n_wires wires n_parameters parameters} kind n_outputs [strings] normalize
// rows columns theta x grad features grad_theta grad_x
bool read_case(std::istream& in, Case& out) {
  std::uint32_t n_wires, n_parameters, n_gates, kind;
  if (!(in >> n_wires >> n_parameters >> n_gates)) return false;
  std::vector<GateCall> gates(n_gates);
  auto read_list = [&](std::vector<std::uint32_t>& list) {
    std::size_t n;
    in >> n;
    list.resize(n);
    for (auto& item : list) in >> item;
  };
  for (GateCall& gate : gates) {
    in >> gate.name;
    read_list(gate.wires);
    read_list(gate.parameters);
  }
  ReadoutSpec readout;
  in >> kind >> readout.n_outputs;
  readout.kind = ReadoutKind(kind);
  if (readout.kind == ReadoutKind::expval) {
    readout.paulis.resize(readout.n_outputs);
    for (auto& string : readout.paulis) in >> string;
  }
  bool normalize;
  in >> normalize >> out.rows >> out.columns;
  PlanOptions options = default_options();
  out.plans = {compile(n_wires, n_parameters, gates, readout, normalize, options)};
  options.rotate_radix = options.rotate_radix == 4 ? 3 : 4;
  options.unwind_radix = options.unwind_radix == 3 ? 2 : 3;
  out.plans.push_back(compile(n_wires, n_parameters, gates, readout, normalize, options));
  out.noisy.clear();
  for (const Noise& noise : {Noise{}, Noise{0.1, 0.05, 0.1, 0.2, 0.1}}) {
    if (readout.kind == ReadoutKind::state) break;
    out.noisy.push_back(compile_noisy(n_wires, n_parameters, gates, readout, normalize, noise));
  }
  const std::size_t rows = std::size_t(out.rows), k = out.plans[0].n_columns();
  out.theta = read_numbers(in, n_parameters);
  out.x = read_numbers(in, rows * std::size_t(out.columns));
  out.grad = read_numbers(in, rows * k);
  out.features = read_numbers(in, rows * k);
  out.grad_theta = read_numbers(in, n_parameters);
  out.grad_x = read_numbers(in, rows * std::size_t(out.columns));
  return bool(in);
}

template <class T>
double error(const std::vector<T>& value, const std::vector<double>& expected) {
  double largest = 0, size = 1;
  for (std::size_t i = 0; i < value.size(); ++i) {
    largest = std::fmax(largest, std::isnan(double(value[i])) ? INFINITY : std::abs(double(value[i]) - expected[i]));
    size = std::fmax(size, std::abs(expected[i]));
  }
  return largest / size;
}

template <class T>
double run(const Case& c, const Plan& plan, int threads) {
  const Scalar scalar = sizeof(T) == 8 ? Scalar::float64 : Scalar::float32;
  const std::vector<T> x(c.x.begin(), c.x.end()), grad(c.grad.begin(), c.grad.end());
  const std::int64_t k = plan.n_columns(), n = plan.n_strings();
  std::vector<T> features(c.features.size()), strings(std::size_t(c.rows * n) + 1), grad_x(c.x.size());
  std::vector<double> grad_theta(c.theta.size());
  const ConstMatrix in{x.data(), c.rows, c.columns, c.columns, scalar};
  forward({plan, c.theta.data(), in, {features.data(), c.rows, k, k, scalar}, threads, 1,
           {strings.data(), c.rows, n, n, scalar}});
  double worst = error(features, c.features);
  for (const bool known : {true, false}) {  // the strings' values as they were written, or measured once more
    backward({plan, c.theta.data(), in, {grad.data(), c.rows, k, k, scalar}, grad_theta.data(),
              {grad_x.data(), c.rows, c.columns, c.columns, scalar}, threads, 1,
              {known ? strings.data() : nullptr, c.rows, n, n, scalar}});
    worst = std::fmax(worst, std::fmax(error(grad_theta, c.grad_theta), error(grad_x, c.grad_x)));
  }
  return worst;
}

// A trajectory without noise has the exact features; with noise, threads change nothing.
template <class T>
double run_noisy(const Case& c) {
  if (c.noisy.empty()) return 0;
  const Scalar scalar = sizeof(T) == 8 ? Scalar::float64 : Scalar::float32;
  const std::vector<T> x(c.x.begin(), c.x.end());
  const std::int64_t k = c.noisy[0].n_outputs;
  const ConstMatrix in{x.data(), c.rows, c.columns, c.columns, scalar};
  auto features = [&](const NoisyPlan& plan, int trajectories, int threads) {
    std::vector<T> out(c.features.size()), errors(out.size());
    forward(NoisyCall{plan, c.theta.data(), in, trajectories, 7, {out.data(), c.rows, k, k, scalar},
                      {errors.data(), c.rows, k, k, scalar}, threads});
    return out;
  };
  if (c.noisy[1].n_wires < 5 && features(c.noisy[1], 520, 1) != features(c.noisy[1], 520, 3)) return INFINITY;
  return error(features(c.noisy[0], 1, 1), c.features);
}

int check(const char* path) {
  std::ifstream in(path);
  int passed = 0, failed = 0;
  for (Case c; read_case(in, c);) {
    for (const Plan& plan : c.plans) {
      const int threads = &plan == &c.plans[0] ? 1 : 3;
      const double e64 = std::fmax(run<double>(c, plan, threads), threads == 1 ? run_noisy<double>(c) : 0);
      const double e32 = std::fmax(run<float>(c, plan, threads), threads == 1 ? run_noisy<float>(c) : 0);
      const bool ok = e64 < 1e-11 && e32 < 1e-4;
      ok ? ++passed : ++failed;
      if (!ok) std::cout << "case " << passed + failed << ": float64 " << e64 << ", float32 " << e32 << "\n";
    }
  }
  std::cout << instruction_set() << ": " << passed << " passed, " << failed << " failed\n";
  return passed > 0 && failed == 0 ? 0 : 1;
}

// The circuit of qaa.ansatz("ring", n, layers), read out as "z".
Plan default_plan(std::uint32_t n, std::uint32_t layers) {
  std::vector<GateCall> gates;
  std::uint32_t p = 0;
  for (std::uint32_t l = 0; l < layers; ++l, p += 3 * n) {
    for (std::uint32_t w = 0; w < n; ++w) gates.push_back({"RY", {w}, {p + 3 * w}});
    for (std::uint32_t w = 0; w < n; ++w) gates.push_back({"RZ", {w}, {p + 3 * w + 1}});
    for (std::uint32_t w = 0; w < n; ++w) gates.push_back({"CNOT", {w, (w + 1) % n}, {}});
    for (std::uint32_t w = 0; w < n; ++w) gates.push_back({"RY", {w}, {p + 3 * w + 2}});
  }
  ReadoutSpec readout{ReadoutKind::expval, n, {}};
  for (std::uint32_t w = 0; w < n; ++w) {
    readout.paulis.emplace_back(n, 'I');
    readout.paulis.back()[w] = 'Z';
  }
  return compile(n, p, gates, readout, true, default_options());
}

int run_default(std::uint32_t n, std::uint32_t layers, std::int64_t rows, bool adjoint) {
  const Plan plan = default_plan(n, layers);
  std::vector<double> theta(plan.n_parameters), grad_theta(plan.n_parameters);
  for (std::size_t i = 0; i < theta.size(); ++i) theta[i] = 0.1 + 0.37 * double(i);
  const std::int64_t d = plan.n_amplitudes(), k = n, n_strings = plan.n_strings();
  std::vector<float> x(std::size_t(rows * d)), features(std::size_t(rows * k), 1.0f), grad_x(x.size());
  std::vector<float> strings(std::size_t(rows * n_strings), 0.5f);
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = float(std::sin(0.7 * double(i)));
  const ConstMatrix in{x.data(), rows, d, d, Scalar::float32};
  if (adjoint) {
    backward({plan, theta.data(), in, {features.data(), rows, k, k, Scalar::float32}, grad_theta.data(),
              {grad_x.data(), rows, d, d, Scalar::float32}, 1, 1,
              {strings.data(), rows, n_strings, n_strings, Scalar::float32}});
  } else {
    forward({plan, theta.data(), in, {features.data(), rows, k, k, Scalar::float32}, 1, 1,
             {strings.data(), rows, n_strings, n_strings, Scalar::float32}});
  }
  return 0;
}

// Features and both gradients of a batch that is worth several threads.
std::vector<double> everything(const Plan& plan, int threads) {
  constexpr std::int64_t rows = 600;
  const std::int64_t d = plan.n_amplitudes(), k = plan.n_columns();
  std::vector<double> theta(plan.n_parameters), grad_theta(plan.n_parameters), grad(std::size_t(rows * k), 1.0);
  for (std::size_t i = 0; i < theta.size(); ++i) theta[i] = 0.1 + 0.37 * double(i);
  std::vector<double> x(std::size_t(rows * d)), out(grad.size() + x.size());
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = std::sin(0.7 * double(i));
  const ConstMatrix in{x.data(), rows, d, d, Scalar::float64};
  forward({plan, theta.data(), in, {out.data(), rows, k, k, Scalar::float64}, threads});
  backward({plan, theta.data(), in, {grad.data(), rows, k, k, Scalar::float64}, grad_theta.data(),
            {out.data() + grad.size(), rows, d, d, Scalar::float64}, threads});
  out.insert(out.end(), grad_theta.begin(), grad_theta.end());
  return out;
}

int run_together(int callers, int rounds) {
  const Plan plan = default_plan(8, 2);
  const std::vector<double> alone = everything(plan, 1);
  std::atomic<int> different = 0;
  std::vector<std::thread> threads;
  for (int t = 0; t < callers; ++t) {
    threads.emplace_back([&, t] {
      for (int round = 0; round < rounds; ++round) {
        different += everything(round % 2 ? default_plan(8, 2) : plan, 1 + (t + round) % 4) != alone;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  std::printf("%d callers, %d rounds: %d different\n", callers, rounds, different.load());
  return different == 0 ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2) return check(argv[1]);
  if (argc == 3) return run_together(std::atoi(argv[1]), std::atoi(argv[2]));
  if (argc == 5) {
    return run_default(std::uint32_t(std::atoi(argv[1])), std::uint32_t(std::atoi(argv[2])), std::atoll(argv[3]),
                       std::string(argv[4]) == "backward");
  }
  std::fprintf(stderr, "usage: replay CASES | replay CALLERS ROUNDS | replay WIRES LAYERS ROWS forward|backward\n");
  return 2;
}
