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
  saved_.clear();
  if (samples.count > 1) for_each_element(samples, [&](T& x) { saved_.push_back(x); });

  std::size_t counted = 0;
  try {
    for (std::int64_t n = 0; n < samples.count; ++n) {
      const std::int64_t i = lessons.order ? lessons.order[n] : n;
      const Row row = load(samples, i);
      predict(row, predictions_.data());
      check_predictions(samples, i);
      if (lessons.predictions)
        std::copy(predictions_.begin(), predictions_.end(),
                  lessons.predictions + i * arrays_.outputs);

      const double weight = lessons.weights ? lessons.weights[i] : 1;
      if (weight == 0) continue;
      const double lr = lessons.rates[lessons.rates.size() == 1 ? 0 : counted];
      step(row, lessons.targets[i], weight, steps + static_cast<std::int64_t>(++counted), lr);
    }
  } catch (...) {
    auto saved = saved_.begin();
    if (samples.count > 1) for_each_element(samples, [&](T& x) { x = *saved++; });
    throw;
  }
  return static_cast<std::int64_t>(counted);
}

template <class T>
void Model<T>::predict(const Samples<T>& samples, double* predictions) {
  const cpu::IeeeEnvironment ieee;
  kernels_ = &cpu::active_tier().kernels->of<T>();
  for (std::int64_t i = 0; i < samples.count; ++i) {
    predict(load(samples, i), predictions_.data());
    check_predictions(samples, i);
    std::copy(predictions_.begin(), predictions_.end(), predictions + i * arrays_.outputs);
  }
}

// ---- samples ----

template <class T>
typename Model<T>::Row Model<T>::load(const Samples<T>& samples, std::int64_t i) {
  if (!samples.is_sparse) return load_dense(samples, i);
  return skips_absent(samples) ? load_sparse(samples, i) : load_scattered(samples, i);
}

template <class T>
typename Model<T>::Row Model<T>::load_dense(const Samples<T>& samples, std::int64_t i) {
  if (static_cast<std::int64_t>(features_.size()) != width_)
    features_.assign(static_cast<std::size_t>(width_), T{0});
  if (samples.column_stride == static_cast<std::int64_t>(sizeof(T)))
    memcpy(features_.data(), samples.values + i * samples.row_stride,
           static_cast<std::size_t>(samples.features) * sizeof(T));
  else
    for (std::int64_t j = 0; j < samples.features; ++j)
      features_[static_cast<std::size_t>(j)] = samples.at(i, j);
  if (options_.has_intercept) features_[static_cast<std::size_t>(arrays_.features)] = T{1};
  return {width_, features_.data(), nullptr};
}

template <class T>
typename Model<T>::Row Model<T>::load_sparse(const Samples<T>& samples, std::int64_t i) {
  features_.clear();
  columns_.clear();
  for (std::int64_t at = samples.starts[i]; at < samples.starts[i + 1]; ++at) {
    features_.push_back(samples.value(at));
    columns_.push_back(samples.columns[at]);
  }
  if (options_.has_intercept) {
    features_.push_back(T{1});
    columns_.push_back(arrays_.features);
  }
  return {static_cast<std::int64_t>(features_.size()), features_.data(), columns_.data()};
}

