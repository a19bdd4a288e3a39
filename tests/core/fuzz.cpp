// Any bytes, read as a circuit, a readout, options, and calls of the public C++ header: what is accepted must agree with
// a dense simulation that shares no code with the core, what is refused must be refused in a sentence and leave every
// output as it was. Aborts at the first difference, so that sanitizers and fuzzers report the input.
//
//   fuzz --runs N [--seed S] [--corpus FOLDER] [--save FOLDER]   mutates the corpus; the same N and S give the same inputs
//   fuzz --replay FILE...                                        runs these inputs alone
//
// An input whose plan has a shape not seen before joins the corpus (and is written to the second folder). libFuzzer
// brings its own main: clang++ -fsanitize=fuzzer,address -DQAA_LIBFUZZER, with this file and the core's sources.
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <complex>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "layout.h"
#include "qaa.h"

using namespace qaa;
using Bytes = std::vector<std::uint8_t>;
using Complex = std::complex<double>;

namespace {

struct Counts {
  std::uint64_t compiled = 0, refused = 0, forward = 0, backward = 0, project = 0, refused_calls = 0;
} counts;
std::uint64_t shape_of_last_plan = 0;  // what the driver calls new

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "fuzz: %s\n", what.c_str());
  std::abort();
}

// Reads an input; zeros follow its end.
class Reader {
 public:
  Reader(const std::uint8_t* data, std::size_t size) : at_(data), end_(data + size) {}
  std::uint32_t byte() { return at_ < end_ ? *at_++ : 0; }
  std::uint32_t two() { return byte() << 8 | byte(); }
  std::uint32_t below(std::uint32_t n) { return n > 256 ? two() % n : byte() % n; }

 private:
  const std::uint8_t *at_, *end_;
};

// ------------------------------------------------------------------------------------------------ the dense simulation

struct Circuit {
  std::uint32_t n_wires = 0, n_parameters = 0;
  std::vector<GateCall> gates;
  ReadoutSpec readout;
  bool normalize = true;
};

using Two = std::array<Complex, 4>;  // row by row

Two product(const Two& a, const Two& b) {
  return {a[0] * b[0] + a[1] * b[2], a[0] * b[1] + a[1] * b[3], a[2] * b[0] + a[3] * b[2], a[2] * b[1] + a[3] * b[3]};
}

Two matrix_of(const std::string& name, const double* angle) {
  const Complex i(0, 1);
  const double root = std::sqrt(0.5);
  if (name == "X") return {0, 1, 1, 0};
  if (name == "Y") return {0, -i, i, 0};
  if (name == "Z") return {1, 0, 0, -1};
  if (name == "H") return {root, root, root, -root};
  if (name == "S") return {1, 0, 0, i};
  if (name == "T") return {1, 0, 0, std::polar(1.0, std::acos(-1.0) / 4)};
  const double c = std::cos(angle[0] / 2), s = std::sin(angle[0] / 2);
  if (name == "RX") return {c, -i * s, -i * s, c};
  if (name == "RY") return {c, -s, s, c};
  if (name == "RZ") return {Complex(c, -s), 0, 0, Complex(c, s)};
  if (name == "PhaseShift") return {1, 0, 0, std::polar(1.0, angle[0])};
  if (name == "Rot") {
    return product(matrix_of("RZ", angle + 2), product(matrix_of("RY", angle + 1), matrix_of("RZ", angle)));
  }
  fail("the dense simulation does not know " + name);
}

// A gate on dense states: its matrix on one wire where `control` is set, and that matrix's derivative along a direction
// of the angles, by differences of fourth order.
struct DenseGate {
  std::size_t control = 0, target = 0, other = 0;  // bits; `other` is what a swap swaps `target` with
  Two matrix{}, slope{};
  bool moves = false;
};

DenseGate dense(const GateCall& gate, std::uint32_t n, const std::vector<double>& theta, const std::vector<double>& turn) {
  const auto bit = [&](std::uint32_t wire) { return std::size_t{1} << (n - 1 - wire); };
  DenseGate out{.target = bit(gate.wires.back()), .moves = !gate.parameters.empty()};
  if (gate.name == "SWAP") {
    out.other = bit(gate.wires[0]);
    return out;
  }
  const bool controlled = gate.wires.size() == 2;
  if (controlled) out.control = bit(gate.wires[0]);
  const std::string name = gate.name == "CNOT" ? "X" : controlled ? gate.name.substr(1) : gate.name;
  auto matrix_at = [&](double t) {
    double angles[3] = {0, 0, 0};
    for (std::size_t k = 0; k < gate.parameters.size(); ++k) {
      angles[k] = theta[gate.parameters[k]] + t * turn[gate.parameters[k]];
    }
    return matrix_of(name, angles);
  };
  out.matrix = matrix_at(0);
  if (out.moves) {
    const double h = 1e-3;
    const Two a = matrix_at(h), b = matrix_at(-h), c = matrix_at(2 * h), d = matrix_at(-2 * h);
    for (std::size_t i = 0; i < 4; ++i) out.slope[i] = (8.0 * (a[i] - b[i]) - (c[i] - d[i])) / (12 * h);
  }
  return out;
}

