// kernels.cpp: the CPU bodies of the linears, norms and rotations in kernels.py, which compiles and loads this file.
//
// The one idea: output rows of a weight matrix lie side by side, one in each 32-bit lane of a vector, and an input
// is broadcast to all of them. No sum ever crosses lanes, the order of additions is the order of the
// inputs, and how many rows of activations ride along changes nothing: row i has the same bits for every n.

#include <numeric>
#include <vector>

#include "operators.h"
#include "team.h"
#include "vectors.h"

using gpt_spec::OptionalTensor, gpt_spec::Tensor, std::int64_t;

namespace {

constexpr int BLOCK = 64;   // output rows that lie side by side: 4 vectors, read as one stream
constexpr int PREFETCH = 8192;  // bytes ahead, into the second cache, where a block is not read in one go: the machine
                                // itself looks ahead well enough only in a plain stream

// ------------------------------------------------------------------------------------------------------------
// Activations: what a linear does to a row before it multiplies. norm or SwiGLU, then the words that a weight
// format wants: two bf16 or four int8 numbers each.
// ------------------------------------------------------------------------------------------------------------

// x / rms(x), rounded, times the weight, rounded, as Hugging Face does. In place; zeros stay zeros.
void norm_row(float* x, int64_t size, const bf16* weight, float eps) {
  Floats squares = all(0.0f);
  for (int64_t i = 0; i < size; i += LANES) squares = fma(load(x + i), load(x + i), squares);
  Floats scale = all(1.0f / std::sqrt(sum(squares) / size + eps));
  for (int64_t i = 0; i < size; i += LANES) {
    bf16 w[LANES] = {};
    std::memcpy(w, weight + i, std::min<int64_t>(size - i, LANES) * sizeof(bf16));
    store(x + i, rounded(rounded(load(x + i) * scale) * widen(w)));
  }
}

// silu(gate) * up of a row [gate, up], rounded once.
void swiglu_row(float* gate, const float* up, int64_t size) {
  for (int64_t i = 0; i < size; i += LANES) store(gate + i, rounded(silu(load(gate + i)) * load(up + i)));
}

// Hadamard matrices of order * power numbers that lie `stride` apart: see `rotate` in kernels.py.
struct Rotation {
  const float* matrix;  // [order, order] of +1 and -1, or null: no rotation at all
  int64_t order, power, stride;
};

// The fast Walsh-Hadamard transform: sums and differences of numbers that lie half, a quarter, ... of it all apart,
// down to `least`.
void butterflies(float* x, int64_t span, int64_t least) {
  for (int64_t half = span / 2; half >= least; half /= 2)
    for (int64_t begin = 0; begin < span; begin += 2 * half) {
      float *low = x + begin, *high = low + half;
      int64_t i = 0;
      for (; i + LANES <= half; i += LANES) {
        Floats a = load(low + i), b = load(high + i);
        store(low + i, a + b), store(high + i, a - b);
      }
      for (; i < half; i++) {
        float a = low[i], b = high[i];
        low[i] = a + b, high[i] = a - b;
      }
    }
}

// The last four stages of it, for 256 numbers: vectors are turned around, so that what lay in one lies side by side.
void butterflies_in_vectors(float* x) {
  float turned[LANES * LANES];
  const float* rows[LANES];
  Floats v[LANES];
  for (int i = 0; i < LANES; i++) rows[i] = x + i * LANES;
  transpose(rows, turned);
  for (int i = 0; i < LANES; i++) v[i] = load(turned + i * LANES), rows[i] = turned + i * LANES;
  for (int half = LANES / 2; half; half /= 2)
    for (int i = 0; i < LANES; i++)
      if (!(i & half)) {
        Floats a = v[i], b = v[i + half];
        v[i] = a + b, v[i + half] = a - b;
      }
  for (int i = 0; i < LANES; i++) store(turned + i * LANES, v[i]);
  transpose(rows, x);
}

// matrix times x [order, span], in place, 16 columns at a time and 4 rows of the matrix.
void mix_rows(float* x, const float* matrix, int64_t order, int64_t span) {
  static thread_local std::vector<float> columns;
  columns.assign(order * LANES, 0.0f);
  for (int64_t i = 0; i < span; i += LANES) {
    const int64_t count = std::min<int64_t>(LANES, span - i);
    for (int64_t j = 0; j < order; j++) std::copy_n(x + j * span + i, count, columns.data() + j * LANES);
    for (int64_t k = 0; k < order; k += 4) {
      Floats sums[4] = {all(0.0f), all(0.0f), all(0.0f), all(0.0f)};
      for (int64_t j = 0; j < order; j++)
        for (int r = 0; r < 4; r++)
          sums[r] = fma(all(matrix[(k + r) * order + j]), load(columns.data() + j * LANES), sums[r]);
      for (int r = 0; r < 4; r++) {
        float lanes[LANES];
        store(lanes, sums[r]);
        std::copy_n(lanes, count, x + (k + r) * span + i);
      }
    }
  }
}

void rotate_row(float* x, int64_t size, const Rotation& r) {
  const int64_t span = r.power * r.stride, block = r.order * span;
  const bool in_vectors = r.stride == 1 && span % LANES == 0;
  for (int64_t begin = 0; begin < size; begin += span) butterflies(x + begin, span, in_vectors ? LANES : r.stride);
  if (in_vectors) {
    int64_t i = 0;
    for (; i + LANES * LANES <= size; i += LANES * LANES) butterflies_in_vectors(x + i);
    for (; i < size; i += LANES) butterflies(x + i, LANES, 1);
  }
  if (r.order > 1)
    for (int64_t begin = 0; begin < size; begin += block) mix_rows(x + begin, r.matrix, r.order, span);
  const float scale = 1.0f / std::sqrt((float)(r.order * r.power));
  for (int64_t i = 0; i < size; i++) x[i] *= scale;
}

// A packed matrix: blocks of 64 output rows. One step of a block is 256 bytes, 4 for each row.
struct Weight {
  const uint8_t* bytes;
  const uint16_t *scales, *zeros;  // float16 [blocks, groups, 64], or null
  int64_t out, in, blocks, groups;
  int inputs;             // in one step: 2 (bf16), 4 (int8) or 8 (4-bit)
  int64_t chunk, chunks;  // inputs that are added up together, a part of a group: 16 or 32 steps, if they come out even

