// kernels.cpp: the CPU bodies of the operations in kernels.py, which compiles and loads this file.
//
// The one idea: output rows of a weight matrix lie side by side, one in each 32-bit lane of a vector, and an input
// is broadcast to all of them. No sum ever crosses lanes, the order of additions is the order of the
// inputs, and how many rows of activations ride along changes nothing: row i has the same bits for every n.
//
// The file is compiled once for the instruction set that kernels.py picked: AVX-512 with VNNI and BF16, AVX2,
// or none at all. The first part gives each of them the same few vector operations; the rest is written once.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <omp.h>
#include <torch/library.h>

namespace {

using std::int32_t, std::int64_t, std::int8_t, std::uint16_t, std::uint32_t, std::uint8_t;
using bf16 = uint16_t;  // its bits

constexpr int LANES = 16;
constexpr int VECTOR = 64;  // bytes of packed weights in a vector: 4 for each lane
constexpr int BLOCK = 64;   // output rows that lie side by side: 4 vectors, read as one stream
constexpr int PREFETCH = 8192;  // bytes ahead, into the second cache, where a block is not read in one go: the machine
                                // itself looks ahead well enough only in a plain stream

// ------------------------------------------------------------------------------------------------------------
// Vector operations: Floats and Ints have 16 lanes of 32 bits; Bytes are 64 bytes as they were loaded, 4 to a
// lane; Pairs are two bf16 numbers to a lane. An `int32_t x` stands for 4 int8 or 2 bf16 inputs, broadcast.
// ------------------------------------------------------------------------------------------------------------

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)

constexpr int MAX_ROWS = 8, MAX_SUMS = 12;  // rows of activations at a time, and vectors of sums in registers
constexpr int INT8_OFFSET = 128;  // vpdpbusd wants unsigned weights

struct Floats { __m512 v; };
struct Ints { __v16si v; };  // not __m512i, of which GCC makes 64-bit numbers: it would copy every sum twice a step
struct Bytes { __m512i v; };
struct Pairs { __m512i v; };

