// What one instruction-set tier offers: the innermost loops, nothing else.
//
// tier_kernels.cpp is compiled once per tier and fills one of these tables. Everything around the
// loops (tiles, threads, conversions of odd layouts) is compiled once, for every machine.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "core/dtypes.h"
#include "core/layout.h"
#include "core/random.h"
#include "gradients/dense.h"
#include "rules/anchor.h"
#include "rules/moving_average.h"
#include "rules/registry.h"
#include "rules/weight_decay.h"

namespace fusestep::cpu {

// One run of elements in the type a rule computes in. The arrays do not overlap.
template <class T>
struct Run {
  std::int64_t size;
  T* parameter = nullptr;
  gradients::Dense<T> gradient{};
  T* state[kMaxStates] = {};

  // Where the parameter is anchored.
  rules::Anchor<T> anchor{};
  const T* reference = nullptr;
  const T* importance = nullptr;

  // What follows the parameter, where its average does.
  rules::MovingAverage<T> average{0};
  T* averaged = nullptr;
};

// A block of a sum of outer products, as large as registers allow, and what it is made from: for
// each term, the errors of so many rows, and the x of so many columns (gradients/outer.h).
inline constexpr std::int64_t kOuterRows = 8;
template <class T>
inline constexpr std::int64_t kOuterColumns = 192 / static_cast<std::int64_t>(sizeof(T));

template <class T>
struct Kernels {
  using Update = void (*)(const void* rule, const Run<T>& run);
  using Suits = bool (*)(const void* idle, const Run<T>& run);
  using CatchUp = void (*)(const void* idle, const Run<T>& run);
  using SumOfRow = double (*)(const void* rule, const Run<T>& run);
  using RuleOfRow = void (*)(void* rule, double mean_square, T& accumulator);
  using Load = void (*)(const void* from, T* to, std::int64_t size);
  using Store = void (*)(const T* from, void* to, std::int64_t size);

  // Of parameters that are free, and of those that are anchored.
  std::array<std::array<Update, rules::Loops::size>, 2> update;

  // Of parameters that are free and followed by their average, which is brought up to date in the
  // same pass: memory serves one loop better than two in turn. Null for float64, which is not worth
  // the machine code, and for rules that move whole rows.
  std::array<Update, rules::Loops::size> update_averaged;

  // Makes up for idle steps (rules/idle.h) where it suits all elements. Reads no gradient.
  std::array<Suits, rules::Loops::size> suits;
  std::array<CatchUp, rules::Loops::size> catch_up;

  // For row-wise rules: the sum of the rule's squares over at most kTileSize elements of a row, in
  // a fixed order; and what makes its coefficients those of that row.
  std::array<SumOfRow, rules::Loops::size> sum_of_row;
  std::array<RuleOfRow, rules::Loops::size> rule_of_row;

  std::array<Load, kDTypes> load;    // by stored type; `from` need not be aligned
  std::array<Store, kDTypes> store;  // by stored type; `to` need not be aligned

  // The same, rounded at random where the type has 16 bits: element i with the bits for the place
  // `first` + i.
  using StoreAtRandom = void (*)(const T* from, void* to, std::int64_t size, TileRandom random,
                                 std::uint32_t first);
  std::array<StoreAtRandom, kDTypes> store_at_random;

  // Of numbers that are kept in two halves (core/split.h); neither need be aligned.
  void (*join)(const void* upper, const void* lower, T* to, std::int64_t size);
  void (*split)(const T* from, void* upper, void* lower, std::int64_t size);

  // Gradients that are brought to within a bound. Not a part of the rules' loops, of which those in
  // the first two caches would be a quarter slower, whether there is a bound or not.
  void (*bound)(gradients::Bounded<T> gradient, T* to, std::int64_t size);

  // Brings the average of parameters up to date.
  void (*average)(rules::MovingAverage<T> average, const T* parameter, T* averaged,
                  std::int64_t size);

  // Of linear models, where a rule has its step in pieces (else null): conditioned[i] of the
  // feature i, after the state has observed run.gradient; and the step by `s` times the features.
  // Where there is no state, the step works out for itself what it needs of `conditioned`.
  using Condition = void (*)(const void* rule, const Run<T>& run, T* conditioned);
  using Finish = void (*)(const void* rule, const Run<T>& run, const T* conditioned, T s);
  std::array<Condition, rules::Loops::size> condition;
  std::array<Finish, rules::Loops::size> finish;

  // The inner product of the features and `conditioned`, where there is no state (else null); of at
  // most kTileSize elements, in the order of `dot`.
  using Reach = double (*)(const void* rule, const T* features, std::int64_t size);
  std::array<Reach, rules::Loops::size> reach;

  // Their penalty: shrinks weights, and pulls them to the anchor of `run`, if it has one.
  void (*shrink)(rules::WeightDecay<T> decay, const Run<T>& run);
  void (*pull)(const Run<T>& run);

  // The inner product of at most kTileSize elements, in a fixed order.
  double (*dot)(const T* a, const T* b, std::int64_t size);

  // to[i] = from[i] where meant[i] is not 0.
  void (*select)(const unsigned char* meant, const T* from, T* to, std::int64_t size);

  // sum[i] = times[0] * from[0][i], to which the next is added, of one or four arrays; or all are
  // added to what is there.
  void (*add_products)(const T* const* from, const T* times, int count, bool begins, T* sum,
                       std::int64_t size);

  // sum[r * stride + c] = error[0][r] * x[0][c], to which those of the next term are added: a whole
  // block; or all are added to what is there.
  void (*add_outer)(const T* error, const T* x, std::int64_t terms, bool begins, T* sum,
                    std::int64_t stride);

  // The sum of (prescale * x)^2 over at most kTileSize elements, in a fixed order.
  double (*sum_of_squares)(const T* x, std::int64_t size, double prescale);
};

// A piece of a run's state that is stored in less than 32 bits, from the run's first element on,
// and the random bits by which it is rounded.
struct NarrowState {
  std::byte* data = nullptr;
  std::uint8_t* powers = nullptr;  // of state in 8 bits
  TileRandom random{};
};

struct KernelTable {
  Kernels<float> float32;
  Kernels<double> float64;

  // State in 8 bits (core/blocks.h), unsigned and signed: elements from the first of a block on, of
  // which the i-th is rounded by the bits for the place `first` + i.
  using LoadBlocks = void (*)(const void* codes, const void* powers, float* to, std::int64_t size);
  using StoreBlocks = void (*)(const float* from, void* codes, void* powers, std::int64_t size,
                               TileRandom random, std::uint32_t first);
  std::array<LoadBlocks, 2> load_blocks;
  std::array<StoreBlocks, 2> store_blocks;

  // The update of free parameters, at most kTileSize elements, where all of the state is stored in
  // bfloat16, or all of it in 8 bits: that of `run` is not looked at. Null where a rule has none.
  using UpdateNarrow = void (*)(const void* rule, const Run<float>& run, const NarrowState* state);
  std::array<UpdateNarrow, rules::Loops::size> update_bfloat16, update_blocks;

  template <class T>
  const Kernels<T>& of() const {
    if constexpr (sizeof(T) == 8)
      return float64;
    else
      return float32;
  }
};

}  // namespace fusestep::cpu
