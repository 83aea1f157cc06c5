#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "bind/register.h"
#include "core/errors.h"
#include "engine/gil.h"
#include "engine/turn.h"
#include "linear/model.h"

namespace py = pybind11;

namespace fusestep::bind {
namespace {

constexpr std::int64_t kElementsWorthReleasingGil = 1 << 14;

linear::Loss loss_of(const std::string& name) {
  if (name == "squared") return linear::Loss::squared;
  if (name == "logistic") return linear::Loss::logistic;
  if (name == "hinge") return linear::Loss::hinge;
  if (name == "softmax") return linear::Loss::softmax;
  throw ValueError("unknown loss '" + name + "'");
}

// An array of Ts, one after another.
template <class T>
const T* contiguous(const py::handle& object, std::int64_t size, const char* name) {
  if (!py::isinstance<py::array_t<T>>(object))
    throw TypeError(std::string(name) + " is not a NumPy array of the right dtype");
  const auto array = py::reinterpret_borrow<py::array>(object);
  if (!(array.flags() & py::array::c_style))
    throw ValueError(std::string(name) + " is not contiguous");
  if (size >= 0 && array.size() != size)
    throw ValueError(std::string(name) + " has " + std::to_string(array.size()) +
                     " elements; expected " + std::to_string(size));
  return static_cast<const T*>(array.data());
}

template <class T>
T* writable(const py::handle& object, std::int64_t size, const char* name) {
  const T* data = contiguous<T>(object, size, name);
  if (!py::reinterpret_borrow<py::array>(object).writeable())
    throw ValueError(std::string(name) + " is read-only");
  return const_cast<T*>(data);
}

linear::Indices indices(const py::handle& object, std::int64_t size, const char* name) {
  if (py::isinstance<py::array_t<std::int32_t>>(object))
    return {contiguous<std::int32_t>(object, size, name), false};
  return {contiguous<std::int64_t>(object, size, name), true};
}

// What a wrong index would lead to is memory of somebody else.
template <class T>
void check_compressed(const linear::Samples<T>& samples, std::int64_t stored) {
  const auto fail = [](std::int64_t row) {
    throw ValueError("row " + std::to_string(row) +
                     " of X is not in canonical form: column numbers ascend from 0 to n_features");
  };
  if (samples.starts[0] != 0 || samples.starts[samples.count] > stored) fail(0);
  for (std::int64_t i = 0; i < samples.count; ++i)
    if (samples.starts[i] > samples.starts[i + 1]) fail(i);
  for (std::int64_t i = 0; i < samples.count; ++i) {
    std::int64_t before = -1;
    for (std::int64_t at = samples.starts[i]; at < samples.starts[i + 1]; ++at) {
      const std::int64_t column = samples.columns[at];
      if (column <= before || column >= samples.features) fail(i);
      before = column;
    }
  }
}

// `x` is an array [N, features], or (values, columns, starts) of compressed rows.
template <class T>
linear::Samples<T> samples_of(const py::object& x, std::int64_t features) {
  linear::Samples<T> samples{.features = features};
  if (py::isinstance<py::tuple>(x)) {
    const auto parts = py::reinterpret_borrow<py::tuple>(x);
    samples.is_sparse = true;
    const auto stored = static_cast<std::int64_t>(py::len(parts[0]));
    samples.count = static_cast<std::int64_t>(py::len(parts[2])) - 1;
    samples.values =
        reinterpret_cast<const std::byte*>(contiguous<T>(parts[0], stored, "the values of X"));
    samples.columns = indices(parts[1], stored, "the columns of X");
    samples.starts = indices(parts[2], samples.count + 1, "the starts of rows of X");
    check_compressed(samples, stored);
    return samples;
  }
  if (!py::isinstance<py::array_t<T>>(x)) throw TypeError("X does not have the dtype of the model");
  const auto array = py::reinterpret_borrow<py::array>(x);
  if (array.ndim() != 2 || array.shape(1) != features)
    throw ValueError("X does not have " + std::to_string(features) + " features");
  samples.count = array.shape(0);
  samples.values = static_cast<const std::byte*>(array.data());
  samples.row_stride = array.strides(0);
  samples.column_stride = array.strides(1);
  return samples;
}

// One model of float32 or of float64, and what keeps its arrays alive.
class LinearModel {
  // One thread at a time.
  template <class Visit>
  void visit(Visit visitor) {
    const engine::Turnstile::Turn turn(turnstile_);
    std::visit([&]<class T>(std::unique_ptr<linear::Model<T>>& model) { visitor(*model, T{}); },
               model_);
  }

 public:
  LinearModel(const std::string& loss, const std::string& rule,
              const std::map<std::string, double>& options, bool is_importance_aware,
              bool has_intercept, double l2, std::int64_t features, const py::array& weights,
              const py::list& states, const py::object& anchor, std::int64_t steps)
      : steps(steps),
        rule_(make_rule(rule, options)),
        keep_(py::make_tuple(weights, states, anchor)) {
    const linear::Options model{.loss = loss_of(loss),
                                .is_importance_aware = is_importance_aware,
                                .has_intercept = has_intercept,
                                .l2 = l2,
                                .rests = states.empty() || rule == "adagrad",
                                .adds_squares = rule == "adagrad",
                                .observes = rule == "adagrad" || rule == "adam"};
    if (weights.ndim() != 2 || weights.shape(1) % linear::kColumns != 0 || features < 0 ||
        features + (has_intercept ? 1 : 0) > weights.shape(1))
      throw ValueError("the weights do not have the shape of a model's");
    is_softmax_ = model.loss == linear::Loss::softmax;
    outputs_ = weights.shape(0);
    features_ = features;
    if (py::isinstance<py::array_t<float>>(weights))
      emplace<float>(model, weights, states, anchor);
    else
      emplace<double>(model, weights, states, anchor);
  }