inline Floats all(float x) { return {_mm512_set1_ps(x)}; }
inline Ints all_ints(int32_t x) { return {(__v16si)_mm512_set1_epi32(x)}; }
inline Floats load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, Floats a) { _mm512_storeu_ps(p, a.v); }
inline Floats operator+(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Floats operator-(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Floats operator*(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Floats operator/(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Floats fma(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Floats max(Floats a, Floats b) { return {_mm512_max_ps(a.v, b.v)}; }  // b where one is NaN
inline Floats min(Floats a, Floats b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Floats abs(Floats a) { return {_mm512_abs_ps(a.v)}; }
inline Floats round(Floats a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Floats times_power_of_two(Floats a, Floats n) { return {_mm512_scalef_ps(a.v, n.v)}; }
inline Floats to_floats(Ints a) { return {_mm512_cvtepi32_ps((__m512i)a.v)}; }
inline Floats widen_half(const uint16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
inline Floats widen(const bf16* p) {
  __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
inline void narrow(bf16* p, Floats a) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(a.v)); }
inline void narrow_int8(int8_t* p, Floats a) {
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.v)));
}

inline Bytes load_bytes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline Bytes nibbles(Bytes a, int high) {
  return {_mm512_and_si512(high ? _mm512_srli_epi16(a.v, 4) : a.v, _mm512_set1_epi8(15))};
}
inline Ints dot_nibbles(Ints sum, Bytes w, int32_t x) {
  return {(__v16si)_mm512_dpbusd_epi32((__m512i)sum.v, w.v, _mm512_set1_epi32(x))};
}
inline Bytes int8_operand(Bytes a) { return {_mm512_xor_si512(a.v, _mm512_set1_epi8(-128))}; }
inline Ints dot_int8(Ints sum, Bytes w, int32_t x) { return dot_nibbles(sum, w, x); }

inline Pairs load_pairs(const void* p) { return {_mm512_loadu_si512(p)}; }
alignas(64) constexpr bf16 MINUS_8_TO_7[32] = {  // twice, because vpermw looks at five bits
    0xC100, 0xC0E0, 0xC0C0, 0xC0A0, 0xC080, 0xC040, 0xC000, 0xBF80, 0, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0, 0x40C0,
    0x40E0, 0xC100, 0xC0E0, 0xC0C0, 0xC0A0, 0xC080, 0xC040, 0xC000, 0xBF80, 0, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0,
    0x40C0, 0x40E0};
inline Pairs nibble_pairs(Bytes a, int t) {  // nibble t of both 16-bit halves of every lane, less 8
  return {_mm512_permutexvar_epi16(_mm512_srli_epi16(a.v, 4 * t), _mm512_load_si512(MINUS_8_TO_7))};
}
inline Pairs int8_pairs(Bytes a, int high) {  // bytes 0 and 1 of every lane, or 2 and 3
  __m512i first = _mm512_srai_epi32(_mm512_slli_epi32(a.v, high ? 8 : 24), 24);
  __m512i second = _mm512_srai_epi32(_mm512_slli_epi32(a.v, high ? 0 : 16), 24);
  __m512i low = _mm512_srli_epi32(_mm512_castps_si512(_mm512_cvtepi32_ps(first)), 16);  // exact: 8 bits
  __m512i kept = _mm512_castps_si512(_mm512_cvtepi32_ps(second));
  return {_mm512_mask_blend_epi16(0xAAAAAAAA, low, kept)};
}
inline Floats dot(Floats sum, Pairs w, int32_t x) {
  return {_mm512_dpbf16_ps(sum.v, (__m512bh)w.v, (__m512bh)_mm512_set1_epi32(x))};
}

// 16 rows of 16 words each -> their columns.
template <class Word>
inline void transpose(const Word* const* rows, Word* out) {
  __m512 r[16], t[16];
  for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_ps(rows[i]);
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; j++) {
      __m512d a = _mm512_castps_pd(t[i + j]), b = _mm512_castps_pd(t[i + j + 2]);
      r[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      r[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  for (int i = 0; i < 4; i++)
    for (int j = 0; j < 16; j += 8) {
      t[i + j] = _mm512_shuffle_f32x4(r[i + j], r[i + j + 4], 0x88);
      t[i + j + 4] = _mm512_shuffle_f32x4(r[i + j], r[i + j + 4], 0xDD);
    }
  for (int i = 0; i < 8; i++) {
    _mm512_storeu_ps(out + 16 * i, _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88));
    _mm512_storeu_ps(out + 16 * (i + 8), _mm512_shuffle_f32x4(t[i], t[i + 8], 0xDD));
  }
}

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

constexpr int MAX_ROWS = 4, MAX_SUMS = 4;
constexpr int INT8_OFFSET = 0;

struct Floats { __m256 v[2]; };
struct Ints { __m256i v[2]; };
struct Bytes { __m256i v[2]; };
struct Pairs { Floats first, second; };  // widened: there is no dot product of bf16 numbers

inline Floats all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Ints all_ints(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, Floats a) {
  _mm256_storeu_ps(p, a.v[0]);
  _mm256_storeu_ps(p + 8, a.v[1]);
}
inline Floats operator+(Floats a, Floats b) { return {a.v[0] + b.v[0], a.v[1] + b.v[1]}; }
inline Floats operator-(Floats a, Floats b) { return {a.v[0] - b.v[0], a.v[1] - b.v[1]}; }
inline Floats operator*(Floats a, Floats b) { return {a.v[0] * b.v[0], a.v[1] * b.v[1]}; }
inline Floats operator/(Floats a, Floats b) { return {a.v[0] / b.v[0], a.v[1] / b.v[1]}; }
inline Floats fma(Floats a, Floats b, Floats c) {
  return {_mm256_fmadd_ps(a.v[0], b.v[0], c.v[0]), _mm256_fmadd_ps(a.v[1], b.v[1], c.v[1])};
}
inline Floats max(Floats a, Floats b) { return {_mm256_max_ps(a.v[0], b.v[0]), _mm256_max_ps(a.v[1], b.v[1])}; }
inline Floats min(Floats a, Floats b) { return {_mm256_min_ps(a.v[0], b.v[0]), _mm256_min_ps(a.v[1], b.v[1])}; }
inline Floats abs(Floats a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.v[0]), _mm256_andnot_ps(sign, a.v[1])};
}
inline Floats round(Floats a) {
  constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.v[0], nearest), _mm256_round_ps(a.v[1], nearest)};
}
inline Floats times_power_of_two(Floats a, Floats n) {
  for (int i = 0; i < 2; i++) {
    __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v[i]), _mm256_set1_epi32(127)), 23);
    a.v[i] = a.v[i] * _mm256_castsi256_ps(exponent);
  }
  return a;
}
inline Floats to_floats(Ints a) { return {_mm256_cvtepi32_ps(a.v[0]), _mm256_cvtepi32_ps(a.v[1])}; }
inline Floats widen_half(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p + 1))};
}
inline Floats high_halves(__m256i a, __m256i b) {
  const __m256i mask = _mm256_set1_epi32(0xFFFF0000);
  return {_mm256_castsi256_ps(_mm256_and_si256(a, mask)), _mm256_castsi256_ps(_mm256_and_si256(b, mask))};
}
inline Floats low_halves(__m256i a, __m256i b) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(b, 16))};
}
inline Floats widen(const bf16* p) {
  return low_halves(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)),
                    _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p + 1)));
}
inline void narrow(bf16* p, Floats a) {  // to nearest, ties to even; a NaN stays one
  for (int i = 0; i < 2; i++) {
    __m256i bits = _mm256_castps_si256(a.v[i]);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    bits = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF))), 16);
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v[i], a.v[i], _CMP_UNORD_Q));
    bits = _mm256_blendv_epi8(bits, _mm256_set1_epi32(0x7FC0), nan);
    bits = _mm256_permute4x64_epi64(_mm256_packus_epi32(bits, bits), 0xD8);
    _mm_storeu_si128((__m128i*)p + i, _mm256_castsi256_si128(bits));
  }
}
inline void narrow_int8(int8_t* p, Floats a) {
  __m256i low = _mm256_cvtps_epi32(a.v[0]), high = _mm256_cvtps_epi32(a.v[1]);
  __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xD8);
  __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128((__m128i*)p, bytes);
}

