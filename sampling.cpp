// sampling.cpp: the CPU bodies of the operations that pick tokens: see kernels.py, which compiles this file together
// with kernels.cpp, and reference.py, whose bits these bodies give.
//
// The one idea: nothing is sorted, and noise is made where it can matter. A row of logits is seen as blocks of 64.
// One pass finds the largest logit of each block, one hash per block tells the largest noise in it, and only the few
// blocks whose sum of both can win are looked into. Whether the winner is in the nucleus of top-p is a question
// about it alone: how much probability lies ahead of it? If too much, the winner among those ahead is next.
//
// Probabilities are whole numbers, so their sums have no order, and floats are added and multiplied as they are
// written: plain loops, which the compiler may turn into the vectors of the machine, without changing a bit.

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "operators.h"
#include "team.h"

using gpt_spec::Tensor, std::int64_t;

namespace {

constexpr int BLOCK = 64;       // tokens that share a hash
constexpr int32_t LEAST = (int32_t)0x807FFFFE;  // less than the key of minus infinity

// ------------------------------------------------------------------------------------------------------------
// Noise: exponential clocks as a function of seed, position and token. The first clock of a block to ring rings after
// Exp(1) / 64, any of the 64 may be it, and the others ring Exp(1) after it: together they are independent Exp(1).
// ------------------------------------------------------------------------------------------------------------

inline uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

// log(x) of a positive, normal number, by additions and multiplications in this order, on every machine.
inline double log_of(double x) {
  const int64_t bits = std::bit_cast<int64_t>(x);
  const int64_t exponent = (bits - 0x3FE6A09E667F3BCD) >> 52;  // so that the rest is in [sqrt(1/2), sqrt(2))
  const double rest = std::bit_cast<double>(bits - (exponent << 52));
  const double z = (rest - 1) / (rest + 1), y = z * z;
  const double series = 1 + y * (1. / 3 + y * (1. / 5 + y * (1. / 7 + y * (1. / 9 + y * (1. / 11 + y * (1. / 13))))));
  return (double)(int32_t)exponent * 0.6931471805599453 + 2 * z * series;
}

inline double exponential(uint32_t bits) { return -log_of(1 - ((double)bits + 0.5) * 0x1p-32); }

// The clocks of one position. Gumbel noise is minus the logarithm of the time at which a clock rings.
struct Noise {
  uint32_t a, b, c, d;

  Noise(int64_t seed, int64_t position) {
    const uint32_t first = mix(mix((uint32_t)seed) ^ (uint32_t)((uint64_t)seed >> 32));
    const uint32_t second = mix(first ^ 0x5BF03635u);  // seeds whose streams meet in one key do not meet in the other
    a = mix((uint32_t)position + first), b = mix(a ^ second);
    c = mix(a ^ 0x2C1B3C6Du), d = mix(b ^ 0x297A2D39u);
  }
  uint32_t block_bits(uint32_t block) const { return mix(mix(block + c) ^ d); }
  static double first(uint32_t bits) { return exponential(bits) / BLOCK; }
  static uint32_t winner(uint32_t bits) { return mix(bits + 0x9E3779B9u) % BLOCK; }
  uint32_t token_bits(uint32_t token) const { return mix(mix(token + a) ^ b); }
  double after_first(uint32_t token) const { return exponential(token_bits(token)); }
};

inline float gumbel_of(double time) { return (float)-log_of(time); }

// At least the Gumbel noise of a clock that rings at this time or later: the logarithm is concave, and the bits of a
// float are its chord. What is added covers all roundings.
inline float most_gumbel(float time) { return (127.001f - (float)std::bit_cast<int32_t>(time) * 0x1p-23f) * 0.69314724f; }
inline float uniform(uint32_t bits) { return ((float)bits + 0.5f) * 0x1p-32f; }  // Exp(1) of these bits is at least it

// ------------------------------------------------------------------------------------------------------------
// A row of logits
// ------------------------------------------------------------------------------------------------------------

// By value: references, as those of std::max, keep loops from becoming vectors.
inline int32_t larger(int32_t a, int32_t b) { return a > b ? a : b; }
inline int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }
inline int32_t within(int64_t token) { return token < 0 ? -1 : token > BLOCK ? BLOCK : (int32_t)token; }

// Whole numbers in the order of the floats. NaN comes first, and the two zeros are equal.
inline int32_t order(float x) {
  const int32_t bits = std::bit_cast<int32_t>(x + 0.0f);
  return (bits & 0x7FFFFFFF) <= 0x7F800000 ? bits ^ ((bits >> 31) & 0x7FFFFFFF) : LEAST;
}
inline float from_order(int32_t key) { return std::bit_cast<float>(key ^ ((key >> 31) & 0x7FFFFFFF)); }

