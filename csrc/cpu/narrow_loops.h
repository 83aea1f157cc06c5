// State of less than 32 bits, for tier_kernels.cpp: in blocks, nearly all of which have nothing in
// them that is to be looked at one by one; made into floats, stored, or moved in one pass.
//
// In an anonymous namespace, as everything that is compiled once per tier.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#include "core/blocks.h"
#include "cpu/any_block.h"
#include "cpu/kernels.h"
#include "cpu/loops.h"

namespace fusestep::cpu {
namespace {

// ---- what a block is made of ----

// A format has codes, which are floats times what their block shares; that is found from the bits
// of the largest magnitude. All this is for blocks in which nothing is special, and no magnitude
// has bits as large as kHuge; `any` is for as many elements as a block has, or fewer.
struct InBFloat16 {
  using Code = BFloat16;
  static constexpr int kPowers = 0;  // that a block has
  static constexpr std::uint32_t kHuge = kLargestBFloat16;

  [[gnu::always_inline]] static bool is_special(const std::byte*) { return false; }
  [[gnu::always_inline]] static float shared(const std::uint8_t*) { return 1; }
  [[gnu::always_inline]] static float decode(Code code, float) { return to_float(code); }

  [[gnu::always_inline]] static float inverse(std::uint32_t, std::uint8_t*) { return 1; }
  [[gnu::always_inline]] static Code encode(float x, float, std::uint32_t random) {
    return to_smaller_bfloat16(x, random);
  }

  [[gnu::noinline]] static void load_any(const std::byte* codes, const std::uint8_t*, float* to,
                                         std::int64_t size) {
    load<float, BFloat16>(codes, to, size);
  }
  [[gnu::noinline]] static void store_any(const float* from, std::byte* codes, std::uint8_t*,
                                          std::int64_t size, TileRandom random,
                                          std::uint32_t first) {
    store_at_random<float, BFloat16>(from, codes, size, random, first);
  }
};

template <bool is_signed>
struct InSmallFloats {
  using Code = std::uint8_t;
  static constexpr int kPowers = 1;
  using Float = SmallFloat<is_signed>;
  static constexpr std::uint32_t kHuge = SharedPower::kHuge;

  // Whether a block has codes of infinities or NaN.
  [[gnu::always_inline]] static bool is_special(const std::byte* codes) {
    const auto* const code = reinterpret_cast<const Code*>(codes);
    Code top = 0;
    for (std::int64_t i = 0; i < kBlockElements; ++i) {
      const Code magnitude = code[i] & static_cast<Code>(Float::kNan);
      top = top < magnitude ? magnitude : top;
    }
    return top >= Float::kInfinity;
  }
  [[gnu::always_inline]] static float shared(const std::uint8_t* power) {
    return SharedPower{*power}.value();
  }
  [[gnu::always_inline]] static float decode(Code code, float shared) {
    return Float::decode(code, shared);
  }

  // Of what the block shares from now on.
  [[gnu::always_inline]] static float inverse(std::uint32_t largest, std::uint8_t* power) {
    const SharedPower shared = SharedPower::of<is_signed>(largest);
    *power = shared.field;
    return shared.inverse();
  }
  [[gnu::always_inline]] static Code encode(float x, float inverse, std::uint32_t random) {
    return Float::encode(x, inverse, random);
  }

