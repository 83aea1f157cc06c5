// Calls a rule's loop on elements that lie in the type it computes in, whoever brought them there.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>

#include "core/work.h"
#include "cpu/kernels.h"
#include "cpu/tile_access.h"
#include "rules/registry.h"

namespace fusestep::cpu {

// The importance of all elements of a tile where none is given. A loop for that case would know
// beforehand how strong the pull is; g++ 12 then makes two loops of it and vectorises neither.
template <class T>
inline constexpr auto kOnes = [] {
  std::array<T, kTileSize> ones;
  ones.fill(1);
  return ones;
}();

template <class T>
class Mover {
 protected:
  Mover(const KernelTable& kernels, const Work& work, const StepOptions& options)
      : kernels_(kernels.of<T>()),
        access_(kernels_),
        work_(work),
        loop_number_(work.rule->loop),
        loop_(kernels_.update[is_anchored()][loop_number_]),
        rule_(work.rule->bytes),
        anchor_(anchor_at(work.anchor.lr)),
        factor_(static_cast<T>(work.gradient_factor * options.gradient_factor)),
        bound_(static_cast<T>(options.gradient_bound)),
        average_(work.followers.decay),
        narrow_loop_(narrow_loop(kernels)) {}

  bool is_anchored() const { return work_.anchor.reference != 0; }

  rules::Anchor<T> anchor_at(double lr) const {
    return rules::Anchor<T>::of(lr * work_.anchor.lambda);
  }

  bool is_moved(int operand) const { return operand != kGradient && operand < work_.rule_operands; }

  // ---- reading what is to move ----

  // Where it is, or copied to `buffer`; block_of(i) is the piece of the i-th operand.
  template <class BlockOf>
  T* read(int operand, BlockOf block_of, T* buffer) const {
    if (operand != kParameter || !work_.lower_half) return access_.read(block_of(operand), buffer);
    access_.join(block_of(kParameter), block_of(work_.lower_half), buffer);
    return buffer;
  }

  // ---- writing what has moved, and what follows it ----

  // Elements of a tile from `first` on.
  template <class BlockOf>
  void store(int operand, const T* elements, BlockOf block_of, std::int64_t tile,
             std::int64_t first) const {
    const bool is_split = operand == kParameter && work_.lower_half;
    if (is_split || !work_.rounding.is_random(operand))
      return store_nearest(operand, elements, block_of);
    access_.store(elements, block_of(operand), work_.rounding.of(operand, tile), first);
  }

  template <class BlockOf>
  void store_nearest(int operand, const T* elements, BlockOf block_of) const {
    if (operand == kParameter && work_.lower_half)
      access_.split(elements, block_of(kParameter), block_of(work_.lower_half));
    else
      access_.store(elements, block_of(operand));
  }

  // Brings up to date what follows the parameter, of which these are the elements.
  template <class BlockOf>
  void follow(const T* parameter, BlockOf block_of) const {
    if (const int operand = work_.followers.average) {
      alignas(kCacheLine) T buffer[kTileSize];
      const Block& block = block_of(operand);
      T* const averaged = access_.read(block, buffer);
      kernels_.average(average_, parameter, averaged, block.size());
      if (averaged == buffer) access_.store(buffer, block);
    }
    if (const int operand = work_.followers.copy) access_.store(parameter, block_of(operand));
  }

  // ---- calling the loop ----

  Run<T> run_over(const std::array<T*, kMaxOperands>& at, std::int64_t size,
                  const gradients::Dense<T>& gradient, const rules::Anchor<T>& anchor) const {
    return {size,
            at[kParameter],
            gradient,
            {at[kState], at[kState + 1], at[kState + 2]},
            anchor,
            at[work_.anchor.reference],
            work_.anchor.importance ? at[work_.anchor.importance] : kOnes<T>.data(),
            average_,
            at[work_.followers.average]};
  }

  using Update = typename Kernels<T>::Update;

  void call_loop(const std::array<T*, kMaxOperands>& at, std::int64_t size) const {
    call_loop(rule_, at, size);
  }

  void call_loop(const void* rule, const std::array<T*, kMaxOperands>& at,
                 std::int64_t size) const {
    call_loop(rule, at, size, factor_);
  }

  void call_loop(const void* rule, const std::array<T*, kMaxOperands>& at, std::int64_t size,
                 T factor) const {
    call_loop(loop_, rule, at, size, factor);
  }