// A place in the order of a row: tokens with larger logits come first, then those with lower ids.
struct Place {
  float value;
  int64_t token;
  bool operator<(const Place& other) const {
    return value > other.value || (value == other.value && token < other.token);
  }
};

constexpr Place END = {-INFINITY, std::numeric_limits<int64_t>::max()};  // behind all tokens

// 2^t for t <= 0: 2^-whole * part / 2^24 of whole numbers.
struct Power {
  int32_t whole, part;

  explicit Power(float t) {
    t = t > -63.0f ? t : -63.0f;  // also where t is NaN
    whole = -(int32_t)t;
    const float f = t + (float)whole;  // in (-1, 0]
    float p = f * 0x1.ef65bcp-11f + 0x1.2da7a8p-7f;
    p = p * f + 0x1.c4feecp-5f;
    p = p * f + 0x1.ebe390p-3f;
    p = p * f + 0x1.62e3bcp-1f;
    part = (int32_t)((p * f + 1.0f) * 0x1p24f);
  }
};

struct Row {
  const float* logits;
  int64_t size, blocks;
  float last[BLOCK];       // the last block, filled up
  std::vector<float> top;  // the largest of each block
  Place most;              // the first of the largest

  void read(const float* from, int64_t count) {
    logits = from, size = count, blocks = (count + BLOCK - 1) / BLOCK, most = {-INFINITY, -1};
    std::fill(last, last + BLOCK, -INFINITY);
    std::copy(from + (blocks - 1) * BLOCK, from + count, last);
    top.resize(blocks);
    int64_t best = 0;
    for (int64_t b = 0; b < blocks; b++) {
      const float* x = block(b);
      int32_t largest = LEAST;
      for (int i = 0; i < BLOCK; i++) largest = larger(largest, order(x[i]));
      top[b] = largest == LEAST ? -INFINITY : from_order(largest);
      if (top[b] > top[best]) best = b;
    }
    const float* x = block(best);
    most = {top[best], top[best] == -INFINITY ? 0 : best * BLOCK + (std::find(x, x + BLOCK, top[best]) - x)};
  }
  const float* block(int64_t b) const { return b == blocks - 1 ? last : logits + b * BLOCK; }

  // The place of number k in the order, from 1 on. Numbers below the k-th largest of the blocks' largest do not matter.
  Place kth(int64_t k) const {
    static thread_local std::vector<float> sorted;
    static thread_local std::vector<Place> places;
    if (k >= size) return END;
    sorted = top;
    if (k <= blocks) std::nth_element(sorted.begin(), sorted.begin() + k - 1, sorted.end(), std::greater<>());
    const float least = k <= blocks ? sorted[k - 1] : -INFINITY;
    places.clear();
    for (int64_t b = 0; b < blocks; b++) {
      if (top[b] < least) continue;
      for (int64_t i = b * BLOCK, end = std::min(i + BLOCK, size); i < end; i++)
        if (!(logits[i] < least)) places.push_back({logits[i] == logits[i] ? logits[i] : -INFINITY, i});
    }
    std::nth_element(places.begin(), places.begin() + k - 1, places.end());
    return places[k - 1];
  }

  // Of one block, the sums of 2^((x - largest) * scale), in units of 2^-42, over the tokens up to each of two places.
  std::pair<int64_t, int64_t> masses(int64_t b, float scale, Place one, Place other) const {
    const int32_t whole = Power((top[b] - most.value) * scale).whole;  // of none is it less
    if (whole > 42) return {0, 0};
    const float* x = block(b);
    const int32_t to_one = within(one.token - b * BLOCK), to_other = within(other.token - b * BLOCK);
    // Bits that would be lost later are dropped at once, so that sums have no order.
    const int32_t drop = larger(whole - 18, 0) - whole, left = larger(18 - whole, 0);
    int32_t in_one = 0, in_other = 0;
    for (int32_t i = 0; i < BLOCK; i++) {
      const Power power((x[i] - most.value) * scale);
      const int32_t weight = power.part >> smaller(power.whole + drop, 31);
      in_one += (x[i] > one.value) | ((x[i] == one.value) & (i <= to_one)) ? weight : 0;
      in_other += (x[i] > other.value) | ((x[i] == other.value) & (i <= to_other)) ? weight : 0;
    }
    return {(int64_t)in_one << left, (int64_t)in_other << left};
  }