  void learn(const py::object& x, const py::object& targets, const py::object& weights,
             const py::object& rates, const py::object& order, const py::object& predictions) {
    visit([&](auto& model, auto t) {
      using T = decltype(t);
      const auto samples = samples_of<T>(x, features_);
      const std::int64_t n = samples.count;
      linear::Lessons lessons{.targets = contiguous<double>(targets, n, "y")};
      if (!weights.is_none()) lessons.weights = contiguous<double>(weights, n, "sample_weight");
      if (!order.is_none()) lessons.order = contiguous<std::int64_t>(order, n, "the order");
      if (!predictions.is_none())
        lessons.predictions = writable<double>(predictions, n * outputs_, "the predictions");
      const double rate = PyFloat_Check(rates.ptr()) ? PyFloat_AS_DOUBLE(rates.ptr()) : 0;
      lessons.rates = {&rate, 1};
      if (!PyFloat_Check(rates.ptr()))
        lessons.rates = {contiguous<double>(rates, -1, "the learning rates"),
                         static_cast<std::size_t>(py::len(rates))};
      check(lessons, n);
      const engine::GilRelease without_gil(is_long(x, n));
      steps += model.learn(samples, lessons, steps);
    });
  }

  void predict(const py::object& x, const py::object& predictions) {
    visit([&](auto& model, auto t) {
      const auto samples = samples_of<decltype(t)>(x, features_);
      double* const out =
          writable<double>(predictions, samples.count * outputs_, "the predictions");
      const engine::GilRelease without_gil(is_long(x, samples.count));
      model.predict(samples, out);
    });
  }

  std::int64_t steps;  // samples that have counted

 private:
  template <class T>
  void emplace(const linear::Options& options, const py::array& weights, const py::list& states,
               const py::object& anchor) {
    const std::int64_t size = weights.size();
    linear::Arrays<T> arrays{
        outputs_, features_, weights.shape(1), writable<T>(weights, size, "the weights"), {}};
    for (const py::handle state : states)
      arrays.states.push_back(writable<T>(state, size, "the state"));
    if (!anchor.is_none()) {
      const auto [strength, reference, importance] =
          anchor.cast<std::tuple<double, py::object, py::object>>();
      arrays.anchor_strength = strength;
      arrays.reference = contiguous<T>(reference, outputs_ * features_, "the reference");
      arrays.importance = contiguous<T>(importance, outputs_ * features_, "the importance");
    }
    model_.template emplace<std::unique_ptr<linear::Model<T>>>(
        std::make_unique<linear::Model<T>>(options, *rule_, arrays));
  }

  bool is_long(const py::object& x, std::int64_t samples) const {
    const std::int64_t elements = py::isinstance<py::tuple>(x)
                                      ? static_cast<std::int64_t>(py::len(x[py::int_(0)]))
                                      : samples * features_;
    return elements * outputs_ >= kElementsWorthReleasingGil;
  }

  void check(const linear::Lessons& lessons, std::int64_t samples) const {
    for (std::int64_t i = 0; i < samples; ++i) {
      const double y = lessons.targets[i];
      if (!std::isfinite(y))
        throw ValueError("Input y contains NaN or infinity, at " + std::to_string(i));
      if (is_softmax_ && !(y >= 0 && y < static_cast<double>(outputs_)))
        throw ValueError("y has classes that are not the model's");
    }
    std::int64_t counted = samples;
    for (std::int64_t i = 0; lessons.weights && i < samples; ++i) {
      const double weight = lessons.weights[i];
      if (!(weight >= 0 && std::isfinite(weight)))
        throw ValueError("sample_weight[" + std::to_string(i) + "] is " + std::to_string(weight) +
                         "; expected a finite number that is not negative");
      counted -= weight == 0;
    }
    for (std::int64_t i = 0; lessons.order && i < samples; ++i)
      if (lessons.order[i] < 0 || lessons.order[i] >= samples)
        throw ValueError("the order has numbers that are no rows");
    if (const auto rates = static_cast<std::int64_t>(lessons.rates.size());
        rates != 1 && rates < counted)
      throw ValueError("there are fewer learning rates than samples");
  }

  std::unique_ptr<rules::AnyRule> rule_;
  py::tuple keep_;
  bool is_softmax_ = false;
  std::int64_t outputs_ = 0, features_ = 0;
  engine::Turnstile turnstile_;
  std::variant<std::unique_ptr<linear::Model<float>>, std::unique_ptr<linear::Model<double>>>
      model_;
};

}  // namespace

void register_linear(py::module_& module) {
  using namespace py::literals;
  module.attr("LINEAR_COLUMNS") = linear::kColumns;
  py::class_<LinearModel>(module, "LinearModel")
      .def(py::init<const std::string&, const std::string&, const std::map<std::string, double>&,
                    bool, bool, double, std::int64_t, const py::array&, const py::list&,
                    const py::object&, std::int64_t>(),
           "loss"_a, "rule"_a, "options"_a, "importance_aware"_a, "intercept"_a, "l2"_a,
           "features"_a, "weights"_a, "states"_a, "anchor"_a, "steps"_a)
      .def_readonly("steps", &LinearModel::steps)
      .def("learn", &LinearModel::learn, "x"_a, "targets"_a, "weights"_a, "rates"_a, "order"_a,
           "predictions"_a)
      .def("predict", &LinearModel::predict, "x"_a, "predictions"_a);
}

}  // namespace fusestep::bind
