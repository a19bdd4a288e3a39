#include "xla.h"

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>

#include "qaa.h"
#include "third_party/xla/ffi/api/c_api.h"

namespace qaa::xla {
namespace {

// ------------------------------------------------------------------------------------------------ reading a call

Scalar scalar_of(const XLA_FFI_Buffer& buffer) {
  switch (buffer.dtype) {
    case XLA_FFI_DataType_F16: return Scalar::float16;
    case XLA_FFI_DataType_BF16: return Scalar::bfloat16;
    case XLA_FFI_DataType_F32:
    case XLA_FFI_DataType_C64: return Scalar::float32;
    case XLA_FFI_DataType_F64:
    case XLA_FFI_DataType_C128: return Scalar::float64;
    default:
      throw std::invalid_argument("expected an array of real or complex floating numbers, received XLA's type " +
                                  std::to_string(int(buffer.dtype)));
  }
}

// A complex number is two real ones.
template <class M>
M matrix(const XLA_FFI_Buffer& buffer) {
  if (buffer.rank != 2) throw std::invalid_argument("expected a matrix, received rank " + std::to_string(buffer.rank));
  const bool is_complex = buffer.dtype == XLA_FFI_DataType_C64 || buffer.dtype == XLA_FFI_DataType_C128;
  const std::int64_t columns = buffer.dims[1] * (is_complex ? 2 : 1);
  return {buffer.data, buffer.dims[0], columns, columns, scalar_of(buffer)};
}

const XLA_FFI_Buffer& argument(const XLA_FFI_CallFrame& frame, std::int64_t position) {
  if (position >= frame.args.size || frame.args.types[position] != XLA_FFI_ArgType_BUFFER) {
    throw std::invalid_argument("expected an array as argument " + std::to_string(position) + ", received none");
  }
  return *static_cast<const XLA_FFI_Buffer*>(frame.args.args[position]);
}

const XLA_FFI_Buffer& result(const XLA_FFI_CallFrame& frame, std::int64_t position) {
  if (position >= frame.rets.size || frame.rets.types[position] != XLA_FFI_RetType_BUFFER) {
    throw std::invalid_argument("expected an array as result " + std::to_string(position) + ", received none");
  }
  return *static_cast<const XLA_FFI_Buffer*>(frame.rets.rets[position]);
}

const void* attribute(const XLA_FFI_CallFrame& frame, std::string_view name, XLA_FFI_AttrType type) {
  for (std::int64_t k = 0; k < frame.attrs.size; ++k) {
    if (std::string_view(frame.attrs.names[k]->ptr, frame.attrs.names[k]->len) != name) continue;
    if (frame.attrs.types[k] == type) return frame.attrs.attrs[k];
    throw std::invalid_argument("expected the attribute '" + std::string(name) + "' of XLA's type " +
                                std::to_string(int(type)) + ", received type " +
                                std::to_string(int(frame.attrs.types[k])));
  }
  throw std::invalid_argument("expected the attribute '" + std::string(name) + "', received none");
}

std::string shape_of(const XLA_FFI_Buffer& buffer) {
  std::string out = "(";
  for (std::int64_t k = 0; k < buffer.rank; ++k) out += (k > 0 ? ", " : "") + std::to_string(buffer.dims[k]);
  return out + ")";
}

// Plans by their text. One call compiles, and all later ones, in any thread, find the plan; a cache that is full is
// emptied, and calls that are on their way keep theirs.
std::shared_ptr<const Plan> plan_of(const XLA_FFI_CallFrame& frame) {
  static std::mutex& mutex = *new std::mutex;
  static auto& plans = *new std::map<std::string, std::shared_ptr<const Plan>, std::less<>>;
  const auto& span = *static_cast<const XLA_FFI_ByteSpan*>(attribute(frame, "program", XLA_FFI_AttrType_STRING));
  const std::string_view text(span.ptr, span.len);
  const std::lock_guard lock(mutex);
  const auto found = plans.find(text);
  if (found != plans.end()) return found->second;
  if (plans.size() >= 1024) plans.clear();
  return plans[std::string(text)] = std::make_shared<const Plan>(compile(text));
}

std::int64_t integer(const XLA_FFI_CallFrame& frame, const std::string& name) {
  const auto& scalar = *static_cast<const XLA_FFI_Scalar*>(attribute(frame, name, XLA_FFI_AttrType_SCALAR));
  if (scalar.dtype != XLA_FFI_DataType_S64) {
    throw std::invalid_argument("expected " + name + " of int64, received XLA's type " +
                                std::to_string(int(scalar.dtype)));
  }
  return *static_cast<const std::int64_t*>(scalar.value);
}

int threads_of(const XLA_FFI_CallFrame& frame) {
  return int(std::clamp<std::int64_t>(integer(frame, "threads"), 1, 1024));
}

// Angles as the core wants them, from float32 or float64.
std::vector<double> angles(const XLA_FFI_Buffer& theta, const Plan& plan, std::int64_t groups) {
  constexpr std::int64_t most = std::int64_t{1} << 31;
  const std::size_t n = std::size_t(std::clamp<std::int64_t>(groups, 0, most)) * plan.n_parameters;
  if (theta.rank != 1 || std::size_t(theta.dims[0]) != n) {
    throw std::invalid_argument("expected theta with " + std::to_string(n) + " angles, received shape " + shape_of(theta));
  }
  auto copy = [&](const auto* first) { return std::vector<double>(first, first + n); };
  if (theta.dtype == XLA_FFI_DataType_F64) return copy(static_cast<const double*>(theta.data));
  if (theta.dtype == XLA_FFI_DataType_F32) return copy(static_cast<const float*>(theta.data));
  throw std::invalid_argument("expected theta of float32 or float64, received XLA's type " +
                              std::to_string(int(theta.dtype)));
}

// ------------------------------------------------------------------------------------------------ calls

void run_forward(const XLA_FFI_CallFrame& frame) {
  const std::shared_ptr<const Plan> plan = plan_of(frame);
  const std::int64_t groups = integer(frame, "groups");
  const std::vector<double> theta = angles(argument(frame, 0), *plan, groups);
  forward({*plan, theta.data(), matrix<ConstMatrix>(argument(frame, 1)), matrix<Matrix>(result(frame, 0)),
           threads_of(frame), groups});
}

void run_backward(const XLA_FFI_CallFrame& frame) {
  const std::shared_ptr<const Plan> plan = plan_of(frame);
  const std::int64_t groups = integer(frame, "groups");
  const std::vector<double> theta = angles(argument(frame, 0), *plan, groups);
  const XLA_FFI_Buffer& grad_theta = result(frame, 0);
  if (grad_theta.rank != 1 || std::size_t(grad_theta.dims[0]) != theta.size() ||
      grad_theta.dtype != argument(frame, 0).dtype) {
    throw std::invalid_argument("expected grad_theta with the shape and type of theta, received shape " +
                                shape_of(grad_theta) + " and XLA's type " + std::to_string(int(grad_theta.dtype)));
  }
  std::vector<double> sums(theta.size());
  backward({*plan, theta.data(), matrix<ConstMatrix>(argument(frame, 1)), matrix<ConstMatrix>(argument(frame, 2)),
            sums.data(), frame.rets.size > 1 ? matrix<Matrix>(result(frame, 1)) : Matrix(), threads_of(frame), groups});
  if (grad_theta.dtype == XLA_FFI_DataType_F64) {
    std::ranges::copy(sums, static_cast<double*>(grad_theta.data));
  } else {
    std::ranges::transform(sums, static_cast<float*>(grad_theta.data), [](double sum) { return float(sum); });
  }
}

// ------------------------------------------------------------------------------------------------ the interface

// The oldest version that is still accepted, so that newer runtimes and older ones take the handlers alike.
void describe(const XLA_FFI_CallFrame& frame) {
  XLA_FFI_Metadata& metadata = *reinterpret_cast<XLA_FFI_Metadata_Extension*>(frame.extension_start)->metadata;
  metadata.api_version = {XLA_FFI_Api_Version_STRUCT_SIZE, nullptr, XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR};
  metadata.traits = 0;
}

template <void (*run)(const XLA_FFI_CallFrame&)>
XLA_FFI_Error* handle(XLA_FFI_CallFrame* frame) {
  if (frame->extension_start != nullptr && frame->extension_start->type == XLA_FFI_Extension_Metadata) {
    describe(*frame);
    return nullptr;
  }
  try {
    run(*frame);
    return nullptr;
  } catch (const std::exception& error) {
    XLA_FFI_Error_Create_Args create{XLA_FFI_Error_Create_Args_STRUCT_SIZE, nullptr, error.what(),
                                     XLA_FFI_Error_Code_INVALID_ARGUMENT};
    return frame->api->XLA_FFI_Error_Create(&create);
  }
}

}  // namespace

void* forward_handler() { return reinterpret_cast<void*>(&handle<run_forward>); }
void* backward_handler() { return reinterpret_cast<void*>(&handle<run_backward>); }

}  // namespace qaa::xla