  Weight(const Tensor& packed, const uint16_t* scales, const uint16_t* zeros, int64_t out, int64_t groups)
      : bytes((const uint8_t*)packed.const_data_ptr()), scales(scales), zeros(zeros), out(out), groups(groups) {
    inputs = packed.scalar_type() == at::kBFloat16 ? 2 : packed.scalar_type() == at::kChar ? 4 : 8;
    blocks = packed.size(0), in = packed.size(1) * inputs;
    chunk = std::gcd(in / groups, inputs == 4 ? 128 : 16 * inputs), chunks = in / chunk;
  }
};

// Rows of activations, ready to be multiplied. They are taken in parts of up to MAX_ROWS rows of nearly the same
// number, whose words are interleaved: first word 0 of every row of the part, then word 1 of every row.
struct Activations {
  std::vector<int32_t> words;       // [n * width], part after part
  std::vector<float> sums, scales;  // [n, chunks], [n, groups]: sums of (quantized) inputs; scales of 4-bit ones,
                                    // and at the beginning of a row that of 8-bit ones
  int64_t n, width;

  int64_t parts() const { return (n + MAX_ROWS - 1) / MAX_ROWS; }
  int64_t first_row(int64_t part) const { return part * n / parts(); }
  void put(const int32_t* row_words, int64_t row) {
    int64_t part = row * parts() / n;
    while (first_row(part + 1) <= row) part++;
    int64_t first = first_row(part), rows = first_row(part + 1) - first;
    int32_t* out = words.data() + first * width + (row - first);
    for (int64_t k = 0; k < width; k++) out[k * rows] = row_words[k];
  }
};

// Where input i of eight stands among the bf16 words of a 4-bit step: words hold (0, 2), (4, 6), (1, 3), (5, 7),
// so that the nibbles that make a pair for bf16 are those that make a quadruple for int8 (see pack in kernels.py).
constexpr int PAIR_ORDER[8] = {0, 2, 4, 6, 1, 3, 5, 7};

void prepare_16_bit(const float* x, const Weight& w, int64_t row, bf16* out, Activations& a) {
  bf16 bits[LANES];
  for (int64_t i = 0; i < w.in; i += LANES) {
    narrow(bits, load(x + i));
    int count = std::min<int64_t>(w.in - i, LANES);
    if (w.inputs != 8)
      std::memcpy(out + i, bits, count * sizeof(bf16));
    else
      for (int j = 0; j < count; j++) out[i + j] = bits[(j & 8) + PAIR_ORDER[j & 7]];
  }
  if (!w.zeros) return;
  for (int64_t begin = 0, chunk = w.chunk; begin < w.in; begin += chunk) {
    Floats total = all(0.0f);
    for (int64_t i = begin; i < begin + chunk; i += LANES) total = total + rounded(load(x + i));
    a.sums[row * w.chunks + begin / chunk] = sum(total);
  }
}

// Round to the integers of -limit .. limit: one scale for the row, or one for each group.
void prepare_integers(const float* x, const Weight& w, int64_t row, float limit, bool by_group, int8_t* out,
                      Activations& a) {
  const int64_t group = w.in / w.groups, span = by_group ? group : w.in, chunk = w.chunk;
  for (int64_t begin = 0; begin < w.in; begin += span) {
    Floats most = all(0.0f);
    for (int64_t i = begin; i < begin + span; i += LANES) most = max(most, abs(load(x + i)));
    float absmax = largest(most), factor = absmax < TINY ? 0.0f : limit / absmax;
    a.scales[row * w.groups + begin / group] = absmax < TINY ? 0.0f : absmax / limit;
    for (int64_t c = begin; c < begin + span; c += chunk) {
      Floats total = all(0.0f);
      for (int64_t i = c; i < c + chunk; i += LANES) {
        Floats q = round(load(x + i) * all(factor));
        narrow_int8(out + i, q);
        total = total + q;
      }
      float exact = sum(total);
      bool broken = std::isnan(exact);  // there is no integer for NaN: the scale tells
      a.sums[row * w.chunks + c / chunk] = broken ? 0.0f : exact;
      if (broken) a.scales[row * w.groups + begin / group] = exact;
    }
  }
}

// What happens to a row before it is rounded.
struct Preparation {
  const bf16* norm;  // [in], or null
  float eps;
  bool gated;
  Rotation rotation;
  const int32_t* permutation;  // [in], or null
};

// Row `i` of the activations, prepared, and the words that the weights want.
void prepare(const bf16* x, const Weight& w, int64_t i, const Preparation& p, int64_t bits, Activations& a) {
  static thread_local std::vector<float> row;
  static thread_local std::vector<int32_t> words;
  const int64_t size = round_up(w.in, LANES);
  row.resize(2 * size), words.resize(a.width);
  float *first = row.data(), *second = first + size;
  widen_row(x, w.in, first);
  if (p.norm) norm_row(first, w.in, p.norm, p.eps);
  if (p.gated) {
    widen_row(x + w.in, w.in, second);
    swiglu_row(first, second, w.in);
  }
  if (p.rotation.matrix) rotate_row(first, w.in, p.rotation);
  if (p.permutation) {
    for (int64_t j = 0; j < w.in; j++) second[j] = first[p.permutation[j]];
    std::fill(second + w.in, second + size, 0.0f);
    std::swap(first, second);
  }
  if (bits == 16)
    prepare_16_bit(first, w, i, (bf16*)words.data(), a);
  else
    prepare_integers(first, w, i, bits == 8 ? 127 : 7, bits == 4, (int8_t*)words.data(), a);
  a.put(words.data(), i);
}

// ------------------------------------------------------------------------------------------------------------
// Multiplication
// ------------------------------------------------------------------------------------------------------------

inline Floats to_floats(Floats a) { return a; }

// Weight formats. A step is `operands` words of activations. Integer weights are stored with an offset, which is
// taken back where a sum starts.
struct Bf16 {
  static constexpr int operands = 1;
  static constexpr bool scaled = false, scales_by_group = false;
  static Floats start(float) { return all(0.0f); }
  static auto operand(const uint8_t* p, int) { return load_pairs(p); }
  static Floats multiply(Floats sum, Pairs w, int32_t x) { return dot(sum, w, x); }
};
struct Int8Times16 : Bf16 {
  static constexpr int operands = 2;
  static constexpr bool scaled = true;
  static auto operand(const uint8_t* p, int t) { return int8_pairs(load_bytes(p), t); }
};
struct Int4Times16 : Int8Times16 {
  static constexpr int operands = 4;
  static auto operand(const uint8_t* p, int t) { return nibble_pairs(load_bytes(p), t); }
};
struct Int8Times8 {
  static constexpr int operands = 1;
  static constexpr bool scaled = true, scales_by_group = false;
  static Ints start(float sum) { return all_ints(-INT8_OFFSET * (int32_t)sum); }
  static auto operand(const uint8_t* p, int) { return int8_operand(load_bytes(p)); }
  static Ints multiply(Ints sum, Bytes w, int32_t x) { return dot_int8(sum, w, x); }
};
struct Int4Times8 {
  static constexpr int operands = 2;
  static constexpr bool scaled = true, scales_by_group = false;
  static Ints start(float sum) { return all_ints(-8 * (int32_t)sum); }
  static auto operand(const uint8_t* p, int t) { return nibbles(load_bytes(p), t); }
  static Ints multiply(Ints sum, Bytes w, int32_t x) { return dot_nibbles(sum, w, x); }
};
struct Int4Times4 : Int4Times8 {
  static constexpr bool scales_by_group = true;
};

constexpr int VECTORS = BLOCK / LANES;

// Adds to `out` a chunk of ROWS rows of activations times TOGETHER vectors of a block, from `first` on. Sums side by
// side hide the latency of each, which waits for itself; every lane adds up its inputs one after another.
template <class Format, int ROWS, int TOGETHER>
inline void add_chunk(const Weight& w, const Activations& a, int64_t row, int64_t block, int64_t chunk, int64_t group,
                      int first, Floats (&out)[ROWS][VECTORS]) {
  const int64_t steps = w.chunk / w.inputs, chunks = w.chunks;
  const int32_t* x =
      a.words.data() + row * a.width + chunk * steps * Format::operands * ROWS;  // the part begins at `row`
  const uint8_t* p = w.bytes + ((block * chunks + chunk) * steps * VECTORS + first) * VECTOR;
  decltype(Format::start(0)) sums[ROWS][TOGETHER];
  for (int m = 0; m < ROWS; m++)
    for (int v = 0; v < TOGETHER; v++)
      if constexpr (Format::scaled)
        sums[m][v] = Format::start(a.sums[(row + m) * chunks + chunk]);
      else
        sums[m][v] = out[m][first + v];
  for (int64_t step = 0; step < steps; step++, p += VECTORS * VECTOR, x += Format::operands * ROWS)
    for (int v = 0; v < TOGETHER; v++) {
      if constexpr (TOGETHER < VECTORS) __builtin_prefetch(p + v * VECTOR + PREFETCH, 0, 2);
      for (int t = 0; t < Format::operands; t++) {
        auto operand = Format::operand(p + v * VECTOR, t);
        for (int m = 0; m < ROWS; m++) sums[m][v] = Format::multiply(sums[m][v], operand, x[t * ROWS + m]);
      }
    }
  for (int v = 0; v < TOGETHER; v++) {
    const int64_t place = (block * w.groups + group) * BLOCK + (first + v) * LANES;
    const Floats scale = Format::scaled ? widen_half(w.scales + place) : all(1.0f);
    for (int m = 0; m < ROWS; m++) {
      Floats total = to_floats(sums[m][v]);
      if (w.zeros) total = fma(all(8.0f) - widen_half(w.zeros + place), all(a.sums[(row + m) * chunks + chunk]), total);
      if constexpr (Format::scales_by_group) total = total * all(a.scales[(row + m) * w.groups + group]);
      out[m][first + v] = Format::scaled ? fma(total, scale, out[m][first + v]) : total;
    }
  }
}

// ROWS rows of activations times a block of weights.
template <class Format, int ROWS>
void multiply(const Weight& w, const Activations& a, int64_t row, int64_t block, Floats (&out)[ROWS][VECTORS]) {
  constexpr int TOGETHER = ROWS * 4 <= MAX_SUMS ? 4 : ROWS * 2 <= MAX_SUMS ? 2 : 1;
  for (auto& vectors : out)
    for (auto& o : vectors) o = all(0.0f);
  const int64_t chunks_of_group = w.chunks / w.groups;
  for (int64_t group = 0; group < w.groups; group++)
    for (int64_t chunk = group * chunks_of_group; chunk < (group + 1) * chunks_of_group; chunk++)
      for (int v = 0; v < VECTORS; v += TOGETHER)
        add_chunk<Format, ROWS, TOGETHER>(w, a, row, block, chunk, group, v, out);
  if (std::is_same_v<decltype(Format::start(0)), Ints> && !Format::scales_by_group)
    for (int m = 0; m < ROWS; m++)
      for (auto& o : out[m]) o = o * all(a.scales[(row + m) * w.groups]);
}

// What happens to a result before it is stored: bias and residual are added in float32, then it is rounded once,
// or, if it is to stay wide, not at all.
struct Result {
  bf16* y;                      // [n, out], or null
  float* wide;                  // [n, out], or null
  const bf16 *bias, *residual;  // [out], [n, out], or null
  void store_lanes(Floats value, int64_t row, int64_t column, int64_t out) const {
    int64_t place = row * out + column, count = std::min<int64_t>(LANES, out - column);
    if (count <= 0) return;
    bf16 lanes[LANES] = {};
    for (const bf16* more : {bias ? bias + column : nullptr, residual ? residual + place : nullptr}) {
      if (!more) continue;
      std::memcpy(lanes, more, count * sizeof(bf16));
      value = value + widen(lanes);
    }
    if (wide) {
      float floats[LANES];
      store(floats, value);
      std::memcpy(wide + place, floats, count * sizeof(float));
    } else {
      narrow(lanes, value);
      std::memcpy(y + place, lanes, count * sizeof(bf16));
    }
  }
};

// A block for `rows` rows, whose number becomes a constant of the innermost loop.
template <class Format, int ROWS = MAX_ROWS>
void multiply_block(const Weight& w, const Activations& a, int rows, int64_t row, int64_t block, const Result& result) {
  if constexpr (ROWS > 1)
    if (rows < ROWS) return multiply_block<Format, ROWS - 1>(w, a, rows, row, block, result);
  Floats out[ROWS][VECTORS];
  multiply<Format, ROWS>(w, a, row, block, out);
  for (int m = 0; m < ROWS; m++)
    for (int v = 0; v < VECTORS; v++) result.store_lanes(out[m][v], row + m, block * BLOCK + v * LANES, w.out);
}

template <class Format>
void multiply_all(const Weight& w, const Activations& a, const Result& result) {
  side_by_side(w.blocks, a.n * w.in * w.out, [&](int64_t block) {  // its weights stay in the cache for all rows
    for (int64_t part = 0; part < a.parts(); part++) {
      int64_t row = a.first_row(part);
      multiply_block<Format>(w, a, a.first_row(part + 1) - row, row, block, result);
    }
  });
}

template <class T>
const T* pointer(OptionalTensor t) {
  return t ? (const T*)t->const_data_ptr() : nullptr;
}

void check(OptionalTensor t, at::ScalarType type, int64_t count, const char* name) {
  TORCH_CHECK(!t || (t->scalar_type() == type && t->numel() == count && t->is_contiguous()), "linear: ", name,
              " should be contiguous, ", type, " and of ", count, " elements");
}

Rotation make_rotation(OptionalTensor matrix, int64_t power, int64_t stride, int64_t size) {
  if (!matrix) return {nullptr, 1, 1, 1};
  const int64_t order = matrix->size(0);
  check(matrix, at::kFloat, order * order, "rotation");
  TORCH_CHECK(order > 0 && power > 0 && (power & (power - 1)) == 0 && stride > 0 && (order == 1 || order % 4 == 0) &&
                  size % (order * power * stride) == 0,
              "rotation: orders ", order, " and ", power, " at stride ", stride, " do not fit ", size, " numbers");
  return {pointer<float>(matrix), order, power, stride};
}

}  // namespace