// One complex number of each of four rows, which are simulated side by side.
struct Numbers {
  using Four = double __attribute__((vector_size(32)));
  Four re{}, im{};
  void add(const Complex& factor, const Numbers& a) {
    const double x = factor.real(), y = factor.imag();
    re += x * a.re - y * a.im;
    im += x * a.im + y * a.re;
  }
};

struct State {
  std::vector<Numbers> value, slope;  // amplitudes, and their derivatives along the direction
};

void apply(const DenseGate& gate, State& state) {
  const std::size_t size = state.value.size(), target = gate.target;
  const Two &m = gate.matrix, &s = gate.slope;
  for (std::size_t high = 0; high < size; high += 2 * target) {
    for (std::size_t i = high; i < high + target; ++i) {
      if (gate.other != 0) {
        if ((i & gate.other) == 0) continue;
        std::swap(state.value[i], state.value[i ^ target ^ gate.other]);
        std::swap(state.slope[i], state.slope[i ^ target ^ gate.other]);
        continue;
      }
      if ((i & gate.control) != gate.control) continue;
      Numbers a, b, da, db;
      a.add(m[0], state.value[i]), a.add(m[1], state.value[i + target]);
      b.add(m[2], state.value[i]), b.add(m[3], state.value[i + target]);
      da.add(m[0], state.slope[i]), da.add(m[1], state.slope[i + target]);
      db.add(m[2], state.slope[i]), db.add(m[3], state.slope[i + target]);
      if (gate.moves) {
        da.add(s[0], state.value[i]), da.add(s[1], state.value[i + target]);
        db.add(s[2], state.value[i]), db.add(s[3], state.value[i + target]);
      }
      state.value[i] = a, state.value[i + target] = b;
      state.slope[i] = da, state.slope[i + target] = db;
    }
  }
}

struct Features {
  std::vector<double> value, slope;  // (rows, n_columns): features, and their derivatives along the direction
};

// <P> for a Pauli string, which takes amplitude i ^ flip to i with the factor (-i)^(number of Y) (-1)^|i & sign|.
void expectation(const std::string& letters, const State& state, Numbers::Four& value, Numbers::Four& slope) {
  std::size_t flip = 0, sign = 0;
  Complex factor = 1;
  for (const char letter : letters) {
    flip = flip << 1 | std::size_t(letter == 'X' || letter == 'Y');
    sign = sign << 1 | std::size_t(letter == 'Z' || letter == 'Y');
    if (letter == 'Y') factor *= Complex(0, -1);
  }
  auto add_real = [](Numbers::Four& to, const Numbers& bra, const Complex& z, const Numbers& ket) {
    to += z.real() * (bra.re * ket.re + bra.im * ket.im) - z.imag() * (bra.re * ket.im - bra.im * ket.re);
  };
  for (std::size_t i = 0; i < state.value.size(); ++i) {
    const Complex z = std::popcount(i & sign) % 2 ? -factor : factor;
    add_real(value, state.value[i], z, state.value[i ^ flip]);
    add_real(slope, state.slope[i], z, state.value[i ^ flip]);
    add_real(slope, state.value[i], z, state.slope[i ^ flip]);
  }
}

// Features of rows of `columns` numbers, and their derivatives along the direction (turn of angles, step of rows).
Features simulate(const Circuit& c, const std::vector<double>& theta, const std::vector<double>& turn,
                  const std::vector<double>& x, const std::vector<double>& step, std::size_t columns) {
  std::vector<DenseGate> gates;
  for (const GateCall& gate : c.gates) gates.push_back(dense(gate, c.n_wires, theta, turn));
  const bool is_state = c.readout.kind == ReadoutKind::state;
  const std::size_t rows = x.size() / columns, width = c.readout.n_outputs * (is_state ? 2 : 1);
  Features out{std::vector<double>(rows * width), std::vector<double>(rows * width)};
  State state;
  for (std::size_t first = 0; first < rows; first += 4) {
    const std::size_t here = std::min<std::size_t>(4, rows - first);
    state.value.assign(std::size_t{1} << c.n_wires, {});
    state.slope = state.value;
    for (std::size_t r = 0; r < here; ++r) {
      const double *row = &x[(first + r) * columns], *along = &step[(first + r) * columns];
      double square = 0, change = 0;
      for (std::size_t j = 0; j < columns; ++j) square += row[j] * row[j], change += row[j] * along[j];
      const bool divides = c.normalize && square > 0;
      const double norm = divides ? std::sqrt(square) : 1, shrinks = divides ? change / square : 0;
      for (std::size_t j = 0; j < columns; ++j) {
        state.value[j].re[r] = row[j] / norm;
        state.slope[j].re[r] = (along[j] - row[j] * shrinks) / norm;
      }
    }
    for (const DenseGate& gate : gates) apply(gate, state);
    auto put = [&](std::size_t column, const Numbers::Four& value, const Numbers::Four& slope) {
      for (std::size_t r = 0; r < here; ++r) {
        out.value[(first + r) * width + column] = value[r];
        out.slope[(first + r) * width + column] = slope[r];
      }
    };
    for (std::size_t k = 0; k < c.readout.n_outputs; ++k) {
      if (c.readout.kind == ReadoutKind::expval) {
        Numbers::Four value{}, slope{};
        expectation(c.readout.paulis[k], state, value, slope);
        put(k, value, slope);
        continue;
      }
      const Numbers &a = state.value[k], &d = state.slope[k];
      if (is_state) {
        put(2 * k, a.re, d.re), put(2 * k + 1, a.im, d.im);
      } else {
        put(k, a.re * a.re + a.im * a.im, 2 * (a.re * d.re + a.im * d.im));
      }
    }
  }
  return out;
}

