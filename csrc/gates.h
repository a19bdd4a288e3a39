// The gate table: every gate as a short sequence of primitives that the plan compiler knows.
//
// Three kinds of primitives reach the kernels: a real rotation of pairs of amplitudes (`ry`), a diagonal phase
// (`rz`, `rzz`, `phase`), and a relabelling of amplitudes that costs nothing (`x`, `z`, `cnot`, `swap`).
// Each angle is linear in at most one parameter of the gate, so derivatives never meet a singular decomposition.
#pragma once

#include <array>
#include <cstdint>
#include <numbers>
#include <string_view>

namespace qaa {

enum class Primitive : std::uint8_t {
  none,
  ry,     // exp(-i angle Y/2) on wire a
  rz,     // exp(-i angle Z/2) on wire a
  rzz,    // exp(-i angle Z Z/2) on wires a and b
  phase,  // exp(+i angle) on the whole state
  x,      // Pauli X on wire a
  z,      // Pauli Z on wire a
  cnot,   // control a, target b
  swap,   // wires a and b
};

// One primitive of a gate: its operands are positions in the gate's own lists of wires and parameters.
struct Step {
  Primitive primitive = Primitive::none;
  std::int8_t a = 0;           // position of the first wire
  std::int8_t b = 0;           // position of the second wire, where there is one
  std::int8_t parameter = -1;  // position of the parameter, -1 for a constant angle
  double factor = 0;           // angle = factor * parameter, or factor alone where there is no parameter
};

struct GateInfo {
  std::string_view name;
  std::int8_t n_wires;
  std::int8_t n_parameters;
  std::array<Step, 7> steps;  // applied first to last; `none` ends the sequence
};

namespace detail {
inline constexpr double pi = std::numbers::pi;
constexpr Step ry(int wire, int parameter, double factor = 1) {
  return {Primitive::ry, std::int8_t(wire), 0, std::int8_t(parameter), factor};
}
constexpr Step rz(int wire, int parameter, double factor = 1) {
  return {Primitive::rz, std::int8_t(wire), 0, std::int8_t(parameter), factor};
}
constexpr Step rzz(int parameter, double factor) { return {Primitive::rzz, 0, 1, std::int8_t(parameter), factor}; }
constexpr Step phase(int parameter, double factor) { return {Primitive::phase, 0, 0, std::int8_t(parameter), factor}; }
constexpr Step map(Primitive primitive, int a, int b = 0) { return {primitive, std::int8_t(a), std::int8_t(b), -1, 0}; }
inline constexpr Step cnot = map(Primitive::cnot, 0, 1);
}  // namespace detail

// RX = RZ(-pi/2) RY RZ(pi/2) as operators: the Y axis turned about Z onto X. Controlled rotations: the rotation by
// half the angle, and by half the angle with the sign that the control chooses.
inline constexpr std::array<GateInfo, 17> gate_table = [] {
  using namespace detail;
  return std::array<GateInfo, 17>{{
      {"X", 1, 0, {map(Primitive::x, 0)}},
      {"Y", 1, 0, {map(Primitive::z, 0), map(Primitive::x, 0), phase(-1, pi / 2)}},
      {"Z", 1, 0, {map(Primitive::z, 0)}},
      {"H", 1, 0, {map(Primitive::z, 0), ry(0, -1, pi / 2)}},
      {"S", 1, 0, {rz(0, -1, pi / 2), phase(-1, pi / 4)}},
      {"T", 1, 0, {rz(0, -1, pi / 4), phase(-1, pi / 8)}},
      {"RX", 1, 1, {rz(0, -1, pi / 2), ry(0, 0), rz(0, -1, -pi / 2)}},
      {"RY", 1, 1, {ry(0, 0)}},
      {"RZ", 1, 1, {rz(0, 0)}},
      {"PhaseShift", 1, 1, {rz(0, 0), phase(0, 0.5)}},
      {"Rot", 1, 3, {rz(0, 0), ry(0, 1), rz(0, 2)}},
      {"CNOT", 2, 0, {cnot}},
      {"CZ", 2, 0, {rz(0, -1, pi / 2), rz(1, -1, pi / 2), rzz(-1, -pi / 2), phase(-1, pi / 4)}},
      {"SWAP", 2, 0, {map(Primitive::swap, 0, 1)}},
      {"CRX", 2, 1, {rz(1, -1, pi / 2), ry(1, 0, 0.5), cnot, ry(1, 0, -0.5), cnot, rz(1, -1, -pi / 2)}},
      {"CRY", 2, 1, {ry(1, 0, 0.5), cnot, ry(1, 0, -0.5), cnot}},
      {"CRZ", 2, 1, {rz(1, 0, 0.5), rzz(0, -0.5)}},
  }};
}();

constexpr const GateInfo* find_gate(std::string_view name) {
  for (const GateInfo& gate : gate_table) {
    if (gate.name == name) return &gate;
  }
  return nullptr;
}

}  // namespace qaa
