// A program's text -> plan; qaa.program.Program writes it.
#include <charconv>
#include <limits>
#include <span>
#include <stdexcept>

#include "qaa.h"

namespace qaa {
namespace {

[[noreturn]] void refuse(const std::string& expected, std::string_view received) {
  throw std::invalid_argument("expected " + expected + ", received '" + std::string(received.substr(0, 80)) + "'");
}

std::vector<std::string_view> split(std::string_view text, std::string_view separator) {
  std::vector<std::string_view> parts;
  for (std::size_t at; (at = text.find(separator)) != std::string_view::npos;) {
    parts.push_back(text.substr(0, at));
    text.remove_prefix(at + separator.size());
  }
  parts.push_back(text);
  return parts;
}

std::vector<std::string_view> words(std::string_view text) {
  std::vector<std::string_view> parts = split(text, " ");
  std::erase(parts, std::string_view());
  return parts;
}

std::uint32_t number(std::string_view text) {
  std::uint32_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) refuse("an integer of at least 0", text);
  return value;
}

// "2x4x3" has 24 parameters, "0" none, and the empty shape, that of a number, one.
std::uint32_t n_parameters(std::string_view shape) {
  std::uint64_t product = 1;
  for (const std::string_view length : split(shape, "x")) {
    product *= number(length);
    if (product > std::numeric_limits<std::uint32_t>::max()) refuse("less than 2^32 parameters", shape);
  }
  return std::uint32_t(product);
}

GateCall gate(const std::vector<std::string_view>& statement) {
  GateCall call{std::string(statement.at(0)), {}, {}};
  for (const std::string_view operand : std::span(statement).subspan(1)) {
    const bool is_parameter = operand.front() == 't';
    (is_parameter ? call.parameters : call.wires).push_back(number(operand.substr(is_parameter)));
  }
  return call;
}

ReadoutSpec readout(std::string_view text) {
  ReadoutSpec spec;
  if (text.starts_with("probs[:") || text.starts_with("state[:")) {
    if (!text.ends_with(']')) refuse("a readout 'probs[:K]' or 'state[:K]'", text);
    const ReadoutKind kind = text.starts_with("probs") ? ReadoutKind::probs : ReadoutKind::state;
    return {kind, number(text.substr(7, text.size() - 8)), {}};
  }
  for (const std::string_view pauli : split(text, ",")) spec.paulis.emplace_back(pauli);
  spec.n_outputs = std::uint32_t(spec.paulis.size());
  return spec;
}

}  // namespace

Plan compile(std::string_view program, const PlanOptions& options) {
  const std::vector<std::string_view> parts = split(program, " | ");
  if (parts.size() != 3 || (parts[2] != "normalize" && parts[2] != "as is")) {
    refuse("'CIRCUIT | READOUT | normalize' or '... | as is'", program);
  }
  const std::vector<std::string_view> statements = split(parts[0], ";");
  const std::vector<std::string_view> wires = words(statements[0]);
  const std::vector<std::string_view> theta = statements.size() > 1 ? words(statements[1]) : wires;
  if (wires.size() != 2 || wires[0] != "wires" || theta.empty() || theta[0] != "theta" || theta.size() > 2) {
    refuse("'wires N; theta SHAPE; GATE ...'", parts[0]);
  }
  std::vector<GateCall> gates;
  for (const std::string_view statement : std::span(statements).subspan(2)) {
    if (words(statement).empty()) refuse("a gate between semicolons", statement);
    gates.push_back(gate(words(statement)));
  }
  return compile(number(wires[1]), theta.size() == 2 ? n_parameters(theta[1]) : 1, gates, readout(parts[1]),
                 parts[2] == "normalize", options);
}

}  // namespace qaa
