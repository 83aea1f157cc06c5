// Moves a piece of work: which memory the rule's loop is called on, tile after tile.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "core/reduction.h"
#include "core/work.h"
#include "cpu/kernels.h"
#include "cpu/mover.h"
#include "cpu/row_tile.h"
#include "cpu/tile_access.h"
#include "rules/registry.h"
#include "rules/row_history.h"

namespace fusestep::cpu {

// From this size on a run is worth starting at a cache line.
inline constexpr std::int64_t kAlignedRun = 4096;

// After so many elements of a run the gradient that the step has read, from the second cache by
// then at the latest, is cleared.
inline constexpr std::int64_t kClearedRun = 4096;

template <class T>
class Updater : Mover<T> {
 public:
  Updater(const KernelTable& kernels, const Work& work, const StepOptions& options)
      : Mover<T>(kernels, work, options),
        iteration_(work.iteration),
        clear_(options.clear_gradients && !work.whole_gradient.array) {}

  void operator()(std::int64_t first, std::int64_t last) const {
    if (work_.rows) return update_rows(first, last);
    if (is_one_run()) return update_run(first, last);
    for (std::int64_t tile = first; tile < last; ++tile) update_tile(tile, tile + 1 < last);
  }

 private:
  using Mover<T>::kernels_, Mover<T>::access_, Mover<T>::work_, Mover<T>::loop_number_,
      Mover<T>::loop_, Mover<T>::rule_, Mover<T>::anchor_, Mover<T>::factor_;
  using Mover<T>::is_anchored, Mover<T>::anchor_at, Mover<T>::is_moved, Mover<T>::run_over,
      Mover<T>::call_loop, Mover<T>::call_loop_from_line, Mover<T>::read, Mover<T>::store,
      Mover<T>::store_nearest, Mover<T>::follow, Mover<T>::is_state, Mover<T>::moves_in_one_pass,
      Mover<T>::move_in_one_pass;

  // True where the rule's loop can go straight through the arrays' own memory.
  bool is_one_run() const {
    if (iteration_.layout || work_.followers.copy) return false;
    for (int i = 0; i < work_.operands_read; ++i)
      if (!is_in_place(i)) return false;
    return !work_.followers.average || is_in_place(work_.followers.average);
  }

  bool is_in_place(int operand) const {
    return TileAccess<T>::in_place(iteration_.dense(operand, 0, 1));
  }

  void update_run(std::int64_t first, std::int64_t last) const {
    std::int64_t begin = first * kTileSize;
    const std::int64_t end = std::min(last * kTileSize, iteration_.size);
    std::array<T*, kMaxOperands> at{};
    for (int i = 0; i < iteration_.operands; ++i)
      at[i] = reinterpret_cast<T*>(iteration_.operand[i].data) + begin;

    for (const std::int64_t stretch = stretch_of_run(end - begin); begin < end; begin += stretch) {
      const std::int64_t some = std::min(stretch, end - begin);
      update_stretch(at, begin, some);
      if (clear_) access_.clear(iteration_.dense(kGradient, begin, some));
      for (T*& elements : at) elements += stretch;
    }
  }

  // What comes after a stretch has moved finds it in a cache.
  std::int64_t stretch_of_run(std::int64_t size) const {
    const bool has_ones = is_anchored() && work_.anchor.importance == 0;  // as many as a tile has
    if (has_ones || (work_.followers.average && !averages_in_loop())) return kTileSize;
    return clear_ ? kClearedRun : size;
  }

  bool averages_in_loop() const {
    return work_.followers.average && !is_anchored() && kernels_.update_averaged[loop_number_];
  }

  void update_stretch(const std::array<T*, kMaxOperands>& at, std::int64_t begin,
                      std::int64_t size) const {
    const auto loop = averages_in_loop() ? kernels_.update_averaged[loop_number_] : loop_;
    if (size >= kAlignedRun)
      call_loop_from_line(loop, rule_, at, size, factor_);
    else
      call_loop(loop, rule_, at, size, factor_);
    if (!averages_in_loop())
      follow(at[kParameter], [&](int i) { return iteration_.dense(i, begin, size); });
  }

  void update_tile(std::int64_t tile, bool has_next) const {
    alignas(kCacheLine) T buffer[kMaxOperands][kTileSize];
    std::array<Block, kMaxOperands> block;
    std::array<T*, kMaxOperands> at{};
    for (int i = 0; i < iteration_.operands; ++i) block[i] = iteration_.block(i, tile);
    const auto block_of = [&](int i) -> const Block& { return block[i]; };
    const bool in_one_pass = moves_in_one_pass(block_of);  // and then asks ahead
    const bool asks = has_next && !in_one_pass && asks_ahead();
    for (int i = 0; i < work_.operands_read; ++i) {
      if (in_one_pass && is_state(i)) continue;
      at[i] = read(i, block_of, buffer[i]);
      if (asks) ask_for(i, tile + 1);
    }
    if (in_one_pass)
      move_in_one_pass(at, block_of, tile);
    else
      call_loop(at, block[kParameter].size());
    for (int i = 0; i < work_.rule_operands; ++i)
      if (is_moved(i) && at[i] == buffer[i]) store(i, buffer[i], block_of, tile, 0);
    follow_stored(at[kParameter], buffer[kParameter], block_of);
    if (clear_) access_.clear(block[kGradient]);
  }

