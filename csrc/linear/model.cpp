#include "linear/model.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "core/errors.h"
#include "core/floating.h"
#include "core/reduction.h"
#include "core/tiling.h"
#include "cpu/dispatch.h"
#include "cpu/fp_environment.h"
#include "linear/softmax.h"

namespace fusestep::linear {

namespace {

// Longer paths and larger reaches change nothing, but their products would overflow.
constexpr double kLongest = 1e75;

// How exact integrals need to be for weights of this type.
template <class T>
constexpr double kTolerance = sizeof(T) == 8 ? 1e-15 : 1e-9;

// As a T; at most its largest, so that it times 0 is 0.
template <class T>
T narrowed(double x) {
  const auto most = static_cast<double>(largest(T{}));
  return static_cast<T>(std::clamp(x, -most, most));
}

}  // namespace

template <class T>
Model<T>::Model(const Options& options, const rules::AnyRule& rule, const Arrays<T>& arrays)
    : options_(options), rule_(rule), arrays_(arrays), width_(arrays.width) {
  const auto outputs = static_cast<std::size_t>(arrays.outputs);
  for (auto* one : {&predictions_, &derivatives_, &reaches_, &integrals_, &logs_})
    one->resize(outputs);
}

template <class T>
std::int64_t Model<T>::learn(const Samples<T>& samples, const Lessons& lessons,
                             std::int64_t steps) {
  const cpu::IeeeEnvironment ieee;
  kernels_ = &cpu::active_tier().kernels->of<T>();
  // One sample is checked before it changes anything.
  if (samples.count > 1) {
    saved_.resize(elements(samples));
    for_each_element(samples, [saved = saved_.data()](T& x) mutable { *saved++ = x; });
  }

  try {
    if (!is_direct(samples))
      return learn(samples, lessons, steps,
                   [&](const Row& row, std::int64_t i, double target, double weight) {
                     predict(samples, i, row);
                     if (weight != 0) step(row, target, weight);
                   });
    return with_length([&](auto length) {
      cpu::Run<T> run{.size = width_, .parameter = array(0, 0)};
      for (std::size_t j = 0; j < arrays_.states.size(); ++j) run.state[j] = arrays_.states[j];
      return learn(samples, lessons, steps,
                   [&](const Row& row, std::int64_t i, double target, double weight) {
                     run.gradient.values = row.values;
                     step_directly(samples, i, run, target, weight, length);
                   });
    });
  } catch (...) {
    if (samples.count > 1)
      for_each_element(samples, [saved = saved_.data()](T& x) mutable { x = *saved++; });
    throw;
  }
}

// Calls step(row, its number, target, weight) for all samples, which predicts and learns.
template <class T>
template <class Step>
std::int64_t Model<T>::learn(const Samples<T>& samples, const Lessons& lessons, std::int64_t steps,
                             Step step) {
  std::size_t counted = 0;
  const auto number = [&](std::int64_t n) { return lessons.order ? lessons.order[n] : n; };
  if (samples.count > 0) load(samples, number(0), rows_[0]);
  for (std::int64_t n = 0; n < samples.count; ++n) {
    // The next row is copied before this one is learnt from. What has been written in other pieces
    // than it is read can only be read when all that was done before it has been.
    if (n + 1 < samples.count) load(samples, number(n + 1), rows_[(n + 1) % 2]);
    const std::int64_t i = number(n);
    const Row& row = rows_[n % 2];
    const double weight = lessons.weights ? lessons.weights[i] : 1;
    if (weight != 0) {
      const double lr = lessons.rates[lessons.rates.size() == 1 ? 0 : counted];
      prepare(row, steps + static_cast<std::int64_t>(++counted), lr);
    }
    step(row, i, lessons.targets[i], weight);
    if (lessons.predictions)
      std::copy(predictions_.begin(), predictions_.end(),
                lessons.predictions + i * arrays_.outputs);
  }
  return static_cast<std::int64_t>(counted);
}

template <class T>
void Model<T>::predict(const Samples<T>& samples, double* predictions) {
  const cpu::IeeeEnvironment ieee;
  kernels_ = &cpu::active_tier().kernels->of<T>();
  for (std::int64_t i = 0; i < samples.count; ++i) {
    load(samples, i, rows_[0]);
    predict(samples, i, rows_[0]);
    std::copy(predictions_.begin(), predictions_.end(), predictions + i * arrays_.outputs);
  }
}

// ---- samples ----

template <class T>
void Model<T>::load(const Samples<T>& samples, std::int64_t i, Row& row) const {
  if (!samples.is_sparse)
    load_dense(samples, i, row);
  else if (skips_absent(samples))
    load_sparse(samples, i, row);
  else
    load_scattered(samples, i, row);
  row.values = row.memory_of_values.data();
  row.size = static_cast<std::int64_t>(row.memory_of_values.size());
}

template <class T>
void Model<T>::load_dense(const Samples<T>& samples, std::int64_t i, Row& row) const {
  AlignedVector<T>& features = row.memory_of_values;
  if (static_cast<std::int64_t>(features.size()) != width_)
    features.assign(static_cast<std::size_t>(width_), T{0});
  if (samples.column_stride == static_cast<std::int64_t>(sizeof(T)))
    memcpy(features.data(), samples.values + i * samples.row_stride,
           static_cast<std::size_t>(samples.features) * sizeof(T));
  else
    for (std::int64_t j = 0; j < samples.features; ++j)
      features[static_cast<std::size_t>(j)] = samples.at(i, j);
  if (options_.has_intercept) features[static_cast<std::size_t>(arrays_.features)] = T{1};
  row.columns = nullptr;
}

template <class T>
void Model<T>::load_sparse(const Samples<T>& samples, std::int64_t i, Row& row) const {
  const std::int64_t begin = samples.starts[i], count = samples.starts[i + 1] - begin;
  const auto size = static_cast<std::size_t>(count + (options_.has_intercept ? 1 : 0));
  row.memory_of_values.resize(size);
  row.memory_of_columns.resize(size);
  std::copy_n(samples.stored() + begin, count, row.memory_of_values.data());
  samples.columns.copy(begin, count, row.memory_of_columns.data());
  if (options_.has_intercept) {
    row.memory_of_values.back() = T{1};
    row.memory_of_columns.back() = arrays_.features;
  }
  row.columns = row.memory_of_columns.data();
}

// For steps that move the weights of absent features, too.
template <class T>
void Model<T>::load_scattered(const Samples<T>& samples, std::int64_t i, Row& row) const {
  AlignedVector<T>& features = row.memory_of_values;
  features.assign(static_cast<std::size_t>(width_), T{0});
  for (std::int64_t at = samples.starts[i]; at < samples.starts[i + 1]; ++at)
    features[static_cast<std::size_t>(samples.columns[at])] = samples.stored()[at];
  if (options_.has_intercept) features[static_cast<std::size_t>(arrays_.features)] = T{1};
  row.columns = nullptr;
}

template <class T>
bool Model<T>::skips_absent(const Samples<T>& samples) const {
  return samples.is_sparse && options_.rests && options_.l2 == 0 && !arrays_.reference;
}

// ---- predictions ----

// The sum over the row of its features times `with_all[column]`, or `with_row[i]`. Its order is
// that of the columns, so that zeros may be absent.
template <class T>
double Model<T>::dot(const Row& row, const T* with_all, const T* with_row) {
  products_.resize(static_cast<std::size_t>(row.size));
  if (row.columns) {
    groups_.resize(static_cast<std::size_t>(row.size));
    double* const products = products_.data();
    for (std::int64_t i = 0; i < row.size; ++i)
      products[i] = static_cast<double>(row.values[i]) *
                    static_cast<double>(with_all ? with_all[row.columns[i]] : with_row[i]);
    return sum_of_places(row.columns, products, groups_.data(), row.size, width_);
  }
  const T* const other = with_all ? with_all : with_row;
  if (row.size <= kTileSize) return kernels_->dot(row.values, other, row.size);
  std::int64_t tiles = 0;
  for (std::int64_t begin = 0; begin < row.size; begin += kTileSize)
    products_[static_cast<std::size_t>(tiles++)] =
        kernels_->dot(row.values + begin, other + begin, std::min(kTileSize, row.size - begin));
  return sum_in_groups(products_.data(), tiles);
}

template <class T>
void Model<T>::predict(const Samples<T>& samples, std::int64_t i, const Row& row) {
  bool is_finite = true;
  for (std::int64_t k = 0; k < arrays_.outputs; ++k) {
    const double p = predictions_[static_cast<std::size_t>(k)] = dot(row, array(0, k), nullptr);
    is_finite &= std::isfinite(p);
  }
  // What is not finite in the features or the weights is not in the prediction.
  if (!is_finite) fail(samples, i, row.values, row.size);
}

template <class T>
void Model<T>::fail(const Samples<T>& samples, std::int64_t i, const T* features,
                    std::int64_t size) const {
  if (!std::all_of(features, features + size, [](T x) { return std::isfinite(x); }))
    throw ValueError("Input X contains NaN or infinity, in row " + std::to_string(i) +
                     "; expected finite numbers");
  throw ValueError("the prediction for row " + std::to_string(i) + " of X overflows" +
                   (samples.count > 1 ? ", the rows before it learnt" : "") +
                   ": the features are too large, or the learning rate is");
}

// ---- steps ----

// What a step needs that does not depend on the prediction. The prediction is what every sample
// waits for: between it and the move of the weights nothing should be done that can be done before.
template <class T>
void Model<T>::prepare(const Row& row, std::int64_t number, double lr) {
  if (!options_.rests || lr != lr_)
    coefficients_ = rule_.coefficients({number, 1}, kComputeType<T>, lr, arrays_.states.size());
  lr_ = lr;
  conditioned_.resize(static_cast<std::size_t>(arrays_.outputs * row.size));
  if (options_.observes || !options_.is_importance_aware) return;
  double reach;
  if (const auto sum = kernels_->reach[coefficients_.loop];
      sum && !row.columns && row.size <= kTileSize) {
    reach = sum(coefficients_.bytes, row.values, row.size);
  } else {
    condition(row, 0, 0);
    reach = dot(row, nullptr, conditioned(row, 0));
  }
  std::fill(reaches_.begin(), reaches_.end(), std::min(reach, kLongest));
}

template <class T>
void Model<T>::step(const Row& row, double target, double weight) {
  if (options_.l2 > 0) shrink();
  if (row.columns) gather(row);
  if (options_.loss == Loss::softmax)
    step_softmax(row, static_cast<std::int64_t>(target), weight);
  else
    for (std::int64_t k = 0; k < arrays_.outputs; ++k)
      step_output(row, k, label(target, k), weight);
  if (row.columns) put_back(row);
  if (arrays_.reference) pull();
}

// By a loss that each output has for itself.
template <class T>
void Model<T>::step_output(const Row& row, std::int64_t k, double y, double weight) {
  const auto i = static_cast<std::size_t>(k);
  if (options_.observes) observe(row, k, derivative(predictions_[i], y), weight);
  finish(row, k,
         with_length([&](auto length) { return length(predictions_[i], y, weight, reaches_[i]); }));
}

// Whether all there is to do between the prediction and the move is to find its length.
template <class T>
bool Model<T>::is_direct(const Samples<T>& samples) const {
  return !options_.observes && arrays_.outputs == 1 && !skips_absent(samples) &&
         width_ <= kTileSize && options_.l2 == 0 && !arrays_.reference &&
         options_.loss != Loss::softmax;
}

// Predicts and steps without a detour: every sample waits for all that the one before it does
// between its prediction and its move.
template <class T>
template <class Length>
void Model<T>::step_directly(const Samples<T>& samples, std::int64_t i, const cpu::Run<T>& run,
                             double target, double weight, Length length) {
  const double p = kernels_->dot(run.gradient.values, run.parameter, run.size);
  if (!std::isfinite(p)) [[unlikely]]
    fail(samples, i, run.gradient.values, run.size);
  if (weight != 0)
    kernels_->finish[coefficients_.loop](coefficients_.bytes, run, conditioned_.data(),
                                         narrowed<T>(length(p, target, weight, reaches_[0])));
  predictions_[0] = p;
}

template <class T>
void Model<T>::step_softmax(const Row& row, std::int64_t label, double weight) {
  softmax_derivatives(predictions_.data(), arrays_.outputs, label, derivatives_.data());
  for (std::int64_t k = 0; k < arrays_.outputs; ++k) {
    const auto i = static_cast<std::size_t>(k);
    if (options_.observes) observe(row, k, derivatives_[i], weight);
    integrals_[i] = weight * derivatives_[i];
  }
  if (options_.is_importance_aware)
    softmax_integrals(predictions_.data(), arrays_.outputs, label, std::min(weight, kLongest),
                      reaches_.data(), integrals_.data(), logs_.data());
  for (std::int64_t k = 0; k < arrays_.outputs; ++k)
    finish(row, k, integrals_[static_cast<std::size_t>(k)]);
}

// Lets the state of an output observe the gradient, and works out its metric and how far that
// reaches.
template <class T>
void Model<T>::observe(const Row& row, std::int64_t k, double slope, double weight) {
  const double repeated = !options_.is_importance_aware ? weight
                          : options_.adds_squares       ? square_root(weight)
                                                        : 1;
  condition(row, k, repeated * slope);
  if (options_.is_importance_aware)
    reaches_[static_cast<std::size_t>(k)] =
        std::min(dot(row, nullptr, conditioned(row, k)), kLongest);
}

template <class T>
void Model<T>::condition(const Row& row, std::int64_t k, double factor) {
  kernels_->condition[coefficients_.loop](coefficients_.bytes, run_of(row, k, factor),
                                          conditioned(row, k));
}

template <class T>
void Model<T>::finish(const Row& row, std::int64_t k, double s) {
  kernels_->finish[coefficients_.loop](coefficients_.bytes, run_of(row, k, 0), conditioned(row, k),
                                       narrowed<T>(s));
}

// What a gradient of 1 per feature becomes: one for each output, unless they are all the same.
template <class T>
T* Model<T>::conditioned(const Row& row, std::int64_t k) {
  return conditioned_.data() + (options_.observes ? k * row.size : 0);
}

template <class T>
void Model<T>::shrink() {
  cpu::Run<T> run{.size = arrays_.features};
  const auto decay = rules::WeightDecay<T>::of(std::min(options_.l2, 1 / lr_), true, lr_);
  for (std::int64_t k = 0; k < arrays_.outputs; ++k) {
    run.parameter = array(0, k);
    kernels_->shrink(decay, run);
  }
}

template <class T>
void Model<T>::pull() {
  cpu::Run<T> run{.size = arrays_.features};
  run.anchor = rules::Anchor<T>::of(lr_ * arrays_.anchor_strength);
  for (std::int64_t k = 0; k < arrays_.outputs; ++k) {
    run.parameter = array(0, k);
    run.reference = arrays_.reference + k * arrays_.features;
    run.importance = arrays_.importance + k * arrays_.features;
    kernels_->pull(run);
  }
}

template <class T>
double Model<T>::derivative(double p, double y) const {
  return with_loss([&](auto loss) { return loss.derivative(p, y); });
}

// Calls visit(loss) with the loss, which is not softmax.
template <class T>
template <class Visit>
auto Model<T>::with_loss(Visit visit) const {
  return options_.loss == Loss::squared    ? visit(Squared{})
         : options_.loss == Loss::logistic ? visit(Logistic{})
                                           : visit(Hinge{});
}

// Calls visit(length), where length(p, y, weight, reach) is how long a move is, in conditioned
// features.
template <class T>
template <class Visit>
auto Model<T>::with_length(Visit visit) const {
  return with_loss([&]<class Function>(Function) {
    if (!options_.is_importance_aware)
      return visit([](double p, double y, double weight, double) {
        return weight * Function::derivative(p, y);
      });
    return visit([](double p, double y, double weight, double reach) {
      // Where there is no reach, nothing moves p.
      return reach > 0 ? Function::integral(p, y, std::min(weight, kLongest), reach, kTolerance<T>)
                       : 0.0;
    });
  });
}

// Where there are several outputs, each tells its class from all others.
template <class T>
double Model<T>::label(double target, std::int64_t output) const {
  if (arrays_.outputs == 1) return target;
  return target == static_cast<double>(output) ? 1 : -1;
}

// ---- arrays ----

// The row of an output in the weights (0) or a state array (1, 2, ...).
template <class T>
T* Model<T>::array(std::int64_t i, std::int64_t output) const {
  return (i == 0 ? arrays_.weights : arrays_.states[static_cast<std::size_t>(i - 1)]) +
         output * width_;
}

template <class T>
cpu::Run<T> Model<T>::run_of(const Row& row, std::int64_t output, double factor) {
  const auto count = static_cast<std::int64_t>(1 + arrays_.states.size());
  const auto start = [&](std::int64_t i) {
    return row.columns ? gathered_.data() + (output * count + i) * row.size : array(i, output);
  };
  cpu::Run<T> run{.size = row.size, .parameter = start(0)};
  run.gradient = {row.values, narrowed<T>(factor)};
  for (std::int64_t i = 1; i < count; ++i) run.state[i - 1] = start(i);
  return run;
}

// Calls visit(element of an array, element of what is gathered) for all columns of the row.
template <class T>
template <class Visit>
void Model<T>::for_each_gathered(const Row& row, Visit visit) {
  const auto count = static_cast<std::int64_t>(1 + arrays_.states.size());
  gathered_.resize(static_cast<std::size_t>(arrays_.outputs * count * row.size));
  T* gathered = gathered_.data();
  for (std::int64_t k = 0; k < arrays_.outputs; ++k)
    for (std::int64_t i = 0; i < count; ++i) {
      T* const all = array(i, k);
      for (std::int64_t j = 0; j < row.size; ++j) visit(all[row.columns[j]], *gathered++);
    }
}

template <class T>
void Model<T>::gather(const Row& row) {
  for_each_gathered(row, [](T& element, T& gathered) { gathered = element; });
}

template <class T>
void Model<T>::put_back(const Row& row) {
  for_each_gathered(row, [](T& element, T& gathered) { element = gathered; });
}

// In each array, counting some of them several times.
template <class T>
std::int64_t Model<T>::changes(const Samples<T>& samples) const {
  return samples.starts[samples.count] - samples.starts[0] + (options_.has_intercept ? 1 : 0);
}

template <class T>
bool Model<T>::changes_few(const Samples<T>& samples) const {
  return skips_absent(samples) && changes(samples) < width_;
}

// How many for_each_element visits.
template <class T>
std::size_t Model<T>::elements(const Samples<T>& samples) const {
  const std::int64_t arrays =
      arrays_.outputs * static_cast<std::int64_t>(1 + arrays_.states.size());
  return static_cast<std::size_t>(arrays * (changes_few(samples) ? changes(samples) : width_));
}

// Of weights and state, those that `samples` can change; some several times.
template <class T>
template <class Visit>
void Model<T>::for_each_element(const Samples<T>& samples, Visit visit) {
  const auto count = static_cast<std::int64_t>(1 + arrays_.states.size());
  for (std::int64_t k = 0; k < arrays_.outputs; ++k)
    for (std::int64_t i = 0; i < count; ++i) {
      T* const all = array(i, k);
      if (!changes_few(samples)) {
        for (std::int64_t j = 0; j < width_; ++j) visit(all[j]);
        continue;
      }
      for (std::int64_t at = samples.starts[0]; at < samples.starts[samples.count]; ++at)
        visit(all[samples.columns[at]]);
      if (options_.has_intercept) visit(all[arrays_.features]);
    }
}

template class Model<float>;
template class Model<double>;

}  // namespace fusestep::linear
