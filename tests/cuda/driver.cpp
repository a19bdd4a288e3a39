// The host functions of csrc/cuda.h for ctypes, in builds where the device is emulated: "device" memory is memory of the
// caller, and the workspace comes from malloc, exactly as large as asked for and filled with NaN.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>

#include "cuda.h"

namespace {

using namespace qaa;

struct OnDevice {
  cuda::Program program;
  std::unique_ptr<unsigned char[]> description;  // a copy of its own, so that a byte beyond its end is an error
  explicit OnDevice(const Plan& plan, bool is_known) : program(plan, is_known) {
    description.reset(new unsigned char[program.description.size()]);
    std::memcpy(description.get(), program.description.data(), program.description.size());
  }
};

struct Compiled {
  Plan plan;
  OnDevice any;
  std::unique_ptr<OnDevice> known;  // where there are kernels for this circuit alone
  const void* kernels[2] = {nullptr, nullptr};
  std::string source;
  explicit Compiled(Plan from) : plan(std::move(from)), any(plan, false) {
    if (cuda::Program::can_be_known(plan)) known = std::make_unique<OnDevice>(plan, true);
  }
  const OnDevice& with(const void* kernel) const { return kernel != nullptr ? *known : any; }
};

thread_local std::string message;

// "RY 0 : 3; CNOT 0 1 : ;" -- name, wires, a colon, parameters.
std::vector<GateCall> parse_gates(const char* text) {
  std::vector<GateCall> gates;
  std::istringstream all(text);
  for (std::string one; std::getline(all, one, ';');) {
    std::istringstream words(one);
    GateCall gate;
    if (!(words >> gate.name)) continue;
    bool wires = true;
    for (std::string word; words >> word;) {
      if (word == ":") {
        wires = false;
      } else {
        (wires ? gate.wires : gate.parameters).push_back(std::uint32_t(std::stoul(word)));
      }
    }
    gates.push_back(std::move(gate));
  }
  return gates;
}

class Workspace {
 public:
  explicit Workspace(std::size_t bytes) : memory_(std::malloc(bytes)) { std::memset(memory_, 0xff, bytes); }
  ~Workspace() { std::free(memory_); }
  Workspace(const Workspace&) = delete;
  void* get() const { return memory_; }

 private:
  void* memory_;
};

template <class F>
int guarded(F&& f) {
  try {
    f();
    return 0;
  } catch (const std::exception& error) {
    message = error.what();
    return 1;
  }
}

}  // namespace

extern "C" {

const char* qaa_error() { return message.c_str(); }

void* qaa_plan(std::uint32_t n_wires, std::uint32_t n_parameters, const char* gates, int kind, std::uint32_t n_outputs,
               const char* paulis, int normalize, const char* without) {
  Compiled* out = nullptr;
  guarded([&] {
    ReadoutSpec readout{ReadoutKind(kind), n_outputs, {}};
    std::istringstream strings(paulis);
    for (std::string word; strings >> word;) readout.paulis.push_back(word);
    PlanOptions options;
    const std::string off(without);
    auto on = [&](const char* name) { return off.find(name) == std::string::npos; };
    options.fuse = on("fuse");
    options.absorb = on("absorb");
    options.real = on("real");
    options.tangent = on("tangent");
    out = new Compiled(compile(n_wires, n_parameters, parse_gates(gates), readout, normalize != 0, options));
  });
  return out;
}

const char* qaa_known_source(void* plan, int scalar, int backward) {
  auto& compiled = *static_cast<Compiled*>(plan);
  compiled.source.clear();
  guarded([&] {
    if (compiled.known) compiled.source = cuda::known_source(compiled.known->program, Scalar(scalar), backward != 0);
  });
  return compiled.source.c_str();
}

// From now on this plan's calls run kernels of its own.
void qaa_use_kernels(void* plan, const void* forward, const void* backward) {
  auto& compiled = *static_cast<Compiled*>(plan);
  compiled.kernels[0] = cuda::load_kernel(forward);
  compiled.kernels[1] = cuda::load_kernel(backward);
}

void qaa_plan_free(void* plan) { delete static_cast<Compiled*>(plan); }

int qaa_forward(void* plan, const void* theta, int theta_scalar, const void* x, std::int64_t x_rows,
                std::int64_t columns, std::int64_t stride, int scalar, std::int64_t rows, std::int64_t groups,
                void* features, std::int64_t features_stride, int features_scalar) {
  return guarded([&] {
    const auto& compiled = *static_cast<Compiled*>(plan);
    const void* kernel = compiled.kernels[0];
    const auto& [program, description] = compiled.with(kernel);
    const Workspace workspace(cuda::workspace_bytes(program, rows, Scalar(scalar), false, groups));
    cuda::forward({program, description.get(), theta, Scalar(theta_scalar),
                   {x, x_rows, columns, stride, Scalar(scalar)},
                   {features, rows, compiled.plan.n_columns(), features_stride, Scalar(features_scalar)},
                   workspace.get(), nullptr, kernel, groups});
  });
}

int qaa_backward(void* plan, const void* theta, int theta_scalar, const void* x, std::int64_t x_rows,
                 std::int64_t columns, std::int64_t stride, int scalar, std::int64_t rows, std::int64_t groups,
                 const void* grad, std::int64_t grad_stride, int grad_scalar, void* grad_theta, void* grad_x,
                 std::int64_t grad_x_stride) {
  return guarded([&] {
    const auto& compiled = *static_cast<Compiled*>(plan);
    const void* kernel = compiled.kernels[1];
    const auto& [program, description] = compiled.with(kernel);
    const Workspace workspace(cuda::workspace_bytes(program, rows, Scalar(scalar), true, groups));
    cuda::backward({program, description.get(), theta, Scalar(theta_scalar),
                    {x, x_rows, columns, stride, Scalar(scalar)},
                    {grad, rows, compiled.plan.n_columns(), grad_stride, Scalar(grad_scalar)},
                    grad_theta,
                    {grad_x, rows, columns, grad_x_stride, Scalar(scalar)},
                    workspace.get(), nullptr, kernel, groups});
  });
}

}  // extern "C"
