// The kernels: rows in, features or gradients out, states in shared memory in between.
//
// A state is an array of numbers for its real parts and one for its imaginary parts. A pass goes over all of it: each
// thread loads a tile of 16 or 32 amplitudes (see layout.h), works on it in registers and stores it where it was; then the
// threads of the state wait for each other. Up to 9 or 10 wires a warp holds one or several whole states and waits for
// itself alone; above, a block holds one state. States that do not fit into shared memory lie in the caller's workspace.
//
// Addresses are bytes, and every part of one (tile, part of the state, state, warp) has bits of its own, so that one xor
// moves along any of them.
#pragma once

#include "layout.h"
#include "portable.cuh"

namespace qaa::cuda {

constexpr std::uint32_t warp_size = 32, whole_warp = ~0u;
constexpr std::uint32_t max_threads = 256;  // of a block that holds one state
constexpr std::uint32_t threads_of_whole_warps = 128;  // per block where a warp holds whole states
constexpr std::uint32_t chain_rule_threads = 512;

// What a block keeps in memory: its states, then sums over a state's threads on their way to whoever needs them.
//   norms, overlaps  of each warp, where a block holds one state
//   strings          values of the strings: (n_strings, width)
//   weights          their derivatives: (n_strings, states of the warp)
//   slots            derivatives, added up over the rows of the block: (n_slots, n_warps)
// Where a warp holds whole states, every warp has its own states, strings and weights. The states of a warp lie
// interleaved, amplitude by amplitude.
struct BlockMemory {
  std::uint32_t n_warps, n_states;  // of the block; of each warp, or of the block
  std::uint32_t width;              // sums of a string that are kept apart: one for each warp of a state or state of a warp
  std::uint32_t n_threads_of_state;
  std::uint32_t shift, unit;        // log2 of the numbers, and of the bytes, from one amplitude to the next
  std::uint32_t part_bytes;         // of one part of all states of a warp, or of the block
  std::uint32_t bra;                // the part where the bra starts: after the parts of the ket
  std::uint32_t state_bytes;        // of all the states of a warp, or of the block
  std::uint32_t sums;               // in bytes: where the sums start; in numbers from there:
  std::uint32_t overlaps, strings, strings_of_warp, weights, weights_of_warp, slots;
  std::uint32_t bytes;              // all together
};

// Of a block of so many warps, for numbers of so many bytes.
constexpr QAA_ANYWHERE BlockMemory block_memory(const Layout& layout, std::uint32_t number, std::uint32_t warps,
                                                bool backward) {
  const bool in_warp = layout.in_warp();
  const std::uint32_t holders = in_warp ? warps : 1;
  BlockMemory m{};
  m.n_warps = warps;
  m.shift = in_warp ? warp_bits - layout.lane_bits() : 0;
  m.n_states = 1u << m.shift;
  m.width = in_warp ? m.n_states : warps;
  m.n_threads_of_state = in_warp ? layout.n_tiles() : warps * warp_size;
  m.unit = m.shift + (number == 8 ? 3 : 2);
  m.part_bytes = 1u << (layout.n_wires + m.unit);
  m.bra = layout.ends_complex ? 2 : 1;
  m.state_bytes = (m.bra << backward) * m.part_bytes;
  m.sums = holders * m.state_bytes;
  m.overlaps = warps;
  m.strings = 2 * warps;
  m.strings_of_warp = m.width * layout.n_strings;
  m.weights = m.strings + holders * m.strings_of_warp;
  m.weights_of_warp = backward ? m.n_states * layout.n_strings : 0;
  m.slots = m.weights + holders * m.weights_of_warp;
  m.bytes = m.sums + (m.slots + (backward ? layout.n_slots * warps : 0)) * number;
  return m;
}

// Everything that a launch needs. Pointers are to device memory. Rows fall into groups with angles of their own: blockIdx.y
// names the group in every kernel but those of one circuit, which know a single one.
template <class T>
struct Arguments {
  Layout layout;
  BlockMemory block;
  const unsigned char* description;
  const void* theta;
  bool theta_is_double;
  const T* values;    // the bound values: computed from theta by `bind`, those of each group
  ConstMatrix x;      // of all groups, or of one for all; rows may have no data: they are zeros then
  Matrix features;    // forward
  ConstMatrix grad;   // backward
  Matrix grad_x;      // backward; may have no data
  void* grad_theta;   // of theta's type
  T* partial;         // backward: (groups, n_slots, n_blocks), the sum of each block
  std::uint32_t n_blocks;         // of each group
  std::int64_t rows;              // of each group
  std::int64_t x_rows_of_a_group; // in x: as many, or none where all groups have the same
  unsigned char* memory;  // of all blocks, where they do not use shared memory
};

// Where a kernel has its circuit from: the description on the device, which any circuit may be in. A kernel that is
// compiled for one circuit has a class of the same form with constants (specialize.cpp).
struct Described {
  static constexpr bool is_constant = false;
  static constexpr bool has_phases = true, has_constants = true;
  static constexpr std::uint32_t tile_bits = common_tile_bits, n_strings = 0;
  template <class T>
  static __device__ __forceinline__ const Layout& layout(const Arguments<T>& a) { return a.layout; }
  template <class T>
  static __device__ __forceinline__ const BlockMemory& block(const Arguments<T>& a) { return a.block; }
  template <class T>
  static __device__ __forceinline__ const Item* readout_items(const Arguments<T>& a) {
    return a.layout.items.in(a.description);
  }
  static __device__ __forceinline__ Scalar scalar(Scalar given) { return given; }
  static __device__ __forceinline__ Scalar feature_scalar(Scalar given) { return given; }
};

// ------------------------------------------------------------------------------------------------ numbers

__device__ __forceinline__ float to_number(float value) { return value; }
__device__ __forceinline__ double to_number(double value) { return value; }
__device__ __forceinline__ float to_number(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_number(__nv_bfloat16 value) { return __bfloat162float(value); }

template <class Out>
__device__ __forceinline__ Out from_number(double value) {
  return Out(value);
}
template <class Out>
__device__ __forceinline__ Out from_number(float value) {
  return Out(value);
}
template <>
__device__ __forceinline__ __half from_number<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_number<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// Calls f with a null pointer to the storage type that goes with the scalar and the kernel's precision.
template <class T, class F>
__device__ __forceinline__ void with_storage(Scalar scalar, F&& f) {
  if constexpr (sizeof(T) == 8) {
    f(static_cast<double*>(nullptr));
  } else if (scalar == Scalar::float16) {
    f(static_cast<__half*>(nullptr));
  } else if (scalar == Scalar::bfloat16) {
    f(static_cast<__nv_bfloat16*>(nullptr));
  } else {
    f(static_cast<float*>(nullptr));
  }
}

// 16 bytes of a row.
template <class S>
struct Vector {
  static constexpr std::uint32_t size = 16 / sizeof(S), map = sizeof(S) == 8 ? 0 : sizeof(S) == 4 ? 1 : 2;
  S items[size];

  static __device__ __forceinline__ bool fits(const void* data, std::int64_t row_stride) {
    return (reinterpret_cast<std::uintptr_t>(data) | std::uintptr_t(row_stride * std::int64_t(sizeof(S)))) % 16 == 0;
  }
  __device__ __forceinline__ void load(const S* from) {
    const uint4 raw = *reinterpret_cast<const uint4*>(from);
    memcpy(items, &raw, 16);
  }
  __device__ __forceinline__ void store(S* to) const {
    uint4 raw;
    memcpy(&raw, items, 16);
    *reinterpret_cast<uint4*>(to) = raw;
  }
};

__device__ __forceinline__ bool odd(Index bits) { return __popc(bits) & 1; }

template <class T>
__device__ __forceinline__ T negate_if(bool condition, T value) {
  return condition ? -value : value;
}

// A number that the compiler takes for a new one: it then computes addresses from it again, where it would otherwise
// keep all those of a tile in registers.
__device__ __forceinline__ std::uint32_t opaque(std::uint32_t value) {
  asm volatile("" : "+r"(value));
  return value;
}

// The bit that changes on the way to step i of a Gray code over 32 numbers, and the code there.
constexpr QAA_ANYWHERE std::uint32_t changed_bit(std::uint32_t i) {
  return i & 1 ? 0 : i & 2 ? 1 : i & 4 ? 2 : i & 8 ? 3 : 4;
}
constexpr QAA_ANYWHERE std::uint32_t gray(std::uint32_t i) { return i ^ (i >> 1); }

// The sums over the lanes of a warp of several values at once: lane (32 / count) k + j has the sum of value k. With
// `lowest` > 1 the lanes that differ in bits below it are not added up, and j < lowest tells them apart. Spoils the values.
template <std::uint32_t count, std::uint32_t step = warp_size / 2, class T>
__device__ __forceinline__ T sum_lanes(T* value, std::uint32_t lane, std::uint32_t lowest) {
  if constexpr (count > 1) {
    constexpr std::uint32_t half = count / 2;
    const bool high = lane & step;
#pragma unroll
    for (std::uint32_t k = 0; k < half; ++k) {
      const T sent = high ? value[k] : value[half + k], kept = high ? value[half + k] : value[k];
      value[k] = kept + __shfl_xor_sync(whole_warp, sent, step);
    }
    return sum_lanes<half, step / 2>(value, lane, lowest);
  } else {
    T sum = value[0];
#pragma unroll
    for (std::uint32_t s = step; s > 0; s >>= 1) {
      if (s >= lowest) sum += __shfl_xor_sync(whole_warp, sum, s);
    }
    return sum;
  }
}

// ------------------------------------------------------------------------------------------------ a thread at work

enum Part : std::uint32_t { ket_re, ket_im };  // then the parts of the bra, after as many as the ket has

template <class T, bool in_warp, bool in_shared, class Circuit>
class Worker {
  static constexpr std::uint32_t tile_bits = Circuit::tile_bits, tile_size = 1u << tile_bits;
  static constexpr std::uint32_t n_quads = tile_size / 4, group = 4;  // sums that go over a warp together

 public:
  __device__ __forceinline__ Worker(const Arguments<T>& a, unsigned char* shared)
      : a_(a), layout_(Circuit::layout(a)), block_(Circuit::block(a)), warp_(threadIdx.x / warp_size), lane_(threadIdx.x % warp_size) {
    state_ = in_warp ? lane_ & (n_states() - 1) : 0;
    first_tile_ = in_warp ? lane_ >> block_.shift : threadIdx.x;
    memory_ = in_shared ? shared : a.memory + (std::size_t{group_of_rows()} * gridDim.x + blockIdx.x) * block_.bytes;
    sums_ = block_.sums;
    origin_ = (in_warp ? warp_ * block_.state_bytes : 0) + state_ * sizeof(T);
    if constexpr (Circuit::is_constant) {  // addresses are those of the multiprocessor, and an xor changes no other bit
      const std::uint32_t start = shared_address(shared), part_bytes = block_.part_bytes;
      sums_ = start;
      origin_ += (start + block_.bytes - block_.sums + part_bytes - 1) & -part_bytes;
    }
  }

  // Asks for what every pass of the circuit reads, so that the first row does not wait for it pass by pass.
  __device__ __forceinline__ void prefetch() const {
    constexpr std::uint32_t line = 128;
    auto ask = [&](const void* start, std::size_t bytes) {
      const auto* from = static_cast<const unsigned char*>(start);
      for (std::size_t at = threadIdx.x * line; at < bytes; at += blockDim.x * line) prefetch_line(from + at);
    };
    ask(layout_.passes.in(a_.description), layout_.n_circuit_passes * sizeof(Pass));
    ask(layout_.tiles.in(a_.description), layout_.tiles.size * sizeof(Tile));
    ask(values(), layout_.n_values * sizeof(T));
  }

  // Rows of the group are dealt to states: `first_row` is the row of the block's first state.
  __device__ __forceinline__ std::uint32_t rows_per_block() const { return in_warp ? block_.n_warps * n_states() : 1; }
  __device__ __forceinline__ void start(std::int64_t first_row) {
    row_ = x_row_ = first_row + (in_warp ? warp_ * n_states() + state_ : 0);
    active_ = row_ < a_.rows;
    if constexpr (!Circuit::is_constant) {
      row_ += group_of_rows() * a_.rows;
      x_row_ += group_of_rows() * a_.x_rows_of_a_group;
    }
  }

  // Waits for the other threads of the same state.
  __device__ __forceinline__ void wait() const {
    if constexpr (in_warp) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }

  // ---------------------------------------------------------------------------------------------- embedding

  // Loads the row, padded with zeros, and its norm. The state is left unnormalized: the circuit is linear, so the
  // readout divides.
  __device__ __forceinline__ void embed() {
    T squares = 0;
    with_storage<T>(Circuit::scalar(a_.x.scalar), [&](auto* storage) { squares = load_row(storage); });
    if (layout_.starts_complex) {
      for (Index i = first_tile_; i < n_amplitudes(); i += stride()) at(address(ket_im, i)) = 0;
    }
    rescale_ = 1;
    if (!layout_.normalize) {
      wait();
      inverse_ = 1;
      return;
    }
    squared_ = sum_over_state(squares, 0);
    constexpr T tiny = sizeof(T) == 8 ? T(1e-250) : T(1e-24f), huge = sizeof(T) == 8 ? T(1e300) : T(1e30f);
    if (__any_sync(whole_warp, squared_ > huge || squared_ < tiny)) rescue(squared_ > huge || squared_ < tiny);
    inverse_ = squared_ == 0 ? T(0) : layout_.readout == ReadoutKind::state ? 1 / sqrt(squared_) : 1 / squared_;
  }

  // ---------------------------------------------------------------------------------------------- circuit

  // Passes of the circuit are read from the description for known circuits too: only their masks would be constants, and
  // the code would grow with the depth until it left the instruction cache.
  __device__ __forceinline__ void run_circuit() {
    const Pass* passes = layout_.passes.in(a_.description);
#pragma unroll 1
    for (std::uint32_t p = 0; p < layout_.n_circuit_passes; ++p) run(passes[p]);
  }
  __device__ __forceinline__ void unwind_circuit() {
    const Pass* passes = layout_.passes.in(a_.description);
#pragma unroll 1
    for (std::uint32_t p = layout_.n_circuit_passes; p-- > 0;) unwind(passes[p]);
  }
  // The readout of a known circuit is code without a loop: strings, signs and masks are constants.
  template <class F>
  __device__ __forceinline__ void for_readout(F&& f) const {
    if constexpr (Circuit::is_constant) {
      unrolled<0>(f);
    } else {
      const Pass* passes = layout_.passes.in(a_.description) + layout_.n_circuit_passes;
      const std::uint32_t n_readout = layout_.passes.size - layout_.n_circuit_passes;
#pragma unroll 1
      for (std::uint32_t p = 0; p < n_readout; ++p) f(passes[p], p == 0);
    }
  }
  template <std::uint32_t p, class F>
  __device__ __forceinline__ void unrolled(F& f) const {
    if constexpr (p < Circuit::n_readout_passes) {
      f(Circuit::readout_passes()[p], p == 0);
      unrolled<p + 1>(f);
    }
  }

  template <bool apply>
  __device__ __forceinline__ void measure_all() {
    if constexpr (Circuit::is_constant) {
#pragma unroll
      for (std::uint32_t s = 0; s < Circuit::n_strings; ++s) kept_strings_[s] = 0;
    }
    for_readout([&](const Pass& pass, bool first) { measure<apply>(pass, first); });
    if constexpr (Circuit::is_constant) {
      put_kept_strings<apply>();
      if (apply) wait();
    }
  }

  __device__ __forceinline__ void run(const Pass& pass) {
    if (pass.kind == PassKind::rotations) {
      rotate(pass);
    } else if (Circuit::has_phases && pass.kind == PassKind::phases) {
      turn(pass);
    } else if (Circuit::has_constants) {
      multiply(pass);
    }
    wait();
  }
  __device__ __forceinline__ void unwind(const Pass& pass) {
    if (pass.kind == PassKind::rotations) {
      rotate_back(pass);
    } else if (Circuit::has_phases && pass.kind == PassKind::phases) {
      turn_back(pass);
    } else if (Circuit::has_constants) {
      multiply_back(pass);
    }
    wait();
  }

  // ---------------------------------------------------------------------------------------------- readout

  // Values of the strings of one pass; with `apply` also bra (+)= sum over strings of weight * string ket.
  template <bool apply>
  __device__ __forceinline__ void measure(const Pass& pass, bool first) {
    if (pass.kind == PassKind::z_strings) {
      measure_z<apply>(pass, first);
    } else {
      measure_x<apply>(pass, first);
    }
    if (apply) wait();
  }

  __device__ __forceinline__ void write_features() {
    with_storage<T>(Circuit::feature_scalar(a_.features.scalar), [&](auto* storage) {
      if (layout_.readout == ReadoutKind::expval) {
        write_expectations(storage);
      } else {
        const bool complex = layout_.ends_complex;
        store_row(storage, a_.features, layout_.outputs, [&](std::uint32_t where) -> T {
          const Index i = where & (n_amplitudes() - 1);
          if (layout_.readout == ReadoutKind::state) {
            const bool imaginary = (where >> layout_.n_wires) & 1;
            if (imaginary && !complex) return 0;
            return inverse_ * negate_if(where & negative, at(address(imaginary, i)));
          }
          const T re = at(address(ket_re, i)), im = complex ? at(address(ket_im, i)) : T(0);
          return inverse_ * (re * re + im * im);
        });
      }
    });
  }

  // ---------------------------------------------------------------------------------------------- gradients

  __device__ __forceinline__ void clear_slots() {
    for (std::uint32_t k = threadIdx.x; k < layout_.n_slots * block_.n_warps; k += blockDim.x) slot_sum(0, k) = 0;
    __syncthreads();
  }

  // The bra M ket, where M is the readout weighted by the incoming gradient, over the squared norm.
  __device__ __forceinline__ void start_bra() {
    overlap_ = 0;
    with_storage<T>(Circuit::feature_scalar(a_.grad.scalar), [&](auto* storage) {
      if (layout_.readout == ReadoutKind::expval) {
        weigh_strings(storage);
        wait();
        measure_all<true>();
        differentiate_terms(storage);
      } else {
        load_bra(storage);
        wait();
      }
    });
  }

  __device__ __forceinline__ void write_grad_x() {
    // d/dx of q(x) / |x|^2, or of phi(x) / |x|: what lies along x drops out.
    T along = 0;
    if (layout_.normalize) {
      const T overlap = sum_over_state(overlap_, block_.overlaps);
      along = squared_ == 0 ? T(0) : overlap / squared_;
    }
    const T outer = layout_.readout == ReadoutKind::state ? rescale_ : 2 * rescale_;
    with_storage<T>(Circuit::scalar(a_.grad_x.scalar), [&](auto* storage) {
      store_row(storage, a_.grad_x, layout_.inputs, [&](std::uint32_t i) {
        return outer * (at(address(block_.bra, i)) - along * at(address(ket_re, i)));
      });
    });
  }

  // The sum of every slot over the rows of this block.
  __device__ __forceinline__ void write_slots() const {
    __syncthreads();
    for (std::uint32_t k = threadIdx.x; k < layout_.n_slots; k += blockDim.x) {
      T sum = 0;
      for (std::uint32_t w = 0; w < block_.n_warps; ++w) sum += slot_sum(k, w);
      a_.partial[(std::size_t{group_of_rows()} * layout_.n_slots + k) * a_.n_blocks + blockIdx.x] = sum;
    }
  }

 private:
  // ---------------------------------------------------------------------------------------------- addresses

  static __device__ __forceinline__ std::uint32_t group_of_rows() { return Circuit::is_constant ? 0 : blockIdx.y; }
  __device__ __forceinline__ const T* values() const { return a_.values + std::size_t{group_of_rows()} * layout_.n_values; }
  __device__ __forceinline__ std::uint32_t n_states() const { return in_warp ? block_.n_states : 1; }
  __device__ __forceinline__ std::uint32_t stride() const { return block_.n_threads_of_state; }
  __device__ __forceinline__ Index n_amplitudes() const { return Index{1} << layout_.n_wires; }

  __device__ __forceinline__ T& at(std::uint32_t address) const {
    if constexpr (Circuit::is_constant) {
      return *static_cast<T*>(at_shared_address(memory_, address));
    } else {
      return *reinterpret_cast<T*>(memory_ + address);
    }
  }
  __device__ __forceinline__ std::uint32_t address(std::uint32_t part, Index i) const {
    return origin_ + ((part << layout_.n_wires) << block_.unit) + (i << block_.unit);
  }

  __device__ __forceinline__ T& sum_at(std::uint32_t number) const { return at(sums_ + number * sizeof(T)); }
  // The value of a string in one warp of the state, or in one state of the warp.
  __device__ __forceinline__ T& string_sum(std::uint32_t string, std::uint32_t which) const {
    return sum_at(block_.strings + (in_warp ? warp_ * block_.strings_of_warp : 0) + string * block_.width + which);
  }
  __device__ __forceinline__ T& string_weight(std::uint32_t string) const {
    return sum_at(block_.weights + (in_warp ? warp_ * block_.weights_of_warp : 0) + string * n_states() + state_);
  }
  __device__ __forceinline__ T& slot_sum(std::uint32_t slot, std::uint32_t warp) const {
    return sum_at(block_.slots + slot * block_.n_warps + warp);
  }

  // Whether the state has an imaginary part before a pass of the circuit.
  __device__ __forceinline__ bool complex_before(const Pass& pass) const {
    return layout_.ends_complex && pass.complex_before;
  }
  // Of a pass of the circuit, and of the readout.
  __device__ __forceinline__ const Item* items_of(const Pass& pass) const {
    return layout_.items.in(a_.description) + pass.first_item;
  }
  __device__ __forceinline__ const Item* readout_items(const Pass& pass) const {
    return Circuit::readout_items(a_) + pass.first_item;
  }

  // A tile of one pass, and the way through its amplitudes.
  struct Place {
    Tile tile;
    std::uint32_t masks[tile_bits];  // in bytes

    // Calls f(v, address) for all amplitudes v.
    template <class F>
    __device__ __forceinline__ void each(std::uint32_t first, F&& f) const {
      first = opaque(first);
#pragma unroll
      for (std::uint32_t v = 0; v < tile_size; ++v) f(v, address(first, v));
    }
    __device__ __forceinline__ std::uint32_t address(std::uint32_t first, std::uint32_t v) const {
      const std::uint32_t low = (v & 1 ? masks[0] : 0) ^ (v & 2 ? masks[1] : 0);
      std::uint32_t high = (v & 4 ? masks[2] : 0) ^ (v & 8 ? masks[3] : 0);
      if constexpr (tile_bits > 4) high ^= v & 16 ? masks[4] : 0;
      return first ^ (low ^ high);
    }
    __device__ __forceinline__ Index base() const { return tile & 0xffff; }
    __device__ __forceinline__ bool flipped(std::uint32_t k) const { return (tile >> (16 + k)) & 1; }
  };

  // Calls f(place, first address of the tile's real part) for all tiles of this thread.
  template <class F>
  __device__ __forceinline__ void for_tiles(const Pass& pass, F&& f) const {
    Place place;
#pragma unroll
    for (std::uint32_t k = 0; k < tile_bits; ++k) place.masks[k] = pass.masks[k] << block_.unit;
    const Tile* tiles = layout_.tiles.in(a_.description) + pass.tiles;
    for (std::uint32_t t = first_tile_; t < layout_.n_tiles(); t += stride()) {
      place.tile = tiles[t];
      f(place, address(ket_re, place.base()));
    }
  }

  // The address of the same amplitude in another part.
  __device__ __forceinline__ std::uint32_t in_part(std::uint32_t address, std::uint32_t part) const {
    return address + (part << layout_.n_wires << block_.unit);
  }

  __device__ __forceinline__ void load(const Place& place, std::uint32_t first, T (&tile)[tile_size]) const {
    place.each(first, [&](std::uint32_t v, std::uint32_t address) { tile[v] = at(address); });
  }
  __device__ __forceinline__ void store(const Place& place, std::uint32_t first, const T (&tile)[tile_size]) const {
    place.each(first, [&](std::uint32_t v, std::uint32_t address) { at(address) = tile[v]; });
  }

  // ---------------------------------------------------------------------------------------------- rows

  // The row's numbers into the real part, chunk by chunk; returns this thread's sum of squares.
  template <class S>
  __device__ __forceinline__ T load_row(const S*) {
    const RowMap& map = layout_.inputs;
    const bool present = active_ && a_.x.data != nullptr;
    const S* row = present ? static_cast<const S*>(a_.x.data) + x_row_ * a_.x.row_stride : nullptr;
    const auto n_columns = std::uint32_t(present ? a_.x.columns : 0);
    T squares = 0;
    for_chunks<S>(map, a_.x.data, a_.x.row_stride, [&](const Chunk& chunk, bool aligned) {
      Vector<S> in;
      if (aligned && chunk.column + in.size <= n_columns) {
        in.load(row + chunk.column);
      } else {
#pragma unroll
        for (std::uint32_t e = 0; e < in.size; ++e) {
          in.items[e] = chunk.column + e < n_columns ? row[chunk.column + e] : from_number<S>(T(0));
        }
      }
#pragma unroll
      for (std::uint32_t e = 0; e < in.size; ++e) {
        const T value = to_number(in.items[e]);
        squares += value * value;
        at(address(ket_re, element(map, chunk, e))) = value;
      }
    });
    return squares;
  }

  // get(address) of every column to a row of the matrix.
  template <class S, class Get>
  __device__ __forceinline__ void store_row(const S*, const Matrix& m, const RowMap& map, Get&& get) const {
    S* row = static_cast<S*>(m.data) + row_ * m.row_stride;
    const auto n_columns = std::uint32_t(active_ ? m.columns : 0);
    for_chunks<S>(map, m.data, m.row_stride, [&](const Chunk& chunk, bool aligned) {
      if (chunk.column >= n_columns) return;
      Vector<S> out;
#pragma unroll
      for (std::uint32_t e = 0; e < out.size; ++e) out.items[e] = from_number<S>(get(element(map, chunk, e)));
      if (aligned && chunk.column + out.size <= n_columns) {
        out.store(row + chunk.column);
      } else {
#pragma unroll
        for (std::uint32_t e = 0; e < out.size; ++e) {
          if (chunk.column + e < n_columns) row[chunk.column + e] = out.items[e];
        }
      }
    });
  }

  // Calls f(chunk, whether rows allow 16-byte accesses) for all chunks of this thread.
  template <class S, class F>
  __device__ __forceinline__ void for_chunks(const RowMap& map, const void* data, std::int64_t row_stride, F&& f) const {
    const Section<Chunk>& section = map.chunks[Vector<S>::map];
    const Chunk* chunks = section.in(a_.description);
    const bool aligned = Vector<S>::fits(data, row_stride);
    for (std::uint32_t c = first_tile_; c < section.size; c += stride()) f(chunks[c], aligned);
  }
  // The address of element e of a chunk.
  static __device__ __forceinline__ std::uint32_t element(const RowMap& map, const Chunk& chunk, std::uint32_t e) {
    return chunk.address ^ (e & 1 ? map.next[0] : 0) ^ (e & 2 ? map.next[1] : 0) ^ (e & 4 ? map.next[2] : 0);
  }

  // The sum over all threads of a state, the same in each, by way of `of_warps`. Waits, so that the state is complete too.
  __device__ __forceinline__ T sum_over_state(T value, std::uint32_t of_warps) const {
    for (std::uint32_t step = warp_size / 2; step >= n_states(); step >>= 1) {
      value += __shfl_xor_sync(whole_warp, value, step);
    }
    if constexpr (in_warp) {
      wait();
      return value;
    }
    if (lane_ == 0) sum_at(of_warps + warp_) = value;
    wait();
    T sum = 0;
    for (std::uint32_t w = 0; w < block_.n_warps; ++w) sum += sum_at(of_warps + w);
    return sum;
  }
  __device__ __forceinline__ T max_over_state(T value) const {
    for (std::uint32_t step = warp_size / 2; step >= n_states(); step >>= 1) {
      value = fmax(value, __shfl_xor_sync(whole_warp, value, step));
    }
    if constexpr (in_warp) return value;
    if (lane_ == 0) sum_at(block_.overlaps + warp_) = value;
    wait();
    for (std::uint32_t w = 0; w < block_.n_warps; ++w) value = fmax(value, sum_at(block_.overlaps + w));
    return value;
  }

  // Multiplies a row whose squares overflow or vanish by a power of two. All threads of a state, or of the states of a
  // warp, come here together; a state that is not `extreme` is left as it is.
  __device__ __forceinline__ void rescue(bool extreme) {
    T largest = 0;
#pragma unroll 1
    for (Index i = first_tile_; i < n_amplitudes(); i += stride()) largest = fmax(largest, fabs(at(address(ket_re, i))));
    largest = max_over_state(largest);
    int exponent = 0;
    // Zero, infinity: no rescue. NaN is not extreme.
    if (extreme && largest > 0 && largest <= (sizeof(T) == 8 ? T(1.7976931348623157e308) : T(3.4028234e38f))) {
      frexp(largest, &exponent);
      constexpr int limit = sizeof(T) == 8 ? 1020 : 126;
      exponent = exponent > limit ? limit : exponent < -limit ? -limit : exponent;
    }
    rescale_ = ldexp(T(1), -exponent);
    T squares = 0;
#pragma unroll 1
    for (Index i = first_tile_; i < n_amplitudes(); i += stride()) {
      T& amplitude = at(address(ket_re, i));
      amplitude *= rescale_;
      squares += amplitude * amplitude;
    }
    const T rescaled = sum_over_state(squares, 0);
    if (exponent != 0) squared_ = rescaled;
  }

  // ---------------------------------------------------------------------------------------------- rotations

  // The numbers of a pass: its sines and cosines; for rotations by no angle near a half turn the cosines are taken out, the
  // sines are tangents, and one more number, which is zero elsewhere, is the product of the cosines.
  static __device__ __forceinline__ void load_angles(const T* from, T (&to)[tile_bits]) {
    constexpr std::uint32_t size = Vector<T>::size;
#pragma unroll
    for (std::uint32_t k = 0; k < tile_bits; k += size) {
      Vector<T> vector;
      vector.load(from + k);
#pragma unroll
      for (std::uint32_t e = 0; e < size; ++e) {
        if (k + e < tile_bits) to[k + e] = vector.items[e];
      }
    }
  }
  // The sines with the signs that hold for a tile.
  static __device__ __forceinline__ void load_sines(const T* values, const Place& place, bool inverse,
                                                    T (&sine)[tile_bits]) {
    load_angles(values + sine_values, sine);
#pragma unroll
    for (std::uint32_t k = 0; k < tile_bits; ++k) sine[k] = negate_if(place.flipped(k) != inverse, sine[k]);
  }

  __device__ __forceinline__ void rotate_tile(const Pass& pass, const Place& place, bool inverse,
                                              T (&tile)[tile_size]) const {
    const T* values = this->values() + pass.values;
    T sine[tile_bits], cosine[tile_bits];
    load_sines(values, place, inverse, sine);
    const T scale = values[scale_value];
    if (scale == 0) {
      load_angles(values + cosine_values, cosine);
      return rotate_pairs<false>(tile, sine, cosine);
    }
    rotate_pairs<true>(tile, sine, cosine);
#pragma unroll
    for (std::uint32_t v = 0; v < tile_size; ++v) tile[v] *= scale;
  }
  // Also by the angles that a pass with fewer rotations leaves at zero: to skip them would move every register.
  template <bool tangent>
  static __device__ __forceinline__ void rotate_pairs(T (&tile)[tile_size], const T (&sine)[tile_bits],
                                                      const T (&cosine)[tile_bits]) {
#pragma unroll
    for (std::uint32_t k = 0; k < tile_bits; ++k) {
#pragma unroll
      for (std::uint32_t v = 0; v < tile_size; ++v) {
        if (v >> k & 1) continue;
        const T a = tile[v], b = tile[v | 1u << k];
        tile[v] = (tangent ? a : cosine[k] * a) - sine[k] * b;
        tile[v | 1u << k] = (tangent ? b : cosine[k] * b) + sine[k] * a;
      }
    }
  }

  __device__ __forceinline__ void rotate(const Pass& pass) {
    for_tiles(pass, [&](const Place& place, std::uint32_t first) {
      for (std::uint32_t part = 0; part <= complex_before(pass); ++part) {
        T tile[tile_size];
        load(place, in_part(first, part), tile);
        rotate_tile(pass, place, false, tile);
        store(place, in_part(first, part), tile);
      }
    });
  }

  // Undoes the rotations on ket and bra. The derivative of each is the sum over pairs of bra_b ket_a - bra_a ket_b,
  // which is the same before and after.
  __device__ __forceinline__ void rotate_back(const Pass& pass) {
    T derivative[Circuit::is_constant ? 8 : group] = {};
    for_tiles(pass, [&](const Place& place, std::uint32_t first) {
      for (std::uint32_t part = 0; part <= complex_before(pass); ++part) {
        T ket[tile_size], bra[tile_size];
        load(place, in_part(first, part), ket);
        load(place, in_part(first, block_.bra + part), bra);
#pragma unroll
        for (std::uint32_t k = 0; k < tile_bits; ++k) {
          if (k >= pass.n_items) continue;
          T sum = 0;
#pragma unroll
          for (std::uint32_t v = 0; v < tile_size; ++v) {
            if (v >> k & 1) continue;
            sum += bra[v | 1u << k] * ket[v];
            sum -= bra[v] * ket[v | 1u << k];
          }
          derivative[k] += negate_if(place.flipped(k), sum);
        }
        rotate_tile(pass, place, true, ket);
        store(place, in_part(first, part), ket);
        rotate_tile(pass, place, true, bra);
        store(place, in_part(first, block_.bra + part), bra);
      }
    });
    add_to_slots<Circuit::is_constant ? 8 : group>(pass, 0, derivative);
  }

  // ---------------------------------------------------------------------------------------------- diagonals

  struct Amplitude {
    T re, im;
    __device__ __forceinline__ Amplitude times(T other_re, T other_im) const {
      return {re * other_re - im * other_im, re * other_im + im * other_re};
    }
  };
  // The diagonal at the amplitudes of a tile: its value at the base comes from a table, and each of the items that tell the
  // amplitudes apart turns it on.
  struct Diagonal {
    Amplitude high[n_quads];  // for all bits but the two lowest
    T sine[tile_bits], cosine[tile_bits];
    __device__ __forceinline__ Amplitude turned(const Amplitude& a, std::uint32_t k) const {
      return a.times(cosine[k], sine[k]);
    }
    // The values at amplitudes 4 q to 4 q + 3.
    __device__ __forceinline__ void quad(std::uint32_t q, Amplitude (&value)[4]) const {
      value[0] = high[q];
      value[1] = turned(high[q], 0);
      value[2] = turned(high[q], 1);
      value[3] = turned(value[2], 0);
    }
  };
  __device__ __forceinline__ Diagonal diagonal_of(const Pass& pass, const Place& place, std::uint32_t t,
                                                  bool conjugate) const {
    const T* values = this->values() + pass.values;
    const T* base = values + turn_values + 2 * t;
    Diagonal out;
    load_sines(values, place, conjugate, out.sine);
    load_angles(values + cosine_values, out.cosine);
    out.high[0] = {base[0], negate_if(conjugate, base[1])};
#pragma unroll
    for (std::uint32_t k = 2; k < tile_bits; ++k) {
#pragma unroll
      for (std::uint32_t q = 0; q < 1u << (k - 2); ++q) out.high[q | 1u << (k - 2)] = out.turned(out.high[q], k);
    }
    return out;
  }

  __device__ __forceinline__ Amplitude get(std::uint32_t address, bool complex) const {
    return {at(address), complex ? at(in_part(address, 1)) : T(0)};
  }
  __device__ __forceinline__ void set(std::uint32_t address, const Amplitude& a, bool complex) const {
    at(address) = a.re;
    if (complex) at(in_part(address, 1)) = a.im;
  }

  __device__ __forceinline__ void turn(const Pass& pass) {
    std::uint32_t t = first_tile_;
    for_tiles(pass, [&](const Place& place, std::uint32_t first) {
      const Diagonal diagonal = diagonal_of(pass, place, t, false);
#pragma unroll
      for (std::uint32_t q = 0; q < n_quads; ++q) {
        Amplitude factor[4];
        diagonal.quad(q, factor);
#pragma unroll
        for (std::uint32_t v = 0; v < 4; ++v) {
          const std::uint32_t address = place.address(first, 4 * q + v);
          set(address, get(address, complex_before(pass)).times(factor[v].re, factor[v].im), true);
        }
      }
      t += stride();
    });
  }

  // Undoes the diagonal on ket and bra. The derivatives are signed sums of 2 Im(conj(bra) ket) / 2, which the diagonal
  // does not change. Where the state was real before, only the real parts are kept: nothing upstream depends on the
  // imaginary part of the bra.
  __device__ __forceinline__ void turn_back(const Pass& pass) {
    std::uint32_t t = first_tile_;
    for_tiles(pass, [&](const Place& place, std::uint32_t first) {
      const Diagonal diagonal = diagonal_of(pass, place, t, true);
      TileSums sums;
#pragma unroll
      for (std::uint32_t q = 0; q < n_quads; ++q) {
        Amplitude factor[4];
        diagonal.quad(q, factor);
        T overlap[4];
#pragma unroll
        for (std::uint32_t v = 0; v < 4; ++v) {
          const std::uint32_t address = place.address(first, 4 * q + v), bra_address = in_part(address, block_.bra);
          const Amplitude ket = get(address, true), bra = get(bra_address, true);
          overlap[v] = bra.re * ket.im - bra.im * ket.re;
          set(address, ket.times(factor[v].re, factor[v].im), complex_before(pass));
          set(bra_address, bra.times(factor[v].re, factor[v].im), complex_before(pass));
        }
        sums.add(q, overlap);
      }
      for_sums(pass, items_of(pass), place, sums, [&](std::uint32_t first, T(&value)[group]) {
        add_to_slots<group>(pass, first, value);
      });
      t += stride();
    });
  }

  template <bool conjugate>
  __device__ __forceinline__ void multiply_part(const Pass& pass, const Place& place, std::uint32_t first) {
    const T* table = values() + pass.values;
    place.each(first, [&](std::uint32_t, std::uint32_t address) {
      const Index i = place.base() ^ ((address ^ first) >> block_.unit);
      const T re = table[2 * i], im = negate_if(conjugate, table[2 * i + 1]);
      if (!pass.complex_after) {
        at(address) *= re;
      } else {
        const bool reads = conjugate || complex_before(pass), writes = !conjugate || complex_before(pass);
        set(address, get(address, reads).times(re, im), writes);
      }
    });
  }
  __device__ __forceinline__ void multiply(const Pass& pass) {
    for_tiles(pass, [&](const Place& place, std::uint32_t first) { multiply_part<false>(pass, place, first); });
  }
  __device__ __forceinline__ void multiply_back(const Pass& pass) {
    for_tiles(pass, [&](const Place& place, std::uint32_t first) {
      multiply_part<true>(pass, place, first);
      multiply_part<true>(pass, place, in_part(first, block_.bra));
    });
  }

  // ---------------------------------------------------------------------------------------------- sums

  // Signed sums of a tile's values, which come four at a time.
  struct TileSums {
    T difference[tile_bits] = {}, quad[n_quads];
    __device__ __forceinline__ void add(std::uint32_t q, const T (&value)[4]) {
      const T low = value[0] + value[1], high = value[2] + value[3];
      difference[0] += (value[0] - value[1]) + (value[2] - value[3]);
      difference[1] += low - high;
      quad[q] = low + high;
    }
    // Those that the quads tell apart; returns the plain sum.
    __device__ __forceinline__ T finish() {
#pragma unroll
      for (std::uint32_t k = 2; k < tile_bits; ++k) {
        difference[k] = 0;
#pragma unroll
        for (std::uint32_t q = 0; q < tile_size >> (k + 1); ++q) {
          difference[k] += quad[2 * q] - quad[2 * q + 1];
          quad[q] = quad[2 * q] + quad[2 * q + 1];
        }
      }
      return quad[0];
    }
  };

  // Calls take(k, sums) with this thread's signed sums for items k to k + 3 of the pass.
  template <class Take>
  __device__ __forceinline__ void for_sums(const Pass& pass, const Item* items, const Place& place, TileSums& tile,
                                           Take&& take) const {
    const T total = tile.finish();
    T sums[group];
    // Items beyond the tile's come in groups of their own; those of a known readout in one code without a loop.
#pragma unroll
    for (std::uint32_t first = 0; first < tile_bits; first += group) {
      if (first >= pass.n_items) continue;
#pragma unroll
      for (std::uint32_t j = 0; j < group; ++j) {
        const std::uint32_t k = first + j;
        sums[j] = k < tile_bits ? negate_if(place.flipped(k), tile.difference[k < tile_bits ? k : 0]) : T(0);
      }
      take(first, sums);
    }
    auto others = [&](std::uint32_t first) {
#pragma unroll
      for (std::uint32_t j = 0; j < group; ++j) {
        const bool here = first + j < pass.n_items;
        sums[j] = here ? negate_if(odd(items[here ? first + j : 0].z & place.base()), total) : T(0);
      }
      take(first, sums);
    };
    if constexpr (Circuit::is_constant) {
#pragma unroll
      for (std::uint32_t first = tile_bits; first < max_items; first += group) {
        if (first < pass.n_items) others(first);
      }
    } else {
#pragma unroll 1
      for (std::uint32_t first = tile_bits; first < pass.n_items; first += group) others(first);
    }
  }

  // This lane's share of sums over a warp: item `first` + k of the pass.
  __device__ __forceinline__ std::uint32_t id_for_lane(const Pass& pass, std::uint32_t first, std::uint32_t k) const {
    return first + k < pass.n_items ? items_of(pass)[first + k].id : unused;
  }
  template <std::uint32_t count>
  __device__ __forceinline__ void add_to_slots(const Pass& pass, std::uint32_t first, T (&value)[count]) const {
    constexpr std::uint32_t lanes = warp_size / count;
    const T sum = sum_lanes<count>(value, lane_, 1);
    const std::uint32_t slot = id_for_lane(pass, first, lane_ / lanes);
    if (lane_ % lanes == 0 && slot != unused) slot_sum(slot, warp_) += sum;
  }
  __device__ __forceinline__ void put_strings(const Pass& pass, std::uint32_t first, T (&value)[group], bool add) const {
    const T sum = sum_lanes<group>(value, lane_, n_states());
    const std::uint32_t string = id_for_lane(pass, first, lane_ / 8);
    if (lane_ % 8 >= n_states() || string == unused) return;
    T& total = string_sum(string, in_warp ? state_ : warp_);
    total = add ? total + sum : sum;
  }
  // Of a known circuit, whose strings' sums a thread has kept: lane s of a warp gets string s, 32 at a time, and with
  // `apply` its share of <bra|ket>.
  template <bool apply>
  __device__ __forceinline__ void put_kept_strings() {
    constexpr std::uint32_t n = Circuit::n_strings;
#pragma unroll
    for (std::uint32_t first = 0; first < n; first += warp_size) {
      T values[warp_size];
#pragma unroll
      for (std::uint32_t k = 0; k < warp_size; ++k) {
        values[k] = first + k < n ? kept_strings_[first + k < n ? first + k : 0] : T(0);
      }
      const T sum = sum_lanes<warp_size>(values, lane_, 1);
      if (first + lane_ < n) {
        string_sum(first + lane_, in_warp ? state_ : warp_) = sum;
        if constexpr (apply) overlap_ += string_weight(first + lane_) * sum;
      }
    }
  }

  // ---------------------------------------------------------------------------------------------- strings

  __device__ __forceinline__ T string_value(std::uint32_t string) const {
    if constexpr (in_warp) return string_sum(string, state_);
    T value = 0;
    for (std::uint32_t w = 0; w < block_.n_warps; ++w) value += string_sum(string, w);
    return value;
  }
  __device__ __forceinline__ void keep_string(const Pass& pass, std::uint32_t item, T value) {
    if (item >= pass.n_items) return;
    const std::uint32_t string = readout_items(pass)[item].id;
    if (string != unused) kept_strings_[string] += value;
  }
  __device__ __forceinline__ T weight_of(std::uint32_t string) const {
    return string == unused ? T(0) : string_weight(string);
  }

  // to[v] = to[0] +- a +- b, with the signs of the bits of v.
  static __device__ __forceinline__ void spread(T* to, T a, T b) {
    const T sum = to[0];
    to[0] = sum + a + b;
    to[1] = sum - a + b;
    to[2] = sum + a - b;
    to[3] = sum - a - b;
  }

  template <bool apply>
  __device__ __forceinline__ void measure_z(const Pass& pass, bool first_pass) {
    const bool complex = layout_.ends_complex;
    const Item* items = readout_items(pass);
    bool first_tile = true;
    for_tiles(pass, [&](const Place& place, std::uint32_t first) {
      T low[4] = {}, high[n_quads] = {};  // weights: those of amplitude v are low[v & 3] + high[v >> 2]
      if constexpr (apply) {
        for (std::uint32_t k = tile_bits; k < pass.n_items; ++k) {
          high[0] += negate_if(odd(items[k].z & place.base()), weight_of(items[k].id));
        }
        auto weight = [&](std::uint32_t k) { return negate_if(place.flipped(k), weight_of(items[k].id)); };
        spread(low, weight(0), weight(1));
        spread(high, weight(2), weight(3));
        if constexpr (n_quads > 4) {
          const T last = weight(4);
#pragma unroll
          for (std::uint32_t q = 0; q < 4; ++q) {
            high[4 + q] = high[q] - last;
            high[q] += last;
          }
        }
      }
      TileSums sums;
#pragma unroll
      for (std::uint32_t q = 0; q < n_quads; ++q) {
        T square[4];
#pragma unroll
        for (std::uint32_t v = 0; v < 4; ++v) {
          const std::uint32_t address = place.address(first, 4 * q + v);
          const Amplitude ket = get(address, complex);
          square[v] = ket.re * ket.re + ket.im * ket.im;
          if constexpr (apply) {
            const std::uint32_t bra_address = in_part(address, block_.bra);
            const Amplitude bra = first_pass ? Amplitude{0, 0} : get(bra_address, complex);
            const T weight = high[q] + low[v];
            set(bra_address, {bra.re + weight * ket.re, bra.im + weight * ket.im}, complex);
            if constexpr (!Circuit::is_constant) overlap_ += weight * square[v];
          }
        }
        sums.add(q, square);
      }
      for_sums(pass, items, place, sums, [&](std::uint32_t first, T(&value)[group]) {
        if constexpr (Circuit::is_constant) {
#pragma unroll
          for (std::uint32_t k = 0; k < group; ++k) keep_string(pass, first + k, value[k]);
        } else {
          put_strings(pass, first, value, !first_tile);
        }
      });
      first_tile = false;
    });
  }

  // How a string's sign changes when bit m of an amplitude's place in the tile does.
  struct Signs {
    T change[tile_bits];
    __device__ __forceinline__ explicit Signs(Index signs) {
#pragma unroll
      for (std::uint32_t m = 0; m < tile_bits; ++m) change[m] = signs >> m & 1 ? T(-1) : T(1);
    }
  };
  // The sum over pairs v, u = v ^ (1 << k) of sign(v) a[v] b(u). Along a Gray code one bit changes at a time, and with it
  // the sign of all that was summed before; the last step is v = 0, which has none.
  template <class B>
  static __device__ __forceinline__ T pair_sum(std::uint32_t k, const Signs& signs, const T (&a)[tile_size], B&& b) {
    T sum = 0;
#pragma unroll
    for (std::uint32_t i = tile_size / 2; i-- > 0;) {
      const std::uint32_t code = gray(i), v = (code >> k << (k + 1)) | (code & ((1u << k) - 1));
      sum += a[v] * b(v | 1u << k);
      if (i > 0) sum *= signs.change[changed_bit(i) + (changed_bit(i) >= k)];
    }
    return sum;
  }
  // to[v] += (weight a sign a(v) + weight b sign b(v)) from(v ^ (1 << k))
  template <class From>
  static __device__ __forceinline__ void add_flipped(std::uint32_t k, const Signs& signs_a, T weight_a,
                                                     const Signs& signs_b, T weight_b, From&& from, T (&to)[tile_size]) {
#pragma unroll
    for (std::uint32_t i = 0; i < tile_size; ++i) {
      if (i > 0) {
        weight_a *= signs_a.change[changed_bit(i)];
        weight_b *= signs_b.change[changed_bit(i)];
      }
      to[gray(i)] += (weight_a + weight_b) * from(gray(i) ^ 1u << k);
    }
  }

  template <bool apply>
  __device__ __forceinline__ void measure_x(const Pass& pass, bool first_pass) {
    const bool complex = layout_.ends_complex;
    const Item* items = readout_items(pass);
    constexpr std::uint32_t n_strings_of_pass = strings_of_mask * tile_bits;
    T total[n_strings_of_pass] = {};
    for_tiles(pass, [&](const Place& place, std::uint32_t first) {
      for (std::uint32_t part = 0; part <= std::uint32_t(complex); ++part) {
        T own[tile_size];
        load(place, in_part(first, part), own);
        auto same = [&](std::uint32_t v) { return own[v]; };
        // Strings that read Im are rare: they take the other part from where it lies.
        auto other = [&](std::uint32_t v) { return at(place.address(in_part(first, part ^ 1), v)); };
#pragma unroll
        for (std::uint32_t s = 0; s < n_strings_of_pass; ++s) {
          if (s >= pass.n_items || items[s].id == unused) continue;
          const Signs signs(pass.signs[s]);
          if (!(pass.mirrored >> s & 1)) {
            total[s] += negate_if(place.flipped(s), pair_sum(s / strings_of_mask, signs, own, same));
          } else if (complex) {
            total[s] += negate_if(place.flipped(s) != (part == 1), pair_sum(s / strings_of_mask, signs, own, other));
          }
        }
        if constexpr (apply) {
          const std::uint32_t first_bra = in_part(first, block_.bra + part);
          T bra[tile_size];
          place.each(first_bra, [&](std::uint32_t v, std::uint32_t address) { bra[v] = first_pass ? T(0) : at(address); });
#pragma unroll
          for (std::uint32_t k = 0; k < tile_bits; ++k) {
            const std::uint32_t a = strings_of_mask * k, b = a + 1;
            if (a >= pass.n_items) continue;
            const Signs signs_a(pass.signs[a]), signs_b(pass.signs[b]);
            const bool imaginary_a = pass.mirrored >> a & 1, imaginary_b = pass.mirrored >> b & 1;
            const T weight_a = negate_if(place.flipped(a), weight_of(items[a].id));
            const T weight_b = negate_if(place.flipped(b), weight_of(items[b].id));
            if (!imaginary_a || !imaginary_b) {
              add_flipped(k, signs_a, imaginary_a ? T(0) : weight_a, signs_b, imaginary_b ? T(0) : weight_b, same, bra);
            }
            if (complex && (imaginary_a || imaginary_b)) {
              add_flipped(k, signs_a, imaginary_a ? negate_if(part == 1, weight_a) : T(0), signs_b,
                          imaginary_b ? negate_if(part == 1, weight_b) : T(0), other, bra);
            }
          }
          store(place, first_bra, bra);
        }
      }
    });
#pragma unroll
    for (std::uint32_t s = 0; s < n_strings_of_pass; ++s) total[s] *= 2;
    if constexpr (apply && !Circuit::is_constant) {
#pragma unroll
      for (std::uint32_t s = 0; s < n_strings_of_pass; ++s) {
        if (s < pass.n_items) overlap_ += weight_of(items[s].id) * total[s];
      }
    }
#pragma unroll
    for (std::uint32_t first = 0; first < n_strings_of_pass; first += group) {
      if (first >= pass.n_items) continue;
      T value[group];
#pragma unroll
      for (std::uint32_t k = 0; k < group; ++k) value[k] = first + k < n_strings_of_pass ? total[first + k] : T(0);
      if constexpr (Circuit::is_constant) {
#pragma unroll
        for (std::uint32_t k = 0; k < group; ++k) keep_string(pass, first + k, value[k]);
      } else {
        put_strings(pass, first, value, false);
      }
    }
  }

  // features[output] = sum over the output's terms of coefficient * value of the string.
  template <class S>
  __device__ __forceinline__ void write_expectations(const S*) {
    wait();
    const std::uint32_t* first_term = layout_.first_term.in(a_.description);
    const ReadoutTerm* terms = layout_.terms.in(a_.description);
    const T* coefficients = values() + layout_.coefficient_values;
    S* row = static_cast<S*>(a_.features.data) + row_ * a_.features.row_stride;
    if (!active_) return;
    for (std::uint32_t k = first_tile_; k < layout_.n_columns; k += stride()) {
      T feature = 0;
      for (std::uint32_t t = first_term[k]; t < first_term[k + 1]; ++t) {
        feature += coefficients[t] * string_value(terms[t].string);
      }
      row[k] = from_number<S>(inverse_ * feature);
    }
  }

  template <class S>
  __device__ __forceinline__ T grad_of(const S* row, std::uint32_t column) const {
    return active_ ? inverse_ * to_number(row[column]) : T(0);
  }

  template <class S>
  __device__ __forceinline__ void weigh_strings(const S*) {
    const std::uint32_t* first_term = layout_.first_string_term.in(a_.description);
    const std::uint32_t* order = layout_.string_terms.in(a_.description);
    const ReadoutTerm* terms = layout_.terms.in(a_.description);
    const T* coefficients = values() + layout_.coefficient_values;
    const S* row = static_cast<const S*>(a_.grad.data) + row_ * a_.grad.row_stride;
    for (std::uint32_t s = first_tile_; s < layout_.n_strings; s += stride()) {
      T weight = 0;
      for (std::uint32_t k = first_term[s]; k < first_term[s + 1]; ++k) {
        weight += coefficients[order[k]] * grad_of(row, terms[order[k]].output);
      }
      string_weight(s) = weight;
    }
  }

  // The derivative with respect to the coefficient of every term that depends on an angle.
  template <class S>
  __device__ __forceinline__ void differentiate_terms(const S*) {
    const ReadoutTerm* terms = layout_.terms.in(a_.description);
    const S* row = static_cast<const S*>(a_.grad.data) + row_ * a_.grad.row_stride;
    for (std::uint32_t first = 0; first < layout_.terms.size; first += stride()) {
      const std::uint32_t t = first + first_tile_;
      const std::uint32_t slot = t < layout_.terms.size ? terms[t].slot : unused;
      T derivative = slot == unused ? T(0) : grad_of(row, terms[t].output) * string_value(terms[t].string);
      for (std::uint32_t step = 1; step < n_states(); step *= 2) {
        derivative += __shfl_xor_sync(whole_warp, derivative, step);
      }
      if (slot != unused && state_ == 0) slot_sum(slot, in_warp ? warp_ : 0) += derivative;
    }
  }

  // The bra of probabilities, gradient * ket, or of amplitudes, the gradient itself.
  template <class S>
  __device__ __forceinline__ void load_bra(const S*) {
    const RowMap& map = layout_.outputs;
    const S* row = static_cast<const S*>(a_.grad.data) + row_ * a_.grad.row_stride;
    const bool complex = layout_.ends_complex;
    for_chunks<S>(map, a_.grad.data, a_.grad.row_stride, [&](const Chunk& chunk, bool aligned) {
      Vector<S> in;
      const bool whole = active_ && aligned && chunk.column + in.size <= layout_.n_columns;
      if (whole) in.load(row + chunk.column);
#pragma unroll
      for (std::uint32_t e = 0; e < in.size; ++e) {
        const bool inside = active_ && chunk.column + e < layout_.n_columns;
        const T grad = whole ? inverse_ * to_number(in.items[e]) : inside ? grad_of(row, chunk.column + e) : T(0);
        const std::uint32_t where = element(map, chunk, e);
        const Index i = where & (n_amplitudes() - 1);
        if (layout_.readout == ReadoutKind::probs) {
          const Amplitude ket = get(address(ket_re, i), complex);
          const Amplitude bra{grad * ket.re, grad * ket.im};
          set(address(block_.bra, i), bra, complex);
          overlap_ += bra.re * ket.re + bra.im * ket.im;
        } else {
          const bool imaginary = (where >> layout_.n_wires) & 1;
          if (imaginary && !complex) continue;
          const T bra = negate_if(where & negative, grad);
          at(address(block_.bra + imaginary, i)) = bra;
          overlap_ += bra * at(address(imaginary, i));
        }
      }
    });
  }

  const Arguments<T>& a_;
  const Layout& layout_;
  const BlockMemory& block_;
  const std::uint32_t warp_, lane_;
  std::uint32_t state_;       // which of the states that lie interleaved in a warp's memory
  std::uint32_t first_tile_;  // this thread's first tile, or first of whatever else is dealt to the threads of a state
  std::uint32_t origin_;      // the address of this state's first number
  unsigned char* memory_;
  std::int64_t row_ = 0, x_row_ = 0;  // among those of all groups, and where x has it
  bool active_ = false;  // whether there is such a row
  T squared_ = 0;        // of the vector that was embedded
  T rescale_ = 1;        // the power of two that the row was multiplied by
  T inverse_ = 1;        // 1 / squared norm, or 1 / norm for the state itself; zero for a zero row
  T overlap_ = 0;        // this thread's share of Re <bra|ket>
  std::uint32_t sums_;   // the address of the sums
  T kept_strings_[Circuit::n_strings + 1];  // of a known circuit: this thread's shares of the strings
};

// ------------------------------------------------------------------------------------------------ kernels

template <bool in_warp>
constexpr std::uint32_t threads = in_warp ? threads_of_whole_warps : max_threads;
// Registers of a thread that let no kernel of float32 spill, on any architecture; and the blocks of a multiprocessor that
// can be resident then.
template <class T, bool in_warp, bool in_shared, bool backward>
constexpr std::uint32_t registers = sizeof(T) == 8 ? 255
                                    : !backward    ? (!in_shared ? 128 : in_warp ? 96 : 80)
                                                   : !in_shared ? 255 : (in_warp ? 168 : 128);
template <class T, bool in_warp, bool in_shared, bool backward>
constexpr std::uint32_t blocks = 65536 / (registers<T, in_warp, in_shared, backward> * threads<in_warp>);

template <class T, bool in_warp, bool in_shared, class Circuit>
__device__ __forceinline__ void run_forward(const Arguments<T>& a, unsigned char* shared) {
  Worker<T, in_warp, in_shared, Circuit> worker(a, shared);
  worker.prefetch();
  const std::int64_t rows_per_block = worker.rows_per_block();
  for (std::int64_t row = blockIdx.x * rows_per_block; row < a.rows; row += gridDim.x * rows_per_block) {
    worker.start(row);
    worker.embed();
    worker.run_circuit();
    worker.template measure_all<false>();
    worker.write_features();
    worker.wait();
  }
}

template <class T, bool in_warp, bool in_shared, class Circuit>
__device__ __forceinline__ void run_backward(const Arguments<T>& a, unsigned char* shared) {
  Worker<T, in_warp, in_shared, Circuit> worker(a, shared);
  worker.prefetch();
  const std::int64_t rows_per_block = worker.rows_per_block();
  worker.clear_slots();
  for (std::int64_t row = blockIdx.x * rows_per_block; row < a.rows; row += gridDim.x * rows_per_block) {
    worker.start(row);
    worker.embed();
    worker.run_circuit();
    worker.start_bra();
    worker.unwind_circuit();
    if (a.grad_x.data != nullptr) worker.write_grad_x();
    worker.wait();
  }
  worker.write_slots();
}

template <class T, bool in_warp, bool in_shared>
__global__ void __launch_bounds__(threads<in_warp>, blocks<T, in_warp, in_shared, false>)
    forward_kernel(const __grid_constant__ Arguments<T> a) {
  QAA_DYNAMIC_SHARED(unsigned char, shared);
  run_forward<T, in_warp, in_shared, Described>(a, shared);
}

template <class T, bool in_warp, bool in_shared>
__global__ void __launch_bounds__(threads<in_warp>, blocks<T, in_warp, in_shared, true>)
    backward_kernel(const __grid_constant__ Arguments<T> a) {
  QAA_DYNAMIC_SHARED(unsigned char, shared);
  run_backward<T, in_warp, in_shared, Described>(a, shared);
}

// ------------------------------------------------------------------------------------------------ angles

// Of the group that blockIdx.y names. Large angles are reduced before they are added up, so that a sum is as exact as the
// sine of each of its terms.
template <class T>
__device__ double angle_of(const Arguments<T>& a, std::uint32_t which) {
  constexpr double period = 12.566370614359172, period_rest = 4 * 1.2246467991473532e-16;  // 4 pi in two doubles
  const BoundAngle& angle = a.layout.angles.in(a.description)[which];
  const AngleTerm* terms = a.layout.angle_terms.in(a.description) + angle.first_term;
  const std::size_t first = std::size_t{blockIdx.y} * a.layout.n_parameters;
  double value = angle.constant;
  for (std::uint32_t k = 0; k < angle.n_terms; ++k) {
    const std::size_t p = first + terms[k].parameter;
    const double theta = a.theta_is_double ? static_cast<const double*>(a.theta)[p]
                                           : double(static_cast<const float*>(a.theta)[p]);
    double part = terms[k].coefficient * theta;
    if (fabs(part) > period) {
      const double turns = nearbyint(part * (1 / period));
      part = fma(-turns, period_rest, fma(-turns, period, part));
    }
    value += part;
  }
  return value;
}

// Angles are small enough by now for this way around `sincos`, whose reduction of huge angles needs local memory.
__device__ __forceinline__ void sine_and_cosine(double angle, double* sine, double* cosine) {
  sincospi(angle * 0.31830988618379067, sine, cosine);
}

// A term's coefficient, or its derivative with respect to the angle of one of its factors.
template <class T>
__device__ double coefficient_of(const Arguments<T>& a, std::uint32_t t, std::uint32_t derivative_of) {
  const ReadoutTerm& term = a.layout.terms.in(a.description)[t];
  const AngleFactor* factors = a.layout.factors.in(a.description) + term.first_factor;
  double value = term.sign;
  for (std::uint32_t f = 0; f < term.n_factors; ++f) {
    double sine, cosine;
    sine_and_cosine(angle_of(a, factors[f].angle), &sine, &cosine);
    if (f == derivative_of) {
      value *= factors[f].sine ? cosine : -sine;
    } else {
      value *= factors[f].sine ? sine : cosine;
    }
  }
  return value;
}

// Below it a pass keeps its cosines. Taking them out costs no accuracy, only range: five angles make numbers 4e19 times as
// large before they are paid back.
constexpr double min_cosine = 1.0 / 8192;

// The numbers that the circuit's kernels read, from the angles: for each group one block for every pass of the circuit, and
// one for the readout and the chain rule. The only place where float32 kernels compute in double precision.
template <class T>
__global__ void __launch_bounds__(threads_of_whole_warps) bind_kernel(const __grid_constant__ Arguments<T> a, T* values) {
  const Layout& layout = a.layout;
  values += std::size_t{blockIdx.y} * layout.n_values;
  if (blockIdx.x == layout.n_circuit_passes) {
    for (std::uint32_t t = threadIdx.x; t < layout.terms.size; t += blockDim.x) {
      values[layout.coefficient_values + t] = T(coefficient_of(a, t, unused));
    }
    for (std::uint32_t c = threadIdx.x; c < layout.contributions.size; c += blockDim.x) {
      const Contribution& contribution = layout.contributions.in(a.description)[c];
      const double outer = contribution.coefficient;
      const bool of_term = contribution.term != unused;
      values[layout.contribution_values + c] =
          T(of_term ? outer * coefficient_of(a, contribution.term, contribution.factor) : outer);
    }
    return;
  }
  const Pass& pass = layout.passes.in(a.description)[blockIdx.x];
  const Item* items = layout.items.in(a.description) + pass.first_item;
  values += pass.values;
  if (pass.kind == PassKind::constants) {
    const auto* constants = &layout.constants.in(a.description)[pass.first_item].re;
    for (std::uint32_t k = threadIdx.x; k < 2u << layout.n_wires; k += blockDim.x) values[k] = T(constants[k]);
    return;
  }
  // A rotation turns by half its angle; from one amplitude to its partner a phase turns by all of it.
  const bool phases = pass.kind == PassKind::phases;
  QAA_SHARED(double, cosines, max_tile_bits);
  const std::uint32_t bit = threadIdx.x, tile_bits = layout.tile_bits;
  double own_sine = 0, own_cosine = 1;
  if (bit < tile_bits) {
    if (bit < pass.n_items && items[bit].angle != unused) {
      sine_and_cosine(angle_of(a, items[bit].angle) * (phases ? 1.0 : 0.5), &own_sine, &own_cosine);
    }
    cosines[bit] = own_cosine;
  }
  __syncthreads();
  if (bit < tile_bits) {
    double scale = phases ? 0 : 1;
    for (std::uint32_t k = 0; k < tile_bits; ++k) scale = fabs(cosines[k]) >= min_cosine ? scale * cosines[k] : 0;
    values[sine_values + bit] = T(scale != 0 ? own_sine / own_cosine : own_sine);
    values[cosine_values + bit] = T(own_cosine);
    if (bit == 0) values[scale_value] = T(scale);
  }
  if (!phases) return;
  QAA_SHARED(double, angles, max_items);
  for (std::uint32_t k = threadIdx.x; k < pass.n_items; k += blockDim.x) {
    angles[k] = items[k].angle != unused ? angle_of(a, items[k].angle) : 0;
  }
  __syncthreads();
  const Tile* tiles = layout.tiles.in(a.description) + pass.tiles;
  for (std::uint32_t t = threadIdx.x; t < layout.n_tiles(); t += blockDim.x) {
    double angle = 0, sine, cosine;
    for (std::uint32_t k = 0; k < pass.n_items; ++k) {
      angle += negate_if(odd(items[k].z & tiles[t] & 0xffff), angles[k]);
    }
    sine_and_cosine(-angle / 2, &sine, &cosine);
    values[turn_values + 2 * t] = T(cosine);
    values[turn_values + 2 * t + 1] = T(sine);
  }
}

// grad_theta[p]: the sum over parameter p's slots and over the blocks, one block of threads for each parameter of each group
// of rows. Teams of threads share out the slots, and a team's threads the blocks; every sum has a fixed order.
template <class T>
__global__ void __launch_bounds__(chain_rule_threads) chain_rule_kernel(const __grid_constant__ Arguments<T> a) {
  constexpr std::uint32_t n_teams = 4, team_threads = chain_rule_threads / n_teams, at_once = 8;
  const Layout& layout = a.layout;
  const std::uint32_t* first = layout.first_contribution.in(a.description) + blockIdx.x;
  const Contribution* contributions = layout.contributions.in(a.description);
  const T* values = a.values + std::size_t{blockIdx.y} * layout.n_values + layout.contribution_values;
  T sum = 0;
  for (std::uint32_t c = first[0] + threadIdx.x / team_threads; c < first[1]; c += n_teams) {
    const T* partial = a.partial + (std::size_t{blockIdx.y} * layout.n_slots + contributions[c].slot) * a.n_blocks;
    T of_slot = 0;
    for (std::uint32_t b = threadIdx.x % team_threads; b < a.n_blocks; b += at_once * team_threads) {
      T some[at_once];
#pragma unroll
      for (std::uint32_t k = 0; k < at_once; ++k) {
        some[k] = b + k * team_threads < a.n_blocks ? partial[b + k * team_threads] : T(0);
      }
#pragma unroll
      for (std::uint32_t k = 0; k < at_once; ++k) of_slot += some[k];
    }
    sum += values[c] * of_slot;
  }
  for (std::uint32_t step = warp_size / 2; step > 0; step /= 2) sum += __shfl_xor_sync(whole_warp, sum, step);
  QAA_SHARED(T, of_warps, chain_rule_threads / warp_size);
  if (threadIdx.x % warp_size == 0) of_warps[threadIdx.x / warp_size] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  sum = 0;
  for (std::uint32_t w = 0; w < blockDim.x / warp_size; ++w) sum += of_warps[w];
  const std::size_t p = std::size_t{blockIdx.y} * layout.n_parameters + blockIdx.x;
  if (a.theta_is_double) {
    static_cast<double*>(a.grad_theta)[p] = sum;
  } else {
    static_cast<float*>(a.grad_theta)[p] = float(sum);
  }
}

}  // namespace qaa::cuda