  // The largest of logit + temperature * noise among the tokens up to a place.
  Place sample(const Noise& noise, float temperature, Place end) const {
    Place best = {-INFINITY, size};
    auto consider = [&](int64_t token, double time) {
      const Place sum = {logits[token] + temperature * gumbel_of(time), token};
      if (!(end < Place{logits[token], token}) && sum < best) best = sum;
    };
    auto time_of = [&](int64_t token) {
      const uint32_t bits = noise.block_bits(token / BLOCK);
      return Noise::first(bits) + (token % BLOCK == Noise::winner(bits) ? 0 : noise.after_first(token));
    };
    auto look_into = [&](int64_t b) {  // logarithms only of what can win
      const uint32_t bits = noise.block_bits(b), winner = Noise::winner(bits);
      const float *x = block(b), time = uniform(bits) / BLOCK;
      float bound[BLOCK];
      for (uint32_t i = 0; i < BLOCK; i++)
        bound[i] = x[i] + temperature * most_gumbel(time + uniform(noise.token_bits(b * BLOCK + i)));
      bound[winner] = x[winner] + temperature * most_gumbel(time);
      int count = 0;
      for (uint32_t i = 0; i < BLOCK; i++) count += bound[i] >= best.value;
      for (int64_t i = 0; count > 0 && i < BLOCK && b * BLOCK + i < size; i++)
        if (bound[i] >= best.value) consider(b * BLOCK + i, time_of(b * BLOCK + i));
    };
    consider(most.token, time_of(most.token));
    static thread_local std::vector<float> bound;
    bound.resize(blocks);
    for (int64_t b = 0; b < blocks; b++)
      bound[b] = top[b] + temperature * most_gumbel(uniform(noise.block_bits(b)) / BLOCK);
    const int64_t likely = std::max_element(bound.begin(), bound.end()) - bound.begin();
    if (top[likely] >= end.value) look_into(likely);
    for (int64_t b = 0; b < blocks; b++)
      if (bound[b] >= best.value && top[b] >= end.value && b != likely) look_into(b);
    return {logits[best.token], best.token};
  }

  // Do the tokens up to `ahead` hold less than a share of the tokens up to `end`? First come the blocks that have tokens
  // ahead. What the others of them can hold at most is known, so that a few blocks nearly always suffice.
  bool in_nucleus(double share, float scale, Place end, Place ahead) const {
    static thread_local std::vector<int64_t> limit;  // of each block, 64 times its largest
    limit.resize(blocks);
    int64_t rest = 0, all = 0, before = 0;
    for (int64_t b = 0; b < blocks; b++) {
      const Power power((top[b] - most.value) * scale);
      limit[b] = ((int64_t)(power.part + 8) << 24) >> power.whole;  // 8: powers increase nearly always
      limit[b] = top[b] >= ahead.value ? limit[b] : 0;
      rest += limit[b];
    }
    for (bool has_ahead : {true, false})
      for (int64_t b = 0; b < blocks; b++) {
        if ((top[b] >= ahead.value) != has_ahead) continue;
        const auto [in_end, in_ahead] = masses(b, scale, end, ahead);
        all += in_end, before += in_ahead, rest -= limit[b];
        if ((double)(before + rest) < share * (double)(all + rest) * (1 - 1e-9)) return true;
      }
    return before == 0 || (double)before < share * (double)all;
  }

  // The pick of a row. settings: temperature, log2(e) / temperature, top_k, top_p, temperature * log(min_p).
  int64_t pick(int64_t seed, int64_t position, const double* settings) const {
    const float temperature = settings[0], scale = settings[1];
    if (settings[0] == 0 || most.value == -INFINITY) return most.token;
    Place end = END;  // of what the filters keep
    if (settings[4] > -INFINITY) end = {most.value + (float)settings[4], END.token};
    if (settings[2] > 0) end = std::min(end, kth(settings[2]));
    const Noise noise(seed, position);
    for (Place below = end;;) {
      const Place place = sample(noise, temperature, below);
      if (settings[3] >= 1 || place.token == most.token) return place.token;
      below = {place.value, place.token - 1};  // what is ahead of it
      if (in_nucleus(settings[3], scale, end, below)) return place.token;
    }
  }
};

// ------------------------------------------------------------------------------------------------------------
// The operators
// ------------------------------------------------------------------------------------------------------------

// Rows of a tensor [B, n, V] that may be cut from wider ones.
struct Rows {
  Tensor x;
  int64_t batch, n, size;