// ------------------------------------------------------------------------------------------------ arrays

std::size_t bytes_of(Scalar scalar) { return scalar == Scalar::float64 ? 8 : scalar == Scalar::float32 ? 4 : 2; }

// Only numbers that the narrow types hold exactly are encoded, subnormal ones apart.
std::uint16_t to_half(double value) {
  int exponent;
  const double fraction = std::frexp(std::abs(value), &exponent);
  if (value == 0) return 0;
  const auto mantissa = std::uint32_t(std::lround(std::ldexp(fraction, 11))) - 1024;
  return std::uint16_t((value < 0 ? 0x8000 : 0) | std::uint32_t(exponent + 14) << 10 | mantissa);
}
double from_half(std::uint16_t bits) {
  const int exponent = (bits >> 10) & 31;
  const double mantissa = bits & 1023;
  const double size = exponent == 0    ? std::ldexp(mantissa, -24)
                      : exponent == 31 ? (mantissa == 0 ? INFINITY : NAN)
                                       : std::ldexp(1024 + mantissa, exponent - 25);
  return bits & 0x8000 ? -size : size;
}

// Rows in memory of exactly the size that they need, so that a sanitizer sees the first byte beyond; the gaps between
// rows hold a pattern that nobody may change. A stride may be zero or negative in an array that is only read.
class Array {
 public:
  Array(std::int64_t rows, std::int64_t columns, std::int64_t stride, Scalar scalar)
      : rows_(rows), columns_(columns), stride_(stride), scalar_(scalar) {
    if (rows > 0) size_ = std::size_t((rows - 1) * std::abs(stride) + columns) * bytes_of(scalar);
    memory_.reset(new std::uint8_t[size_]);
    std::fill_n(memory_.get(), size_, pattern);
  }
  void* row(std::int64_t r) const {
    const std::int64_t at = (stride_ < 0 ? r - (rows_ - 1) : r) * stride_;
    return memory_.get() + at * std::int64_t(bytes_of(scalar_));
  }
  void set(std::int64_t r, std::int64_t c, double value) {
    std::uint8_t* to = static_cast<std::uint8_t*>(row(r)) + c * std::int64_t(bytes_of(scalar_));
    const float narrow = float(value);
    const std::uint16_t half = to_half(value), brain = std::uint16_t(std::bit_cast<std::uint32_t>(narrow) >> 16);
    switch (scalar_) {
      case Scalar::float64: std::memcpy(to, &value, 8); break;
      case Scalar::float32: std::memcpy(to, &narrow, 4); break;
      case Scalar::float16: std::memcpy(to, &half, 2); break;
      case Scalar::bfloat16: std::memcpy(to, &brain, 2); break;
    }
  }
  double get(std::int64_t r, std::int64_t c) const {
    const std::uint8_t* from = static_cast<const std::uint8_t*>(row(r)) + c * std::int64_t(bytes_of(scalar_));
    double wide;
    float narrow;
    std::uint16_t half;
    switch (scalar_) {
      case Scalar::float64: return std::memcpy(&wide, from, 8), wide;
      case Scalar::float32: return std::memcpy(&narrow, from, 4), narrow;
      case Scalar::float16: return std::memcpy(&half, from, 2), from_half(half);
      case Scalar::bfloat16: break;
    }
    std::memcpy(&half, from, 2);
    return std::bit_cast<float>(std::uint32_t(half) << 16);
  }
  std::vector<double> numbers() const {
    std::vector<double> out;
    for (std::int64_t r = 0; r < rows_; ++r) {
      for (std::int64_t c = 0; c < columns_; ++c) out.push_back(get(r, c));
    }
    return out;
  }
  void fill(std::mt19937_64& random, double size, bool zero_rows) {
    for (std::int64_t r = 0; r < rows_; ++r) {
      const bool zero = zero_rows && random() % 4 == 0;
      // Eight bits and a power of two: exact in every type.
      for (std::int64_t c = 0; c < columns_; ++c) set(r, c, zero ? 0 : size * (double(random() % 511) - 255) / 256);
    }
  }
  bool is_untouched() const {
    return std::all_of(memory_.get(), memory_.get() + size_, [](std::uint8_t b) { return b == pattern; });
  }
  bool gaps_are_untouched() const {
    const auto width = std::size_t(columns_) * bytes_of(scalar_), apart = std::size_t(stride_) * bytes_of(scalar_);
    for (std::size_t at = 0; at < size_; at += apart) {
      for (std::size_t b = at + width; b < std::min(at + apart, size_); ++b) {
        if (memory_[b] != pattern) return false;
      }
    }
    return true;
  }
  Matrix matrix() const { return {row(0), rows_, columns_, stride_, scalar_}; }
  ConstMatrix view() const { return {row(0), rows_, columns_, stride_, scalar_}; }

