// tape.cpp: operator calls that were recorded once, made again without Python between them. tape.py records them, and
// building.py compiles this file together with kernels.cpp.
//
// The one idea: a step of a small model is hundreds of short operators, and Python takes longer to call them than
// they take to run. What they are called with is known after one step, but for the tensors that earlier calls or the
// caller supply. So a tape is a list of calls whose arguments have holes.

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include "operators.h"
#include "team.h"

namespace {

using at::Tensor;
using c10::IValue;
using std::int64_t;
using Numbers = std::vector<int64_t>;

struct Hole {  // where a tensor belongs: argument, place in it if it is a list, otherwise -1, and number of the tensor
  int64_t argument, place, tensor;
};

struct Call {
  c10::OperatorHandle op;
  std::vector<IValue> arguments;  // all that the schema has
  std::vector<Hole> holes;
  Numbers results, last;  // tensors that it makes (-1: nobody wants it), and those that nobody needs after it
};

// An argument as its schema wants it. Python gives numbers for tensors of no dimension. It could not tell of which type
// an empty list is, and says None; a list that has None in it is one of tensors, whose holes these are.
IValue typed(const IValue& value, const c10::TypePtr& type) {
  if (type->kind() == c10::TypeKind::TensorType && value.isScalar()) {
    const c10::Scalar scalar = value.toScalar();
    Tensor number(gpt_spec::empty({}, scalar.isBoolean() ? at::kBool : scalar.isIntegral(false) ? at::kLong : at::kDouble));
    if (scalar.isBoolean())
      *number.mutable_data_ptr<bool>() = scalar.toBool();
    else if (scalar.isIntegral(false))
      *number.mutable_data_ptr<int64_t>() = scalar.toLong();
    else
      *number.mutable_data_ptr<double>() = scalar.toDouble();
    number.unsafeGetTensorImpl()->set_wrapped_number(true);  // which does not decide about the type of a result
    return number;
  }
  if (type->kind() != c10::TypeKind::ListType || !(value.isNone() || value.isList())) return value;
  c10::impl::GenericList list(type->containedType(0));
  if (value.isNone()) return list;
  const bool tensors = type->containedType(0)->kind() == c10::TypeKind::TensorType;
  for (const IValue& each : value.toListRef()) list.push_back(tensors && each.isNone() ? IValue(Tensor()) : each);
  return list;
}

struct Tape : torch::CustomClassHolder {
  std::vector<Call> calls;
  int64_t count = 0;  // of the tensors that have numbers: those of the caller, and then those that the calls make
  bool ours = false;  // are the linears ours? Otherwise PyTorch needs its threads

  void add(const std::string& name, const std::string& overload, const std::vector<IValue>& arguments,
           const Numbers& holes, const Numbers& results, const Numbers& last) {
    Call call{c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), overload.c_str()), {}, {}, results, last};
    const auto& schema = call.op.schema().arguments();
    TORCH_CHECK(schema.size() == arguments.size(), "tape: ", name, " has ", schema.size(), " arguments");
    for (size_t i = 0; i < schema.size(); i++) call.arguments.push_back(typed(arguments[i], schema[i].type()));
    for (size_t i = 0; i < holes.size(); i += 3) call.holes.push_back({holes[i], holes[i + 1], holes[i + 2]});
    for (int64_t number : results) count = std::max(count, number + 1);
    ours |= name == "gpt_spec::linear";
    calls.push_back(std::move(call));
  }

  std::vector<Tensor> run(const std::vector<Tensor>& inputs, const Numbers& outputs) const {
    at::AutoDispatchBelowADInplaceOrView no_autograd;
    std::optional<team::PyTorchAlone> alone;
    if (ours) alone.emplace();
    std::vector<Tensor> tensors = inputs;
    tensors.resize(std::max<size_t>(count, inputs.size()));
    for (const Call& call : calls) run(call, tensors);
    std::vector<Tensor> results;
    for (int64_t number : outputs) results.push_back(tensors[number]);
    return results;
  }

  static void run(const Call& call, std::vector<Tensor>& tensors) {
    std::vector<IValue> stack = call.arguments;
    for (const Hole& hole : call.holes) fill(stack[hole.argument], tensors[hole.tensor], hole, call);
    call.op.callBoxed(stack);
    auto number = call.results.begin();
    auto keep = [&](const Tensor& tensor) {
      if (*number >= 0) tensors[*number] = tensor;
      number++;
    };
    for (const IValue& result : stack)
      if (result.isTensor())
        keep(result.toTensor());
      else if (result.isTensorList())
        for (const Tensor& tensor : result.toTensorVector()) keep(tensor);
    for (int64_t n : call.last) tensors[n] = Tensor();
  }

  static void fill(IValue& argument, const Tensor& tensor, const Hole& hole, const Call& call) {
    if (hole.place < 0) {
      argument = tensor;
      return;
    }
    if (argument.is(call.arguments[hole.argument])) argument = argument.toList().copy();  // the recorded one stays
    argument.toList().set(hole.place, tensor);
  }
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(gpt_spec, m) {
  m.class_<Tape>("Tape")
      .def(torch::init<>())
      .def("add", &Tape::add)
      .def("run", [](const c10::intrusive_ptr<Tape>& tape, const std::vector<Tensor>& inputs, const Numbers& outputs) {
        return tape->run(inputs, outputs);
      });
}

// A body of ours as PyTorch calls it.
template <class T>
struct Given { using type = T; };
template <>
struct Given<const gpt_spec::Tensor&> { using type = const Tensor&; };
template <>
struct Given<gpt_spec::OptionalTensor> { using type = const std::optional<Tensor>&; };
template <>
struct Given<const gpt_spec::Tensors&> { using type = at::TensorList; };

template <class T>
const T& ours(const T& argument) { return argument; }
gpt_spec::Tensors ours(at::TensorList list) { return {list.begin(), list.end()}; }
Tensor theirs(const gpt_spec::Tensor& result) { return Tensor(result); }
std::tuple<Tensor, Tensor> theirs(const std::tuple<gpt_spec::Tensor, gpt_spec::Tensor>& results) {
  return {Tensor(std::get<0>(results)), Tensor(std::get<1>(results))};
}

template <auto body, class Type = decltype(body)>
struct Body;
template <auto body, class R, class... A>
struct Body<body, R (*)(A...)> {
  static auto call(typename Given<A>::type... arguments) {
    if constexpr (std::is_void_v<R>)
      body(ours(arguments)...);
    else
      return theirs(body(ours(arguments)...));
  }
};

// The operators of the other files are given to PyTorch here, since what that includes takes seconds to read.
TORCH_LIBRARY_IMPL(gpt_spec, CPU, m) {
#define IMPLEMENT(name) m.impl(#name, Body<gpt_spec::name>::call);
  EACH_OPERATOR(IMPLEMENT)
}
