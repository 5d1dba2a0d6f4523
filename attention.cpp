// attention.cpp: the CPU bodies of what has to do with the KV cache in kernels.py, which compiles and loads this file:
// RoPE, storing, attention, moving.
//
// The one idea: sums go over positions in fixed ranges, whoever computes them and wherever the keys lie. So a query has
// the same bits alone and in a tree of sixty, and threads can share the work for a single text.

#include <limits>
#include <vector>

#include "operators.h"
#include "team.h"
#include "vectors.h"

using gpt_spec::Tensor, std::int64_t;

namespace {

// ------------------------------------------------------------------------------------------------------------
// What comes between the projections and attention: RoPE, and keys and values to their slots.
// ------------------------------------------------------------------------------------------------------------

// Tokens and heads of a tensor [B, n, heads, size], whose numbers lie side by side and whose other strides are any.
template <class T>
struct Heads {
  T* data;
  int64_t batch, n, heads, size, strides[3];

  Heads(const Tensor& t, T* data) : data(data), batch(t.size(0)), n(t.size(1)), heads(t.size(2)), size(t.size(3)) {
    TORCH_CHECK(t.dim() == 4 && (t.stride(3) == 1 || size == 1), "[B, n, heads, size] should be dense in the last");
    for (int i = 0; i < 3; i++) strides[i] = t.stride(i);
  }
  T* at(int64_t b, int64_t i, int64_t h) const { return data + b * strides[0] + i * strides[1] + h * strides[2]; }
};

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
  const uint32_t bits = (uint32_t)x << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}

// One head: (a, b) -> (a cos - b sin, b cos + a sin), where a and b are its halves.
template <class T>
void turn(const T* x, const float* cos, const float* sin, int64_t half, T* out) {
  float wide[2 * LANES];
  for (int64_t i = 0; i < half; i += LANES) {
    const int64_t count = std::min<int64_t>(LANES, half - i);
    for (int64_t j = 0; j < count; j++) {
      const float a = to_float(x[i + j]), b = to_float(x[half + i + j]), c = cos[i + j], s = sin[i + j];
      wide[j] = a * c - b * s, wide[LANES + j] = b * c + a * s;
    }
    narrow_row(wide, count, out + i);
    narrow_row(wide + LANES, count, out + half + i);
  }
}

template <class T>
void rope_of(const Tensor& x, const float* cos, const float* sin, Tensor& out) {
  const Heads<const T> from(x, (const T*)x.const_data_ptr());
  const Heads<T> to(out, (T*)out.mutable_data_ptr());
  const int64_t half = from.size / 2;
  side_by_side(from.batch * from.n, x.numel(), [&](int64_t token) {
    const int64_t b = token / from.n, i = token % from.n;
    for (int64_t h = 0; h < from.heads; h++)
      turn(from.at(b, i, h), cos + token * half, sin + token * half, half, to.at(b, i, h));
  });
}

}  // namespace

std::tuple<Tensor, Tensor> gpt_spec::rope(const Tensor& q, const Tensor& k, const Tensor& cos_any,
                                          const Tensor& sin_any) {
  Tensor cos = cos_any.contiguous(), sin = sin_any.contiguous();
  Tensor out[2] = {empty(q.sizes(), q.scalar_type()), empty(k.sizes(), k.scalar_type())};
  for (const Tensor& t : {q, k})
    TORCH_CHECK(t.dim() == 4 && t.size(3) % 2 == 0 && cos.numel() == t.size(0) * t.size(1) * t.size(3) / 2 &&
                    cos.numel() == sin.numel() && cos.scalar_type() == at::kFloat && sin.scalar_type() == at::kFloat,
                "rope: angles ", cos.sizes(), " do not fit ", t.sizes());
  for (int i = 0; i < 2; i++) {
    const Tensor& x = i ? k : q;
    TORCH_CHECK(x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kFloat, "rope: not float32 or bfloat16");
    auto body = x.scalar_type() == at::kFloat ? rope_of<float> : rope_of<bf16>;
    body(x, cos.const_data_ptr<float>(), sin.const_data_ptr<float>(), out[i]);
  }
  return {out[0], out[1]};
}

namespace {

void store_rows(const Tensor& cache, const Tensor& x, const int64_t* slots) {
  TORCH_CHECK(cache.scalar_type() == x.scalar_type() && cache.dim() == 4 && x.dim() == 4 && cache.stride(3) == 1 &&
                  cache.stride(2) == cache.size(3) && cache.size(0) == x.size(0) && cache.size(2) == x.size(2) &&
                  cache.size(3) == x.size(3),
              "store: ", x.sizes(), " do not fit into a cache ", cache.sizes());
  const Heads<const char> from(x, (const char*)x.const_data_ptr());
  const int64_t bytes = x.element_size(), head = from.size * bytes;
  for (int64_t b = 0; b < from.batch; b++)
    for (int64_t i = 0; i < from.n; i++) {
      const int64_t slot = slots[b * from.n + i];
      TORCH_CHECK(0 <= slot && slot < cache.size(1), "store: slot ", slot, " of ", cache.size(1));
      char* to = (char*)cache.mutable_data_ptr() + (b * cache.stride(0) + slot * cache.stride(1)) * bytes;
      for (int64_t h = 0; h < from.heads; h++)
        std::memcpy(to + h * head, from.data + (from.at(b, i, h) - from.data) * bytes, head);
    }
}

}  // namespace