  explicit Rows(const Tensor& given) : x(given) {
    TORCH_CHECK(x.scalar_type() == at::kFloat && x.dim() == 3 && x.size(2) > 0, "logits: float32 [B, n, V], not ",
                x.scalar_type(), " ", x.sizes());
    if (x.stride(2) != 1) x = x.contiguous();
    batch = x.size(0), n = x.size(1), size = x.size(2);
  }
  const float* row(int64_t i) const {
    return x.const_data_ptr<float>() + i / n * x.stride(0) + i % n * x.stride(1);
  }
  int64_t count() const { return batch * n; }
};

// Calls f(i) for every row, side by side.
template <class Function>
void each_row(int64_t rows, int64_t size, Function f) {
  side_by_side(rows, rows * size, f);
}

}  // namespace

Tensor gpt_spec::pick(const Tensor& logits, const Tensor& positions_any, const Tensor& seed_any,
                      const Tensor& settings_any) {
  const Rows rows(logits);
  Tensor positions = positions_any.contiguous(), seed = seed_any.contiguous(), settings = settings_any.contiguous();
  TORCH_CHECK(positions.scalar_type() == at::kLong && positions.numel() == rows.count() &&
                  seed.scalar_type() == at::kLong && seed.numel() == rows.batch,
              "pick: positions int64 [B, n], seed int64 [B]");
  TORCH_CHECK(settings.scalar_type() == at::kDouble && settings.numel() == 5 * rows.batch, "pick: float64 [B, 5]");
  Tensor out = empty({rows.batch, rows.n}, at::kLong);
  const int64_t *keys = seed.const_data_ptr<int64_t>(), *position = positions.const_data_ptr<int64_t>();
  const double* rules = settings.const_data_ptr<double>();
  int64_t* to = out.mutable_data_ptr<int64_t>();
  each_row(rows.count(), rows.size, [&](int64_t i) {
    static thread_local Row row;
    row.read(rows.row(i), rows.size);
    to[i] = row.pick(keys[i / rows.n], position[i], rules + 5 * (i / rows.n));
  });
  return out;
}

Tensor gpt_spec::gumbel(const Tensor& seed_any, const Tensor& positions_any, int64_t size) {
  Tensor seed = seed_any.contiguous(), positions = positions_any.contiguous();
  TORCH_CHECK(seed.scalar_type() == at::kLong && positions.scalar_type() == at::kLong && positions.dim() == 2 &&
                  seed.numel() == positions.size(0) && size > 0,
              "gumbel: seed int64 [B], positions int64 [B, n]");
  const int64_t n = positions.size(1);
  Tensor out = empty({positions.size(0), n, size}, at::kFloat);
  const int64_t *keys = seed.const_data_ptr<int64_t>(), *position = positions.const_data_ptr<int64_t>();
  float* to = out.mutable_data_ptr<float>();
  each_row(positions.numel(), size, [&](int64_t i) {
    const Noise noise(keys[i / n], position[i]);
    for (int64_t begin = 0; begin < size; begin += BLOCK) {
      const uint32_t bits = noise.block_bits(begin / BLOCK), winner = Noise::winner(bits);
      const double first = Noise::first(bits);
      float* values = to + i * size + begin;
      const uint32_t count = std::min<int64_t>(size - begin, BLOCK);
      for (uint32_t j = 0; j < count; j++)
        values[j] = gumbel_of(j == winner ? first : first + noise.after_first(begin + j));
    }
  });
  return out;
}

namespace {

// A logit after the bias and the penalties of its row; `count`: how often the text has the token, and SEEN in prompts.
struct Penalties {
  float repetition, presence, frequency;

  static constexpr int32_t SEEN = 1 << 30;
  float operator()(float x, float bias, int32_t count) const {
    const int32_t output = count & (SEEN - 1);
    x = x + bias;
    const float repeated = x > 0 ? x / repetition : x * repetition;
    x = count > 0 ? repeated : x;
    return x - frequency * (float)output - (output > 0 ? presence : 0.0f);
  }
};

}  // namespace