// For steps that move the weights of absent features, too.
template <class T>
typename Model<T>::Row Model<T>::load_scattered(const Samples<T>& samples, std::int64_t i) {
  features_.assign(static_cast<std::size_t>(width_), T{0});
  for (std::int64_t at = samples.starts[i]; at < samples.starts[i + 1]; ++at)
    features_[static_cast<std::size_t>(samples.columns[at])] = samples.value(at);
  if (options_.has_intercept) features_[static_cast<std::size_t>(arrays_.features)] = T{1};
  return {width_, features_.data(), nullptr};
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
    places_.assign(row.columns, row.columns + row.size);
    for (std::int64_t i = 0; i < row.size; ++i)
      products_[static_cast<std::size_t>(i)] =
          static_cast<double>(row.values[i]) *
          static_cast<double>(with_all ? with_all[row.columns[i]] : with_row[i]);
    return sum_of_places(places_.data(), products_.data(), row.size, width_);
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
void Model<T>::predict(const Row& row, double* predictions) {
  for (std::int64_t k = 0; k < arrays_.outputs; ++k)
    predictions[k] = dot(row, array(0, k), nullptr);
}

// What is not finite in the features or the weights is not in the prediction.
template <class T>
void Model<T>::check_predictions(const Samples<T>& samples, std::int64_t i) const {
  if (std::all_of(predictions_.begin(), predictions_.end(),
                  [](double p) { return std::isfinite(p); }))
    return;
  if (!std::all_of(features_.begin(), features_.end(), [](T x) { return std::isfinite(x); }))
    throw ValueError("Input X contains NaN or infinity, in row " + std::to_string(i) +
                     "; expected finite numbers");
  throw ValueError("the prediction for row " + std::to_string(i) + " of X overflows" +
                   (samples.count > 1 ? ", the rows before it learnt" : "") +
                   ": the features are too large, or the learning rate is");
}

// ---- steps ----

template <class T>
void Model<T>::step(const Row& row, double target, double weight, std::int64_t number, double lr) {
  if (!options_.rests || lr != lr_)
    coefficients_ = rule_.coefficients({number, 1}, kComputeType<T>, lr, arrays_.states.size());
  lr_ = lr;
  cpu::Run<T> run{.size = arrays_.features};
  if (options_.l2 > 0) {
    const auto decay = rules::WeightDecay<T>::of(std::min(options_.l2, 1 / lr), true, lr);
    for (std::int64_t k = 0; k < arrays_.outputs; ++k) {
      run.parameter = arrays_.weights + k * width_;
      kernels_->shrink(decay, run);
    }
  }
  if (row.columns) gather(row);
  if (options_.is_importance_aware)
    step_by_importance(row, target, weight);
  else
    step_plainly(row, target, weight);
  if (row.columns) put_back(row);
  if (arrays_.reference) {
    run.anchor = rules::Anchor<T>::of(lr * arrays_.anchor_strength);
    for (std::int64_t k = 0; k < arrays_.outputs; ++k) {
      run.parameter = arrays_.weights + k * width_;
      run.reference = arrays_.reference + k * arrays_.features;
      run.importance = arrays_.importance + k * arrays_.features;
      kernels_->pull(run);
    }
  }
}

template <class T>
void Model<T>::step_plainly(const Row& row, double target, double weight) {
  differentiate(target);
  const auto update = kernels_->update[0][coefficients_.loop];
  for (std::int64_t k = 0; k < arrays_.outputs; ++k)
    update(coefficients_.bytes, run_of(row, k, weight * derivatives_[static_cast<std::size_t>(k)]));
}

template <class T>
void Model<T>::step_by_importance(const Row& row, double target, double weight) {
  differentiate(target);
  const double repeated = options_.adds_squares ? square_root(weight) : 1;
  conditioned_.resize(static_cast<std::size_t>(arrays_.outputs * row.size));
  for (std::int64_t k = 0; k < arrays_.outputs; ++k) {
    const auto i = static_cast<std::size_t>(k);
    T* const conditioned = conditioned_.data() + k * row.size;
    kernels_->condition[coefficients_.loop](
        coefficients_.bytes, run_of(row, k, repeated * derivatives_[i]), conditioned);
    reaches_[i] = std::min(dot(row, nullptr, conditioned), kLongest);
  }
  integrate(target, std::min(weight, kLongest));
  for (std::int64_t k = 0; k < arrays_.outputs; ++k)
    kernels_->finish[coefficients_.loop](coefficients_.bytes, run_of(row, k, 1),
                                         conditioned_.data() + k * row.size,
                                         narrowed<T>(integrals_[static_cast<std::size_t>(k)]));
}

template <class T>
void Model<T>::differentiate(double target) {
  if (options_.loss == Loss::softmax)
    return softmax_derivatives(predictions_.data(), arrays_.outputs,
                               static_cast<std::int64_t>(target), derivatives_.data());
  for (std::int64_t k = 0; k < arrays_.outputs; ++k) {
    const auto i = static_cast<std::size_t>(k);
    const double p = predictions_[i], y = label(target, k);
    derivatives_[i] = options_.loss == Loss::squared    ? Squared::derivative(p, y)
                      : options_.loss == Loss::logistic ? Logistic::derivative(p, y)
                                                        : Hinge::derivative(p, y);
  }
}

template <class T>
void Model<T>::integrate(double target, double weight) {
  if (options_.loss == Loss::softmax)
    return softmax_integrals(predictions_.data(), arrays_.outputs,
                             static_cast<std::int64_t>(target), weight, reaches_.data(),
                             integrals_.data(), logs_.data());
  for (std::int64_t k = 0; k < arrays_.outputs; ++k) {
    const auto i = static_cast<std::size_t>(k);
    const double p = predictions_[i], y = label(target, k), q = reaches_[i];
    integrals_[i] = !(q > 0)                          ? 0  // there is nothing that moves p
                    : options_.loss == Loss::squared  ? Squared::integral(p, y, weight, q)
                    : options_.loss == Loss::logistic ? Logistic::integral(p, y, weight, q)
                                                      : Hinge::integral(p, y, weight, q);
  }
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

// Of weights and state, those that `samples` can change; some several times.
template <class T>
template <class Visit>
void Model<T>::for_each_element(const Samples<T>& samples, Visit visit) {
  const auto count = static_cast<std::int64_t>(1 + arrays_.states.size());
  for (std::int64_t k = 0; k < arrays_.outputs; ++k)
    for (std::int64_t i = 0; i < count; ++i) {
      T* const all = array(i, k);
      if (!skips_absent(samples)) {
        std::for_each(all, all + width_, visit);
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
