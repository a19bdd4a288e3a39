// Trajectories: one group of W of them at a time, of up to W rows. Amplitude i of all of them is one vector.
#pragma once

#include "kernels.h"
#include "noise.h"

namespace qaa::QAA_ISA {

// Philox-4x32-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, 2011).
struct Philox {
  std::uint32_t counter[4], key[2];
  QAA_INLINE void run() {
    for (int round = 0; round < 10; ++round) {
      const std::uint64_t a = std::uint64_t{0xD2511F53} * counter[0], b = std::uint64_t{0xCD9E8D57} * counter[2];
      counter[0] = std::uint32_t(b >> 32) ^ counter[1] ^ key[0];
      counter[2] = std::uint32_t(a >> 32) ^ counter[3] ^ key[1];
      counter[1] = std::uint32_t(b);
      counter[3] = std::uint32_t(a);
      key[0] += 0x9E3779B9;
      key[1] += 0xBB67AE85;
    }
  }
};

// 32 random bits for every lane and draw, from the lane's row, its trajectory and the number of the draw.
template <class T>
class Draws {
 public:
  static constexpr int w = width<T>;
  Draws(std::uint64_t seed, const std::int64_t* rows, const std::int64_t* trajectories)
      : seed_(seed), rows_(rows), trajectories_(trajectories) {}
  const std::uint32_t* next() {
    const std::uint32_t at = n_++;
    if (at % 4 == 0) {
      for (int l = 0; l < w; ++l) {
        Philox philox{{at / 4, std::uint32_t(trajectories_[l]), std::uint32_t(rows_[l]),
                       std::uint32_t(std::uint64_t(rows_[l]) >> 32)},
                      {std::uint32_t(seed_), std::uint32_t(seed_ >> 32)}};
        philox.run();
        for (int k = 0; k < 4; ++k) words_[k][l] = philox.counter[k];
      }
    }
    return words_[at % 4];
  }

 private:
  std::uint64_t seed_;
  const std::int64_t *rows_, *trajectories_;
  std::uint32_t words_[4][w];
  std::uint32_t n_ = 0;
};

// -1 or 1 for X and Z on every bit.
template <class T>
struct SignFrame {
  Vec<T>*x, *z;
};

template <class T>
struct NoisyWorkspace {
  Vec<T>* start;   // the embedded rows
  State<T> state;
  Vec<T>* squares;
  SignFrame<T> frame;
  Vec<T>* signs;     // of the angle of every step; of damping, of X on its bit
  Vec<T>* chances;   // of damping: 32 random bits as a number from 0 to 1
  Vec<T>* columns;
  Wide<T>* sums;     // of the values of every output, then of their squares

