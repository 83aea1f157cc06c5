// The innermost loops, compiled once per instruction-set tier (see CMakeLists.txt).
//
// Plain loops over plain functions: with the flags of the build g++ turns each into the tier's
// widest vectors, and writing them once is what makes the tiers agree to the last bit. Everything
// lives in an anonymous namespace, and only the table has a name, different in each tier: a symbol
// shared between tiers could be resolved to the AVX-512 copy on a machine that has no AVX-512.

#include <cstdint>
#include <cstring>
#include <utility>

#include "core/reduction.h"
#include "core/split.h"
#include "cpu/kernels.h"
#include "cpu/loops.h"
#include "cpu/narrow_loops.h"
#include "cpu/outer_block.h"
#include "gradients/sum_of_samples.h"

namespace fusestep::cpu {
namespace {

template <class T, class Move, class... State>
bool suits(const Move move, std::int64_t size, const T* parameter, const State*... state) {
  int unsuited = 0;
  for (std::int64_t i = 0; i < size; ++i) unsuited |= !move.suits(parameter[i], state[i]...);
  return unsuited == 0;
}

template <class T, class Move, class... State>
void catch_up(const Move move, std::int64_t size, T* parameter, State*... state) {
  FUSESTEP_DISJOINT_ARRAYS
  for (std::int64_t i = 0; i < size; ++i) {
    const auto move_one = [&](T w, State... s) {
      move(w, s...);
      parameter[i] = w;
      ((state[i] = s), ...);
    };
    move_one(parameter[i], state[i]...);
  }
}

template <class T, class Loop, std::size_t... S>
bool suits(const void* idle, const Run<T>& run, std::index_sequence<S...>) {
  using Idle = typename Loop::template Of<T>::Idle;
  const Idle& steps = *static_cast<const Idle*>(idle);
  if (!steps.is_closed) return false;
  return suits(typename Idle::template Move<T>(steps), run.size, run.parameter, run.state[S]...);
}

template <class T, class Loop>
bool suits(const void* idle, const Run<T>& run) {
  return suits<T, Loop>(idle, run, std::make_index_sequence<Loop::kStates>{});
}

template <class T, class Loop, std::size_t... S>
void catch_up(const void* idle, const Run<T>& run, std::index_sequence<S...>) {
  using Idle = typename Loop::template Of<T>::Idle;
  const Idle& steps = *static_cast<const Idle*>(idle);
  catch_up(typename Idle::template Move<T>(steps), run.size, run.parameter, run.state[S]...);
}

template <class T, class Loop>
void catch_up(const void* idle, const Run<T>& run) {
  catch_up<T, Loop>(idle, run, std::make_index_sequence<Loop::kStates>{});
}

template <class T>
void join(const void* upper, const void* lower, T* __restrict to, std::int64_t size) {
  const auto *high = static_cast<const unsigned char*>(upper),
             *low = static_cast<const unsigned char*>(lower);
  for (std::int64_t i = 0; i < size; ++i) {
    Halves halves;
    memcpy(&halves.upper, high + 2 * i, 2);
    memcpy(&halves.lower, low + 2 * i, 2);
    to[i] = static_cast<T>(halves.value());
  }
}

template <class T>
void split(const T* __restrict from, void* upper, void* lower, std::int64_t size) {
  auto *high = static_cast<unsigned char*>(upper), *low = static_cast<unsigned char*>(lower);
  FUSESTEP_DISJOINT_ARRAYS
  for (std::int64_t i = 0; i < size; ++i) {
    const Halves halves = Halves::of(static_cast<float>(from[i]));
    memcpy(high + 2 * i, &halves.upper, 2);
    memcpy(low + 2 * i, &halves.lower, 2);
  }
}

template <class T>
void bound(const gradients::Bounded<T> gradient, T* to, std::int64_t size) {
  FUSESTEP_DISJOINT_ARRAYS  // or one array
      for (std::int64_t i = 0; i < size; ++i) to[i] = gradient(i);
}

template <class T>
void select(const unsigned char* meant, const T* from, T* to, std::int64_t size) {
  FUSESTEP_DISJOINT_ARRAYS
  for (std::int64_t i = 0; i < size; ++i) {
    const T moved = from[i], kept = to[i];
    to[i] = meant[i] != 0 ? moved : kept;
  }
}

template <class T>
void add_products(const T* const* from, const T* times, int count, bool begins, T* __restrict sum,
                  std::int64_t size) {
  const T *const a = from[0], *const b = from[1], *const c = from[2], *const d = from[3];
  const T ta = times[0], tb = times[1], tc = times[2], td = times[3];
  if (count == 1 && begins)
    for (std::int64_t i = 0; i < size; ++i) sum[i] = ta * a[i];
  else if (count == 1)
    for (std::int64_t i = 0; i < size; ++i) sum[i] += ta * a[i];
  else if (begins)
    for (std::int64_t i = 0; i < size; ++i)
      sum[i] = gradients::plus_four(gradients::kNoSamples<T>, ta * a[i], tb * b[i], tc * c[i],
                                    td * d[i]);
  else
    for (std::int64_t i = 0; i < size; ++i)
      sum[i] = gradients::plus_four(sum[i], ta * a[i], tb * b[i], tc * c[i], td * d[i]);
}

// Squares of floats are exact in double: the norm of a float gradient can neither overflow nor lose
// its small values.
template <class T>
double sum_of_squares(const T* x, std::int64_t size, double prescale) {
  return sum_in_lanes(size, [=](std::int64_t i) {
    const double scaled = prescale * static_cast<double>(x[i]);
    return scaled * scaled;
  });
}

template <class T, class Loop>
double sum_of_row([[maybe_unused]] const void* rule, [[maybe_unused]] const Run<T>& run) {
  using Rule = typename Loop::template Of<T>;
  if constexpr (rules::kIsRowwise<Rule>) {
    const Rule move = *static_cast<const Rule*>(rule);
    const T* const w = run.parameter;
    const gradients::Dense<T> gradient = run.gradient;
    return sum_in_lanes(run.size, [=](std::int64_t i) { return move.square(w[i], gradient(i)); });
  }
  return 0;
}

template <class T, class Loop>
void rule_of_row([[maybe_unused]] void* rule, [[maybe_unused]] double mean_square,
                 [[maybe_unused]] T& accumulator) {
  using Rule = typename Loop::template Of<T>;
  if constexpr (rules::kIsRowwise<Rule>) {
    auto* const of_step = static_cast<Rule*>(rule);
    *of_step = of_step->of_row(mean_square, accumulator);
  }
}

// ---- linear models ----

template <class T, class Rule, class... State>
void condition(const Rule rule, const Run<T>& run, T* conditioned, State*... state) {
  const gradients::Dense<T> gradient = run.gradient;
  const T* const features = gradient.values;
  FUSESTEP_DISJOINT_ARRAYS
  for (std::int64_t i = 0; i < run.size; ++i) {
    const auto observe = [&](State... s) {
      rule.observe(gradient(i), s...);
      conditioned[i] = rule.conditioned(features[i], s...);
      ((state[i] = s), ...);
    };
    observe(state[i]...);
  }
}

template <class T, class Rule, class... State>
void finish(const Rule rule, const Run<T>& run, const T* conditioned, T s, State*... state) {
  T* const w = run.parameter;
  const T* const features = run.gradient.values;
  if constexpr (requires(T x) { rule.advance(x, x, *state...); }) {
    FUSESTEP_DISJOINT_ARRAYS
    for (std::int64_t i = 0; i < run.size; ++i) {
      const auto advance = [&](T moved, State... kept) {
        rule.advance(moved, s * features[i], kept...);
        w[i] = moved;
        ((state[i] = kept), ...);
      };
      advance(w[i], state[i]...);
    }
  } else if constexpr (sizeof...(State) == 0) {
    FUSESTEP_DISJOINT_ARRAYS
    for (std::int64_t i = 0; i < run.size; ++i) w[i] -= s * rule.conditioned(features[i]);
  } else {
    FUSESTEP_DISJOINT_ARRAYS
    for (std::int64_t i = 0; i < run.size; ++i) w[i] -= s * conditioned[i];
  }
}

// Whether the rule of this loop has its step in pieces.
template <class T, class Loop>
constexpr bool is_in_pieces() {
  return []<std::size_t... S>(std::index_sequence<S...>) {
    return requires(typename Loop::template Of<T> rule, T g, std::array<T, kMaxStates> state) {
      rule.observe(g, state[S]...);
      rule.conditioned(g, state[S]...);
    };
  }(std::make_index_sequence<Loop::kStates>{});
}

template <class T, class Loop>
constexpr typename Kernels<T>::Condition condition_of() {
  if constexpr (is_in_pieces<T, Loop>())
    return [](const void* rule, const Run<T>& run, T* conditioned) {
      [&]<std::size_t... S>(std::index_sequence<S...>) {
        condition(*static_cast<const typename Loop::template Of<T>*>(rule), run, conditioned,
                  run.state[S]...);
      }(std::make_index_sequence<Loop::kStates>{});
    };
  return nullptr;
}

template <class T, class Loop>
constexpr typename Kernels<T>::Finish finish_of() {
  if constexpr (is_in_pieces<T, Loop>())
    return [](const void* rule, const Run<T>& run, const T* conditioned, T s) {
      [&]<std::size_t... S>(std::index_sequence<S...>) {
        finish(*static_cast<const typename Loop::template Of<T>*>(rule), run, conditioned, s,
               run.state[S]...);
      }(std::make_index_sequence<Loop::kStates>{});
    };
  return nullptr;
}

template <class T>
void shrink(const rules::WeightDecay<T> decay, const Run<T>& run) {
  T* const w = run.parameter;
  for (std::int64_t i = 0; i < run.size; ++i) {
    T shrunk = w[i];
    decay(shrunk, T{0});
    w[i] = shrunk;
  }
}

template <class T>
void pull(const Run<T>& run) {
  const Tied<T> tied(run);
  T* const w = run.parameter;
  FUSESTEP_DISJOINT_ARRAYS
  for (std::int64_t i = 0; i < run.size; ++i) w[i] = tied(i, w[i]);
}

// Most rows of weights are a few times kLanes long, and the next step waits for their sums. Sizes
// that are constants cost memory: each of them is code in every tier.
template <int... n, class Value>
[[gnu::always_inline]] inline double sum_of_features(std::int64_t size, Value value,
                                                     std::integer_sequence<int, n...>) {
  double sum;
  if (((size == (n + 1) * kLanes && (sum = sum_in_lanes<(n + 1) * kLanes>(value), true)) || ...))
    return sum;
  return sum_in_lanes(size, value);
}

template <class Value>
[[gnu::always_inline]] inline double sum_of_features(std::int64_t size, Value value) {
  return sum_of_features(size, value, std::make_integer_sequence<int, 4>{});
}

template <class T>
double dot(const T* a, const T* b, std::int64_t size) {
  return sum_of_features(
      size, [=](std::int64_t i) { return static_cast<double>(a[i]) * static_cast<double>(b[i]); });
}

template <class T, class Loop>
constexpr typename Kernels<T>::Reach reach_of() {
  if constexpr (is_in_pieces<T, Loop>() && Loop::kStates == 0)
    return [](const void* rule, const T* features, std::int64_t size) {
      const auto& move = *static_cast<const typename Loop::template Of<T>*>(rule);
      return sum_of_features(size, [=, &move](std::int64_t i) {
        return static_cast<double>(features[i]) *
               static_cast<double>(move.conditioned(features[i]));
      });
    };
  return nullptr;
}

template <class T, class... Loop>
constexpr Kernels<T> table(rules::LoopList<Loop...>) {
  return {{{
              {update<T, Loop, Free<T>>...},
              {update<T, Loop, Tied<T>>...},
          }},
          {update_averaged<T, Loop>()...},
          {suits<T, Loop>...},
          {catch_up<T, Loop>...},
          {sum_of_row<T, Loop>...},
          {rule_of_row<T, Loop>...},
          {load<T, float>, load<T, double>, load<T, Float16>, load<T, BFloat16>},
          {store<T, float>, store<T, double>, store<T, Float16>, store<T, BFloat16>},
          {nullptr, nullptr, store_at_random<T, Float16>, store_bfloat16<T>()},
          join<T>,
          split<T>,
          bound<T>,
          average<T>,
          {condition_of<T, Loop>()...},
          {finish_of<T, Loop>()...},
          {reach_of<T, Loop>()...},
          shrink<T>,
          pull<T>,
          dot<T>,
          select<T>,
          add_products<T>,
          add_outer<T>,
          sum_of_squares<T>};
}

template <class... Loop>
constexpr KernelTable tables(rules::LoopList<Loop...> loops) {
  return {table<float>(loops),
          table<double>(loops),
          {load_in_blocks<InSmallFloats<false>>, load_in_blocks<InSmallFloats<true>>},
          {store_in_blocks<InSmallFloats<false>>, store_in_blocks<InSmallFloats<true>>},
          {update_narrow<AsBFloat16, Loop>()...},
          {update_narrow<AsSmallFloats, Loop>()...}};
}

}  // namespace

extern const KernelTable FUSESTEP_TIER_TABLE;
const KernelTable FUSESTEP_TIER_TABLE = tables(rules::Loops{});

}  // namespace fusestep::cpu
