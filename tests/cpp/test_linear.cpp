// Linear models by themselves, for sanitizers and emulators: the losses' paths, sums of sparse
// rows, and that a run over samples is the same sparse or dense, whole or one by one, on every
// tier.

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/elementary.h"
#include "core/reduction.h"
#include "linear/model.h"
#include "linear/softmax.h"
#include "testing.h"

namespace fusestep::testing {
namespace {

using linear::Lessons;
using linear::Loss;
using linear::Samples;

bool near(double a, double b, double tolerance) {
  return std::abs(a - b) <= tolerance * std::max({1.0, std::abs(a), std::abs(b)});
}

void test_elementary_functions() {
  for (double x = -700; x < 709; x += 0.37) {
    CHECK(std::abs(exp_of(x) / std::exp(x) - 1) < 1e-15);                            // e^x
    CHECK(std::abs(log_of(std::exp(x)) - x) <= 1e-15 * std::max(1.0, std::abs(x)));  // ln x
  }
  for (double x = 1e-300; x < 700; x *= 1.7)
    for (const double y : {x, -x})
      CHECK(std::abs(expm1_of(y) / std::expm1(y) - 1) < 2e-15);                        // e^x - 1
  CHECK(exp_of(1e9) == std::numeric_limits<double>::infinity() && exp_of(-1e9) == 0);  // far away
}

// Two paths of half the length are one.
template <class Function>
void test_halves() {
  for (const double y : {-1.0, 1.0})
    for (double p = -40; p < 40; p += 0.9)
      for (double h = 1e-9; h < 1e9; h *= 7) {
        const double q = 1.3;
        const double half = Function::integral(p, y, h / 2, q);
        const double rest = Function::integral(p - q * half, y, h / 2, q);
        CHECK(near(half + rest, Function::integral(p, y, h, q), 1e-12));  // two halves are one
      }
}

void test_softmax() {
  const double p[] = {0.3, -2.0, 5.0}, q[] = {2.0, 1.0, 0.5};
  for (double h = 1e-6; h < 1e60; h *= 11)
    for (std::int64_t label = 0; label < 3; ++label) {
      double s[3], logs[3], after[3], slopes[3];
      linear::softmax_integrals(p, 3, label, h, q, s, logs);
      for (int k = 0; k < 3; ++k) after[k] = p[k] - q[k] * s[k];
      linear::softmax_derivatives(after, 3, label, slopes);
      for (int k = 0; k < 3; ++k)
        CHECK(near(s[k], h * slopes[k], 1e-9));  // the gradient is the one after the step
    }
}

// A sum of the values at these places, beside that of all values.
void check_sum_of_places(std::vector<std::int64_t> places, std::int64_t size, Random& random) {
  std::vector<double> all(static_cast<std::size_t>(size)), values;
  std::vector<std::int64_t> groups(places.size());
  for (const std::int64_t i : places)
    values.push_back(all[static_cast<std::size_t>(i)] = random.number());
  const double sum = sum_of_places(places.data(), values.data(), groups.data(),
                                   static_cast<std::int64_t>(places.size()), size);
  CHECK(sum == sum_in_groups(all.data(), size));  // absent zeros make no difference
}

void test_sums_of_places() {
  Random random(1);
  for (const std::int64_t size : {1, 31, 32, 33, 1024, 1025, 5000, 1100000}) {
    std::vector<std::int64_t> even, uneven;
    for (std::int64_t i = size / 9; i < size; i += 1 + size / 300 + i % 3) even.push_back(i);
    check_sum_of_places(even, size, random);
    // None, one, two or more in each group of 1,024.
    for (std::int64_t begin = 0; begin < size; begin += kReductionGroup) {
      std::int64_t at = begin;
      for (std::int64_t rest = random.below(5); rest > 0; --rest) {
        at += 1 + random.below(200);
        if (at < size && at < begin + kReductionGroup) uneven.push_back(at);
      }
    }
    check_sum_of_places(uneven, size, random);
  }
}

// Lanes are defined by a plain loop; sizes around whole lanes, and around what has its own code.
template <class T>
void test_inner_products() {
  Random random(3);
  for (const std::int64_t size : {0,   1,   5,   31,  32,  33,  63,  64,  65,  96,  100,  127,
                                  128, 129, 160, 192, 224, 255, 256, 257, 288, 512, 1000, 1024}) {
    std::vector<T> a, b;
    double lane[kLanes] = {};
    for (std::int64_t i = 0; i < size; ++i) {
      a.push_back(static_cast<T>(random.number()));
      b.push_back(static_cast<T>(random.number()));
      lane[i % kLanes] += static_cast<double>(a.back()) * static_cast<double>(b.back());
    }
    for (int width = kLanes / 2; width > 0; width /= 2)
      for (int j = 0; j < width; ++j) lane[j] += lane[j + width];
    for (const cpu::Tier& tier : cpu::compiled_tiers())
      if (tier.runs_here())
        CHECK(tier.kernels->of<T>().dot(a.data(), b.data(), size) == lane[0]);  // the same bits
  }
}

void test_tables() {
  const double points[] = {-700, -64.1, -64, -33, -3.03125, -1e-9, 0, 0.03, 1, 31.9, 64, 64.1, 700};
  for (const double m : points)
    CHECK(std::abs(linear::logistic_of_minus(m) * (1 + std::exp(m)) - 1) < 1e-13);
  for (double m = -70; m < 70; m += 0.0137) {
    const double f = linear::logistic_of_minus(m);
    CHECK(std::abs(f * (1 + std::exp(m)) - 1) < 2e-15);  // 1 / (1 + e^m)
    if (m > -32 && m < 3) {
      const double u = linear::margin_table(m + std::exp(m));
      CHECK(std::abs(u - m) <= 1e-14 * std::max(1.0, std::abs(m)));  // u + e^u = m + e^m
    }
  }
}

// The way that float32 takes comes as near as it says to the one that float64 takes.
void test_tolerance() {
  for (double p = -50; p < 50; p += 0.37)
    for (double h = 1e-9; h < 1e12; h *= 3) {
      const double exact = linear::Logistic::integral(p, 1, h, 1.3);
      const double rough = linear::Logistic::integral(p, 1, h, 1.3, 1e-9);
      CHECK(std::abs(rough - exact) <= 2e-9 * std::abs(exact));
    }
}

struct Case {
  const char* rule;
  std::size_t states;
  bool is_importance_aware, observes;
  double l2;
};

// The weights after ten samples.
template <class T>
std::vector<T> learn(const Case& one, Loss loss, std::int64_t outputs, std::int64_t features,
                     bool is_sparse, bool is_one_by_one) {
  constexpr std::int64_t kSamples = 10;
  const std::int64_t width = (features / linear::kColumns + 1) * linear::kColumns;
  const auto rule = rules::make_rule(one.rule);
  if (one.states == 1 && std::string_view(one.rule) == "sgd") rule->set("momentum", 0.9);
  std::vector<T> weights(static_cast<std::size_t>(width * outputs));
  std::vector<std::vector<T>> states(one.states, weights);
  linear::Arrays<T> arrays{outputs, features, width, weights.data(), {}};
  for (auto& state : states) arrays.states.push_back(state.data());
  const bool adds_squares = std::string_view(one.rule) == "adagrad";
  linear::Model<T> model({.loss = loss,
                          .is_importance_aware = one.is_importance_aware,
                          .l2 = one.l2,
                          .rests = one.states == 0 || adds_squares,
                          .adds_squares = adds_squares,
                          .observes = one.observes},
                         *rule, arrays);

  Random random(7);
  std::vector<T> dense(static_cast<std::size_t>(kSamples * features)), values;
  std::vector<std::int32_t> columns, starts{0};
  std::vector<double> targets;
  for (std::int64_t i = 0; i < kSamples; ++i) {
    for (std::int64_t j = 0; j < features; ++j) {
      if ((i + j) % 3 == 0) continue;
      const T x = static_cast<T>(random.number());
      dense[static_cast<std::size_t>(i * features + j)] = x;
      values.push_back(x);
      columns.push_back(static_cast<std::int32_t>(j));
    }
    starts.push_back(static_cast<std::int32_t>(values.size()));
    targets.push_back(outputs == 1 ? static_cast<double>(1 - 2 * (i % 2))
                                   : static_cast<double>(i % outputs));
  }

  const double lr = 0.1;
  std::int64_t steps = 0;
  const auto step = [&](std::int64_t begin, std::int64_t count) {
    Samples<T> samples{.count = count, .features = features};
    samples.values = reinterpret_cast<const std::byte*>(dense.data() + begin * features);
    samples.row_stride = features * static_cast<std::int64_t>(sizeof(T));
    samples.column_stride = sizeof(T);
    if (is_sparse) {
      samples.is_sparse = true;
      samples.values = reinterpret_cast<const std::byte*>(values.data());
      samples.columns = {columns.data(), false};
      samples.starts = {starts.data() + begin, false};
    }
    steps += model.learn(samples, {.targets = targets.data() + begin, .rates = {&lr, 1}}, steps);
  };
  for (std::int64_t i = 0; i < kSamples; i += is_one_by_one ? 1 : kSamples)
    step(i, is_one_by_one ? 1 : kSamples);
  CHECK(steps == kSamples);  // every sample counts
  return weights;
}

template <class T>
void test_runs(std::int64_t outputs, std::int64_t features) {
  for (const Case& one : {Case{"sgd", 0, true, false, 0}, Case{"sgd", 0, false, false, 0},
                          Case{"sgd", 0, true, false, 0.1}, Case{"sgd", 1, true, false, 0},
                          Case{"sgd", 1, false, false, 0}, Case{"adam", 2, true, true, 0},
                          Case{"adam", 2, false, true, 0.1}, Case{"adagrad", 1, true, true, 0},
                          Case{"adagrad", 1, false, true, 0}, Case{"adagrad", 1, true, true, 0.1}})
    for (const Loss loss : {Loss::squared, Loss::logistic, Loss::hinge, Loss::softmax}) {
      if (loss == Loss::softmax && outputs == 1) continue;
      std::vector<std::vector<T>> results;
      for (const cpu::Tier& tier : cpu::compiled_tiers()) {
        if (!tier.runs_here()) continue;
        cpu::use_tier(tier.name);
        for (const bool is_sparse : {false, true})
          for (const bool is_one_by_one : {false, true})
            results.push_back(learn<T>(one, loss, outputs, features, is_sparse, is_one_by_one));
      }
      // A metric that need not wait for the prediction is the same if it does.
      Case waiting = one;
      waiting.observes = true;
      results.push_back(learn<T>(waiting, loss, outputs, features, false, false));
      const T moved = results[0][0] != 0 ? results[0][0] : results[0][1];
      CHECK(moved != 0 && std::isfinite(moved));  // the weights have moved
      for (const auto& result : results)
        CHECK(result == results[0]);  // sparse, dense, one by one, every tier: the same bits
    }
}

}  // namespace
}  // namespace fusestep::testing

int main() {
  using namespace fusestep::testing;
  namespace linear = fusestep::linear;
  test_elementary_functions();
  test_halves<linear::Squared>();
  test_halves<linear::Logistic>();
  test_halves<linear::Hinge>();
  test_softmax();
  test_sums_of_places();
  test_inner_products<float>();
  test_inner_products<double>();
  test_tables();
  test_tolerance();
  for (const std::int64_t features : {37, 100, 255, 256, 1100}) {
    test_runs<float>(1, features);
    test_runs<double>(1, features);
  }
  test_runs<float>(3, 37);
  test_runs<double>(3, 37);
}