inline Bytes load_bytes(const uint8_t* p) {
  return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)p + 1)};
}
inline Bytes nibbles(Bytes a, int high) {
  for (auto& v : a.v) v = _mm256_and_si256(high ? _mm256_srli_epi16(v, 4) : v, _mm256_set1_epi8(15));
  return a;
}
inline Ints dot_nibbles(Ints sum, Bytes w, int32_t x) {
  for (int i = 0; i < 2; i++) {  // 2 x 15 x 127 fits into 16 bits
    __m256i pairs = _mm256_maddubs_epi16(w.v[i], _mm256_set1_epi32(x));
    sum.v[i] = _mm256_add_epi32(sum.v[i], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  return sum;
}
inline Bytes int8_operand(Bytes a) { return a; }
inline Ints dot_int8(Ints sum, Bytes w, int32_t x) {
  for (int i = 0; i < 2; i++) {  // |w| times x with the sign of w: 2 x 128 x 127 fits
    __m256i signed_x = _mm256_sign_epi8(_mm256_set1_epi32(x), w.v[i]);
    __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w.v[i]), signed_x);
    sum.v[i] = _mm256_add_epi32(sum.v[i], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  return sum;
}

inline Pairs load_pairs(const void* p) {
  Bytes a = load_bytes((const uint8_t*)p);
  return {low_halves(a.v[0], a.v[1]), high_halves(a.v[0], a.v[1])};
}
inline Floats field(Bytes a, int shift, int bits, int offset) {  // `bits` bits of every lane, less `offset`
  Floats out;
  for (int i = 0; i < 2; i++) {
    __m256i value = _mm256_and_si256(_mm256_srli_epi32(a.v[i], shift), _mm256_set1_epi32((1 << bits) - 1));
    out.v[i] = _mm256_cvtepi32_ps(_mm256_sub_epi32(value, _mm256_set1_epi32(offset)));
  }
  return out;
}
inline Pairs nibble_pairs(Bytes a, int t) { return {field(a, 4 * t, 4, 8), field(a, 16 + 4 * t, 4, 8)}; }
inline Pairs int8_pairs(Bytes a, int high) {
  for (auto& v : a.v) v = _mm256_xor_si256(v, _mm256_set1_epi8(-128));
  return {field(a, 16 * high, 8, 128), field(a, 16 * high + 8, 8, 128)};
}
inline Floats dot(Floats sum, Pairs w, int32_t x) {
  __m256i both = _mm256_set1_epi32(x);
  return fma(w.second, high_halves(both, both), fma(w.first, low_halves(both, both), sum));
}

#else  // portable: plain loops, which the compiler may turn into whatever the machine has

constexpr int MAX_ROWS = 4, MAX_SUMS = 4;
constexpr int INT8_OFFSET = 0;

struct Floats { float v[LANES]; };
struct Ints { int32_t v[LANES]; };
struct Bytes { uint8_t v[VECTOR]; };
struct Pairs { Floats first, second; };

inline float widen_bits(uint32_t bf16_bits) {
  uint32_t bits = bf16_bits << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline float half_to_float(uint16_t h) {
  float x = std::ldexp((float)(h & 0x3FF) + ((h & 0x7C00) ? 1024.0f : 0.0f), std::max((h >> 10) & 31, 1) - 25);
  return h & 0x8000 ? -x : x;
}
template <class Result, class Function>
inline Result each_lane(Function f) {
  Result out;
  for (int i = 0; i < LANES; i++) out.v[i] = f(i);
  return out;
}
inline Floats all(float x) { return each_lane<Floats>([=](int) { return x; }); }
inline Ints all_ints(int32_t x) { return each_lane<Ints>([=](int) { return x; }); }
inline Floats load(const float* p) { return each_lane<Floats>([=](int i) { return p[i]; }); }
inline void store(float* p, Floats a) { std::memcpy(p, a.v, sizeof a.v); }
inline Floats operator+(Floats a, Floats b) { return each_lane<Floats>([&](int i) { return a.v[i] + b.v[i]; }); }
inline Floats operator-(Floats a, Floats b) { return each_lane<Floats>([&](int i) { return a.v[i] - b.v[i]; }); }
inline Floats operator*(Floats a, Floats b) { return each_lane<Floats>([&](int i) { return a.v[i] * b.v[i]; }); }
inline Floats operator/(Floats a, Floats b) { return each_lane<Floats>([&](int i) { return a.v[i] / b.v[i]; }); }
inline Floats fma(Floats a, Floats b, Floats c) { return a * b + c; }
inline Floats max(Floats a, Floats b) {  // b where one is NaN
  return each_lane<Floats>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline Floats min(Floats a, Floats b) {
  return each_lane<Floats>([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline Floats abs(Floats a) { return each_lane<Floats>([&](int i) { return std::fabs(a.v[i]); }); }
inline Floats round(Floats a) { return each_lane<Floats>([&](int i) { return std::nearbyint(a.v[i]); }); }
inline Floats times_power_of_two(Floats a, Floats n) {
  return each_lane<Floats>([&](int i) { return std::ldexp(a.v[i], (int)n.v[i]); });
}
inline Floats to_floats(Ints a) { return each_lane<Floats>([&](int i) { return (float)a.v[i]; }); }
inline Floats widen_half(const uint16_t* p) { return each_lane<Floats>([=](int i) { return half_to_float(p[i]); }); }
inline Floats widen(const bf16* p) { return each_lane<Floats>([=](int i) { return widen_bits(p[i]); }); }
inline void narrow(bf16* p, Floats a) {  // to nearest, ties to even; a NaN stays one
  for (int i = 0; i < LANES; i++) {
    uint32_t bits;
    std::memcpy(&bits, &a.v[i], 4);
    p[i] = a.v[i] == a.v[i] ? (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 : 0x7FC0;
  }
}
inline void narrow_int8(int8_t* p, Floats a) {
  for (int i = 0; i < LANES; i++) p[i] = (int8_t)std::lrint(a.v[i]);
}

inline Bytes load_bytes(const uint8_t* p) {
  Bytes out;
  std::memcpy(out.v, p, VECTOR);
  return out;
}
inline Bytes nibbles(Bytes a, int high) {
  for (auto& v : a.v) v = high ? v >> 4 : v & 15;
  return a;
}
template <class Weight>
inline Ints dot_bytes(Ints sum, const Bytes& w, int32_t x) {
  int8_t inputs[4];
  std::memcpy(inputs, &x, 4);
  for (int i = 0; i < LANES; i++)
    for (int c = 0; c < 4; c++) sum.v[i] += (Weight)w.v[4 * i + c] * inputs[c];
  return sum;
}
inline Ints dot_nibbles(Ints sum, Bytes w, int32_t x) { return dot_bytes<uint8_t>(sum, w, x); }
inline Bytes int8_operand(Bytes a) { return a; }
inline Ints dot_int8(Ints sum, Bytes w, int32_t x) { return dot_bytes<int8_t>(sum, w, x); }

inline Pairs load_pairs(const void* p) {
  const bf16* q = (const bf16*)p;
  return {each_lane<Floats>([=](int i) { return widen_bits(q[2 * i]); }),
          each_lane<Floats>([=](int i) { return widen_bits(q[2 * i + 1]); })};
}
inline Pairs nibble_pairs(Bytes a, int t) {
  auto nibble = [&](int byte) { return (float)(((a.v[byte + t / 2] >> (t % 2 * 4)) & 15) - 8); };
  return {each_lane<Floats>([&](int i) { return nibble(4 * i); }),
          each_lane<Floats>([&](int i) { return nibble(4 * i + 2); })};
}
inline Pairs int8_pairs(Bytes a, int high) {
  return {each_lane<Floats>([&](int i) { return (float)(int8_t)a.v[4 * i + 2 * high]; }),
          each_lane<Floats>([&](int i) { return (float)(int8_t)a.v[4 * i + 2 * high + 1]; })};
}
inline Floats dot(Floats sum, Pairs w, int32_t x) {
  return fma(w.second, all(widen_bits((uint32_t)x >> 16)), fma(w.first, all(widen_bits(x & 0xFFFF)), sum));
}

#endif

#if !(defined(__AVX512BF16__) && defined(__AVX512VNNI__))
template <class Word>
inline void transpose(const Word* const* rows, Word* out) {
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 16; j++) out[16 * j + i] = rows[i][j];
}
#endif

inline float sum(Floats a) {
  float v[LANES];
  store(v, a);
  for (int width = LANES / 2; width; width /= 2)
    for (int i = 0; i < width; i++) v[i] += v[i + width];
  return v[0];
}

inline float largest(Floats a) {
  float v[LANES];
  store(v, a);
  return *std::max_element(v, v + LANES);
}

// e^x for |x| <= 87 (clamped): 2^n times a polynomial in what is left, |rest| <= ln 2 / 2. A NaN stays one.
inline Floats exp(Floats x) {
  x = max(all(-87.0f), min(all(87.0f), x));
  Floats n = round(x * all(1.44269504f));
  Floats rest = fma(n, all(2.12194440e-4f), fma(n, all(-0.693359375f), x));  // ln 2 in two parts
  Floats p = all(1.0f / 5040);
  for (float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = fma(p, rest, all(c));
  return times_power_of_two(p, n);
}

inline Floats silu(Floats x) { return x / (all(1.0f) + exp(all(0.0f) - x)); }

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Room for `count` floats from the beginning of a cache line on: a vector that lies across two is read twice.
inline float* scratch(std::vector<float>& room, int64_t count) {
  room.resize(count + LANES);
  return (float*)round_up((int64_t)room.data(), VECTOR);
}

// ------------------------------------------------------------------------------------------------------------
// Activations: what a linear does to a row before it multiplies. norm or SwiGLU, then the words that a weight
// format wants: two bf16 or four int8 numbers each.
// ------------------------------------------------------------------------------------------------------------

// A row of `size` bf16 numbers as floats, filled up with zeros to full vectors.
void widen_row(const bf16* x, int64_t size, float* out) {
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES) store(out + i, widen(x + i));
  if (i < size) {
    bf16 tail[LANES] = {};
    std::memcpy(tail, x + i, (size - i) * sizeof(bf16));
    store(out + i, widen(tail));
  }
}

inline Floats widen(const float* p) { return load(p); }
inline void widen_row(const float* x, int64_t size, float* out) { std::copy(x, x + size, out); }
inline void narrow_row(const float* x, int64_t size, float* out) { std::copy(x, x + size, out); }
inline void narrow_row(const float* x, int64_t size, bf16* out) {  // x is filled up to full vectors
  bf16 lanes[LANES];
  for (int64_t i = 0; i < size; i += LANES) {
    narrow(lanes, load(x + i));
    std::memcpy(out + i, lanes, std::min<int64_t>(size - i, LANES) * sizeof(bf16));
  }
}

inline Floats rounded(Floats a) {  // to the nearest bf16
  bf16 bits[LANES];
  narrow(bits, a);
  return widen(bits);
}

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

  Weight(const at::Tensor& packed, const uint16_t* scales, const uint16_t* zeros, int64_t out, int64_t groups)
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

constexpr float TINY = 1e-30f;  // the largest of a row or group that counts as zero: its inverse must be finite

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
#pragma omp for schedule(static)
  for (int64_t block = 0; block < w.blocks; block++)  // its weights stay in the cache while the rows pass by
    for (int64_t part = 0; part < a.parts(); part++) {
      int64_t row = a.first_row(part);
      multiply_block<Format>(w, a, a.first_row(part + 1) - row, row, block, result);
    }
}

constexpr int64_t SMALL = 1 << 15;  // multiplications or numbers for which waking up threads would take longer

using at::Tensor;
using OptionalTensor = const std::optional<Tensor>&;

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

Tensor linear(const Tensor& x_any, const Tensor& packed, OptionalTensor scales, OptionalTensor zeros,
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
  Tensor y = at::empty(shape, x.options().dtype(wide ? at::kFloat : at::kBFloat16));
  void* place = y.mutable_data_ptr();
  Result result{wide ? nullptr : (bf16*)place, wide ? (float*)place : nullptr, pointer<bf16>(bias),
                pointer<bf16>(residual)};
  static thread_local Activations a;
  a.n = n, a.width = activation_bits == 16 ? w.in / 2 : w.in / 4;
  a.words.resize(n * a.width), a.sums.resize(n * w.chunks), a.scales.resize(n * w.groups);
  Activations& shared = a;  // the calling thread's, for all threads of the region
#pragma omp parallel if (n * w.in * w.out > SMALL)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < n; i++) {
      const bf16* row = (const bf16*)x.const_data_ptr() + i * x.size(-1);
      prepare(row, w, i, preparation, activation_bits, shared);
    }
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
  }
  return y;
}

Tensor rms_norm(const Tensor& x_any, const Tensor& weight, double eps) {
  Tensor x = x_any.contiguous(), y = at::empty(x.sizes(), x.options());
  TORCH_CHECK(x.scalar_type() == at::kBFloat16 && weight.scalar_type() == at::kBFloat16, "rms_norm: not bfloat16");
  int64_t size = x.size(-1), n = x.numel() / size;
#pragma omp parallel for schedule(static) if (x.numel() > SMALL)
  for (int64_t i = 0; i < n; i++) {
    static thread_local std::vector<float> row;
    row.resize(round_up(size, LANES));
    widen_row((const bf16*)x.const_data_ptr() + i * size, size, row.data());
    norm_row(row.data(), size, (const bf16*)weight.const_data_ptr(), eps);
    narrow_row(row.data(), size, (bf16*)y.mutable_data_ptr() + i * size);
  }
  return y;
}

template <class T>
void rotate_rows(const Tensor& x, Tensor& y, const Rotation& rotation) {
  const int64_t size = x.size(-1), n = x.numel() / size;
#pragma omp parallel for schedule(static) if (x.numel() > SMALL)
  for (int64_t i = 0; i < n; i++) {
    static thread_local std::vector<float> row;
    row.resize(round_up(size, LANES));
    widen_row((const T*)x.const_data_ptr() + i * size, size, row.data());
    rotate_row(row.data(), size, rotation);
    narrow_row(row.data(), size, (T*)y.mutable_data_ptr() + i * size);
  }
}

Tensor rotate(const Tensor& x_any, const Tensor& matrix, int64_t power, int64_t stride) {
  Tensor x = x_any.contiguous(), y = at::empty(x.sizes(), x.options());
  const Rotation rotation = make_rotation(matrix, power, stride, x.size(-1));
  TORCH_CHECK(x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kFloat, "rotate: not float32 or bfloat16");
  x.scalar_type() == at::kFloat ? rotate_rows<float>(x, y, rotation) : rotate_rows<bf16>(x, y, rotation);
  return y;
}

// ------------------------------------------------------------------------------------------------------------
// Attention over a static cache. A query's keys are taken in the order of their positions, wherever their slots are:
// position p is slot p below `length`, and beyond it one of the query's ancestors. Ranges of positions, the same for
// every query, are computed alone, by any thread, and put together in ascending order.
// ------------------------------------------------------------------------------------------------------------

constexpr int QUERIES = 8;             // neighbours that share what they read
constexpr int RANGE = 256;             // positions: few enough that threads can share the work for one text
constexpr int SCORES = RANGE + LANES;  // from row to row; rows a power of two apart would compete for cache lines
constexpr int KEYS = 2 * LANES;        // positions at a time
constexpr int TOGETHER = MAX_SUMS == 12 ? 6 : 1;  // rows (a query, a head) that share keys and values in registers

// The queries of one text, and where the keys of their positions are.
struct Text {
  int64_t past;                             // positions that every query sees, in the slots of the same number
  std::vector<std::vector<int64_t>> tails;  // of every query, the slots beyond, in order

  Text(const bool* ancestors, int64_t past, int64_t n, int64_t nodes) : past(past), tails(n) {
    for (int64_t i = 0; i < n; i++)
      for (int64_t j = 0; j < nodes; j++)
        if (ancestors[i * nodes + j]) tails[i].push_back(past + j);
  }
  int64_t seen(int64_t i) const { return past + (int64_t)tails[i].size(); }  // positions that a query sees
};

// One key-value head of a text, `heads` query heads that read it, and queries begin .. end - 1: the rows of a task.
template <class T>
struct Head {
  const Text& text;
  const T *q, *keys, *values;  // q: [n, H, size] of this text, from the first of these heads on
  int64_t g, row_stride, slot_stride, heads, begin, end, size, full;  // full: the size, filled up to full vectors
};

// The rows first .. last - 1 of a task find keys and values of up to 32 positions in these slots.
struct Block {
  int64_t first, last, position, count;
  bool known;  // the slots are those of the block before, or the first of them
  int64_t slots[KEYS];
};

// The positions begin .. end - 1, block after block.
template <class T>
void find_blocks(const Head<T>& head, int64_t begin, int64_t end, std::vector<Block>& blocks) {
  const Text& text = head.text;
  blocks.clear();
  for (int64_t p = begin; p < end; p += KEYS)
    for (int64_t last = head.end, i; last > head.begin; last = i) {  // of a chain, the last sees what the others see
      i = p + KEYS <= text.past ? head.begin : last - 1;
      Block block{0, (last - head.begin) * head.heads, p, std::clamp<int64_t>(text.seen(i) - p, 0, KEYS)};
      for (int64_t j = 0, at = p; j < block.count; j++, at++)
        block.slots[j] = at < text.past ? at : text.tails[i][at - text.past];
      const Block* before = last < head.end ? &blocks.back() : nullptr;
      block.known = before && block.count <= before->count &&
                    std::equal(block.slots, block.slots + block.count, before->slots);
      if (!block.known || block.count < before->count) blocks.push_back(block);
      blocks.back().first = (i - head.begin) * head.heads;
    }
}

// Where the rows of a block lie, in full vectors: in the cache itself, or in `room`, which has zeros behind them. As
// much of the next range is fetched, in the order of memory, of all heads: the rows of one come at half the speed.
template <class T>
void find_rows(const Head<T>& head, const T* cache, const Block& block, T* room, const T** rows) {
  const int64_t p = block.position, next = (p / RANGE + 1) * RANGE * head.slot_stride,
                first = next + (head.g * RANGE + p % RANGE - head.g) * head.size,  // from this head on
                last = std::min(first + KEYS * head.size, (head.text.past - 1) * head.slot_stride);
  for (int64_t d = first; d < last; d += VECTOR / sizeof(T)) __builtin_prefetch(cache + d, 0, 2);
  for (int j = 0; j < block.count; j++) {
    const T* row = cache + block.slots[j] * head.slot_stride;
    rows[j] = head.full == head.size ? row : std::copy_n(row, head.size, room + j * head.full) - head.size;
  }
}

// Calls f(count, row) for groups of rows; their count is a constant.
template <int ROWS = TOGETHER, class Function>
void in_groups(int64_t first, int64_t last, Function f) {
  for (; first + ROWS <= last; first += ROWS) f(std::integral_constant<int, ROWS>(), first);
  if constexpr (ROWS > 1) in_groups<ROWS - 1>(first, last, f);
}

// Keys side by side, packed like weights: words of 32 bits [word of a key][16], for 16 of them and then the others.
template <class T>
void pack_keys(const T* const* keys, int64_t count, int64_t size, T* out) {
  const uint32_t* rows[LANES];
  for (int begin = 0; begin < count; begin += LANES)
    for (int64_t d = 0; d < size; d += VECTOR / sizeof(T)) {
      for (int j = 0; j < LANES; j++) rows[j] = (const uint32_t*)(keys[std::min<int64_t>(begin + j, count - 1)] + d);
      transpose(rows, (uint32_t*)(out + begin * size + d * LANES));
    }
}

inline Floats dot_word(Floats total, const float* keys, const float* q) { return fma(load(keys), all(*q), total); }
inline Floats dot_word(Floats total, const bf16* keys, const bf16* q) {
  int32_t word;
  std::memcpy(&word, q, 4);
  return dot(total, load_pairs(keys), word);
}

// scale * ROWS queries times VECTORS of 16 packed keys. Even and odd words have sums of their own: fewer would wait.
template <class T, int ROWS, int VECTORS>
void score(const T* q, const T* keys, int64_t size, Floats scale, float* scores) {
  constexpr int WORD = 4 / sizeof(T);
  Floats sums[2][ROWS][VECTORS];
  std::fill_n(&sums[0][0][0], 2 * ROWS * VECTORS, all(0.0f));
  for (int64_t d = 0; d < size; d += 2 * WORD)
    for (int i = 0; i < 2; i++)
      for (int m = 0; m < ROWS; m++)
        for (int v = 0; v < VECTORS; v++)
          sums[i][m][v] =
              dot_word(sums[i][m][v], keys + (v * size + d + i * WORD) * LANES, q + m * size + d + i * WORD);
  for (int m = 0; m < ROWS; m++)
    for (int v = 0; v < VECTORS; v++) store(scores + m * SCORES + v * LANES, scale * (sums[0][m][v] + sums[1][m][v]));
}

// exp(score - largest), in place, of `count` scores. What is beyond them in the last vector adds nothing: 1e-38 to 1.
void exponentials(float* scores, int64_t count, float* largest_and_sum) {
  const int64_t end = round_up(count, LANES);
  std::fill(scores + count, scores + end, -std::numeric_limits<float>::infinity());
  Floats most = load(scores), total = all(0.0f);
  for (int64_t p = LANES; p < end; p += LANES) most = max(most, load(scores + p));
  most = all(largest(most));
  for (int64_t p = 0; p < end; p += LANES) {
    const Floats e = exp(load(scores + p) - most);
    store(scores + p, e), total = total + e;
  }
  largest_and_sum[0] = largest(most), largest_and_sum[1] = sum(total);
}

// Sums of ROWS rows += share[j] * values[j], for j = 0, 1, ..., count - 1; VECTORS vectors of a sum at a time.
template <class T, int ROWS, int VECTORS = 4>
void add_weighted(const float* share, const T* const* values, int count, int64_t size, float* sum, int64_t d = 0) {
  const int64_t stride = size + LANES;
  for (; d + VECTORS * LANES <= size; d += VECTORS * LANES) {
    Floats sums[ROWS][VECTORS];
    for (int m = 0; m < ROWS; m++)
      for (int v = 0; v < VECTORS; v++) sums[m][v] = load(sum + m * stride + d + v * LANES);
    for (int j = 0; j < count; j++)
      for (int v = 0; v < VECTORS; v++) {
        const Floats value = widen(values[j] + d + v * LANES);
        for (int m = 0; m < ROWS; m++) sums[m][v] = fma(all(share[m * SCORES + j]), value, sums[m][v]);
      }
    for (int m = 0; m < ROWS; m++)
      for (int v = 0; v < VECTORS; v++) store(sum + m * stride + d + v * LANES, sums[m][v]);
  }
  if constexpr (VECTORS > 1) add_weighted<T, ROWS, 1>(share, values, count, size, sum, d);
}

// What positions begin .. end - 1 contribute to the rows of a task: for each of them [full + 16] numbers, the sum of
// values times exp(score - largest), then the largest score and the sum of exponentials.
template <class T>
void attend(const Head<T>& head, int64_t begin, int64_t end, float* partials) {
  static thread_local std::vector<float> room;
  static thread_local std::vector<Block> blocks;
  const int64_t rows = (head.end - head.begin) * head.heads, size = head.full, stride = size + LANES;
  float* scores = scratch(room, rows * (SCORES + size) + 2 * KEYS * size);
  T *q = (T*)(scores + rows * SCORES), *copies = q + rows * size, *packed = copies + KEYS * size;
  const T* found[KEYS];
  std::fill(q, packed, T(0)), std::fill(partials, partials + rows * stride, 0.0f);
  for (int64_t row = 0; row < rows; row++)
    std::copy_n(head.q + (head.begin + row / head.heads) * head.row_stride + row % head.heads * head.size, head.size,
                q + row * size);

  find_blocks(head, begin, end, blocks);
  const Floats scale = all(1.0f / std::sqrt((float)head.size));
  for (const Block& block : blocks) {
    if (!block.known) find_rows(head, head.keys, block, copies, found), pack_keys(found, block.count, size, packed);
    in_groups(block.first, block.last, [&](auto group, int64_t row) {
      auto multiply = block.count > LANES ? score<T, group, 2> : score<T, group, 1>;
      multiply(q + row * size, packed, size, scale, scores + row * SCORES + block.position - begin);
    });
  }
  for (int64_t row = 0; row < rows; row++) {
    const int64_t count = std::min(head.text.seen(head.begin + row / head.heads), end) - begin;
    if (count > 0) exponentials(scores + row * SCORES, count, partials + row * stride + size);
  }
  for (const Block& block : blocks) {
    if (!block.known) find_rows(head, head.values, block, copies, found);
    in_groups(block.first, block.last, [&](auto group, int64_t row) {
      const float* shares = scores + row * SCORES + block.position - begin;
      add_weighted<T, group>(shares, found, block.count, size, partials + row * stride);
    });
  }
}

// A row's ranges, `stride` apart, put together: the sum of values over that of exponentials; 0 if there is none.
template <class T>
void combine(const float* partial, int64_t ranges, int64_t stride, int64_t size, int64_t full, T* out) {
  static thread_local std::vector<float> sums;
  sums.assign(full, 0.0f);
  float most = -std::numeric_limits<float>::infinity(), total = 0.0f;
  for (int64_t r = 0; r < ranges; r++) most = std::max(most, partial[r * stride + full]);
  for (int64_t r = 0; r < ranges; r++, partial += stride) {
    const float factor = largest(exp(all(partial[full] - most)));  // the same in all lanes
    total += factor * partial[full + 1];
    for (int64_t d = 0; d < full; d += LANES) store(&sums[d], fma(all(factor), load(partial + d), load(&sums[d])));
  }
  for (int64_t d = 0; d < full; d += LANES) store(&sums[d], load(&sums[d]) / all(std::max(total, TINY)));
  narrow_row(sums.data(), size, out);
}

template <class T>
void attention_of(const Tensor& q, const Tensor& keys, const Tensor& values, const bool* ancestors,
                  const int64_t* length, int64_t nodes, Tensor& out) {
  const int64_t batch = q.size(0), n = q.size(1), size = q.size(3), kv_heads = keys.size(2),
                heads = q.size(2) / kv_heads, row = q.size(2) * size;  // not q.stride(1): it may be anything if n is 1
  const int64_t longest = *std::max_element(length, length + batch) + nodes, ranges = (longest + RANGE - 1) / RANGE;
  const int64_t parts = (n + QUERIES - 1) / QUERIES, queries = (n + parts - 1) / parts;  // in every part
  const int64_t full = round_up(size, VECTOR / sizeof(T)), stride = full + LANES;
  const int64_t tasks = batch * ranges * kv_heads * parts, task_size = queries * heads * stride;
  std::vector<Text> texts;
  for (int64_t b = 0; b < batch; b++) texts.emplace_back(ancestors + b * n * nodes, length[b], n, nodes);
  static thread_local std::vector<float> room;
  float* partials = scratch(room, tasks * task_size);  // [batch, ranges, kv_heads, parts, queries, heads, stride]

#pragma omp parallel for schedule(dynamic) if (q.numel() * longest > SMALL)
  for (int64_t task = 0; task < tasks; task++) {
    const int64_t part = task % parts, g = task / parts % kv_heads, range = task / parts / kv_heads % ranges,
                  b = task / parts / kv_heads / ranges;
    const int64_t at = b * keys.stride(0) + g * keys.stride(2), first = part * queries;
    const Head<T> head{texts[b], (const T*)q.const_data_ptr() + b * n * row + g * heads * size,
                       (const T*)keys.const_data_ptr() + at, (const T*)values.const_data_ptr() + at, g, row,
                       keys.stride(1), heads, first, std::min(first + queries, n), size, full};
    int64_t begin = range * RANGE, end = 0;
    for (int64_t i = first; i < head.end; i++) end = std::max(end, std::min(begin + RANGE, texts[b].seen(i)));
    if (begin < end) attend(head, begin, end, partials + task * task_size);
  }
#pragma omp parallel for schedule(static) if (q.numel() * ranges > SMALL)
  for (int64_t i = 0; i < batch * n; i++)
    for (int64_t h = 0; h < kv_heads * heads; h++) {
      const int64_t task = (i / n * ranges * kv_heads + h / heads) * parts + i % n / queries;
      const float* first = partials + task * task_size + (i % n % queries * heads + h % heads) * stride;
      combine(first, (texts[i / n].seen(i % n) + RANGE - 1) / RANGE, kv_heads * parts * task_size, size, full,
              (T*)out.mutable_data_ptr() + i * row + h * size);
    }
}

Tensor attention(const Tensor& q_any, const Tensor& keys, const Tensor& values, const Tensor& ancestors_any,
                 const Tensor& length_any) {
  Tensor q = q_any.contiguous(), ancestors = ancestors_any.contiguous(), length = length_any.contiguous();
  Tensor out = at::empty(q.sizes(), q.options());
  TORCH_CHECK(keys.strides() == values.strides() && keys.stride(3) == 1, "attention: keys and values must lie alike");
  const bool wide = q.scalar_type() == at::kFloat;
  TORCH_CHECK((wide || q.scalar_type() == at::kBFloat16) && keys.scalar_type() == q.scalar_type() &&
                  values.scalar_type() == q.scalar_type(), "attention: one dtype, please, float32 or bfloat16");
  TORCH_CHECK(ancestors.scalar_type() == at::kBool && length.scalar_type() == at::kLong,
              "attention: ancestors bool, length int64");
  TORCH_CHECK(keys.dim() == 4 && keys.sizes() == values.sizes() && keys.size(0) == q.size(0) &&
                  keys.size(3) == q.size(3) && q.size(2) % keys.size(2) == 0,
              "attention: queries ", q.sizes(), " do not fit keys ", keys.sizes());
  TORCH_CHECK(ancestors.dim() == 3 && ancestors.size(0) == q.size(0) && ancestors.size(1) == q.size(1) &&
                  length.numel() == q.size(0),
              "attention: queries ", q.sizes(), " do not fit ancestors ", ancestors.sizes());
  const bool* seen = (const bool*)ancestors.const_data_ptr();
  const int64_t *past = (const int64_t*)length.const_data_ptr(), nodes = ancestors.size(2);
  for (int64_t b = 0; b < q.size(0); b++)
    TORCH_CHECK(past[b] >= 0 && past[b] + nodes <= keys.size(1), "attention: ", past[b], " + ", nodes, " slots of ",
                keys.size(1));
  TORCH_CHECK(q.size(3) % 2 == 0, "attention: heads of ", q.size(3), " are odd");
  (wide ? attention_of<float> : attention_of<bf16>)(q, keys, values, seen, past, nodes, out);
  return out;
}

// ------------------------------------------------------------------------------------------------------------
// The slots of an accepted path, to where they belong. A path increases, so its node d is never below d, and
// going upwards nothing is overwritten that is still to be moved.
// ------------------------------------------------------------------------------------------------------------

void move(at::TensorList caches, const Tensor& path_any, const Tensor& length_any) {
  Tensor path = path_any.contiguous(), length = length_any.contiguous();
  TORCH_CHECK(path.scalar_type() == at::kLong && length.scalar_type() == at::kLong && path.dim() == 2 &&
                  length.numel() == path.size(0),
              "move: path int64 [B, n], length int64 [B]");
  const int64_t batch = path.size(0), n = path.size(1);
  const int64_t *nodes = path.const_data_ptr<int64_t>(), *past = length.const_data_ptr<int64_t>();
  for (const Tensor& cache : caches) {
    TORCH_CHECK(cache.dim() == 4 && cache.is_contiguous() && cache.size(0) == batch, "move: caches [B, slots, G, D]");
    const int64_t bytes = cache.stride(1) * cache.element_size(), slots = cache.size(1);
    for (int64_t b = 0; b < batch; b++) {
      char* row = (char*)cache.data_ptr() + b * slots * bytes;
      for (int64_t d = 0; d < n; d++) {
        const int64_t from = past[b] + nodes[b * n + d], to = past[b] + d;
        TORCH_CHECK(0 <= from && from < slots && to < slots, "move: slot ", from, " to ", to, " of ", slots);
        if (from != to) std::memcpy(row + to * bytes, row + from * bytes, bytes);
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------------------
// The k largest of a row, the first of equal ones first. A NaN counts as minus infinity.
// ------------------------------------------------------------------------------------------------------------

void largest(const float* x, int64_t n, int64_t k, float* values, int64_t* places) {
  int64_t count = 0;
  auto insert = [&](float value, int64_t i) {
    if (value != value) value = -INFINITY;
    if (count == k && !(value > values[k - 1])) return;
    int64_t at = count < k ? count++ : k - 1;
    for (; at > 0 && value > values[at - 1]; at--) values[at] = values[at - 1], places[at] = places[at - 1];
    values[at] = value, places[at] = i;
  };
  for (int64_t begin = 0; begin < n; begin += LANES) {
    const int64_t end = std::min(begin + LANES, n);
    if (count == k && end - begin == LANES) {  // nearly always nothing in sixteen is large enough
      int any = 0;
      for (int j = 0; j < LANES; j++) any |= x[begin + j] > values[k - 1];
      if (!any) continue;
    }
    for (int64_t i = begin; i < end; i++) insert(x[i], i);
  }
}

std::tuple<Tensor, Tensor> top_k(const Tensor& x_any, int64_t k) {
  Tensor x = x_any.contiguous();
  const int64_t n = x.dim() ? x.size(-1) : 0, rows = n ? x.numel() / n : 0;
  TORCH_CHECK(x.scalar_type() == at::kFloat, "top_k: float32, not ", x.scalar_type());
  TORCH_CHECK(0 < k && k <= n, "top_k: ", k, " of ", n);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = k;
  Tensor values = at::empty(shape, x.options()), places = at::empty(shape, x.options().dtype(at::kLong));
  const float* from = x.const_data_ptr<float>();
  float* to = values.mutable_data_ptr<float>();
  int64_t* to_places = places.mutable_data_ptr<int64_t>();
#pragma omp parallel for if (x.numel() > SMALL)
  for (int64_t row = 0; row < rows; row++) largest(from + row * n, n, k, to + row * k, to_places + row * k);
  return {values, places};
}

}  // namespace

TORCH_LIBRARY_IMPL(gpt_spec, CPU, m) {
  m.impl("linear", linear);
  m.impl("rms_norm", rms_norm);
  m.impl("rotate", rotate);
  m.impl("move", move);
  m.impl("top_k", top_k);
  m.impl("attention", attention);
}