  // Where tiles are copied before they are moved, and written back afterwards, memory would have
  // nothing to do meanwhile: it is asked for the next one. (Adam of 30M elements with state of 8
  // bits, when that went this way: 27.0 ms without, 22.2 with on one thread; 12.6 and 11.1 on two.)
  bool asks_ahead() const {
    constexpr std::int64_t kCached = 1 << 19;  // elements that an optimizer need not wait for
    return !iteration_.layout && iteration_.size > kCached;
  }

  // Always inlined: g++ takes a function that only prefetches for one that does nothing, and drops
  // calls of it.
  [[gnu::always_inline]] void ask_for(int operand, std::int64_t tile) const {
    constexpr std::int64_t kLine = 64;
    const Block next = iteration_.block(operand, tile);
    const std::int64_t bytes = next.columns * item_size(next.dtype);
    for (std::int64_t at = 0; at < bytes; at += kLine) __builtin_prefetch(next.data + at, 1);
  }

  // What follows a parameter follows what is kept of it.
  template <class BlockOf>
  void follow_stored(T* parameter, T* buffer, BlockOf block_of) const {
    if (!work_.followers.any()) return;
    follow(parameter == buffer ? read(kParameter, block_of, buffer) : parameter, block_of);
  }

  void update_rows(std::int64_t first, std::int64_t last) const {
    if (work_.is_rowwise) {
      for (std::int64_t row = first; row < last; ++row) {
        if (row + kRowsAhead < last) RowTile(work_, row + kRowsAhead, 0).prefetch();
        update_whole_row(row);
      }
      return;
    }
    if (work_.moves_whole_rows()) {
      for (std::int64_t row = first; row < last; ++row) update_long_row(row);
      return;
    }
    if (iteration_.tiles() == 1) {  // nearly always: no need to divide
      for (std::int64_t row = first; row < last; ++row) {
        if (row + kRowsAhead < last) RowTile(work_, row + kRowsAhead, 0).prefetch();
        update_row_tile(RowTile(work_, row, 0), true);
      }
      return;
    }
    for (std::int64_t tile = first; tile < last; ++tile)
      update_row_tile(RowTile(work_, tile), true);
  }

  // All of the row makes up for missed steps in the same way, whatever its tiles are.
  void update_long_row(std::int64_t row) const {
    bool in_closed_form = true;
    for (std::int64_t tile = 0; tile < iteration_.tiles() && in_closed_form; ++tile) {
      const RowTile at(work_, row, tile);
      if (work_.history->is_behind(at.row())) in_closed_form = suits(at);
    }
    for (std::int64_t tile = 0; tile < iteration_.tiles(); ++tile)
      update_row_tile(RowTile(work_, row, tile), in_closed_form);
  }

  bool suits(const RowTile& tile) const {
    alignas(kCacheLine) T buffer[kMaxOperands][kTileSize];
    std::array<T*, kMaxOperands> at{};
    const auto block_of = [&](int i) { return tile.block(i); };
    for (int i = 0; i < work_.operands_read; ++i)
      if (i != kGradient) at[i] = read(i, block_of, buffer[i]);
    return suits(work_.history->missed_steps(tile.row()), run_over(at, tile.size(), {}, anchor_));
  }

  bool suits(const rules::IdleBytes& idle, const Run<T>& run) const {
    return !is_anchored() && kernels_.suits[loop_number_](idle.bytes, run);
  }

  void update_row_tile(const RowTile& tile, bool may_be_in_closed_form) const {
    alignas(kCacheLine) T buffer[kMaxOperands][kTileSize];
    std::array<T*, kMaxOperands> at{};
    const auto block_of = [&](int i) { return tile.block(i); };
    for (int i = 0; i < work_.operands_read; ++i)
      if (i != kGradient) at[i] = read(i, block_of, buffer[i]);
    const auto for_each_stored = [&](auto visit) {
      for (int i = 0; i < work_.rule_operands; ++i)
        if (is_moved(i) && at[i] == buffer[i]) visit(i, buffer[i]);
    };
    if (work_.history && work_.history->is_behind(tile.row())) {
      catch_up(tile, at, buffer[kGradient], may_be_in_closed_form);
      // Rounded as if somebody had asked for the row first: whether anybody has must not matter.
      for_each_stored([&](int i, T* elements) {
        store_nearest(i, elements, block_of);
        read(i, block_of, elements);
      });
    }
    if (!work_.only_catches_up) {
      at[kGradient] = tile.gradient(access_, buffer[kGradient]);
      call_loop(at, tile.size());
      for_each_stored(
          [&](int i, T* elements) { store(i, elements, block_of, tile.number_in_table(), 0); });
    }
    follow_stored(at[kParameter], buffer[kParameter], block_of);
    if (clear_) tile.clear(access_);
  }