 private:
  static constexpr std::uint8_t pattern = 0xA5;
  std::int64_t rows_, columns_, stride_;
  Scalar scalar_;
  std::size_t size_ = 0;
  std::unique_ptr<std::uint8_t[]> memory_;
};

double resolution(Scalar scalar) {
  switch (scalar) {
    case Scalar::float64: return 1e-11;
    case Scalar::float32: return 1e-4;
    case Scalar::float16: return 2e-3;
    case Scalar::bfloat16: break;
  }
  return 1e-2;
}

template <class Call>
bool is_refused(Call call) {
  try {
    call();
    return false;
  } catch (const std::invalid_argument& error) {
    const std::string text = error.what();
    if (!text.starts_with("expected ") || text.find(", received ") == text.npos) fail("no sentence: " + text);
    return true;
  }
}

// ------------------------------------------------------------------------------------------------ reading an input

const char* const names[] = {"X",  "Y",  "Z",   "H",    "S",  "T",    "RX",  "RY",  "RZ",
                             "PhaseShift", "Rot", "CNOT", "CZ", "SWAP", "CRX", "CRY", "CRZ"};

constexpr std::uint32_t first_wide = 232;  // of an input's second byte: seven wires and more

// `wild` inputs name wires, parameters, gates and sizes that may not be there.
Circuit read_circuit(Reader& in, bool wild) {
  Circuit c;
  const std::uint32_t size = in.byte();
  c.n_wires = size < first_wide ? 1 + size % 6 : size < 252 ? 7 + size % 3 : size < 255 || !wild ? 10 + size % 4 : in.byte();
  const std::uint32_t n = std::clamp(c.n_wires, 1u, 16u);
  c.n_parameters = in.below(9);
  const std::uint32_t n_gates = in.below(c.n_wires > 9 ? 16 : 48);
  for (std::uint32_t g = 0; g < n_gates; ++g) {
    const std::uint32_t which = in.below(wild ? 18 : 17);
    GateCall gate{which < 17 ? names[which] : "NOT", {}, {}};
    const std::size_t n_operands = which > 10 && which < 17 ? 2 : 1;
    const std::size_t n_angles = which == 10 ? 3 : (which > 5 && which < 10) || (which > 13 && which < 17) ? 1 : 0;
    for (std::size_t k = 0; k < n_operands; ++k) gate.wires.push_back(wild ? in.byte() % (n + 1) : in.below(n));
    for (std::size_t k = 0; k < n_angles; ++k) {
      gate.parameters.push_back(wild || c.n_parameters == 0 ? in.below(c.n_parameters + 1) : in.below(c.n_parameters));
    }
    const bool fits = (n_operands == 1 || gate.wires[0] != gate.wires[1]) && (n_angles == 0 || c.n_parameters > 0);
    if (wild && in.byte() == 255) gate.wires.push_back(in.byte());
    if (wild && in.byte() == 255) gate.parameters.clear();
    if (wild || fits) c.gates.push_back(std::move(gate));
  }
  c.readout.kind = ReadoutKind(in.below(wild ? 4 : 3));
  if (c.readout.kind == ReadoutKind::expval) {
    c.readout.n_outputs = wild ? in.below(12) : 1 + in.below(12);
    const bool plain = in.byte() % 2;  // <Z> of one wire after the other
    for (std::uint32_t k = 0; k < c.readout.n_outputs; ++k) {
      std::string letters(n, 'I');
      if (plain) {
        letters[k % n] = 'Z';
      } else {
        for (char& letter : letters) letter = "IXYZ?"[in.below(wild && in.byte() > 250 ? 5 : 4)];
      }
      c.readout.paulis.push_back(letters);
    }
    if (wild && in.byte() == 255) c.readout.paulis.emplace_back("Z");
  } else {
    c.readout.n_outputs = in.below((1u << n) + 1 + wild) + !wild;
    if (!wild) c.readout.n_outputs = std::min(c.readout.n_outputs, 1u << n);
  }
  c.normalize = in.byte() % 2;
  return c;
}

// Seven rewrites and three widths.
PlanOptions options_of(std::uint32_t rewrites, std::array<std::uint32_t, 3> radices) {
  PlanOptions options = default_options();
  options.fuse = rewrites & 1;
  options.rename = rewrites & 2;
  options.absorb = rewrites & 4;
  options.expand = rewrites & 8;
  options.real = rewrites & 16;
  options.tangent = rewrites & 32;
  options.link = rewrites & 64;
  options.load_radix = int(radices[0]);
  options.rotate_radix = int(radices[1]);
  options.unwind_radix = int(radices[2]);
  return options;
}

