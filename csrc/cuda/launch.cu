// Launches: the shape of a grid, where its memory lies, and which instance of a kernel runs.
#include <algorithm>
#include <string>

#include "checks.h"
#include "cuda.h"
#include "kernels.cuh"
#include "specialize.h"

namespace qaa::cuda {
namespace {

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("expected CUDA to ") + what + ", received: " + cudaGetErrorString(error));
}

int of_device(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "name the current device");
  check(cudaDeviceGetAttribute(&value, attribute, device), "describe the device");
  return value;
}

// As cudaKernel_t, which the runtime's calls take in place of a function.
const void* load_function(const void* image, const char* name) {
#ifdef QAA_CUDA_EMULATED
  static_cast<void>(name);
  return image;
#else
  cudaLibrary_t library;
  cudaKernel_t kernel;
  check(cudaLibraryLoadData(&library, image, nullptr, nullptr, 0, nullptr, nullptr, 0), "load a kernel");
  check(cudaLibraryGetKernel(&kernel, library, name), "find a kernel");
  return reinterpret_cast<const void*>(kernel);
#endif
}

std::uint32_t warps_of_block(const Layout& layout) {
  const std::uint32_t wanted = layout.in_warp() ? threads_of_whole_warps : layout.n_tiles();
  return (wanted < max_threads ? wanted : max_threads) / warp_size;
}
// Blocks of a kernel for one circuit that a multiprocessor is to hold at once: of at most 96 registers a thread going forward,
// 168 for the adjoint; and of those as many as shared memory has room for, so that all blocks of a grid run at once.
std::uint32_t resident_blocks(const Layout& layout, bool backward) {
  return std::max((backward ? 12 : 20) / warps_of_block(layout), 1u);
}
std::uint32_t resident_blocks(const Layout& layout, bool backward, std::uint32_t shared_bytes) {
  constexpr std::uint32_t reserved = 1024;  // by CUDA, in every block
  const auto room = std::uint32_t(of_device(cudaDevAttrMaxSharedMemoryPerMultiprocessor)) / (shared_bytes + reserved);
  return std::max(std::min(resident_blocks(layout, backward), room), 1u);
}

// How a call is spread over the device, and the workspace's parts in bytes from its start.
struct Shape {
  std::uint32_t groups, n_threads, n_blocks;  // blocks of each group
  std::int64_t rows;                          // of each group
  bool in_warp, in_shared;
  BlockMemory block;
  std::size_t partial, memory, workspace_bytes;  // the bound values come first
};

// Without a limit on blocks rows would be spread most evenly; but every block has sums to be added up in the end, or
// a part of the workspace.
#ifndef QAA_MAX_BLOCKS
#define QAA_MAX_BLOCKS 4096  // tests lower it, so that blocks have several rows
#endif
constexpr std::int64_t max_blocks = QAA_MAX_BLOCKS, max_blocks_with_workspace = std::min(QAA_MAX_BLOCKS, 256);
// What a block may have of shared memory without asking, and with room for a neighbour on every device.
constexpr std::uint32_t modest_shared_bytes = 48 << 10;

// A group's blocks depend on its rows alone, and so does the order of every sum: its bits are those of a call of its own.
template <class T>
Shape shape_of(const Program& program, std::int64_t rows, std::int64_t groups, bool backward) {
  const Layout& layout = program.layout;
  Shape s{};
  s.groups = std::uint32_t(groups);
  s.rows = rows / groups;
  s.in_warp = layout.in_warp();
  std::uint32_t n_warps = warps_of_block(layout);
  auto measured = [&] { return block_memory(layout, sizeof(T), n_warps, backward); };
  s.block = measured();
  while (s.in_warp && n_warps > 1 && s.block.bytes > modest_shared_bytes && !program.is_known) {
    n_warps /= 2;
    s.block = measured();
  }
  if (program.is_known) s.block.bytes += s.block.part_bytes;  // so that states can start at a multiple of it
  s.in_shared = s.block.bytes <= std::uint32_t(of_device(cudaDevAttrMaxSharedMemoryPerBlockOptin));
  if (!s.in_shared) s.block.bytes = (s.block.bytes + 255) / 256 * 256;
  const std::int64_t rows_per_block = s.in_warp ? n_warps * s.block.n_states : 1;
  s.n_threads = n_warps * warp_size;
  std::int64_t most = s.in_shared ? max_blocks : max_blocks_with_workspace;
  if (program.is_known) {
    const std::uint32_t blocks = resident_blocks(layout, backward, s.block.bytes);
    most = std::min<std::int64_t>(most, of_device(cudaDevAttrMultiProcessorCount) * std::int64_t{blocks});
  }
  s.n_blocks = std::uint32_t(std::min((s.rows + rows_per_block - 1) / rows_per_block, most));
  auto take = [&](std::size_t bytes) {
    const std::size_t at = s.workspace_bytes;
    s.workspace_bytes += (std::size_t(groups) * bytes + 255) / 256 * 256;
    return at;
  };
  take(layout.n_values * sizeof(T));
  s.partial = take(backward ? std::size_t{layout.n_slots} * s.n_blocks * sizeof(T) : 0);
  s.memory = take(s.in_shared ? 0 : std::size_t{s.n_blocks} * s.block.bytes);
  return s;
}

