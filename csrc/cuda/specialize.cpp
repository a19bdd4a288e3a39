// A circuit as constants in CUDA C++: what `Described` in kernels.cuh reads from memory, a compiler knows here. Loops over
// passes, signs, masks and unused halves of complex numbers then cost nothing.
#include "specialize.h"

#include <algorithm>
#include <sstream>

namespace qaa::cuda {
namespace {

class Writer {
 public:
  template <class... Parts>
  Writer& operator()(const Parts&... parts) {
    (one(parts), ...);
    return *this;
  }
  std::string str() const { return out_.str(); }

 private:
  void one(const char* text) { out_ << text; }
  void one(const std::string& text) { out_ << text; }
  void one(std::uint32_t number) { out_ << number << "u, "; }
  template <class T>
  void one(const Section<T>& section) {
    (*this)("{", section.offset, section.size, "}, ");
  }
  template <std::size_t n>
  void one(const std::uint32_t (&numbers)[n]) {
    out_ << "{";
    for (const std::uint32_t number : numbers) one(number);
    out_ << "}, ";
  }
  void one(const RowMap& map) {
    out_ << "{{";
    for (const auto& chunks : map.chunks) one(chunks);
    (*this)("}, ", map.next, "}, ");
  }
  void one(const Pass& p) {
    (*this)("{PassKind(", std::to_string(std::uint32_t(p.kind)), "), ", p.n_items, p.first_item, p.tiles, p.masks,
            p.signs, p.values, p.complex_before, p.complex_after, p.mirrored, "},\n");
  }
  void one(const Item& item) { (*this)("{", item.z, item.angle, item.id, "},\n"); }
  void one(const Layout& l) {
    (*this)("{", l.n_wires, l.tile_bits, l.normalize, "ReadoutKind(", std::to_string(int(l.readout)), "), ",
            l.starts_complex, l.ends_complex, l.n_columns, l.n_strings, l.n_slots, l.n_parameters, l.n_values,
            l.coefficient_values, l.contribution_values, l.passes, l.n_circuit_passes, l.tiles, l.items, l.angles, l.angle_terms, l.constants,
            l.terms, l.factors, l.first_term, l.first_string_term, l.string_terms, l.first_contribution, l.contributions,
            l.inputs, l.outputs, "}");
  }

  std::ostringstream out_;
};

}  // namespace

Scalar known_features(const Program& program, Scalar rows) {
  return program.plan.readout == ReadoutKind::state ? Scalar::float32 : rows;
}

std::string constants_of(const Program& program, Scalar rows, std::uint32_t n_warps, std::uint32_t n_blocks,
                         bool backward) {
  const Layout& layout = program.layout;
  Writer write;
  write("namespace qaa::cuda {\n__device__ constexpr Layout known_layout = ", layout, ";\n");
  write("__device__ constexpr Pass known_passes[] = {\n");
  const Pass* passes = layout.passes.in(program.description.data());
  for (std::uint32_t p = layout.n_circuit_passes; p < layout.passes.size; ++p) write(passes[p]);
  write(Pass{}, "};\n__device__ constexpr Item known_items[] = {\n");  // for readouts without any
  const Item* items = layout.items.in(program.description.data());
  for (std::uint32_t k = 0; k < layout.items.size; ++k) write(items[k]);
  write(Item{0, unused, unused}, "};\n");
  const std::string storage = std::to_string(int(rows)), of_features = std::to_string(int(known_features(program, rows)));
  auto has = [&](PassKind kind) {
    const Pass* end = passes + layout.n_circuit_passes;
    return std::any_of(passes, end, [&](const Pass& pass) { return pass.kind == kind; }) ? "true" : "false";
  };
  write("__device__ constexpr BlockMemory known_block = block_memory(known_layout, sizeof(float), ",
        std::to_string(n_warps), backward ? ", true" : ", false", ");\n", R"(
struct Known {
  static constexpr bool is_constant = true, has_phases = )", has(PassKind::phases), R"(, has_constants = )",
        has(PassKind::constants), R"(;
  static constexpr std::uint32_t tile_bits = known_layout.tile_bits, n_strings = known_layout.n_strings,
                                 n_readout_passes = known_layout.passes.size - known_layout.n_circuit_passes;
  template <class T>
  static __device__ __forceinline__ const Layout& layout(const Arguments<T>&) { return known_layout; }
  template <class T>
  static __device__ __forceinline__ const BlockMemory& block(const Arguments<T>&) { return known_block; }
  static __device__ __forceinline__ const Pass* readout_passes() { return known_passes; }
  template <class T>
  static __device__ __forceinline__ const Item* readout_items(const Arguments<T>&) { return known_items; }
  static __device__ __forceinline__ Scalar scalar(Scalar) { return Scalar()", storage, R"(); }
  static __device__ __forceinline__ Scalar feature_scalar(Scalar) { return Scalar()", of_features, R"(); }
};

extern "C" __global__ void __launch_bounds__()", std::to_string(32 * n_warps), ", ", std::to_string(n_blocks), R"()
    qaa_known_kernel(const __grid_constant__ Arguments<float> a) {
  QAA_DYNAMIC_SHARED(unsigned char, shared);
  run_)", backward ? "backward" : "forward", "<float, ", layout.in_warp() ? "true" : "false", R"(, true, Known>(a, shared);
}
}  // namespace qaa::cuda
)");
  return write.str();
}

}  // namespace qaa::cuda