PlanOptions read_options(Reader& in, bool wild) {
  if (in.byte() % 4 != 3) return default_options();
  const std::uint32_t rewrites = in.byte();
  std::array<std::uint32_t, 3> radices;
  for (std::uint32_t& radix : radices) radix = in.below(wild ? 7 : 4) + !wild;
  return options_of(rewrites, radices);
}

// Good ones, that depend on every byte of the input.
PlanOptions hashed_options(const std::uint8_t* data, std::size_t size) {
  std::uint32_t hash = 2166136261u;
  for (std::size_t i = 0; i < size; ++i) hash = (hash ^ data[i]) * 16777619u;
  return options_of(hash >> 8, {1 + (hash >> 15) % 4, 1 + (hash >> 17) % 4, 1 + (hash >> 19) % 4});
}

// What distinguishes plans: which kinds of stages, passes, trees and readouts there are, and whether there are several.
std::uint64_t shape_of(const Plan& plan) {
  const Layout &rows = plan.layout(0, 0), &neighbours = plan.layout(std::min(plan.n_wires, 2u), 0);
  std::uint64_t shape = 1;
  auto mix = [&](std::size_t count) { shape = shape * 3 + std::min<std::size_t>(count, 2); };
  for (const std::size_t count : {std::size_t(plan.readout), plan.absorbed.size(), plan.trees.size(), rows.flips.size(),
                                  rows.correlations.size(), std::size_t(plan.n_low > 0)}) {
    mix(count);
  }
  std::size_t complex = 0, real = 0, kept = 0, constant = 0, trees = 0, passes = 0, moves = 0;
  for (const StageLayout& stage : rows.stages) {
    kept += stage.kept;
    passes = std::max(passes, stage.rotate.size());
  }
  for (const StageLayout& stage : neighbours.stages) moves = std::max(moves, stage.moves.size());
  for (const Stage& stage : plan.stages) {
    complex += stage.is_diagonal() && !stage.real;
    real += stage.is_diagonal() && stage.real;
    constant += !stage.constant.empty();
    trees = std::max(trees, stage.trees.size());
  }
  for (const std::size_t count : {complex, real, kept, constant, trees, passes, moves}) mix(count);
  return shape;
}

// ------------------------------------------------------------------------------------------------ calls