template <class T, class Call>
Arguments<T> arguments(const Call& call, const Shape& shape) {
  if (call.workspace == nullptr && shape.workspace_bytes > 0) {
    throw std::invalid_argument("expected workspace with " + std::to_string(shape.workspace_bytes) +
                                " bytes, received a null pointer");
  }
  Arguments<T> a{};
  auto* workspace = static_cast<unsigned char*>(call.workspace);
  a.layout = call.program.layout;
  a.block = shape.block;
  a.description = static_cast<const unsigned char*>(call.description);
  a.theta = call.theta;
  a.theta_is_double = call.theta_scalar == Scalar::float64;
  a.values = reinterpret_cast<const T*>(workspace);
  a.x = call.x;
  a.partial = reinterpret_cast<T*>(workspace + shape.partial);
  a.n_blocks = shape.n_blocks;
  a.rows = shape.rows;
  a.x_rows_of_a_group = call.x.rows == shape.rows ? 0 : shape.rows;
  a.memory = workspace + shape.memory;
  return a;
}

template <class T>
using Kernels = void (*[2][2])(const Arguments<T>);

template <class T>
void bind(const Arguments<T>& a, std::uint32_t groups, void* workspace, cudaStream_t stream) {
  const dim3 grid(a.layout.n_circuit_passes + 1, groups);
  QAA_LAUNCH(bind_kernel<T>, grid, threads_of_whole_warps, 0, stream, a, static_cast<T*>(workspace));
  check(cudaGetLastError(), "compute a circuit's tables");
}

// `kernels` are those for any circuit, by whether a warp holds states and whether they are in shared memory; `known` is one
// for this circuit, or null.
template <class T>
void launch(const Kernels<T>& kernels, const void* known, const Arguments<T>& a, const Shape& shape, cudaStream_t stream) {
  const void* kernel = known != nullptr ? known : reinterpret_cast<const void*>(kernels[shape.in_warp][shape.in_shared]);
  const std::uint32_t shared_bytes = shape.in_shared ? shape.block.bytes : 0;
  if (shared_bytes > modest_shared_bytes) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)),
          "give a block more shared memory");
  }
  const dim3 grid(shape.n_blocks, shape.groups);
  check(launch_function(kernel, grid, shape.n_threads, shared_bytes, stream, a), "run a circuit");
}

// A kernel for one circuit fits its program alone, features of one type and rows of one group.
void check_kernel(const Program& program, const void* kernel, Scalar rows, Scalar features, const Shape& shape) {
  if ((kernel != nullptr) != program.is_known) {
    throw std::invalid_argument(program.is_known ? "expected a kernel with a program for one circuit, received none"
                                                 : "expected no kernel with a program for any circuit, received one");
  }
  if (!program.is_known) return;
  if (shape.groups != 1) {
    throw std::invalid_argument("expected one group of rows for one circuit's kernel, received " +
                                std::to_string(shape.groups));
  }
  if (!shape.in_shared) {
    throw std::invalid_argument("expected a circuit whose states fit into a block's shared memory, received one of " +
                                std::to_string(program.plan.n_wires) + " wires");
  }
  if (rows == Scalar::float64) {
    throw std::invalid_argument("expected rows of float16, bfloat16 or float32 for one circuit's kernel, received float64");
  }
  if (const Scalar known = known_features(program, rows); features != known) {
    throw std::invalid_argument("expected features of " + name_of(known) + ", received " + name_of(features));
  }
}