  void call_loop(Update loop, const void* rule, const std::array<T*, kMaxOperands>& at,
                 std::int64_t size, T factor) const {
    if (!has_bound()) return loop(rule, run_over(at, size, {at[kGradient], factor}, anchor_));
    alignas(kCacheLine) T buffer[kTileSize];
    for (std::array<T*, kMaxOperands> here = at; size > 0; size -= kTileSize) {
      const std::int64_t some = std::min(size, kTileSize);
      loop(rule, run_over(here, some, bounded({here[kGradient], factor}, buffer, some), anchor_));
      for (T*& elements : here) elements += kTileSize;
    }
  }

  // ---- state of less than 32 bits, in one pass ----

  bool is_state(int operand) const { return operand >= kState && operand < work_.rule_operands; }

  template <class BlockOf>
  bool moves_in_one_pass(BlockOf block_of) const {
    if (!narrow_loop_) return false;
    for (int i = kState; i < work_.rule_operands; ++i)
      if (!block_of(i).contiguous()) return false;
    return true;
  }

  // Of elements of a tile, from its first on.
  template <class BlockOf>
  void move_in_one_pass(const std::array<T*, kMaxOperands>& at, BlockOf block_of,
                        std::int64_t tile) const {
    if constexpr (sizeof(T) == sizeof(float)) {
      std::array<NarrowState, kMaxStates> state;
      for (int i = kState; i < work_.rule_operands; ++i) {
        const Block& block = block_of(i);
        state[i - kState] = {block.data, reinterpret_cast<std::uint8_t*>(block.powers),
                             work_.rounding.of(i, tile)};
      }
      alignas(kCacheLine) T buffer[kTileSize];
      const std::int64_t size = block_of(kState).columns;
      const auto gradient = bounded({at[kGradient], factor_}, buffer, size);
      narrow_loop_(rule_, run_over(at, size, gradient, anchor_), state.data());
    }
  }

  // Null where there is none.
  KernelTable::UpdateNarrow narrow_loop(const KernelTable& kernels) const {
    if (sizeof(T) != sizeof(float) || is_anchored() || !work_.rounding.is_random_in_state)
      return nullptr;
    const auto all_states = [&](auto holds) {
      for (int i = kState; i < work_.rule_operands; ++i)
        if (!holds(work_.iteration.operand[i].dtype)) return false;
      return true;
    };
    if (all_states([](DType stored) { return stored == DType::bfloat16; }))
      return kernels.update_bfloat16[loop_number_];
    return all_states([](DType stored) { return is_in_blocks(stored); })
               ? kernels.update_blocks[loop_number_]
               : nullptr;
  }

  bool has_bound() const { return bound_ != std::numeric_limits<T>::infinity(); }

  // Gradients, brought to within the bound if there is one.
  gradients::Dense<T> bounded(const gradients::Dense<T>& gradient, T* buffer,
                              std::int64_t size) const {
    if (!has_bound()) return gradient;
    kernels_.bound({gradient, bound_}, buffer, size);
    return {buffer, T{1}};
  }

  // The same for a run that is worth starting at a cache line, so that no vector crosses one.
  void call_loop_from_line(const void* rule, const std::array<T*, kMaxOperands>& at,
                           std::int64_t size) const {
    call_loop_from_line(loop_, rule, at, size, factor_);
  }

  void call_loop_from_line(const void* rule, const std::array<T*, kMaxOperands>& at,
                           std::int64_t size, T factor) const {
    call_loop_from_line(loop_, rule, at, size, factor);
  }

  void call_loop_from_line(Update loop, const void* rule, std::array<T*, kMaxOperands> at,
                           std::int64_t size, T factor) const {
    const auto past_line = reinterpret_cast<std::uintptr_t>(at[kParameter]) % kCacheLine;
    if (past_line != 0) {
      const auto head = static_cast<std::int64_t>((kCacheLine - past_line) / sizeof(T));
      call_loop(loop, rule, at, head, factor);
      for (T*& operand : at) operand += head;
      size -= head;
    }
    call_loop(loop, rule, at, size, factor);
  }

  const Kernels<T>& kernels_;
  TileAccess<T> access_;
  const Work& work_;
  std::size_t loop_number_;
  Update loop_;
  const void* rule_;
  rules::Anchor<T> anchor_;
  T factor_, bound_;
  rules::MovingAverage<T> average_;
  KernelTable::UpdateNarrow narrow_loop_;
};

}  // namespace fusestep::cpu