void gpt_spec::store(const Tensor& keys, const Tensor& values, const Tensor& k, const Tensor& v,
                     const Tensor& slots_any) {
  Tensor slots = slots_any.contiguous();
  TORCH_CHECK(slots.scalar_type() == at::kLong && k.dim() == 4 && k.sizes() == v.sizes() &&
                  slots.numel() == k.size(0) * k.size(1),
              "store: slots int64 [B, n], please");
  store_rows(keys, k, slots.const_data_ptr<int64_t>());
  store_rows(values, v, slots.const_data_ptr<int64_t>());
}

namespace {

// ------------------------------------------------------------------------------------------------------------
// Attention over a static cache. A query's keys are taken in the order of their positions, wherever their slots are:
// position p is slot p below `length`, and beyond it one of the query's ancestors. Ranges of positions, the same for
// every query, are computed alone, by any thread, and put together in ascending order.
// ------------------------------------------------------------------------------------------------------------

constexpr int QUERIES = 8;             // neighbours that share what they read
constexpr int64_t ROOM = 1 << 22;       // numbers of partial results at a time, or those of one part of the queries
constexpr int RANGE = 256;             // positions: few enough that threads can share the work for one text
constexpr int SCORES = RANGE + LANES;  // from row to row; rows a power of two apart would compete for cache lines
constexpr int KEYS = 2 * LANES;        // positions at a time
constexpr int TOGETHER = MAX_SUMS == 12 && MAX_ROWS > 1 ? 6 : 1;  // rows (a query, a head) that share registers

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
  const int64_t task_size = queries * heads * stride, most = batch * ranges * kv_heads * task_size;
  const int64_t together = std::clamp<int64_t>(ROOM / most, 1, parts);  // parts of the queries
  std::vector<Text> texts;
  for (int64_t b = 0; b < batch; b++) texts.emplace_back(ancestors + b * n * nodes, length[b], n, nodes);
  static thread_local std::vector<float> room;
  float* partials = scratch(room, together * most);  // [batch, ranges, kv_heads, some, queries, heads, stride]

  for (int64_t from = 0; from < parts; from += together) {
    const int64_t some = std::min(together, parts - from), tasks = batch * ranges * kv_heads * some;
    const int64_t first_query = from * queries, count = std::min(n, (from + some) * queries) - first_query;
    side_by_side(tasks, q.numel() * longest, [&](int64_t task) {
      const int64_t part = from + task % some, g = task / some % kv_heads, range = task / some / kv_heads % ranges,
                    b = task / some / kv_heads / ranges;
      const int64_t at = b * keys.stride(0) + g * keys.stride(2), first = part * queries;
      const Head<T> head{texts[b], (const T*)q.const_data_ptr() + b * n * row + g * heads * size,
                         (const T*)keys.const_data_ptr() + at, (const T*)values.const_data_ptr() + at, g, row,
                         keys.stride(1), heads, first, std::min(first + queries, n), size, full};
      int64_t begin = range * RANGE, end = 0;
      for (int64_t i = first; i < head.end; i++) end = std::max(end, std::min(begin + RANGE, texts[b].seen(i)));
      if (begin < end) attend(head, begin, end, partials + task * task_size);
    });
    side_by_side(batch * count, q.numel() * ranges, [&](int64_t each) {
      const int64_t b = each / count, offset = each % count, i = first_query + offset;
      for (int64_t h = 0; h < kv_heads * heads; h++) {
        const int64_t task = (b * ranges * kv_heads + h / heads) * some + offset / queries;
        const float* first = partials + task * task_size + (offset % queries * heads + h % heads) * stride;
        combine(first, (texts[b].seen(i) + RANGE - 1) / RANGE, kv_heads * some * task_size, size, full,
                (T*)out.mutable_data_ptr() + (b * n + i) * row + h * size);
      }
    });
  }
}

}  // namespace

Tensor gpt_spec::attention(const Tensor& q_any, const Tensor& keys, const Tensor& values, const Tensor& ancestors_any,
                           const Tensor& length_any) {
  Tensor q = q_any.contiguous(), ancestors = ancestors_any.contiguous(), length = length_any.contiguous();
  Tensor out = empty(q.sizes(), q.scalar_type());
  if (out.numel() == 0) return out;
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

namespace {

// ------------------------------------------------------------------------------------------------------------
// The slots of an accepted path, to where they belong. A path increases, so its node d is never below d, and
// going upwards nothing is overwritten that is still to be moved.
// ------------------------------------------------------------------------------------------------------------

}  // namespace

void gpt_spec::move(const Tensors& caches, const Tensor& path_any, const Tensor& length_any) {
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