Tensor gpt_spec::linear(const Tensor& x_any, const Tensor& packed, OptionalTensor scales, OptionalTensor zeros,
                        OptionalTensor bias, OptionalTensor residual, OptionalTensor norm, double eps, bool gated,
                        OptionalTensor rotation, int64_t power, int64_t stride, OptionalTensor permutation, int64_t out,
                        int64_t activation_bits, bool wide) {
  Tensor x = x_any.contiguous();
  TORCH_CHECK(x.scalar_type() == at::kBFloat16, "linear: activations are bfloat16, not ", x.scalar_type());
  TORCH_CHECK(packed.dim() == 4 && packed.size(2) == BLOCK && packed.is_contiguous(), "linear: weights are not packed");
  TORCH_CHECK(packed.scalar_type() == at::kBFloat16 ? activation_bits == 16 : scales.has_value(),
              "linear: scales are missing");
  const Weight w(packed, pointer<uint16_t>(scales), pointer<uint16_t>(zeros), out, scales ? scales->size(1) : 1);
  TORCH_CHECK(x.size(-1) == w.in * (gated ? 2 : 1), "linear: ", x.size(-1), " inputs for a weight of ", w.in);
  TORCH_CHECK(w.inputs == 2 || (w.in % w.groups == 0 && w.in / w.groups % LANES == 0), "linear: groups of 16 k, please");
  TORCH_CHECK(out > (w.blocks - 1) * BLOCK && out <= w.blocks * BLOCK, "linear: ", out, " outputs of ", w.blocks, " blocks");
  const int64_t n = x.numel() / x.size(-1);
  check(scales, at::kHalf, w.blocks * w.groups * BLOCK, "scales");
  check(zeros, at::kHalf, w.blocks * w.groups * BLOCK, "zeros");
  check(bias, at::kBFloat16, out, "bias");
  check(norm, at::kBFloat16, w.in, "norm");
  check(residual, at::kBFloat16, n * out, "residual");
  check(permutation, at::kInt, w.in, "permutation");
  const Preparation preparation{pointer<bf16>(norm), (float)eps, gated, make_rotation(rotation, power, stride, w.in),
                                pointer<int32_t>(permutation)};

  auto shape = x.sizes().vec();
  shape.back() = out;
  Tensor y = empty(shape, wide ? at::kFloat : at::kBFloat16);
  void* place = y.mutable_data_ptr();
  Result result{wide ? nullptr : (bf16*)place, wide ? (float*)place : nullptr, pointer<bf16>(bias),
                pointer<bf16>(residual)};
  static thread_local Activations a;
  a.n = n, a.width = activation_bits == 16 ? w.in / 2 : w.in / 4;
  a.words.resize(n * a.width), a.sums.resize(n * w.chunks), a.scales.resize(n * w.groups);
  Activations& shared = a;  // the calling thread's, for all threads of the region
  side_by_side(n, n * w.in, [&](int64_t i) {
    const bf16* row = (const bf16*)x.const_data_ptr() + i * x.size(-1);
    prepare(row, w, i, preparation, activation_bits, shared);
  });
  if (w.inputs == 2)
    multiply_all<Bf16>(w, shared, result);
  else if (activation_bits == 16 && w.inputs == 4)
    multiply_all<Int8Times16>(w, shared, result);
  else if (activation_bits == 16)
    multiply_all<Int4Times16>(w, shared, result);
  else if (w.inputs == 4)
    multiply_all<Int8Times8>(w, shared, result);
  else if (activation_bits == 8)
    multiply_all<Int4Times8>(w, shared, result);
  else
    multiply_all<Int4Times4>(w, shared, result);
  return y;
}