  // By a row-wise rule.
  void update_whole_row(std::int64_t row) const {
    if (iteration_.size == 0) return;  // no mean to take
    const std::int64_t in_table = work_.rows->row(row);
    if (work_.history && work_.history->is_behind(in_table) && !is_at_rest(in_table))
      for (const auto& step : work_.history->each_missed_step(in_table))
        move_whole_row(row, step.coefficients, step.lr, false);
    if (work_.only_catches_up) return;
    move_whole_row(row, *work_.rule, work_.anchor.lr, true);
    if (clear_)
      for (std::int64_t tile = 0; tile < iteration_.tiles(); ++tile)
        RowTile(work_, row, tile).clear(access_);
  }

  // True where the steps that a row has missed change nothing.
  bool is_at_rest(std::int64_t row) const {
    return suits(work_.history->missed_steps(row), Run<T>{});
  }

  void move_whole_row(std::int64_t row, rules::Coefficients rule, double lr,
                      bool has_gradient) const {
    alignas(kCacheLine) T buffer[kMaxOperands][kTileSize];
    const auto for_each_tile = [&](auto visit) {
      for (std::int64_t tile = 0; tile < iteration_.tiles(); ++tile) {
        const RowTile at(work_, row, tile);
        std::array<T*, kMaxOperands> elements{};
        const auto block_of = [&](int i) { return at.block(i); };
        for (int i = 0; i < work_.operands_read; ++i)
          if (i != kGradient) elements[i] = read(i, block_of, buffer[i]);
        elements[kGradient] =
            has_gradient ? at.gradient(access_, buffer[kGradient]) : buffer[kGradient];
        if (!has_gradient) std::fill_n(buffer[kGradient], at.size(), T{0});
        const T factor = has_gradient ? factor_ : T{0};
        const auto gradient =
            this->bounded({elements[kGradient], factor}, buffer[kGradient], at.size());
        visit(at, run_over(elements, at.size(), gradient, anchor_at(lr)));
      }
    };

    if (iteration_.tiles() == 1) {  // nearly always, and then once is enough
      for_each_tile([&](const RowTile& at, const Run<T>& run) {
        const double sum = kernels_.sum_of_row[loop_number_](rule.bytes, run);
        find_rule_of_row(row, rule, sum);
        if (!keeps_value(row)) move_tile_of_row(at, rule, run, buffer[kParameter], has_gradient);
      });
      return;
    }
    std::vector<double> sums;
    for_each_tile([&](const RowTile&, const Run<T>& run) {
      sums.push_back(kernels_.sum_of_row[loop_number_](rule.bytes, run));
    });
    find_rule_of_row(row, rule, sum_in_groups(sums.data(), std::ssize(sums)));
    if (keeps_value(row)) return;
    for_each_tile([&](const RowTile& at, const Run<T>& run) {
      move_tile_of_row(at, rule, run, buffer[kParameter], has_gradient);
    });
  }

  // Steps that a row has missed are rounded to nearest, so that it does not matter when it makes up
  // for them.
  void move_tile_of_row(const RowTile& at, const rules::Coefficients& rule, const Run<T>& run,
                        T* buffer, bool has_gradient) const {
    loop_(rule.bytes, run);
    const auto block_of = [&](int i) { return at.block(i); };
    if (run.parameter == buffer && has_gradient)
      store(kParameter, buffer, block_of, at.number_in_table(), 0);
    else if (run.parameter == buffer)
      store_nearest(kParameter, buffer, block_of);
    follow_stored(run.parameter, buffer, block_of);
  }

  // Of a row that is not selected only the state moves.
  bool keeps_value(std::int64_t row) const {
    return work_.selected_rows &&
           !work_.selected_rows->holds(work_.rows->row(row) * iteration_.size);
  }

  void find_rule_of_row(std::int64_t row, rules::Coefficients& rule, double sum) const {
    T accumulator;
    const Block state = state_of_row(work_.rows->row(row));
    access_.load(state, &accumulator);
    kernels_.rule_of_row[loop_number_](rule.bytes, sum / static_cast<double>(iteration_.size),
                                       accumulator);
    access_.store(&accumulator, state);
  }

  Block state_of_row(std::int64_t row) const {
    const Operand& state = work_.row_state;
    return {
        state.data + row * work_.row_state_stride, state.dtype, 1, 1, 0, item_size(state.dtype)};
  }

  // In closed form, or else one missed step after the other.
  void catch_up(const RowTile& tile, const std::array<T*, kMaxOperands>& at, T* zeros,
                bool may_be_in_closed_form) const {
    const rules::IdleBytes idle = work_.history->missed_steps(tile.row());
    Run<T> run = run_over(at, tile.size(), {zeros, T{0}}, anchor_);
    if (may_be_in_closed_form && suits(idle, run))
      return kernels_.catch_up[loop_number_](idle.bytes, run);
    std::fill_n(zeros, tile.size(), T{0});
    for (const auto& step : work_.history->each_missed_step(tile.row())) {
      run.anchor = anchor_at(step.lr);
      loop_(step.coefficients.bytes, run);
    }
  }

  const Iteration& iteration_;
  bool clear_;
};

}  // namespace fusestep::cpu
