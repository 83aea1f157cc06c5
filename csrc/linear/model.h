// A linear model that learns from one sample after another.
//
// Each output k has a row of weights, and its prediction is their inner product with the features.
// The intercept is the weight of one more feature, which is always 1. A sample is one step of a
// rule (rules/registry.h) whose gradient is the derivative of the loss times the features.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "core/aligned.h"
#include "core/reduction.h"
#include "cpu/kernels.h"
#include "linear/losses.h"
#include "linear/samples.h"
#include "rules/any_rule.h"

namespace fusestep::linear {

struct Options {
  Loss loss = Loss::logistic;
  bool is_importance_aware = true;
  bool has_intercept = true;
  double l2 = 0;      // of the weights, but not of the intercept
  bool rests = true;  // whether the rule leaves a weight with a gradient of zero as it is
  // Whether its state adds up squared gradients (rather than averages them), so that a sample of
  // weight 2 counts twice in it.
  bool adds_squares = false;
  // Whether its state learns of the size of a gradient before the step, and the metric with it.
  // Otherwise the metric does not wait for the prediction.
  bool observes = true;
};

// Rows of weights are multiples of so many columns long, so that loops have no rest. The columns
// behind the features and the intercept are 0, and stay so.
inline constexpr std::int64_t kColumns = kLanes;

// [outputs, width] each, one row after another.
template <class T>
struct Arrays {
  std::int64_t outputs = 0, features = 0, width = 0;
  T* weights = nullptr;
  std::vector<T*> states;

  // [outputs, features]: an anchor, if there is one.
  double anchor_strength = 0;
  const T *reference = nullptr, *importance = nullptr;
};

// What is to be learnt from samples.
struct Lessons {
  // The value, or the label (1 or -1) where there is one output, else the number of the class.
  const double* targets = nullptr;
  const double* weights = nullptr;  // one for each sample; null: 1
  // The learning rates of the samples that count, or one for all.
  std::span<const double> rates{};
  const std::int64_t* order = nullptr;  // of the samples; null: as they are
  double* predictions = nullptr;        // [samples, outputs] before each update; null: not wanted
};

template <class T>
class Model {
 public:
  Model(const Options& options, const rules::AnyRule& rule, const Arrays<T>& arrays);

  // Learns from all samples and returns how many had a weight and counted as steps, of which there
  // had been `steps`. Throws ValueError where a feature is not finite, or weights have overflowed,
  // and has changed nothing then.
  std::int64_t learn(const Samples<T>& samples, const Lessons& lessons, std::int64_t steps);

  // predictions[i, k] of all samples. Throws ValueError where one is not finite.
  void predict(const Samples<T>& samples, double* predictions);

 private:
  // A copy of one sample: its features, the intercept's among them.
  struct Row {
    std::int64_t size = 0;
    const T* values = nullptr;
    const std::int64_t* columns = nullptr;  // null: all of them
    AlignedVector<T> memory_of_values{};
    std::vector<std::int64_t> memory_of_columns{};
  };

  template <class Step>
  std::int64_t learn(const Samples<T>& samples, const Lessons& lessons, std::int64_t steps,
                     Step step);

  void load(const Samples<T>& samples, std::int64_t i, Row& row) const;
  void load_dense(const Samples<T>& samples, std::int64_t i, Row& row) const;
  void load_sparse(const Samples<T>& samples, std::int64_t i, Row& row) const;
  void load_scattered(const Samples<T>& samples, std::int64_t i, Row& row) const;

  double dot(const Row& row, const T* with_all, const T* with_row);
  void predict(const Samples<T>& samples, std::int64_t i, const Row& row);
  [[noreturn]] void fail(const Samples<T>& samples, std::int64_t i, const T* features,
                         std::int64_t size) const;

  void prepare(const Row& row, std::int64_t number, double lr);
  void step(const Row& row, double target, double weight);
  void step_output(const Row& row, std::int64_t k, double y, double weight);
  bool is_direct(const Samples<T>& samples) const;
  template <class Length>
  void step_directly(const Samples<T>& samples, std::int64_t i, const cpu::Run<T>& run,
                     double target, double weight, Length length);
  void step_softmax(const Row& row, std::int64_t label, double weight);

  void observe(const Row& row, std::int64_t k, double slope, double weight);
  void condition(const Row& row, std::int64_t k, double factor);
  void finish(const Row& row, std::int64_t k, double s);
  T* conditioned(const Row& row, std::int64_t k);

  void shrink();
  void pull();

  double derivative(double p, double y) const;
  template <class Visit>
  auto with_loss(Visit visit) const;
  template <class Visit>
  auto with_length(Visit visit) const;
  double label(double target, std::int64_t output) const;

  // The weights and state of one output, or those at the row's columns, which lie elsewhere
  // meanwhile.
  void gather(const Row& row);
  void put_back(const Row& row);
  cpu::Run<T> run_of(const Row& row, std::int64_t output, double factor);
  template <class Visit>
  void for_each_gathered(const Row& row, Visit visit);

  // Everything that `samples` may change, to be given back when one of them turns out to be wrong.
  template <class Visit>
  void for_each_element(const Samples<T>& samples, Visit visit);
  std::size_t elements(const Samples<T>& samples) const;
  std::int64_t changes(const Samples<T>& samples) const;
  bool changes_few(const Samples<T>& samples) const;

  bool skips_absent(const Samples<T>& samples) const;
  T* array(std::int64_t i, std::int64_t output) const;

  const Options options_;
  const rules::AnyRule& rule_;
  const Arrays<T> arrays_;
  const std::int64_t width_;
  const cpu::Kernels<T>* kernels_ = nullptr;  // of the instruction set in use
  rules::Coefficients coefficients_{};
  double lr_ = -1;  // that they are of

  // Working memory.
  Row rows_[2];                   // this sample and the next
  AlignedVector<T> gathered_;     // weights and state of the row's columns
  AlignedVector<T> conditioned_;  // of each output
  std::vector<double> products_;
  std::vector<std::int64_t> groups_;
  std::vector<double> predictions_, derivatives_, reaches_, integrals_, logs_;
  std::vector<T> saved_;
};

}  // namespace fusestep::linear
