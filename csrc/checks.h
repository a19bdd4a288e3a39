// Checks of a call's arguments, the same on every device. They throw std::invalid_argument.
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

#include "qaa.h"

namespace qaa {

// Throws what compile() throws for a circuit or a readout that there cannot be.
void check_circuit(std::uint32_t n_wires, std::uint32_t n_parameters, const std::vector<GateCall>& gates,
                   const ReadoutSpec& readout);

inline std::string name_of(Scalar scalar) {
  switch (scalar) {
    case Scalar::float16: return "float16";
    case Scalar::bfloat16: return "bfloat16";
    case Scalar::float32: return "float32";
    case Scalar::float64: return "float64";
  }
  return "type " + std::to_string(int(scalar));
}

// What the numbers of a matrix may be beside those of the one that leads a call.
struct Numbers {
  Scalar scalar;
  const char* leader;
  bool exact = false;  // the very same type; otherwise any that is float64 if and only if the leader is

  bool allow(Scalar other) const {
    if (exact || scalar == Scalar::float64) return other == scalar;
    return other == Scalar::float16 || other == Scalar::bfloat16 || other == Scalar::float32;
  }
  std::string str() const {
    const bool any_narrow = !exact && scalar != Scalar::float64;
    return (any_narrow ? "float16, bfloat16 or float32" : name_of(scalar)) + " numbers, as " + leader +
           (any_narrow ? " has none of float64" : " has");
  }
};

template <class M>
inline void check(const M& m, const char* name, std::int64_t rows, std::int64_t columns, const Numbers& numbers) {
  auto refuse = [&](const std::string& expected, const std::string& received) {
    throw std::invalid_argument(std::string("expected ") + name + " with " + expected + ", received " + received);
  };
  if (m.rows != rows) refuse(std::to_string(rows) + " rows", std::to_string(m.rows));
  if (m.columns != columns) refuse(std::to_string(columns) + " columns", std::to_string(m.columns));
  if (!numbers.allow(m.scalar)) refuse(numbers.str(), name_of(m.scalar));
  if (m.rows > 0 && m.data == nullptr) refuse("data", "a null pointer");
  if constexpr (!std::is_const_v<std::remove_pointer_t<decltype(m.data)>>) {  // threads write different rows
    if (m.rows > 1 && m.row_stride < columns) {
      refuse("rows at least " + std::to_string(columns) + " numbers apart", std::to_string(m.row_stride));
    }
  }
}

// So many that no product with a row's bytes or a plan's amplitudes overflows.
constexpr std::int64_t most_rows = std::int64_t{1} << 40;

inline void check_rows(std::int64_t rows) {
  if (rows < 0 || rows > most_rows) {
    throw std::invalid_argument("expected a batch of 0 to " + std::to_string(most_rows) + " rows, received " +
                                std::to_string(rows));
  }
}

// How many rows a call's features have: as many as x, or as many for each group where all share x.
inline std::int64_t check_groups(std::int64_t groups, std::int64_t x_rows, std::int64_t rows) {
  constexpr std::int64_t most = (std::int64_t{1} << 31) - 1;
  const bool share = groups > 0 && rows % groups == 0 && rows / groups == x_rows;
  if (groups < 1 || groups > most || (!share && x_rows % groups != 0)) {
    throw std::invalid_argument("expected 1 to " + std::to_string(most) +
                                " groups of rows, equally many in each, received " + std::to_string(groups) +
                                " groups and " + std::to_string(x_rows) + " rows");
  }
  return share ? rows : x_rows;
}

inline void check_angle_type(Scalar scalar) {
  if (scalar != Scalar::float32 && scalar != Scalar::float64) {
    throw std::invalid_argument("expected angles of float32 or float64, received " + name_of(scalar));
  }
}

inline void check_angles(std::uint32_t n_parameters, const void* angles, const char* name) {
  if (n_parameters > 0 && angles == nullptr) {
    throw std::invalid_argument(std::string("expected ") + name + " with data, received a null pointer");
  }
}

inline void check_plan(const Plan& plan) {
  if (!plan.layouts) {
    throw std::invalid_argument("expected a plan from compile(), received one that is empty or was moved from");
  }
}

inline void check_threads(int threads) {
  if (threads < 1) throw std::invalid_argument("expected threads of at least 1, received " + std::to_string(threads));
}

inline void check_x(const Plan& plan, const ConstMatrix& x) {
  check_plan(plan);
  check_rows(x.rows);
  if (x.scalar > Scalar::float64) {
    throw std::invalid_argument("expected x of float16, bfloat16, float32 or float64, received " + name_of(x.scalar));
  }
  if (x.columns < 1 || x.columns > std::int64_t{plan.n_amplitudes()}) {
    throw std::invalid_argument("expected x with 1 to " + std::to_string(plan.n_amplitudes()) + " columns for " +
                                std::to_string(plan.n_wires) + " wires, received " + std::to_string(x.columns));
  }
}

inline void check_forward(const Plan& plan, const ConstMatrix& x, const Matrix& features, std::int64_t groups = 1) {
  check_x(plan, x);
  check(features, "features", check_groups(groups, x.rows, features.rows), plan.n_columns(), {x.scalar, "x"});
  if (x.rows > 0 && x.data == nullptr) throw std::invalid_argument("expected x with data, received a null pointer");
}

// Values of strings have the precision of states: any other would not be what the other direction takes them for.
template <class M>
inline void check_strings(const Plan& plan, const M& strings, std::int64_t rows, Scalar x) {
  const Scalar state = x == Scalar::float64 ? Scalar::float64 : Scalar::float32;
  check(strings, "strings", rows, plan.n_strings(), {state, "the state", true});
}

inline void check_backward(const Plan& plan, const ConstMatrix& x, const ConstMatrix& grad, const Matrix& grad_x,
                           std::int64_t groups = 1) {
  check_x(plan, x);
  check(grad, "grad", check_groups(groups, x.rows, grad.rows), plan.n_columns(), {x.scalar, "x"});
  if (x.rows > 0 && x.data == nullptr) {
    if (plan.is_quadratic() || plan.normalize) {
      throw std::invalid_argument("expected x with data for a readout that is not linear in x, received a null "
                                  "pointer");
    }
    if (grad_x.data == nullptr) {
      throw std::invalid_argument("expected grad_x with data where x has none, received a null pointer");
    }
  }
  if (grad_x.data != nullptr) check(grad_x, "grad_x", grad.rows, x.columns, {x.scalar, "x"});
}

}  // namespace qaa