double sum_of_products(const std::vector<double>& a, const std::vector<double>& b) {
  double sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

// The same calls with every plan of one circuit.
void check_calls(Reader& in, const Circuit& c, const std::vector<Plan>& plans) {
  const Plan& plan = plans.front();
  const auto scalar = Scalar(in.below(4));
  const bool is_double = scalar == Scalar::float64;
  // Few rows are quickly simulated; many on many wires wake the other threads.
  const bool many = in.byte() % (c.n_wires > 9 ? 64 : 16) == 0;
  const std::int64_t rows = in.below(c.n_wires > 8 ? (many ? 160 : 4) : (many ? 80 : 20));
  const std::int64_t columns = 1 + in.below(plan.n_amplitudes()), k = plan.n_columns();
  const int threads = 1 + int(in.below(4));
  std::mt19937_64 random(in.two());
  const std::uint32_t size_class = in.byte();
  // Without normalization features grow with the square of the rows, and narrow types have little room.
  const bool wide_range = c.normalize && (scalar == Scalar::float32 || is_double);
  const double size = wide_range ? std::ldexp(1.0, int(size_class) / 2 - 64) : 1;
  const std::uint32_t layout = in.byte();
  const std::int64_t gap = layout % 4;
  const std::int64_t x_stride = layout < 128 ? columns + gap : layout < 192 ? -(columns + gap) : layout < 200 ? 0 : columns;
  const std::int64_t some = 1 + layout / 4 % 5, groups = rows % some == 0 ? some : 1;
  const bool share = layout % 3 == 0;
  const std::int64_t x_rows = share ? rows / groups : rows;
  Array x(x_rows, columns, x_stride, scalar), features(rows, k, k + gap, scalar);
  Array grad(rows, k, k + gap, scalar), grad_x(rows, columns, columns + gap, scalar);
  x.fill(random, size, size_class % 8 == 0);
  grad.fill(random, 1, false);
  std::vector<double> theta(std::size_t(groups) * c.n_parameters), grad_theta(theta.size());
  for (double& angle : theta) {
    angle = random() % 3 == 0 ? std::acos(0.0) * double(int(random() % 9) - 4) : double(random() % 65536) / 5000 - 6.5;
  }

  // A call with one fault: refused, and nothing written.
  if (in.byte() % 8 == 0 && rows > 0) {
    Matrix bad = features.matrix(), bad_x = grad_x.matrix();
    ConstMatrix bad_in = x.view(), bad_grad = grad.view();
    const double* angles = theta.data();
    double* sums = grad_theta.data();
    std::int64_t n_groups = groups;
    const std::uint32_t fault = in.below(13);
    double value = 0;
    Matrix strings;  // of another shape or type than the values of strings have
    switch (fault) {
      case 0: bad.columns += 1; bad_grad.columns -= 1; break;
      case 1: bad.rows -= 1; bad_grad.rows += 1; break;
      case 2: bad_in.rows = -1; break;
      case 3: bad_in.columns = 0; break;
      case 4: bad_in.columns = std::int64_t{plan.n_amplitudes()} + 1; break;
      case 5: bad_in.scalar = is_double ? Scalar::float32 : Scalar::float64; break;
      case 6: bad.data = nullptr; bad_grad.data = nullptr; break;
      case 7: bad_in.rows = bad.rows = bad_grad.rows = bad_x.rows = INT64_MAX - 1; break;
      case 8: bad_in.scalar = Scalar(9); break;
      case 9: angles = sums = nullptr; break;
      case 10: n_groups = rows % 2 ? 0 : rows + 1; break;  // as many as do not share them, nor share x
      case 11: bad.row_stride = k - 1; bad_x.row_stride = columns - 1; break;
      default: strings = {&value, rows, plan.n_strings() + 1, 0, is_double ? Scalar::float64 : Scalar::float32}; break;
    }
    const bool harmless = (fault == 9 && c.n_parameters == 0) || (fault == 11 && rows == 1);
    if (!harmless) {
      if (!is_refused([&] { forward({plan, angles, bad_in, bad, threads, n_groups, strings}); })) fail("a bad forward call was accepted");
      const ConstMatrix known{strings.data, strings.rows, strings.columns, 0, strings.scalar};
      if (!is_refused([&] { backward({plan, angles, bad_in, bad_grad, sums, bad_x, threads, n_groups, known}); })) {
        fail("a bad backward call was accepted: fault " + std::to_string(fault));
      }
      if (!features.is_untouched() || !grad_x.is_untouched()) fail("a refused call wrote");
      counts.refused_calls += 2;
      return;
    }
  }

  // Along one direction of angles and inputs together.
  const std::vector<double> numbers = x.numbers(), weights = grad.numbers();
  std::vector<double> lengths;  // of the rows
  double largest = c.normalize ? 1 : 0;
  for (std::int64_t r = 0; r < x_rows; ++r) {
    double square = 0;
    for (std::int64_t j = 0; j < columns; ++j) square += std::pow(numbers[std::size_t(r * columns + j)], 2);
    lengths.push_back(std::sqrt(square));
    largest = std::max(largest, c.readout.kind == ReadoutKind::state ? std::sqrt(square) : square);
  }
  if (c.normalize) largest = 1;
  std::vector<double> turn(theta.size()), step(numbers.size());
  for (double& t : turn) t = (double(random() % 201) - 100) / 100 / (1 + double(c.gates.size()));
  for (std::size_t i = 0; i < step.size(); ++i) {
    step[i] = lengths[i / std::size_t(columns)] * (double(random() % 201) - 100) / 100 / std::sqrt(double(columns));
  }
  if (x_stride == 0 && x_rows > 1) step.assign(step.size(), 0);  // the rows are one row
  Features expected;
  for (std::size_t g = 0; g < std::size_t(groups); ++g) {
    auto part = [&](const std::vector<double>& all, bool whole = false) {
      if (whole) return all;
      const std::size_t size = all.size() / std::size_t(groups);
      return std::vector<double>(all.begin() + std::ptrdiff_t(g * size), all.begin() + std::ptrdiff_t((g + 1) * size));
    };
    const Features found = simulate(c, part(theta), part(turn), part(numbers, share), part(step, share), std::size_t(columns));
    expected.value.insert(expected.value.end(), found.value.begin(), found.value.end());
    expected.slope.insert(expected.slope.end(), found.slope.begin(), found.slope.end());
  }
  const double slope = sum_of_products(weights, expected.slope);
  double total = 0;
  for (const double w : weights) total += std::abs(w);
  const double bound = resolution(scalar) * std::max(largest, 1e-3), allowed = bound * (total + 1);

  for (const Plan& plan : plans) {
    Array features(rows, k, k + gap, scalar), grad_x(rows, columns, columns + gap, scalar);
    const std::int64_t n_strings = plan.n_strings();
    Array strings(rows, n_strings, n_strings + gap, is_double ? Scalar::float64 : Scalar::float32);
    // With the strings' values, or measured again.
    const bool known = n_strings > 0 && (std::size_t(&plan - plans.data()) + layout) % 2 == 1;
    forward({plan, theta.data(), x.view(), features.matrix(), threads, groups, known ? strings.matrix() : Matrix()});
    backward({plan, theta.data(), x.view(), grad.view(), grad_theta.data(), grad_x.matrix(), threads, groups,
              known ? strings.view() : ConstMatrix()});
    ++counts.forward, ++counts.backward;
    if (!features.gaps_are_untouched() || !grad_x.gaps_are_untouched() || !strings.gaps_are_untouched()) {
      fail("something between rows was written");
    }
    const std::vector<double> received = features.numbers();
    for (std::size_t i = 0; i < received.size(); ++i) {
      if (!(std::abs(received[i] - expected.value[i]) <= bound)) {
        fail("expected feature " + std::to_string(expected.value[i]) + ", received " + std::to_string(received[i]));
      }
    }
    std::vector<double> steps;
    for (std::int64_t g = 0; g < (share ? groups : 1); ++g) steps.insert(steps.end(), step.begin(), step.end());
    const double found = sum_of_products(grad_theta, turn) + sum_of_products(grad_x.numbers(), steps);
    if (!(std::abs(found - slope) <= allowed)) {
      fail("expected derivative " + std::to_string(slope) + ", received " + std::to_string(found));
    }
  }
}

void check_projection(Reader& in) {
  const Scalar scalar = in.byte() % 2 ? Scalar::float64 : Scalar::float32;
  const std::int64_t rows = in.below(in.byte() % 8 == 0 ? 200 : 20), k = 1 + in.below(20), columns = 1 + in.below(70);
  const std::int64_t gap = in.below(3);
  const int threads = 1 + int(in.below(4));
  const bool with_bias = in.byte() % 2;
  std::mt19937_64 random(in.two());
  Array features(rows, k, k + gap, scalar), up(columns, k, k + gap, scalar), bias(1, columns, columns, scalar);
  Array base(rows, columns, columns + gap, scalar), out(rows, columns, columns + gap, scalar);
  Array grad_features(rows, k, k + gap, scalar), grad_up(columns, k, k + gap, scalar), grad_bias(1, columns, columns, scalar);
  for (Array* array : {&features, &up, &bias, &base}) array->fill(random, 1, false);
  const double scale = 0.5;
  ConstMatrix bias_in = bias.view();
  Matrix bias_out = grad_bias.matrix();
  if (!with_bias) bias_in.data = bias_out.data = nullptr;
  if (in.byte() % 8 == 0 && rows > 0) {
    ConstMatrix bad = features.view();
    switch (in.below(4)) {
      case 0: bad.rows = -1; break;
      case 1: bad.columns += 1; break;
      case 2: bad.scalar = Scalar::float16; break;
      default: bad.data = nullptr; break;
    }
    if (!is_refused([&] { project({bad, up.view(), bias_in, base.view(), scale, out.matrix(), threads}); }) ||
        !is_refused([&] {
          project_backward({base.view(), bad, up.view(), scale, grad_features.matrix(), grad_up.matrix(), bias_out, threads});
        })) {
      fail("a bad projection was accepted");
    }
    if (!out.is_untouched() || !grad_up.is_untouched() || !grad_features.is_untouched()) fail("a refused call wrote");
    counts.refused_calls += 2;
    return;
  }
  project({features.view(), up.view(), bias_in, base.view(), scale, out.matrix(), threads});
  project_backward({base.view(), features.view(), up.view(), scale, grad_features.matrix(), grad_up.matrix(), bias_out, threads});
  counts.project += 2;
  const double bound = (scalar == Scalar::float64 ? 1e-12 : 2e-6) * double(k + columns + rows);
  auto compare = [&](double received, double expected) {
    if (!(std::abs(received - expected) <= bound)) fail("a projection differs from its formula");
  };
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t c = 0; c < columns; ++c) {
      double sum = with_bias ? bias.get(0, c) : 0;
      for (std::int64_t j = 0; j < k; ++j) sum += features.get(r, j) * up.get(c, j);
      compare(out.get(r, c), base.get(r, c) + scale * sum);
    }
    for (std::int64_t j = 0; j < k; ++j) {
      double sum = 0;
      for (std::int64_t c = 0; c < columns; ++c) sum += base.get(r, c) * up.get(c, j);
      compare(grad_features.get(r, j), scale * sum);
    }
  }
  for (std::int64_t c = 0; c < columns; ++c) {
    double bias_sum = 0;
    for (std::int64_t r = 0; r < rows; ++r) bias_sum += base.get(r, c);
    if (with_bias) compare(grad_bias.get(0, c), scale * bias_sum);
    for (std::int64_t j = 0; j < k; ++j) {
      double sum = 0;
      for (std::int64_t r = 0; r < rows; ++r) sum += base.get(r, c) * features.get(r, j);
      compare(grad_up.get(c, j), scale * sum);
    }
  }
  if (!out.gaps_are_untouched() || !grad_features.gaps_are_untouched()) fail("something between rows was written");
}