template <class T>
void forward_as(const ForwardCall& call) {
  const Shape shape = shape_of<T>(call.program, call.features.rows, call.groups, false);
  check_kernel(call.program, call.kernel, call.x.scalar, call.features.scalar, shape);
  const auto stream = static_cast<cudaStream_t>(call.stream);
  Arguments<T> a = arguments<T>(call, shape);
  a.features = call.features;
  bind(a, shape.groups, call.workspace, stream);
  static constexpr Kernels<T> kernels = {{forward_kernel<T, false, false>, forward_kernel<T, false, true>},
                                         {forward_kernel<T, true, false>, forward_kernel<T, true, true>}};
  launch<T>(kernels, call.kernel, a, shape, stream);
}

template <class T>
void backward_as(const BackwardCall& call) {
  const Shape shape = shape_of<T>(call.program, call.grad.rows, call.groups, true);
  check_kernel(call.program, call.kernel, call.x.scalar, call.grad.scalar, shape);
  const auto stream = static_cast<cudaStream_t>(call.stream);
  Arguments<T> a = arguments<T>(call, shape);
  a.grad = call.grad;
  a.grad_theta = call.grad_theta;
  a.grad_x = call.grad_x;
  bind(a, shape.groups, call.workspace, stream);
  static constexpr Kernels<T> kernels = {{backward_kernel<T, false, false>, backward_kernel<T, false, true>},
                                         {backward_kernel<T, true, false>, backward_kernel<T, true, true>}};
  if (shape.n_blocks > 0) launch<T>(kernels, call.kernel, a, shape, stream);
  if (a.layout.n_parameters == 0) return;
  const dim3 grid(a.layout.n_parameters, shape.groups);
  QAA_LAUNCH(chain_rule_kernel<T>, grid, chain_rule_threads, 0, stream, a);
  check(cudaGetLastError(), "add up the gradient of the angles");
}

// What CUDA allows of a grid's second dimension.
void check_groups_of_a_grid(std::int64_t groups) {
  constexpr std::int64_t most = 65535;
  if (groups < 1 || groups > most) {
    throw std::invalid_argument("expected 1 to " + std::to_string(most) + " groups of rows on a GPU, received " +
                                std::to_string(groups));
  }
}

// The device would report a null pointer as an error of the whole context, at some later call.
template <class Call>
void check_pointers(const Call& call) {
  check_angle_type(call.theta_scalar);
  check_angles(call.program.plan.n_parameters, call.theta, "theta");
  if (call.description == nullptr) throw std::invalid_argument("expected description with data, received a null pointer");
}

}  // namespace

bool is_built() { return true; }

bool is_available() {
  int n_devices = 0;
  if (cudaGetDeviceCount(&n_devices) == cudaSuccess && n_devices > 0) return true;
  cudaGetLastError();  // forgets the error
  return false;
}

std::size_t workspace_bytes(const Program& program, std::int64_t rows, Scalar scalar, bool backward,
                            std::int64_t groups) {
  check_groups_of_a_grid(groups);
  return scalar == Scalar::float64 ? shape_of<double>(program, rows, groups, backward).workspace_bytes
                                   : shape_of<float>(program, rows, groups, backward).workspace_bytes;
}

std::string known_source(const Program& program, Scalar scalar, bool backward) {
  if (!program.is_known || scalar == Scalar::float64 || !shape_of<float>(program, 1, 1, backward).in_shared) return {};
  return constants_of(program, scalar, warps_of_block(program.layout), resident_blocks(program.layout, backward), backward);
}

const void* load_kernel(const void* image) { return load_function(image, "qaa_known_kernel"); }

void forward(const ForwardCall& call) {
  check_groups_of_a_grid(call.groups);
  check_forward(call.program.plan, call.x, call.features, call.groups);
  if (call.features.rows == 0) return;
  check_pointers(call);
  call.x.scalar == Scalar::float64 ? forward_as<double>(call) : forward_as<float>(call);
}

void backward(const BackwardCall& call) {
  check_groups_of_a_grid(call.groups);
  check_backward(call.program.plan, call.x, call.grad, call.grad_x, call.groups);
  check_pointers(call);
  check_angles(call.program.plan.n_parameters, call.grad_theta, "grad_theta");
  call.x.scalar == Scalar::float64 ? backward_as<double>(call) : backward_as<float>(call);
}

}  // namespace qaa::cuda
