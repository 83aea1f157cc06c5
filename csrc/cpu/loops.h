// The loops that all others are made of, for tier_kernels.cpp: moving elements by a rule, and
// reading and writing them in another type than a rule computes in.
//
// In an anonymous namespace, as everything that is compiled once per tier.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "core/half.h"
#include "core/random.h"
#include "cpu/kernels.h"

// Before a loop: its arrays do not overlap. The caller has checked it.
#if defined(__clang__)
#define FUSESTEP_DISJOINT_ARRAYS _Pragma("clang loop vectorize(assume_safety)")
#define FUSESTEP_NOT_UNROLLED
#else
#define FUSESTEP_DISJOINT_ARRAYS _Pragma("GCC ivdep")
#define FUSESTEP_NOT_UNROLLED _Pragma("GCC unroll 1")
#endif

namespace fusestep::cpu {
namespace {

// Where a weight goes after the rule has moved it.
template <class T>
struct Free {
  explicit Free(const Run<T>&) {}
  [[gnu::always_inline]] T operator()(std::int64_t, T w) const { return w; }
};

template <class T>
struct Tied {
  rules::Anchor<T> anchor;
  const T *reference, *importance;
  explicit Tied(const Run<T>& run)
      : anchor(run.anchor), reference(run.reference), importance(run.importance) {}
  [[gnu::always_inline]] T operator()(std::int64_t i, T w) const {
    return anchor(w, reference[i], importance[i]);
  }
};

// Followed by its average.
template <class T>
struct Averaged {
  rules::MovingAverage<T> average;
  T* averaged;
  explicit Averaged(const Run<T>& run) : average(run.average), averaged(run.averaged) {}
  [[gnu::always_inline]] T operator()(std::int64_t i, T w) const {
    averaged[i] = average.of(averaged[i], w);
    return w;
  }
};

// Moves `size` elements: one loop for every rule, every kind of gradient and anchor, and every
// number of state arrays. The rule works on copies, so that its branches become selects rather than
// conditional stores, which are not vectorised.
template <class T, class Rule, class Gradient, class Pull, class... State>
void move(const Rule rule, std::int64_t size, T* parameter, const Gradient gradient,
          const Pull pull, State*... state) {
  FUSESTEP_DISJOINT_ARRAYS
  for (std::int64_t i = 0; i < size; ++i) {
    const auto move_one = [&](T w, State... s) {
      rule(w, gradient(i), s...);
      parameter[i] = pull(i, w);
      ((state[i] = s), ...);
    };
    move_one(parameter[i], state[i]...);
  }
}

template <class T, class Rule, class Pull, std::size_t... S>
void update(const void* rule, const Run<T>& run, std::index_sequence<S...>) {
  move(*static_cast<const Rule*>(rule), run.size, run.parameter, run.gradient, Pull(run),
       run.state[S]...);
}

template <class T, class Loop, class Pull>
void update(const void* rule, const Run<T>& run) {
  update<T, typename Loop::template Of<T>, Pull>(rule, run,
                                                 std::make_index_sequence<Loop::kStates>{});
}

template <class T>
void average(const rules::MovingAverage<T> average, const T* __restrict parameter,
             T* __restrict averaged, std::int64_t size) {
  for (std::int64_t i = 0; i < size; ++i) averaged[i] = average.of(averaged[i], parameter[i]);
}

// Whether the options of a rule are those for which there are loops that cannot test them once.
template <class Rule>
[[gnu::always_inline]] inline bool is_usual([[maybe_unused]] const Rule& rule) {
  if constexpr (requires { rule.is_usual(); })
    return rule.is_usual();
  else
    return true;
}

template <class T, class Loop, std::size_t... S>
[[gnu::always_inline]] inline void update_averaged(const typename Loop::template Of<T> rule,
                                                   const Run<T>& run, std::index_sequence<S...>) {
  if (is_usual(rule) && run.average.is_long())  // of which the compiler makes one loop, not sixteen
    return move(rule, run.size, run.parameter, run.gradient, Averaged<T>(run), run.state[S]...);
  Run<T> tile = run;  // which is in the first cache when its average follows
  std::int64_t rest = run.size;
  for (; rest > 0; rest -= kTileSize) {
    tile.size = rest < kTileSize ? rest : kTileSize;
    update<T, Loop, Free<T>>(&rule, tile);
    average(run.average, tile.parameter, tile.averaged, tile.size);
    tile.parameter += kTileSize;
    tile.gradient.values += kTileSize;
    ((tile.state[S] += kTileSize), ...);
    tile.averaged += kTileSize;
  }
}

template <class T, class Loop>
constexpr typename Kernels<T>::Update update_averaged() {
  using Rule = typename Loop::template Of<T>;
  if constexpr (sizeof(T) == sizeof(float) && !rules::kIsRowwise<Rule>)
    return [](const void* rule, const Run<T>& run) {
      update_averaged<T, Loop>(*static_cast<const Rule*>(rule), run,
                               std::make_index_sequence<Loop::kStates>{});
    };
  return nullptr;
}

// memcpy, because an array of a packed record may start anywhere; it costs nothing.
template <class T, class Stored>
void load(const void* from, T* __restrict to, std::int64_t size) {
  const auto* bytes = static_cast<const unsigned char*>(from);
  for (std::int64_t i = 0; i < size; ++i) {
    Stored x;
    memcpy(&x, bytes + i * static_cast<std::int64_t>(sizeof x), sizeof x);
    to[i] = cast<T>(x);
  }
}

template <class T, class Stored>
void store(const T* __restrict from, void* to, std::int64_t size) {
  auto* bytes = static_cast<unsigned char*>(to);
  for (std::int64_t i = 0; i < size; ++i) {
    const Stored x = cast<Stored>(from[i]);
    memcpy(bytes + i * static_cast<std::int64_t>(sizeof x), &x, sizeof x);
  }
}

template <class T, class Stored>
void store_at_random(const T* __restrict from, void* to, std::int64_t size, TileRandom random,
                     std::uint32_t first) {
  auto* bytes = static_cast<unsigned char*>(to);
  for (std::int64_t i = 0; i < size; ++i) {
    const Stored x =
        cast_at_random<Stored>(from[i], random.bits(first + static_cast<std::uint32_t>(i)));
    memcpy(bytes + i * static_cast<std::int64_t>(sizeof x), &x, sizeof x);
  }
}

}  // namespace
}  // namespace fusestep::cpu