void run_input(const std::uint8_t* data, std::size_t size) {
  Reader in(data, size);
  const std::uint32_t mode = in.byte();
  if (mode % 64 == 1) return check_projection(in);
  const bool wild = mode % 4 == 2;
  const Circuit c = read_circuit(in, wild);
  const PlanOptions options = read_options(in, wild);
  std::vector<Plan> plans;
  auto add_plan = [&](const PlanOptions& how) {
    plans.push_back(compile(c.n_wires, c.n_parameters, c.gates, c.readout, c.normalize, how));
    ++counts.compiled;
  };
  if (is_refused([&] { add_plan(options); })) {
    ++counts.refused;
    if (!wild) fail("a good circuit was refused");
    return;
  }
  shape_of_last_plan = shape_of(plans.front());
  add_plan(hashed_options(data, size));
  if (mode % 16 == 0 || mode % 64 == 2) check_calls(in, c, plans);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  run_input(data, size);
  return 0;
}

// ------------------------------------------------------------------------------------------------ the driver

#ifndef QAA_LIBFUZZER
namespace {

constexpr std::size_t largest_input = 400, largest_corpus = 5000;

Bytes read_file(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

Bytes mutated(const std::vector<Bytes>& corpus, std::mt19937_64& random) {
  if (random() % 8 == 0 || corpus.empty()) {
    Bytes fresh(1 + random() % largest_input);
    for (auto& byte : fresh) byte = std::uint8_t(random());
    return fresh;
  }
  // Plans of seven wires and more, which are most of the new ones, take most of the time.
  auto is_wide = [](const Bytes& bytes) { return bytes.size() > 1 && bytes[1] >= first_wide; };
  std::size_t chosen;
  do chosen = random() % corpus.size();
  while (is_wide(corpus[chosen]) && random() % 4 != 0);
  Bytes input = corpus[chosen];
  if (!input.empty() && random() % 2) input[0] = std::uint8_t(random());  // or nearly all would be calls
  for (std::uint64_t k = 1 + random() % 6; k > 0; --k) {
    const std::size_t at = input.empty() ? 0 : random() % input.size();
    const auto here = input.begin() + std::ptrdiff_t(at);
    switch (random() % 5) {
      case 0: input.insert(here, std::uint8_t(random())); break;
      case 1:
        if (!input.empty()) input.erase(here);
        break;
      case 2: {  // the tail of another input
        const Bytes& other = corpus[random() % corpus.size()];
        input.resize(at);
        if (at < other.size()) input.insert(input.end(), other.begin() + std::ptrdiff_t(at), other.end());
        break;
      }
      default:
        if (!input.empty()) *here = random() % 2 ? std::uint8_t(random()) : std::uint8_t(*here ^ 1u << random() % 8);
    }
  }
  input.resize(std::min(input.size(), largest_input));
  return input;
}

// The input at hand, for the report of a crash.
Bytes current;
extern "C" void report_input(int) {
  std::ofstream("crash-input", std::ios::binary).write(reinterpret_cast<const char*>(current.data()), std::ptrdiff_t(current.size()));
  std::_Exit(1);
}

void print_counts(std::uint64_t runs, std::size_t shapes) {
  std::printf("%s: %llu inputs, %llu plans compiled (%zu shapes), %llu circuits refused, %llu forward, %llu backward and "
              "%llu projection calls equal to the oracle, %llu calls refused\n",
              instruction_set(), (unsigned long long)runs, (unsigned long long)counts.compiled, shapes,
              (unsigned long long)counts.refused, (unsigned long long)counts.forward,
              (unsigned long long)counts.backward, (unsigned long long)counts.project,
              (unsigned long long)counts.refused_calls);
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  std::uint64_t runs = 0, seed = 0;
  std::string save;
  std::vector<Bytes> corpus;
  std::set<std::uint64_t> shapes;
  std::signal(SIGABRT, report_input);
  for (int i = 1; i < argc; ++i) {
    const std::string option = argv[i];
    if (option == "--replay") {
      for (++i; i < argc; ++i) {
        current = read_file(argv[i]);
        run_input(current.data(), current.size());
      }
      continue;
    }
    if (i + 1 >= argc) {
      std::fprintf(stderr, "usage: fuzz --runs N [--seed S] [--corpus FOLDER] [--save FOLDER] | fuzz --replay FILE...\n");
      return 2;
    }
    const std::string value = argv[++i];
    if (option == "--runs") runs = std::stoull(value);
    if (option == "--seed") seed = std::stoull(value);
    if (option == "--save") save = value;
    if (option == "--corpus") {
      std::vector<std::filesystem::path> files(std::filesystem::directory_iterator(value), {});
      std::ranges::sort(files);
      for (const auto& file : files) {
        current = read_file(file);
        shape_of_last_plan = 0;
        run_input(current.data(), current.size());
        shapes.insert(shape_of_last_plan);
        corpus.push_back(current);
      }
    }
  }
  std::mt19937_64 random(seed);
  for (std::uint64_t run = 0; run < runs; ++run) {
    current = mutated(corpus, random);
    shape_of_last_plan = 0;
    run_input(current.data(), current.size());
    if ((run + 1) % 500'000 == 0) print_counts(run + 1, shapes.size());
    if (shape_of_last_plan == 0 || !shapes.insert(shape_of_last_plan).second) continue;
    if (corpus.size() < largest_corpus) corpus.push_back(current);
    if (!save.empty()) {
      std::ofstream(std::filesystem::path(save) / std::to_string(shape_of_last_plan), std::ios::binary)
          .write(reinterpret_cast<const char*>(current.data()), std::ptrdiff_t(current.size()));
    }
  }
  print_counts(runs, shapes.size());
  return 0;
}
#endif