Tensor gpt_spec::rms_norm(const Tensor& x_any, const Tensor& weight, double eps) {
  Tensor x = x_any.contiguous(), y = empty(x.sizes(), x.scalar_type());
  TORCH_CHECK(x.scalar_type() == at::kBFloat16 && weight.scalar_type() == at::kBFloat16, "rms_norm: not bfloat16");
  int64_t size = x.size(-1), n = x.numel() / size;
  side_by_side(n, x.numel(), [&](int64_t i) {
    static thread_local std::vector<float> row;
    row.resize(round_up(size, LANES));
    widen_row((const bf16*)x.const_data_ptr() + i * size, size, row.data());
    norm_row(row.data(), size, (const bf16*)weight.const_data_ptr(), eps);
    narrow_row(row.data(), size, (bf16*)y.mutable_data_ptr() + i * size);
  });
  return y;
}

namespace {

template <class T>
void rotate_rows(const Tensor& x, Tensor& y, const Rotation& rotation) {
  const int64_t size = x.size(-1), n = x.numel() / size;
  side_by_side(n, x.numel(), [&](int64_t i) {
    static thread_local std::vector<float> row;
    row.resize(round_up(size, LANES));
    widen_row((const T*)x.const_data_ptr() + i * size, size, row.data());
    rotate_row(row.data(), size, rotation);
    narrow_row(row.data(), size, (T*)y.mutable_data_ptr() + i * size);
  });
}

}  // namespace

Tensor gpt_spec::rotate(const Tensor& x_any, const Tensor& matrix, int64_t power, int64_t stride) {
  Tensor x = x_any.contiguous(), y = empty(x.sizes(), x.scalar_type());
  const Rotation rotation = make_rotation(matrix, power, stride, x.size(-1));
  TORCH_CHECK(x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kFloat, "rotate: not float32 or bfloat16");
  x.scalar_type() == at::kFloat ? rotate_rows<float>(x, y, rotation) : rotate_rows<bf16>(x, y, rotation);
  return y;
}
