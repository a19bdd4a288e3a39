// The Python module qaa._core: argument conversion and nothing else. Arrays come as addresses; qaa.arrays and qaa.ops
// have checked their shapes and types.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <exception>
#include <optional>

#include "checks.h"
#include "cuda.h"
#include "gates.h"
#include "noise.h"
#include "qaa.h"
#include "xla.h"

namespace py = pybind11;
using namespace qaa;

namespace {

using Gate = std::tuple<std::string, std::vector<std::uint32_t>, std::vector<std::uint32_t>>;

// Calls `work` without the GIL. Taking it back ends this thread by unwinding its stack if the interpreter has ended in
// the meantime: from a destructor, as py::gil_scoped_release has one, that would be std::terminate.
template <class Work>
void without_gil(const Work& work) {
  PyThreadState* const state = PyEval_SaveThread();
  std::exception_ptr failure;
  try {
    work();
  } catch (...) {
    failure = std::current_exception();
  }
  PyEval_RestoreThread(state);
  if (failure) std::rethrow_exception(failure);
}

std::vector<GateCall> calls_of(const std::vector<Gate>& gates) {
  std::vector<GateCall> calls;
  calls.reserve(gates.size());
  for (const auto& [name, wires, parameters] : gates) calls.push_back({name, wires, parameters});
  return calls;
}

Plan make_plan(std::uint32_t n_wires, std::uint32_t n_parameters, const std::vector<Gate>& gates, ReadoutKind kind,
               std::uint32_t n_outputs, std::vector<std::string> paulis, bool normalize, bool fuse, bool rename,
               bool absorb, bool expand, bool real, bool tangent, bool link, std::optional<int> rotate_radix,
               std::optional<int> unwind_radix) {
  PlanOptions options = default_options();
  options.fuse = fuse;
  options.rename = rename;
  options.absorb = absorb;
  options.expand = expand;
  options.real = real;
  options.tangent = tangent;
  options.link = link;
  options.rotate_radix = rotate_radix.value_or(options.rotate_radix);
  options.unwind_radix = unwind_radix.value_or(options.unwind_radix);
  Plan plan;
  without_gil([&] {
    plan = compile(n_wires, n_parameters, calls_of(gates), {kind, n_outputs, std::move(paulis)}, normalize, options);
  });
  return plan;
}

NoisyPlan make_noisy_plan(std::uint32_t n_wires, std::uint32_t n_parameters, const std::vector<Gate>& gates,
                          ReadoutKind kind, std::uint32_t n_outputs, std::vector<std::string> paulis, bool normalize,
                          std::array<double, 3> pauli, double damping, double readout) {
  const Noise noise{pauli[0], pauli[1], pauli[2], damping, readout};
  NoisyPlan plan;
  without_gil([&] {
    plan = compile_noisy(n_wires, n_parameters, calls_of(gates), {kind, n_outputs, std::move(paulis)}, normalize, noise);
  });
  return plan;
}

template <class M>
M matrix(std::uintptr_t data, std::int64_t rows, std::int64_t columns, std::int64_t row_stride, Scalar scalar) {
  M m;
  m.data = reinterpret_cast<decltype(m.data)>(data);
  m.rows = rows;
  m.columns = columns;
  m.row_stride = row_stride;
  m.scalar = scalar;
  return m;
}

// Angles as the core wants them, from float32 or float64.
class Angles {
 public:
  Angles(std::uintptr_t address, Scalar scalar, std::size_t n) {
    check_angle_type(scalar);
    if (scalar == Scalar::float64) {
      data_ = reinterpret_cast<const double*>(address);
    } else {
      const float* first = reinterpret_cast<const float*>(address);
      copy_.assign(first, first + n);
      data_ = copy_.data();
    }
  }
  const double* data() const { return data_; }

