// direct.cpp: the operators as C functions, which kernels.py calls through ctypes while tape.cpp is still being
// compiled.
//
// The one idea: what gives operators to PyTorch takes longer to compile than all of their bodies. Python can do that,
// too, more slowly: it hands over the addresses of tensors, numbers as words of 64 bits, and tensors for the results.

#include <bit>
#include <string>
#include <type_traits>

#include "operators.h"

namespace {

using gpt_spec::Tensor, gpt_spec::Tensors, std::int64_t;

// An argument, from the next words on: a number, a tensor, one or none, or how many there are and these.
template <class T>
struct Next {
  static T from(const int64_t*& word) { return (T)*word++; }
};
template <>
struct Next<double> {
  static double from(const int64_t*& word) { return std::bit_cast<double>(*word++); }
};
template <>
struct Next<Tensor> {
  static Tensor from(const int64_t*& word) {
    auto* impl = (c10::TensorImpl*)*word++;
    return Tensor(c10::intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>::unsafe_reclaim_from_nonowning(impl));
  }
};
template <>
struct Next<std::optional<Tensor>> {
  static std::optional<Tensor> from(const int64_t*& word) {
    if (*word) return Next<Tensor>::from(word);
    word++;
    return std::nullopt;
  }
};
template <>
struct Next<Tensors> {
  static Tensors from(const int64_t*& word) {
    Tensors list(*word++);
    for (Tensor& tensor : list) tensor = Next<Tensor>::from(word);
    return list;
  }
};

void give(c10::TensorImpl* place, const Tensor& result) { place->shallow_copy_from(result.getIntrusivePtr()); }

// -> what was wrong, or null. Results are put into the tensors at `out`.
template <class R, class... A>
const char* call(R (*body)(A...), const int64_t* word, c10::TensorImpl* const* out) {
  static thread_local std::string message;
  try {
    std::tuple<std::decay_t<A>...> arguments{Next<std::decay_t<A>>::from(word)...};  // one after another
    if constexpr (std::is_void_v<R>) {
      std::apply(body, arguments);
    } else if constexpr (std::is_same_v<R, Tensor>) {
      give(out[0], std::apply(body, arguments));
    } else {
      const auto results = std::apply(body, arguments);
      give(out[0], std::get<0>(results)), give(out[1], std::get<1>(results));
    }
    return nullptr;
  } catch (const c10::Error& error) {
    message = error.what_without_backtrace();
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}

}  // namespace

#define DIRECT(name)                                                                                 \
  extern "C" const char* direct_##name(const std::int64_t* words, c10::TensorImpl* const* out) {     \
    return call(gpt_spec::name, words, out);                                                         \
  }

EACH_OPERATOR(DIRECT)
