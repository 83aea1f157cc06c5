// The little these tests need: a check that says where it failed, and numbers to work on.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "core/dtypes.h"
#include "core/work.h"
#include "cpu/dispatch.h"
#include "rules/any_rule.h"

#define CHECK(condition)                                                           \
  do {                                                                             \
    if (!(condition)) {                                                            \
      std::fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                                \
    }                                                                              \
  } while (false)

namespace fusestep::testing {

// SplitMix64 (Steele, Lea & Flood 2014): the same numbers on every platform.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}

  std::uint64_t bits() {
    std::uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  std::int64_t below(std::int64_t n) {
    return static_cast<std::int64_t>(bits() % static_cast<std::uint64_t>(n));
  }
  // Uniform in [-1, 1): a multiple of 2^-52, so no rounding is involved.
  double number() { return static_cast<double>(static_cast<std::int64_t>(bits()) >> 11) * 0x1p-52; }

 private:
  std::uint64_t state_;
};

// FNV-1a, over bytes.
inline std::uint64_t hash(const void* data, std::size_t size,
                          std::uint64_t h = 0xcbf29ce484222325u) {
  const auto* bytes = static_cast<const unsigned char*>(data);
  for (std::size_t i = 0; i < size; ++i) h = (h ^ bytes[i]) * 0x100000001b3u;
  return h;
}

// A rule by name with options by name.
struct RuleCase {
  const char* name;
  std::vector<std::pair<const char*, double>> options;

  std::unique_ptr<rules::AnyRule> make() const {
    auto rule = rules::make_rule(name);
    for (const auto& [option, value] : options) rule->set(option, value);
    return rule;
  }
};

// Every loop, with options that reach every branch of its rule.
inline const std::vector<RuleCase>& rule_cases() {
  static const std::vector<RuleCase> cases = {
      {"sgd", {{"lr", 0.1}}},
      {"sgd", {{"lr", 0.1}, {"weight_decay", 0.1}}},
      {"sgd", {{"lr", 0.1}, {"momentum", 0.9}, {"dampening", 0.1}}},
      {"sgd", {{"lr", 0.1}, {"momentum", 0.9}, {"nesterov", 1}, {"weight_decay", 0.1}}},
      {"adam", {}},
      {"adam", {{"weight_decay", 0.1}, {"beta1", 0.3}}},
      {"adam", {{"weight_decay", 0.1}, {"decoupled_weight_decay", 1}}},
      {"adam", {{"amsgrad", 1}, {"beta2", 0.4}}},
      {"nadam", {}},
      {"nadam", {{"weight_decay", 0.1}, {"momentum_decay", 0.1}}},
      {"nadam", {{"weight_decay", 0.1}, {"decoupled_weight_decay", 1}}},
      {"adagrad", {{"lr_decay", 0.1}}},
      {"adagrad", {{"weight_decay", 0.1}, {"initial_accumulator_value", 0.1}}},
  };
  return cases;
}

// Says what the operands of work are: the parameter, its gradient, so many arrays of state; and so
// many of an anchor.
inline void count_operands(Work& work, std::size_t states, int of_anchor = 0) {
  work.rule_operands = kState + static_cast<int>(states);
  work.operands_read = work.rule_operands + of_anchor;
}

// Calls f(tier name) with each instruction set of this machine active.
template <class Function>
void for_each_tier(Function f) {
  for (const cpu::Tier& tier : cpu::compiled_tiers()) {
    if (!tier.runs_here()) continue;
    cpu::use_tier(tier.name);
    f(tier.name);
  }
}

inline double read(const std::byte* at, DType dtype) {
  switch (dtype) {
    case DType::float32: {
      float x;
      std::memcpy(&x, at, sizeof x);
      return x;
    }
    case DType::float64: {
      double x;
      std::memcpy(&x, at, sizeof x);
      return x;
    }
    case DType::float16: {
      Float16 x;
      std::memcpy(&x, at, sizeof x);
      return to_float(x);
    }
    case DType::bfloat16: {
      BFloat16 x;
      std::memcpy(&x, at, sizeof x);
      return to_float(x);
    }
    default: return 0;  // no number
  }
}

inline void write(std::byte* at, DType dtype, double value) {
  switch (dtype) {
    case DType::float32: {
      const auto x = cast<float>(value);
      std::memcpy(at, &x, sizeof x);
      return;
    }
    case DType::float64: {
      std::memcpy(at, &value, sizeof value);
      return;
    }
    case DType::float16: {
      const auto x = cast<Float16>(value);
      std::memcpy(at, &x, sizeof x);
      return;
    }
    case DType::bfloat16: {
      const auto x = cast<BFloat16>(value);
      std::memcpy(at, &x, sizeof x);
      return;
    }
    default: return;
  }
}

inline constexpr DType kAllDTypes[] = {DType::float32, DType::float64, DType::float16,
                                       DType::bfloat16};

}  // namespace fusestep::testing
