// vectors.h: 16 numbers of 32 bits at a time, for kernels.cpp and attention.cpp.
//
// The one idea: the files that use this are compiled once for the instruction set that kernels.py picked: AVX-512 with
// VNNI and BF16, AVX2, or none at all. Here each of them gets the same few operations; the rest is written once.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

using std::int32_t, std::int64_t, std::int8_t, std::uint16_t, std::uint32_t, std::uint8_t;
using bf16 = uint16_t;  // its bits

constexpr int LANES = 16;
constexpr int VECTOR = 64;  // bytes of packed weights in a vector: 4 for each lane
constexpr float TINY = 1e-30f;  // the largest of a row or group that counts as zero: its inverse must be finite

// ------------------------------------------------------------------------------------------------------------
// Vector operations: Floats and Ints have 16 lanes of 32 bits; Bytes are 64 bytes as they were loaded, 4 to a
// lane; Pairs are two bf16 numbers to a lane. An `int32_t x` stands for 4 int8 or 2 bf16 inputs, broadcast.
// ------------------------------------------------------------------------------------------------------------

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)

constexpr int MOST_ROWS = 8, MAX_SUMS = 12;  // rows of activations at a time, and vectors of sums in registers
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

constexpr int MOST_ROWS = 4, MAX_SUMS = 4;
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

constexpr int MOST_ROWS = 4, MAX_SUMS = 4;
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

#ifdef QUICK  // the same bits, row by row, compiled in a quarter of the time: see building.py
constexpr int MAX_ROWS = 1;
#else
constexpr int MAX_ROWS = MOST_ROWS;
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

}  // namespace