  static void load_any(const std::byte* codes, const std::uint8_t* power, float* to,
                       std::int64_t size) {
    load_any_block<is_signed>(reinterpret_cast<const Code*>(codes), {*power}, to, size);
  }
  static void store_any(const float* from, std::byte* codes, std::uint8_t* power, std::int64_t size,
                        TileRandom random, std::uint32_t first) {
    store_any_block<is_signed>(from, reinterpret_cast<Code*>(codes), power, size, &random, first);
  }
};

// How many bytes so many codes have.
template <class Format>
constexpr std::int64_t bytes_of(std::int64_t elements) {
  return elements * static_cast<std::int64_t>(sizeof(typename Format::Code));
}

// memcpy, because an array of a packed record may start anywhere.
template <class Format>
[[gnu::always_inline]] inline float decode(const std::byte* codes, int i, float shared) {
  typename Format::Code code;
  memcpy(&code, codes + i * static_cast<int>(sizeof code), sizeof code);
  return Format::decode(code, shared);
}
template <class Format>
[[gnu::always_inline]] inline void encode(float x, float inverse, std::uint32_t random,
                                          std::byte* codes, int i) {
  const typename Format::Code code = Format::encode(x, inverse, random);
  memcpy(codes + i * static_cast<int>(sizeof code), &code, sizeof code);
}

// The length of a block as an int: places in it are no numbers of 64 bits.
constexpr int kBlock = kBlockElements;

// ---- made into floats, and stored ----

template <class Format>
void load_in_blocks(const void* from, const void* powers, float* __restrict to, std::int64_t size) {
  const auto* codes = static_cast<const std::byte*>(from);
  const auto* power = static_cast<const std::uint8_t*>(powers);
  for (; size >= kBlock; size -= kBlock) {
    if (Format::is_special(codes)) {
      Format::load_any(codes, power, to, kBlock);
    } else {
      const float shared = Format::shared(power);
      for (int i = 0; i < kBlock; ++i) to[i] = decode<Format>(codes, i, shared);
    }
    codes += bytes_of<Format>(kBlock);
    power += Format::kPowers;
    to += kBlock;
  }
  if (size > 0) Format::load_any(codes, power, to, size);
}

// The i-th is rounded by the bits for the place `first` + i.
template <class Format>
void store_in_blocks(const float* __restrict from, void* to, void* powers, std::int64_t size,
                     TileRandom random, std::uint32_t first) {
  auto* __restrict codes = static_cast<std::byte*>(to);
  auto* __restrict power = static_cast<std::uint8_t*>(powers);
  const auto encode_block = [&](float inverse, TileRandom here) {
    for (int i = 0; i < kBlock; ++i)
      encode<Format>(from[i], inverse, here.bits(static_cast<std::uint32_t>(i)), codes, i);
  };
  for (; size >= kBlock; size -= kBlock) {
    std::uint32_t largest = 0;
    for (int i = 0; i < kBlock; ++i) largest = larger(largest, magnitude_bits(from[i]));
    const std::uint32_t key = random.at(first).key;
    if (largest >= Format::kHuge)
      Format::store_any(from, codes, power, kBlock, random, first);
    else if (random.is_second)  // a loop for each, which need not ask
      encode_block(Format::inverse(largest, power), {key, true});
    else
      encode_block(Format::inverse(largest, power), {key, false});
    from += kBlock;
    codes += bytes_of<Format>(kBlock);
    power += Format::kPowers;
    first += kBlock;
  }
  if (size > 0) Format::store_any(from, codes, power, size, random, first);
}

void store_bfloat16_at_random(const float* from, void* to, std::int64_t size, TileRandom random,
                              std::uint32_t first) {
  store_in_blocks<InBFloat16>(from, to, nullptr, size, random, first);
}

template <class T>
constexpr typename Kernels<T>::StoreAtRandom store_bfloat16() {
  if constexpr (sizeof(T) == sizeof(float))
    return store_bfloat16_at_random;
  else
    return store_at_random<T, BFloat16>;
}

// ---- moved in one pass ----

// Asks for the memory of the block that comes kAhead elements later: the time in which fifteen
// others are moved is about what memory takes to answer.
template <class Element>
[[gnu::always_inline]] inline void ask_ahead(const void* block) {
  constexpr std::uintptr_t kAhead = 1024, kLine = 64;
  const auto next = reinterpret_cast<std::uintptr_t>(block) + kAhead * sizeof(Element);
  for (std::uintptr_t at = 0; at < kBlock * sizeof(Element); at += kLine)
    __builtin_prefetch(reinterpret_cast<const void*>(next + at), 1);
}

// The update of free parameters by a rule whose pieces of state have these formats. Memory is at
// work all the time, which it is not where a tile is made into floats, moved and stored in three
// loops: with AVX-512 and two cores a step of Adam on 30M elements with state in 8 bits took 0.86
// of float32's time so, and takes 0.67 (docs/adr/0012).
template <class Loop, class... Format>
class NarrowLoop {
 public:
  static void update(const void* coefficients, const Run<float>& run, const NarrowState* state) {
    update(*static_cast<const Rule*>(coefficients), run, state,
           std::index_sequence_for<Format...>{});
  }

 private:
  using Rule = typename Loop::template Of<float>;
  template <class>
  using State = NarrowState;  // one for each format

