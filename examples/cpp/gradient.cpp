// The default circuit on a batch of vectors, without Python: <Z> on every wire, the adjoint's gradient, and a check of it
// by finite differences.
//
//   gradient            builds the circuit here
//   gradient PROGRAM    reads it from its text, as Python prints it: str(qaa.program.program(circuit, "z", True))
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <string>
#include <vector>

#include <qaa/qaa.h>

namespace {

// RY, RZ on every wire; CNOT 0 -> 1, 1 -> 2, ..., n-1 -> 0; RY on every wire. Read out: <Z> on every wire.
qaa::Plan ring(std::uint32_t n_wires, std::uint32_t n_layers) {
  std::vector<qaa::GateCall> gates;
  for (std::uint32_t layer = 0; layer < n_layers; ++layer) {
    auto angle = [&](std::uint32_t wire, std::uint32_t k) { return 3 * (layer * n_wires + wire) + k; };
    for (std::uint32_t w = 0; w < n_wires; ++w) {
      gates.push_back({"RY", {w}, {angle(w, 0)}});
      gates.push_back({"RZ", {w}, {angle(w, 1)}});
    }
    for (std::uint32_t w = 0; w < n_wires; ++w) gates.push_back({"CNOT", {w, (w + 1) % n_wires}, {}});
    for (std::uint32_t w = 0; w < n_wires; ++w) gates.push_back({"RY", {w}, {angle(w, 2)}});
  }
  qaa::ReadoutSpec readout{qaa::ReadoutKind::expval, n_wires, {}};
  for (std::uint32_t w = 0; w < n_wires; ++w) {
    readout.paulis.emplace_back(n_wires, 'I');
    readout.paulis.back()[w] = 'Z';
  }
  return qaa::compile(n_wires, 3 * n_layers * n_wires, gates, readout, true, qaa::default_options());
}

struct Batch {
  std::int64_t rows, columns;
  std::vector<double> numbers;
  qaa::ConstMatrix in() const { return {numbers.data(), rows, columns, columns, qaa::Scalar::float64}; }
  qaa::Matrix out() { return {numbers.data(), rows, columns, columns, qaa::Scalar::float64}; }
};

Batch features_of(const qaa::Plan& plan, const std::vector<double>& theta, const Batch& x) {
  Batch features{x.rows, plan.n_columns(), std::vector<double>(std::size_t(x.rows * plan.n_columns()))};
  qaa::forward({plan, theta.data(), x.in(), features.out(), 2});
  return features;
}

double sum(const Batch& batch) {
  double total = 0;
  for (const double number : batch.numbers) total += number;
  return total;
}

int run(const qaa::Plan& plan) {
  const std::int64_t rows = 100, columns = std::int64_t{3} << plan.n_wires >> 2;  // three quarters of the amplitudes
  auto fill = [](std::vector<double>& numbers) {  // any numbers
    for (std::size_t i = 0; i < numbers.size(); ++i) numbers[i] = std::sin(1.0 + 0.7 * double(i));
  };
  std::vector<double> theta(plan.n_parameters), grad_theta(plan.n_parameters);
  Batch x{rows, columns, std::vector<double>(std::size_t(rows * columns))};
  fill(theta);
  fill(x.numbers);

  const Batch features = features_of(plan, theta, x);
  const Batch ones{rows, features.columns, std::vector<double>(features.numbers.size(), 1.0)};
  Batch grad_x = x;
  qaa::backward({plan, theta.data(), x.in(), ones.in(), grad_theta.data(), grad_x.out(), 2});

  // Central differences of the sum of all features, in some angles and some entries of x.
  const double step = 1e-5;
  double worst = 0;
  auto compare = [&](double& number, double derivative) {
    const double at = number;
    number = at + step;
    const double above = sum(features_of(plan, theta, x));
    number = at - step;
    const double below = sum(features_of(plan, theta, x));
    number = at;
    worst = std::fmax(worst, std::abs((above - below) / (2 * step) - derivative));
  };
  for (std::size_t p = 0; p < theta.size(); p += 5) compare(theta[p], grad_theta[p]);
  for (std::size_t i = 0; i < x.numbers.size(); i += x.numbers.size() / 7) compare(x.numbers[i], grad_x.numbers[i]);

  std::printf("instruction set %s\n<Z> of the first row", qaa::instruction_set());
  for (std::int64_t k = 0; k < features.columns; ++k) std::printf(" %.17g", features.numbers[std::size_t(k)]);
  std::printf("\nsum of the angles' gradient");
  double total = 0;
  for (const double number : grad_theta) total += number;
  std::printf(" %.17g\nlargest deviation from finite differences %.3g\n", total, worst);
  return worst < 1e-7 ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(argc > 1 ? qaa::compile(argv[1]) : ring(4, 2));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "gradient: %s\n", error.what());
    return 2;
  }
}
