// operators.h: the operators that kernels.cpp, attention.cpp and sampling.cpp have bodies for. tape.cpp gives them to
// PyTorch, and direct.cpp to Python. Their schemas are in kernels.py.
//
// The one idea: PyTorch's headers take most of the time that compiling takes, so a file includes only what it needs.
// A tensor is a TensorBase here: what at::Tensor has without its operators.

#pragma once

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include <ATen/EmptyTensor.h>
#include <ATen/core/TensorBase.h>

namespace gpt_spec {

using Tensor = at::TensorBase;
using Tensors = std::vector<Tensor>;
using OptionalTensor = const std::optional<Tensor>&;
using std::int64_t;

inline Tensor empty(at::IntArrayRef sizes, at::ScalarType type) { return at::detail::empty_cpu(sizes, type); }

Tensor linear(const Tensor& x_any, const Tensor& packed, OptionalTensor scales, OptionalTensor zeros,
              OptionalTensor bias, OptionalTensor residual, OptionalTensor norm, double eps, bool gated,
              OptionalTensor rotation, int64_t power, int64_t stride, OptionalTensor permutation, int64_t out,
              int64_t activation_bits, bool wide);
Tensor rms_norm(const Tensor& x_any, const Tensor& weight, double eps);
Tensor rotate(const Tensor& x_any, const Tensor& matrix, int64_t power, int64_t stride);

std::tuple<Tensor, Tensor> rope(const Tensor& q, const Tensor& k, const Tensor& cos_any, const Tensor& sin_any);
void store(const Tensor& keys, const Tensor& values, const Tensor& k, const Tensor& v, const Tensor& slots_any);
Tensor attention(const Tensor& q_any, const Tensor& keys, const Tensor& values, const Tensor& ancestors_any,
                 const Tensor& length_any);
void move(const Tensors& caches, const Tensor& path_any, const Tensor& length_any);

Tensor pick(const Tensor& logits, const Tensor& positions_any, const Tensor& seed_any, const Tensor& settings_any);
Tensor gumbel(const Tensor& seed_any, const Tensor& positions_any, int64_t size);
Tensor penalize(const Tensor& logits, const Tensor& tokens_any, const Tensor& sees_any, const Tensor& counts_any,
                const Tensor& penalties_any, const Tensor& bias_any, OptionalTensor mask_any);
Tensor logsumexp(const Tensor& logits);
std::tuple<Tensor, Tensor> top_k(const Tensor& x_any, int64_t k);

}  // namespace gpt_spec

// F(name) for every operator.
#define EACH_OPERATOR(F) F(linear) F(rms_norm) F(rotate) F(rope) F(store) F(attention) F(move) F(pick) F(gumbel) \
  F(penalize) F(logsumexp) F(top_k)