Tensor gpt_spec::penalize(const Tensor& logits, const Tensor& tokens_any, const Tensor& sees_any,
                          const Tensor& counts_any, const Tensor& penalties_any, const Tensor& bias_any,
                          OptionalTensor mask_any) {
  const Rows rows(logits);
  const int64_t n = rows.n, size = rows.size;
  Tensor tokens = tokens_any.contiguous(), sees = sees_any.contiguous(), counts = counts_any.contiguous();
  Tensor penalties = penalties_any.contiguous(), bias = bias_any.contiguous(), mask;
  if (mask_any) mask = mask_any->contiguous();
  const int64_t m = tokens.size(1), words = mask.defined() ? mask.size(2) : 0;
  TORCH_CHECK(sees.scalar_type() == at::kBool && sees.numel() == rows.count() * m && counts.size(1) == size &&
                  counts.scalar_type() == at::kInt && bias.sizes() == counts.sizes() && penalties.size(1) == 3 &&
                  (!mask.defined() || (mask.scalar_type() == at::kInt && words * 32 >= size)),
              "penalize: shapes or dtypes that do not fit logits ", logits.sizes());
  Tensor out = empty({rows.batch, n, size}, at::kFloat);
  each_row(rows.count(), size, [&](int64_t i) {
    const int64_t b = i / n;
    const float *x = rows.row(i), *p = penalties.const_data_ptr<float>() + 3 * b;
    const float* add = bias.const_data_ptr<float>() + b * size;
    const int32_t* count = counts.const_data_ptr<int32_t>() + b * size;
    const int64_t* token = tokens.const_data_ptr<int64_t>() + b * m;
    const bool* seen = sees.const_data_ptr<bool>() + i * m;
    float* to = out.mutable_data_ptr<float>() + i * size;
    const Penalties penalties = {p[0], p[1], p[2]};
    for (int64_t v = 0; v < size; v++) to[v] = penalties(x[v], add[v], count[v]);
    for (int64_t j = 0; j < m; j++) {
      if (!seen[j]) continue;
      int32_t more = 0;
      for (int64_t k = 0; k < m; k++) more += seen[k] && token[k] == token[j];
      to[token[j]] = penalties(x[token[j]], add[token[j]], count[token[j]] + more);
    }
    if (!mask.defined()) return;
    const int32_t* allowed = mask.const_data_ptr<int32_t>() + i * words;
    for (int64_t v = 0; v < size; v++) to[v] = allowed[v / 32] >> (v % 32) & 1 ? to[v] : -INFINITY;
  });
  return out;
}

Tensor gpt_spec::logsumexp(const Tensor& logits) {
  const Rows rows(logits);
  Tensor out = empty({rows.batch, rows.n, 1}, at::kDouble);
  double* to = out.mutable_data_ptr<double>();
  each_row(rows.count(), rows.size, [&](int64_t i) {
    static thread_local Row row;
    row.read(rows.row(i), rows.size);
    int64_t mass = 0;
    for (int64_t b = 0; b < row.blocks; b++) mass += row.masses(b, std::log2(std::exp(1.0)), END, END).first;
    to[i] = (double)row.most.value + log_of((double)mass * 0x1p-42);
  });
  return out;
}

namespace {

// ------------------------------------------------------------------------------------------------------------
// The k largest of a row, the first of equal ones first. A NaN counts as minus infinity.
// ------------------------------------------------------------------------------------------------------------

constexpr int AT_ONCE = 16;  // numbers

void largest(const float* x, int64_t n, int64_t k, float* values, int64_t* places) {
  int64_t count = 0;
  auto insert = [&](float value, int64_t i) {
    if (value != value) value = -INFINITY;
    if (count == k && !(value > values[k - 1])) return;
    int64_t at = count < k ? count++ : k - 1;
    for (; at > 0 && value > values[at - 1]; at--) values[at] = values[at - 1], places[at] = places[at - 1];
    values[at] = value, places[at] = i;
  };
  for (int64_t begin = 0; begin < n; begin += AT_ONCE) {
    const int64_t end = std::min(begin + AT_ONCE, n);
    if (count == k && end - begin == AT_ONCE) {  // nearly always nothing in sixteen is large enough
      int any = 0;
      for (int j = 0; j < AT_ONCE; j++) any |= x[begin + j] > values[k - 1];
      if (!any) continue;
    }
    for (int64_t i = begin; i < end; i++) insert(x[i], i);
  }
}

}  // namespace

std::tuple<Tensor, Tensor> gpt_spec::top_k(const Tensor& x_any, int64_t k) {
  Tensor x = x_any.contiguous();
  const int64_t n = x.dim() ? x.size(-1) : 0, rows = n ? x.numel() / n : 0;
  TORCH_CHECK(x.scalar_type() == at::kFloat, "top_k: float32, not ", x.scalar_type());
  TORCH_CHECK(0 < k && k <= n, "top_k: ", k, " of ", n);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = k;
  Tensor values = empty(shape, at::kFloat), places = empty(shape, at::kLong);
  const float* from = x.const_data_ptr<float>();
  float* to = values.mutable_data_ptr<float>();
  int64_t* to_places = places.mutable_data_ptr<int64_t>();
  side_by_side(rows, x.numel(), [&](int64_t row) { largest(from + row * n, n, k, to + row * k, to_places + row * k); });
  return {values, places};
}
