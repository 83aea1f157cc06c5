// Moves a piece of work: which memory the rule's loop is called on, tile after tile.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

#include "core/work.h"
#include "cpu/kernels.h"
#include "cpu/row_tile.h"
#include "cpu/tile_access.h"
#include "rules/registry.h"
#include "rules/row_history.h"

namespace fusestep::cpu {

// From this size on a run is worth starting at a cache line, so that no vector crosses one.
inline constexpr std::int64_t kAlignedRun = 4096;
inline constexpr std::uintptr_t kCacheLine = 64;

template <class T>
class Updater {
 public:
  Updater(const KernelTable& kernels, const Work& work, const StepOptions& options)
      : kernels_(kernels.of<T>()),
        access_(kernels_),
        work_(work),
        iteration_(work.iteration),
        loop_number_(work.rule->loop),
        loop_(kernels_.update[loop_number_]),
        rule_(work.rule->bytes),
        factor_(static_cast<T>(work.gradient_factor * options.gradient_factor)),
        clear_(options.clear_gradients) {}

  void operator()(std::int64_t first, std::int64_t last) const {
    if (work_.rows) return update_rows(first, last);
    if (is_one_run(first, last)) return update_run(first, last);
    for (std::int64_t tile = first; tile < last; ++tile) update_tile(tile);
  }

 private:
  // True where the rule's loop can go straight through the arrays' own memory.
  bool is_one_run(std::int64_t first, std::int64_t last) const {
    if (iteration_.layout || (clear_ && last - first > 1)) return false;
    for (int i = 0; i < iteration_.operands; ++i)
      if (!TileAccess<T>::in_place(iteration_.dense(i, 0, 1))) return false;
    return true;
  }

  void update_run(std::int64_t first, std::int64_t last) const {
    const std::int64_t begin = first * kTileSize;
    const std::int64_t size = std::min(last * kTileSize, iteration_.size) - begin;
    std::array<T*, kMaxOperands> at{};
    for (int i = 0; i < iteration_.operands; ++i)
      at[i] = reinterpret_cast<T*>(iteration_.operand[i].data) + begin;

    const auto past_line = reinterpret_cast<std::uintptr_t>(at[kParameter]) % kCacheLine;
    if (size >= kAlignedRun && past_line != 0) {
      const auto head = static_cast<std::int64_t>((kCacheLine - past_line) / sizeof(T));
      call_loop(at, head);
      for (int i = 0; i < iteration_.operands; ++i) at[i] += head;
      call_loop(at, size - head);
    } else {
      call_loop(at, size);
    }
    if (clear_) access_.clear(iteration_.dense(kGradient, begin, size));
  }

  void update_tile(std::int64_t tile) const {
    alignas(kCacheLine) T buffer[kMaxOperands][kTileSize];
    std::array<Block, kMaxOperands> block;
    std::array<T*, kMaxOperands> at{};
    for (int i = 0; i < iteration_.operands; ++i) {
      block[i] = iteration_.block(i, tile);
      at[i] = access_.read(block[i], buffer[i]);
    }
    call_loop(at, block[0].size());
    for (int i = 0; i < iteration_.operands; ++i)
      if (i != kGradient && at[i] == buffer[i]) access_.store(buffer[i], block[i]);
    if (clear_) access_.clear(block[kGradient]);
  }

  void update_rows(std::int64_t first, std::int64_t last) const {
    for (std::int64_t tile = first; tile < last; ++tile) {
      if (tile + kRowsAhead < last) RowTile(work_, tile + kRowsAhead).prefetch();
      update_row_tile(RowTile(work_, tile));
    }
  }

  void update_row_tile(const RowTile& tile) const {
    alignas(kCacheLine) T buffer[kMaxOperands][kTileSize];
    std::array<T*, kMaxOperands> at{};
    for (int i = 0; i < iteration_.operands; ++i)
      if (i != kGradient) at[i] = access_.read(tile.block(i), buffer[i]);
    if (work_.history && work_.history->is_behind(tile.row()))
      catch_up(tile, at, buffer[kGradient]);
    if (!work_.only_catches_up) {
      at[kGradient] = tile.gradient(access_, buffer[kGradient]);
      call_loop(at, tile.size());
    }
    for (int i = 0; i < iteration_.operands; ++i)
      if (i != kGradient && at[i] == buffer[i]) access_.store(buffer[i], tile.block(i));
    if (clear_) tile.clear(access_);
  }

  // In closed form, or else one missed step after the other.
  void catch_up(const RowTile& tile, const std::array<T*, kMaxOperands>& at, T* zeros) const {
    const rules::IdleBytes idle = work_.history->missed_steps(tile.row());
    const Run<T> run = run_over(at, tile.size(), {zeros, T{0}});
    if (kernels_.catch_up[loop_number_](idle.bytes, run)) return;
    std::fill_n(zeros, tile.size(), T{0});
    for (const rules::Coefficients& step : work_.history->each_missed_step(tile.row()))
      loop_(step.bytes, run);
  }

  static Run<T> run_over(const std::array<T*, kMaxOperands>& at, std::int64_t size,
                         const gradients::Dense<T>& gradient) {
    return {size, at[kParameter], gradient, {at[kState], at[kState + 1], at[kState + 2]}};
  }

  void call_loop(const std::array<T*, kMaxOperands>& at, std::int64_t size) const {
    loop_(rule_, run_over(at, size, {at[kGradient], factor_}));
  }

  const Kernels<T>& kernels_;
  TileAccess<T> access_;
  const Work& work_;
  const Iteration& iteration_;
  std::size_t loop_number_;
  typename Kernels<T>::Update loop_;
  const void* rule_;
  T factor_;
  bool clear_;
};

}  // namespace fusestep::cpu