  static std::size_t vectors(const BoundNoisyPlan<T>& p) {
    return 4 * std::size_t{p.n_amplitudes} + 2 * p.n_wires + 2 * std::size_t{p.n_steps} + p.n_outputs +
           2 * (sizeof(Wide<T>) / sizeof(Vec<T>)) * p.n_outputs;
  }
  NoisyWorkspace(const BoundNoisyPlan<T>& p, void* memory) {
    auto* next = static_cast<Vec<T>*>(memory);
    auto take = [&](std::size_t n) { return next += n, next - n; };
    start = take(p.n_amplitudes);
    state = {take(p.n_amplitudes), take(p.n_amplitudes)};
    squares = take(p.n_amplitudes);
    frame = {take(p.n_wires), take(p.n_wires)};
    signs = take(p.n_steps);
    chances = take(p.n_steps);
    columns = take(p.n_outputs);
    sums = reinterpret_cast<Wide<T>*>(next);
  }
};

// ------------------------------------------------------------------------------------------------ drawing

template <class T>
QAA_INLINE void flip_where(Vec<T>& sign, int lane, bool flipped) {
  sign[lane] = flipped ? -sign[lane] : sign[lane];
}

// Walks through the steps without a state: what happens to the frame does not depend on it.
template <class T>
void draw_signs(const BoundNoisyPlan<T>& p, Draws<T> draws, const NoisyWorkspace<T>& work) {
  constexpr int w = width<T>;
  using Kind = NoisyStep::Kind;
  const SignFrame<T> frame = work.frame;
  for (std::uint32_t b = 0; b < p.n_wires; ++b) frame.x[b] = frame.z[b] = splat<T>(1);
  for (std::uint32_t s = 0; s < p.n_steps; ++s) {
    const BoundNoisyStep<T>& step = p.steps[s];
    Vec<T>&x = frame.x[step.a], &z = frame.z[step.a];
    switch (step.kind) {
      case Kind::flip_x: x = -x; break;
      case Kind::flip_z: z = -z; break;
      case Kind::ry: work.signs[s] = x * z; break;
      case Kind::rz: work.signs[s] = x; break;
      case Kind::rzz: work.signs[s] = x * frame.x[step.b]; break;
      case Kind::cnot:
        frame.x[step.b] *= x;
        z *= frame.z[step.b];
        break;
      case Kind::pauli: {
        const std::uint32_t* u = draws.next();
        for (int l = 0; l < w; ++l) {
          flip_where<T>(x, l, u[l] < p.pauli[1]);
          flip_where<T>(z, l, u[l] >= p.pauli[0] && u[l] < p.pauli[2]);
        }
        break;
      }
      case Kind::damping: {
        const std::uint32_t* u = draws.next();
        work.signs[s] = x;
        for (int l = 0; l < w; ++l) work.chances[s][l] = T((u[l] + 0.5) / 4294967296.0);
        break;
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------ steps

// Calls f(i, i | 1 << bit) for every index without that bit.
template <class F>
QAA_INLINE void each_pair(Index n, std::uint32_t bit, F&& f) {
  const Index half = Index{1} << bit;
  for (Index first = 0; first < n; first += 2 * half) {
    for (Index i = first; i < first + half; ++i) f(i, i + half);
  }
}
// Calls f(i) for every index with zeros at two bits, for i + other indices to be reached from.
template <class F>
QAA_INLINE void each_quadruple(Index n, std::uint32_t a, std::uint32_t b, F&& f) {
  const Index high = Index{1} << (a > b ? a : b), low = Index{1} << (a > b ? b : a);
  for (Index upper = 0; upper < n; upper += 2 * high) {
    for (Index first = upper; first < upper + high; first += 2 * low) {
      for (Index i = first; i < first + low; ++i) f(i);
    }
  }
}

// Not std::swap, which all instruction sets would share.
template <class V>
QAA_INLINE void exchange_amplitudes(V& a, V& b) {
  const V c = a;
  a = b;
  b = c;
}

template <class T>
void rotate_bit(Vec<T>* state, Index n, std::uint32_t bit, const Vec<T>& cosine, const Vec<T>& sine) {
  each_pair(n, bit, [=](Index i, Index j) {
    const Vec<T> a = state[i], b = state[j];
    state[i] = cosine * a - sine * b;
    state[j] = cosine * b + sine * a;
  });
}

template <class T>
QAA_INLINE void turn_phase(const State<T>& state, Index i, const Vec<T>& cosine, const Vec<T>& sine) {
  const Vec<T> re = state.re[i], im = state.im[i];
  state.re[i] = cosine * re - sine * im;
  state.im[i] = cosine * im + sine * re;
}

// [a; b] <- real matrix, lane by lane.
template <class T>
void mix_bit(Vec<T>* state, Index n, std::uint32_t bit, const Vec<T>* m) {
  const Vec<T> m00 = m[0], m01 = m[1], m10 = m[2], m11 = m[3];
  each_pair(n, bit, [=](Index i, Index j) {
    const Vec<T> a = state[i], b = state[j];
    state[i] = m00 * a + m01 * b;
    state[j] = m10 * a + m11 * b;
  });
}

// Draws between diag(1, sqrt(1 - g)) and sqrt(g) |0><1| with their probabilities in this state, and keeps its norm.
template <class T>
void damp(const BoundNoisyPlan<T>& p, std::uint32_t bit, const Vec<T>& x, const Vec<T>& chance, bool complex,
          const State<T>& state) {
  constexpr int w = width<T>;
  Vec<T> sums[2][2] = {};
  auto add = [&](const Vec<T>* part) {
    each_pair(p.n_amplitudes, bit, [&](Index i, Index j) {
      sums[0][0] += part[i] * part[i];
      sums[1][0] += part[j] * part[j];
    });
  };
  add(state.re);
  if (complex) add(state.im);
  const Vec<T> even = sums[0][0], odd = sums[1][0];
  Vec<T> m[4] = {};
  for (int l = 0; l < w; ++l) {
    const bool flipped = x[l] < 0;  // X in the frame: stored 0 is |1>
    const T ground = flipped ? odd[l] : even[l], excited = flipped ? even[l] : odd[l], all = ground + excited;
    const T lost = p.damping * excited;
    T from_excited = 0, keep_ground = 1, keep_excited = p.keep;
    if (chance[l] * all < lost || (lost > 0 && all <= lost)) {
      from_excited = T(__builtin_sqrt(double(all / excited)));
      keep_ground = keep_excited = 0;
    } else if (all > 0) {
      const T norm = T(__builtin_sqrt(double(all / (all - lost))));
      keep_ground *= norm;
      keep_excited *= norm;
    }
    m[0][l] = flipped ? keep_excited : keep_ground;
    m[1][l] = flipped ? T(0) : from_excited;
    m[2][l] = flipped ? from_excited : T(0);
    m[3][l] = flipped ? keep_ground : keep_excited;
  }
  mix_bit<T>(state.re, p.n_amplitudes, bit, m);
  if (complex) mix_bit<T>(state.im, p.n_amplitudes, bit, m);
}

// Returns whether the state became complex.
template <class T>
bool run_steps(const BoundNoisyPlan<T>& p, const NoisyWorkspace<T>& work) {
  using Kind = NoisyStep::Kind;
  const State<T> state = work.state;
  const Index n = p.n_amplitudes;
  bool complex = false;
  for (Index i = 0; i < n; ++i) state.re[i] = work.start[i];
  auto become_complex = [&] {
    for (Index i = 0; !complex && i < n; ++i) state.im[i] = Vec<T>{};
    complex = true;
  };
  for (std::uint32_t s = 0; s < p.n_steps; ++s) {
    const BoundNoisyStep<T>& step = p.steps[s];
    const Vec<T> cosine = splat<T>(step.cosine), sine = work.signs[s] * step.sine;
    switch (step.kind) {
      case Kind::ry:
        rotate_bit<T>(state.re, n, step.a, cosine, sine);
        if (complex) rotate_bit<T>(state.im, n, step.a, cosine, sine);
        break;
      case Kind::rz:
        become_complex();
        each_pair(n, step.a, [=](Index, Index j) { turn_phase<T>(state, j, cosine, sine); });
        break;
      case Kind::rzz: {
        become_complex();
        const Index a = Index{1} << step.a, b = Index{1} << step.b;
        each_quadruple(n, step.a, step.b, [=](Index i) {
          turn_phase<T>(state, i | a, cosine, sine);
          turn_phase<T>(state, i | b, cosine, sine);
        });
        break;
      }
      case Kind::cnot: {
        const Index control = Index{1} << step.a, target = Index{1} << step.b;
        each_quadruple(n, step.a, step.b, [&](Index i) {
          exchange_amplitudes(state.re[i | control], state.re[i | control | target]);
          if (complex) exchange_amplitudes(state.im[i | control], state.im[i | control | target]);
        });
        break;
      }
      case Kind::damping: damp<T>(p, step.a, work.signs[s], work.chances[s], complex, state); break;
      default: break;
    }
  }
  return complex;
}

// ------------------------------------------------------------------------------------------------ readout

// i^n_y times the sum over i of (-1)^(bits of z in i) conj(psi[i ^ x]) psi[i], of which only the real part is not zero.
template <class T>
Vec<T> expectation(const NoisyString& string, Index n, bool complex, const State<T>& state, const Vec<T>* squares) {
  Vec<T> sums[2] = {};
  auto sign = [&](Index i) { return __builtin_popcount(string.z & i) & 1 ? T(-1) : T(1); };
  if (string.x == 0) {
    for (Index i = 0; i < n; ++i) sums[i & 1] += squares[i] * sign(i);
    return sums[0] + sums[1];
  }
  const Vec<T>*re = state.re, *im = state.im;
  if (string.n_y % 2 == 0) {
    for (Index i = 0; i < n; ++i) {
      Vec<T> product = re[i ^ string.x] * re[i];
      if (complex) product += im[i ^ string.x] * im[i];
      sums[i & 1] += product * sign(i);
    }
  } else if (complex) {
    for (Index i = 0; i < n; ++i) {
      sums[i & 1] += (im[i ^ string.x] * re[i] - re[i ^ string.x] * im[i]) * sign(i);
    }
  }
  const Vec<T> sum = sums[0] + sums[1];
  return string.n_y % 4 < 2 ? sum : -sum;
}

template <class T>
void read_out(const BoundNoisyPlan<T>& p, bool complex, const NoisyWorkspace<T>& work) {
  const Index n = p.n_amplitudes;
  const SignFrame<T> frame = work.frame;
  Vec<T>* squares = work.squares;
  for (Index i = 0; i < n; ++i) {
    squares[i] = work.state.re[i] * work.state.re[i];
    if (complex) squares[i] += work.state.im[i] * work.state.im[i];
  }
  if (p.readout == ReadoutKind::expval) {
    for (std::uint32_t k = 0; k < p.n_outputs; ++k) {
      const NoisyString& string = p.strings[k];
      Vec<T> value = expectation<T>(string, n, complex, work.state, squares) * T(string.factor);
      for (std::uint32_t b = 0; b < p.n_wires; ++b) {
        if (string.z >> b & 1) value *= frame.x[b];
        if (string.x >> b & 1) value *= frame.z[b];
      }
      work.columns[k] = value;
    }
    return;
  }
  for (std::uint32_t b = 0; b < p.n_wires; ++b) {
    const Vec<T> sign = frame.x[b] * p.right, same = (T(1) + sign) * T(0.5), other = (T(1) - sign) * T(0.5);
    const Vec<T> m[4] = {same, other, other, same};
    mix_bit<T>(squares, n, b, m);
  }
  for (std::uint32_t k = 0; k < p.n_outputs; ++k) work.columns[k] = squares[p.outputs[k]];
}

// ------------------------------------------------------------------------------------------------ a group

// Embeds the rows, `copies` times each, normalized. Returns what a value has to be multiplied by.
template <class T>
Vec<T> embed_noisy(const BoundNoisyPlan<T>& p, const ConstMatrix& x, const NoisyRange& range, int copies,
                   Vec<T>* start) {
  constexpr int w = width<T>;
  const Index n = p.n_amplitudes;
  load_matrix<T, 0>(x, range.first_row, range.n_rows, [=](Index c, Vec<T>* block, int count) {
    for (int k = 0; k < count; ++k) start[c + k] = block[k];
  });
  for (Index i = Index(x.columns); i < n; ++i) start[i] = Vec<T>{};
  for (Index i = 0; copies > 1 && i < Index(x.columns); ++i) {
    for (int l = range.n_rows; l < copies * range.n_rows; ++l) start[i][l] = start[i][l % range.n_rows];
  }
  Vec<T> largest{}, broken{};
  for (Index i = 0; i < n; ++i) {
    const Vec<T> a = start[i] < 0 ? -start[i] : start[i];
    largest = a > largest ? a : largest;
    broken += start[i] - start[i];  // NaN where a number is NaN or infinite
  }
  // Subnormal numbers have no finite inverse.
  constexpr T least = std::numeric_limits<T>::min();
  const Vec<T> reference = largest > least ? largest : splat<T>(least), unit = T(1) / reference;
  Vec<T> squares{};
  for (Index i = 0; i < n; ++i) {
    start[i] *= unit;
    squares += start[i] * start[i];
  }
  Vec<T> scale{}, inverse{};
  for (int l = 0; l < w; ++l) {
    inverse[l] = squares[l] > 0 ? T(1 / __builtin_sqrt(double(squares[l]))) : T(0);
    scale[l] = broken[l] + (largest[l] > 0 ? (p.normalize ? T(1) : reference[l] * reference[l] * squares[l]) : T(0));
  }
  for (Index i = 0; i < n; ++i) start[i] *= inverse;
  return scale;
}

template <class T>
void noisy_group(const BoundNoisyPlan<T>& p, const NoisyCall& call, const NoisyRange& range, void* memory) {
  constexpr int w = width<T>;
  const NoisyWorkspace<T> work(p, memory);
  const int copies = w / range.n_rows, lanes = copies * range.n_rows;
  const Vec<T> scale = embed_noisy<T>(p, call.x, range, copies, work.start);
  Wide<T>*sums = work.sums, *squares = work.sums + p.n_outputs;
  for (std::uint32_t k = 0; k < 2 * p.n_outputs; ++k) sums[k] = Wide<T>{};
  for (std::int64_t first = range.first; first < range.last; first += copies) {
    std::int64_t rows[w], trajectories[w];
    Vec<T> counts{};
    for (int l = 0; l < w; ++l) {
      rows[l] = range.first_row + l % range.n_rows;
      trajectories[l] = first + l / range.n_rows;
      counts[l] = T(l < lanes && trajectories[l] < range.last);
    }
    draw_signs<T>(p, Draws<T>(call.seed, rows, trajectories), work);
    read_out<T>(p, run_steps<T>(p, work), work);
    for (std::uint32_t k = 0; k < p.n_outputs; ++k) {
      const Wide<T> value = widen<T>(work.columns[k] * scale), counted = widen<T>(counts);
      sums[k] += counted * value;
      squares[k] += counted * value * value;
    }
  }
  for (int l = 0; l < lanes; ++l) {
    double* row = range.sums + 2 * std::int64_t{p.n_outputs} * (l % range.n_rows);
    for (std::uint32_t k = 0; k < p.n_outputs; ++k) {
      row[2 * k] += sums[k][l];
      row[2 * k + 1] += squares[k][l];
    }
  }
}

}  // namespace qaa::QAA_ISA