  // The rule is copied: where it is usual, that is then known of every test of its options.
  template <std::size_t... S>
  [[gnu::always_inline]] static void update(const Rule rule, const Run<float>& run,
                                            const NarrowState* state, std::index_sequence<S...>) {
    const auto update_in_three = [&](std::int64_t begin, std::int64_t size) {
      move_in_three<S...>(rule, part_of(run, begin, size), from<Format>(state[S], begin)...);
    };
    if (!is_usual(rule)) return update_in_three(0, run.size);
    std::int64_t begin = 0;
    for (; run.size - begin >= kBlock; begin += kBlock) {
      if ((... | Format::is_special(state[S].data + bytes_of<Format>(begin))))
        update_in_three(begin, kBlock);
      else
        move_block<S...>(rule, run.parameter + begin,
                         {run.gradient.values + begin, run.gradient.factor},
                         from<Format>(state[S], begin)...);
    }
    if (begin < run.size) update_in_three(begin, run.size - begin);
  }

  // From one of its blocks on.
  template <class F>
  [[gnu::always_inline]] static NarrowState from(const NarrowState& state, std::int64_t begin) {
    return {state.data + bytes_of<F>(begin), state.powers + begin / kBlock * F::kPowers,
            state.random.at(static_cast<std::uint32_t>(begin))};
  }
  static Run<float> part_of(Run<float> run, std::int64_t begin, std::int64_t size) {
    run.size = size;
    run.parameter += begin;
    run.gradient.values += begin;
    return run;
  }

  template <std::size_t... S>
  [[gnu::always_inline]] static void move_block(const Rule& rule, float* parameter,
                                                const gradients::Dense<float> gradient,
                                                const State<Format>... state) {
    ask_ahead<float>(parameter);
    ask_ahead<float>(gradient.values);
    (ask_ahead<typename Format::Code>(state.data), ...);
    const float shared[] = {Format::shared(state.powers)...};
    alignas(64) float moved[sizeof...(S)][kBlock];
    std::uint32_t largest[sizeof...(S)] = {};
    FUSESTEP_DISJOINT_ARRAYS
    FUSESTEP_NOT_UNROLLED
    for (int i = 0; i < kBlock; ++i) {
      const auto move_one = [&](float w, auto... s) {
        rule(w, gradient(i), s...);
        parameter[i] = w;
        ((moved[S][i] = s, largest[S] = larger(largest[S], magnitude_bits(s))), ...);
      };
      move_one(parameter[i], decode<Format>(state.data, i, shared[S])...);
    }
    if ((... | (largest[S] >= Format::kHuge)))
      return (Format::store_any(moved[S], state.data, state.powers, kBlock, state.random, 0), ...);

    const float inverse[] = {Format::inverse(largest[S], state.powers)...};
    // Two pieces of state have the same bits (core/random.h): the compiler is to know.
    static_assert(kState % 2 == 0, "the first piece is the first of a pair");
    const std::uint32_t keys[] = {state.random.key...};
    FUSESTEP_DISJOINT_ARRAYS
    for (int i = 0; i < kBlock; ++i) {
      const auto bits_of = [&](std::size_t s) {
        return TileRandom{keys[s / 2 * 2], s % 2 != 0}.bits(static_cast<std::uint32_t>(i));
      };
      (encode<Format>(moved[S][i], inverse[S], bits_of(S), state.data, i), ...);
    }
  }

  template <std::size_t... S>
  [[gnu::noinline]] static void move_in_three(const Rule& rule, Run<float> run,
                                              const State<Format>... state) {
    alignas(64) float moved[sizeof...(S)][kTileSize];
    (load_in_blocks<Format>(state.data, state.powers, moved[S], run.size), ...);
    ((run.state[S] = moved[S]), ...);
    cpu::update<float, Loop, Free<float>>(&rule, run);
    (store_in_blocks<Format>(moved[S], state.data, state.powers, run.size, state.random, 0), ...);
  }
};

// The formats of a rule's pieces of state.
template <class Rule, std::size_t>
using AsBFloat16 = InBFloat16;
template <class Rule, std::size_t piece>
using AsSmallFloats = InSmallFloats<Rule::is_signed(piece)>;

// Null for rules that have no state for each element.
template <template <class, std::size_t> class Format, class Loop>
constexpr KernelTable::UpdateNarrow update_narrow() {
  return []<std::size_t... S>(std::index_sequence<S...>) -> KernelTable::UpdateNarrow {
    if constexpr (sizeof...(S) > 0)
      return NarrowLoop<Loop, Format<typename Loop::template Of<float>, S>...>::update;
    return nullptr;
  }(std::make_index_sequence<Loop::kStates>{});
}

}  // namespace
}  // namespace fusestep::cpu