 private:
  std::vector<double> copy_;
  const double* data_ = nullptr;
};

std::size_t n_angles(const Plan& plan, std::int64_t groups, std::int64_t x_rows, std::int64_t rows) {
  check_groups(groups, x_rows, rows);
  return std::size_t(groups) * plan.n_parameters;
}

void run_forward(const Plan& plan, std::uintptr_t theta, Scalar theta_scalar, const ConstMatrix& x,
                 const Matrix& features, int threads, std::int64_t groups, const Matrix* strings) {
  without_gil([&] {
    const Angles angles(theta, theta_scalar, n_angles(plan, groups, x.rows, features.rows));
    forward({plan, angles.data(), x, features, threads, groups, strings == nullptr ? Matrix() : *strings});
  });
}

// The gradient of the angles is written in the angles' type.
void run_backward(const Plan& plan, std::uintptr_t theta, Scalar theta_scalar, const ConstMatrix& x,
                  const ConstMatrix& grad, std::uintptr_t grad_theta, const Matrix& grad_x, int threads,
                  std::int64_t groups, const ConstMatrix* strings) {
  without_gil([&] {
    const std::size_t n = n_angles(plan, groups, x.rows, grad.rows);
    const Angles angles(theta, theta_scalar, n);
    const ConstMatrix known = strings == nullptr ? ConstMatrix() : *strings;
    if (theta_scalar == Scalar::float64) {
      double* const result = reinterpret_cast<double*>(grad_theta);
      return backward({plan, angles.data(), x, grad, result, grad_x, threads, groups, known});
    }
    std::vector<double> result(n);
    backward({plan, angles.data(), x, grad, result.data(), grad_x, threads, groups, known});
    std::copy(result.begin(), result.end(), reinterpret_cast<float*>(grad_theta));
  });
}

void run_noisy(const NoisyPlan& plan, std::uintptr_t theta, Scalar theta_scalar, const ConstMatrix& x,
               std::int64_t trajectories, std::uint64_t seed, const Matrix& features, const Matrix& errors,
               int threads) {
  without_gil([&] {
    const Angles angles(theta, theta_scalar, plan.n_parameters);
    forward({plan, angles.data(), x, trajectories, seed, features, errors, threads});
  });
}

void run_project(const ConstMatrix& features, const ConstMatrix& up, const ConstMatrix& bias, const ConstMatrix& base,
                 double scale, const Matrix& out, int threads) {
  without_gil([&] {
    project({features, up, bias, base, scale, out, threads});
  });
}

void run_project_backward(const ConstMatrix& grad, const ConstMatrix& features, const ConstMatrix& up, double scale,
                          const Matrix& grad_features, const Matrix& grad_up, const Matrix& grad_bias, int threads) {
  without_gil([&] {
    project_backward({grad, features, up, scale, grad_features, grad_up, grad_bias, threads});
  });
}

py::bytes description_of(const cuda::Program& program) {
  return {reinterpret_cast<const char*>(program.description.data()), program.description.size()};
}

void run_cuda_forward(const cuda::Program& program, std::uintptr_t description, std::uintptr_t theta,
                      Scalar theta_scalar, const ConstMatrix& x, const Matrix& features, std::uintptr_t workspace,
                      std::uintptr_t stream, std::uintptr_t kernel, std::int64_t groups) {
  without_gil([&] {
    auto pointer = [](std::uintptr_t address) { return reinterpret_cast<void*>(address); };
    cuda::forward({program, pointer(description), pointer(theta), theta_scalar, x, features, pointer(workspace),
                   pointer(stream), pointer(kernel), groups});
  });
}

void run_cuda_backward(const cuda::Program& program, std::uintptr_t description, std::uintptr_t theta,
                       Scalar theta_scalar, const ConstMatrix& x, const ConstMatrix& grad, std::uintptr_t grad_theta,
                       const Matrix& grad_x, std::uintptr_t workspace, std::uintptr_t stream, std::uintptr_t kernel,
                       std::int64_t groups) {
  without_gil([&] {
    auto pointer = [](std::uintptr_t address) { return reinterpret_cast<void*>(address); };
    cuda::backward({program, pointer(description), pointer(theta), theta_scalar, x, grad, pointer(grad_theta), grad_x,
                    pointer(workspace), pointer(stream), pointer(kernel), groups});
  });
}

std::uintptr_t load_cuda_kernel(const py::bytes& image) {
  return reinterpret_cast<std::uintptr_t>(cuda::load_kernel(std::string(image).data()));
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "Compiled core of qaa: circuits to plans, and batches of states through them.";

  py::enum_<Scalar>(m, "Scalar", "Storage type of an array's numbers.")
      .value("float16", Scalar::float16)
      .value("bfloat16", Scalar::bfloat16)
      .value("float32", Scalar::float32)
      .value("float64", Scalar::float64);
  py::enum_<ReadoutKind>(m, "ReadoutKind", "What is computed from the final state.")
      .value("expval", ReadoutKind::expval)
      .value("probs", ReadoutKind::probs)
      .value("state", ReadoutKind::state);

  py::class_<Matrix>(m, "Matrix", "A writable array: rows of adjacent numbers, row_stride numbers apart.")
      .def(py::init(&matrix<Matrix>), py::arg("address"), py::arg("rows"), py::arg("columns"), py::arg("row_stride"),
           py::arg("scalar"));
  py::class_<ConstMatrix>(m, "ConstMatrix", "A read-only array: rows of adjacent numbers, row_stride numbers apart.")
      .def(py::init(&matrix<ConstMatrix>), py::arg("address"), py::arg("rows"), py::arg("columns"),
           py::arg("row_stride"), py::arg("scalar"));

  py::class_<Plan>(m, "Plan", "A compiled circuit and readout.")
      .def(py::init(&make_plan), py::arg("n_wires"), py::arg("n_parameters"), py::arg("gates"), py::arg("kind"),
           py::arg("n_outputs"), py::arg("paulis"), py::arg("normalize") = true, py::kw_only(), py::arg("fuse") = true,
           py::arg("rename") = true, py::arg("absorb") = true, py::arg("expand") = true, py::arg("real") = true,
           py::arg("tangent") = true, py::arg("link") = true, py::arg("rotate_radix") = py::none(),
           py::arg("unwind_radix") = py::none())
      .def_property_readonly("n_columns", &Plan::n_columns, "Numbers per state that a readout yields.")
      .def_property_readonly("n_strings", &Plan::n_strings, "Hermitian strings that a readout of expvals comes down to.")
      .def(
          "operations",
          [](const Plan& plan, std::uint32_t columns) {
            const Operations count = count_operations(plan, columns);
            return std::tuple(count.forward, count.backward, count.reading);
          },
          py::arg("columns"),
          "Arithmetic operations for one state; a multiply-add counts as one: (forward, backward with the strings' values, "
          "more without them).")
      .def("__str__", &Plan::str);

  py::class_<NoisyPlan>(m, "NoisyPlan", "A circuit with noise after every gate, and a readout.")
      .def(py::init(&make_noisy_plan), py::arg("n_wires"), py::arg("n_parameters"), py::arg("gates"), py::arg("kind"),
           py::arg("n_outputs"), py::arg("paulis"), py::arg("normalize"), py::arg("pauli"), py::arg("damping"),
           py::arg("readout"));

  m.def("forward", &run_forward, py::arg("plan"), py::arg("theta_address"), py::arg("theta_scalar"), py::arg("x"),
        py::arg("features"), py::arg("threads"), py::arg("groups") = 1, py::arg("strings") = py::none(),
        "features = readout(U(theta) x), of equal groups of rows with angles of their own; releases the GIL.");
  m.def("backward", &run_backward, py::arg("plan"), py::arg("theta_address"), py::arg("theta_scalar"), py::arg("x"),
        py::arg("grad"), py::arg("grad_theta_address"), py::arg("grad_x"), py::arg("threads"), py::arg("groups") = 1,
        py::arg("strings") = py::none(),
        "The vector-Jacobian product of forward, which takes less time with the strings' values that it has written; "
        "releases the GIL.");
  m.def("noisy_forward", &run_noisy, py::arg("plan"), py::arg("theta_address"), py::arg("theta_scalar"), py::arg("x"),
        py::arg("trajectories"), py::arg("seed"), py::arg("features"), py::arg("errors"), py::arg("threads"),
        "Means over trajectories and their standard errors; releases the GIL.");
  m.def("project", &run_project, py::arg("features"), py::arg("up"), py::arg("bias"), py::arg("base"),
        py::arg("scale"), py::arg("out"), py::arg("threads"),
        "out = base + scale (features up^T + bias); releases the GIL.");
  m.def("project_backward", &run_project_backward, py::arg("grad"), py::arg("features"), py::arg("up"),
        py::arg("scale"), py::arg("grad_features"), py::arg("grad_up"), py::arg("grad_bias"), py::arg("threads"),
        "The adjoint of project in one pass over grad; releases the GIL.");
  py::class_<cuda::Program>(m, "CudaProgram", "A plan as the CUDA kernels read it.")
      .def(py::init<const Plan&, bool>(), py::arg("plan"), py::arg("is_known") = false, py::keep_alive<1, 2>(),
           "With is_known, for kernels that are compiled for this circuit alone.")
      .def_static("can_be_known", &cuda::Program::can_be_known, py::arg("plan"),
                  "Whether kernels can be compiled for this circuit alone.")
      .def("known_source", &cuda::known_source, py::arg("scalar"), py::arg("backward"),
           "What follows kernel_headers() in the source of such a kernel; empty where there is none.")
      .def_property_readonly("description", &description_of, "Bytes that a call wants in device memory.")
      .def("workspace_bytes", &cuda::workspace_bytes, py::arg("rows"), py::arg("scalar"), py::arg("backward"),
           py::arg("groups") = 1, "Scratch memory of a call on the current device.");
  m.def("cuda_is_built", &cuda::is_built, "Whether this build has CUDA kernels.");
  m.def("cuda_is_available", &cuda::is_available, "Whether it has, and there is a driver with a device.");
  m.def("cuda_kernel_headers", [] { return std::string(cuda::kernel_headers()); },
        "The source of the kernels without what one circuit makes of them, for a compiler at run time.");
  m.def("cuda_load_kernel", &load_cuda_kernel, py::arg("image"), "A kernel from its machine code, as an address.");
  m.def("cuda_forward", &run_cuda_forward, py::arg("program"), py::arg("description_address"),
        py::arg("theta_address"), py::arg("theta_scalar"), py::arg("x"), py::arg("features"),
        py::arg("workspace_address"), py::arg("stream"), py::arg("kernel") = 0, py::arg("groups") = 1,
        "As forward, on the current device and asynchronous on the stream.");
  m.def("cuda_backward", &run_cuda_backward, py::arg("program"), py::arg("description_address"),
        py::arg("theta_address"), py::arg("theta_scalar"), py::arg("x"), py::arg("grad"),
        py::arg("grad_theta_address"), py::arg("grad_x"), py::arg("workspace_address"), py::arg("stream"),
        py::arg("kernel") = 0, py::arg("groups") = 1,
        "As backward, on the current device and asynchronous on the stream.");
  m.def("xla_handlers", [] {
    const char* kind = "xla._CUSTOM_CALL_TARGET";  // the name under which jax.ffi takes a function
    py::dict handlers;
    handlers["qaa_forward"] = py::capsule(xla::forward_handler(), kind);
    handlers["qaa_backward"] = py::capsule(xla::backward_handler(), kind);
    return handlers;
  }, "XLA's custom calls by name, as capsules for jax.ffi.register_ffi_target.");
  m.def("instruction_set", &instruction_set, "The instruction set in use; QAA_ISA forces one.");
  m.def("gate_table", [] {
    std::vector<std::tuple<std::string, int, int>> table;
    for (const GateInfo& gate : gate_table) table.emplace_back(gate.name, gate.n_wires, gate.n_parameters);
    return table;
  }, "(name, wires, parameters) of every gate.");
}
