// Moves a part of a parameter: selected elements, each by the rule for as many updates as its block
// has had.
//
// Elements of a tile that lie together are moved where they are, like a dense parameter. Where many
// move, here and there, a copy of the whole tile is moved and what is meant is written back; a few
// scattered ones are gathered first. So the rule's loop always meets a run of elements.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>

#include "core/tile_bits.h"
#include "core/work.h"
#include "cpu/ahead.h"
#include "cpu/mover.h"
#include "cpu/part_reader.h"
#include "cpu/places.h"
#include "selections/part.h"

namespace fusestep::cpu {

// The coefficients for each number of updates, the last few of which are kept.
class RulesByProgress {
 public:
  RulesByProgress(const selections::Part& part, DType compute) : part_(part), compute_(compute) {}

  const rules::Coefficients& after(const rules::Progress& before) {
    if (!known_) known_ = std::make_unique_for_overwrite<Known[]>(kKnown);
    const std::size_t place = static_cast<std::size_t>(before.step) % kKnown;
    Known& known = known_[place];
    if (!is_set_[place] || known.before != before) {
      is_set_[place] = true;
      known.before = before;
      known.coefficients =
          part_.rule->coefficients(part_.rule->advance(before), compute_, part_.lr, part_.states);
    }
    return known.coefficients;
  }

 private:
  static constexpr std::size_t kKnown = 128;
  struct Known {
    rules::Progress before;
    rules::Coefficients coefficients;
  };
  const selections::Part& part_;
  DType compute_;
  std::unique_ptr<Known[]> known_;  // not cleared: that takes as long as moving several blocks
  std::array<bool, kKnown> is_set_{};
};

template <class T>
class PartUpdater : Mover<T> {
 public:
  PartUpdater(const KernelTable& kernels, const Work& work, const StepOptions& options)
      : Mover<T>(kernels, work, options),
        part_(*work.part),
        reader_(this->kernels_, part_),
        rules_(part_, work.compute),
        ahead_(part_) {}

  void operator()(std::int64_t first, std::int64_t last) {
    if (goes_straight_on()) return move_straight_on(first, last);
    TileBits next = first < last ? part_.moved(first) : TileBits{};
    for (std::int64_t i = first; i < last; ++i) {
      const TileBits moved = next;
      reader_.expect(i, last);
      ahead_.aim();
      if (i + 1 < last) ahead_.aim(part_.tile(i + 1), next = part_.moved(i + 1));
      update_tile(part_.tile(i), moved);
    }
  }

  // How far each element of a tile would move, were it selected.
  void find_sizes(std::int64_t tile, T* sizes) {
    sizes_ = sizes;
    const TileBits all = TileBits::first(part_.size_of(tile));
    move_tile(tile, all, all);
  }

 private:
  using Mover<T>::access_, Mover<T>::rule_, Mover<T>::work_, Mover<T>::loop_, Mover<T>::factor_,
      Mover<T>::anchor_;
  using Mover<T>::is_anchored, Mover<T>::run_over, Mover<T>::is_moved, Mover<T>::call_loop,
      Mover<T>::call_loop_from_line, Mover<T>::follow;
  using Buffer = T[kMaxOperands][kTileSize];
  using Elements = std::array<T*, kMaxOperands>;

  // A shorter run than this is not worth a call of the rule's loop.
  static constexpr std::int64_t kLongRun = 16;

  // But state in blocks is only written as such.
  std::int64_t least_run() const { return part_.has_blocks ? 1 : kLongRun; }

  // Where one of so many elements of a tile moves, moving a copy of all is quicker than gathering.
  static constexpr std::int64_t kOneOf = 16;

  // From this size on it is worth starting at a cache line: 1.08 times as fast in drawn blocks.
  static constexpr std::int64_t kAlignedRun = 512;

  void update_tile(std::int64_t tile, const TileBits& moved) {
    if (!moved.any()) return;
    move_tile(tile, moved, part_.written(tile, moved));
    if (work_.followers.any()) follow_tile();
    if (part_.counts_by_tile()) part_.progress->advance(*part_.rule, first_, moved);
  }

  // What follows a parameter follows what is kept of it.
  void follow_tile() {
    alignas(kCacheLine) T buffer[kTileSize];
    written_.for_each_run([&](std::int64_t begin, std::int64_t end) {
      follow_run(first_ + begin, first_ + end,
                 reader_.read(kParameter, first_ + begin, end - begin, buffer));
    });
  }

  // Elements of one tile, wherever those of each operand lie.
  void follow_run(std::int64_t begin, std::int64_t end, const T* parameter) const {
    while (begin < end) {
      std::int64_t some = end - begin;
      for (int i = work_.operands_read; i < part_.operands; ++i)
        some = std::min(some, operand(i).stretch(begin));
      follow(parameter, [&](int i) { return operand(i).block(begin, some); });
      begin += some;
      parameter += some;
    }
  }

  const FlatArray& operand(int i) const { return part_.operand[static_cast<std::size_t>(i)]; }

  void move_tile(std::int64_t tile, const TileBits& moved, const TileBits& written) {
    first_ = tile * kTileSize;
    size_ = part_.size_of(tile);
    moved_ = moved;
    written_ = written;
    const auto [begin, end] = moved.first_run();  // often the only one, and of equal progress
    if (end - begin >= least_run() && !sizes_ && moved.none_from(end) &&
        end_of_equal(begin, end) == end)
      return move_run(begin, end);
    const std::int64_t count = moved.count();
    const bool is_scattered = count < kLongRun * moved.runs(), are_many = kOneOf * count >= size_;
    if ((sizes_ || (is_scattered && are_many)) && has_equal_progress()) return move_copy();
    Places places;
    moved.for_each_run([&](std::int64_t begin, std::int64_t end) {
      while (begin < end) {
        const std::int64_t equal = end_of_equal(begin, end);
        if (equal - begin >= least_run() && !sizes_)
          move_run(begin, equal);
        else
          places.add(begin, equal);
        begin = equal;
      }
    });
    if (places.count() > 0) move_places(places);
  }

  // ---- all of a dense parameter, by a gradient that is made as it is used ----

  // Then longer runs than a tile are moved at a time, which takes a fifth off a large step.
  bool goes_straight_on() const {
    if (!part_.makes_gradients() || !part_.moves_all()) return false;
    if (is_anchored() && work_.anchor.importance == 0) return false;  // ones, as many as a tile has
    for (int i = 0; i < work_.operands_read; ++i)
      if (i != kGradient && !is_one_run(operand(i))) return false;
    return true;
  }

  static bool is_one_run(const FlatArray& array) {
    return array.is_one_stretch() && TileAccess<T>::in_place(array.block(0, 1));
  }

  void move_straight_on(std::int64_t first, std::int64_t last) {
    alignas(kCacheLine) T piece[PartReader<T>::kPiece];
    const std::int64_t end = std::min(last * kTileSize, part_.size);
    const std::int64_t size = end - first * kTileSize;
    std::unique_ptr<T[]> long_piece;  // too long for a thread's stack
    if (reader_.makes_long_pieces() && size > PartReader<T>::kPiece)
      long_piece = std::make_unique_for_overwrite<T[]>(
          static_cast<std::size_t>(std::min(size, PartReader<T>::kLongPiece)));
    T* const buffer = long_piece ? long_piece.get() : piece;
    reader_.expect(first, last);
    for (std::int64_t begin = first * kTileSize; begin < end;) {
      const auto [gradient, count] = reader_.gradient(begin, end, factor_, buffer);
      Elements at{};
      for (int i = 0; i < work_.operands_read; ++i)
        at[i] = reinterpret_cast<T*>(operand(i).at(begin));
      at[kGradient] = const_cast<T*>(gradient.values);
      if (count >= kAlignedRun)
        call_loop_from_line(rule_, at, count, gradient.factor);
      else
        call_loop(rule_, at, count, gradient.factor);
      if (work_.followers.any()) follow_tiles(begin, begin + count, at[kParameter]);
      begin += count;
    }
  }

  void follow_tiles(std::int64_t begin, std::int64_t end, const T* parameter) const {
    for (; begin < end; begin += kTileSize, parameter += kTileSize)
      follow_run(begin, std::min(begin + kTileSize, end), parameter);
  }

  // ---- how far blocks have come ----

  rules::Progress progress(std::int64_t place) const { return part_.progress->of(first_ + place); }

  std::int64_t end_of_equal(std::int64_t begin, std::int64_t end) const {
    if (!part_.progress) return end;
    return part_.progress->end_of_equal(first_ + begin, first_ + end) - first_;
  }

  bool has_equal_progress() const {
    if (!part_.progress) return true;
    return part_.progress->is_equal(first_, moved_);
  }

  const void* rule_at(std::int64_t place) {
    return part_.progress ? rules_.after(progress(place)).bytes : rule_;
  }

  // ---- elements that lie together, moved where they are ----

  void move_run(std::int64_t begin, std::int64_t end) {
    alignas(kCacheLine) Buffer buffer;
    const std::int64_t size = end - begin;
    Elements at = read(begin, end, buffer);
    const bool keeps_some = !written_.all(begin, end);
    if (keeps_some) at[kParameter] = copied(at[kParameter], size, buffer[kParameter]);
    call_loop_over_run(rule_at(begin), at, size, at[kParameter] != buffer[kParameter]);
    TileBits here;
    here.set(begin, end);
    for (int i = 0; i < work_.rule_operands; ++i)
      if (is_moved(i) && at[i] == buffer[i]) store(i, here & written_to(i), at[i] - begin);
  }

  void call_loop_over_run(const void* rule, Elements at, std::int64_t size, bool is_in_place) {
    for (; ahead_.has_aim() && size > 0; size -= Ahead::kPiece) {
      ahead_.ask();
      call_loop(rule, at, std::min(size, Ahead::kPiece));
      for (T*& elements : at) elements += Ahead::kPiece;
    }
    if (size <= 0) return;
    if (size >= kAlignedRun && is_in_place)
      call_loop_from_line(rule, at, size);
    else
      call_loop(rule, at, size);
  }

  // ---- many of a tile, here and there ----

  void move_copy() {
    alignas(kCacheLine) Buffer buffer;
    alignas(kCacheLine) T moved[kTileSize];
    Elements at = read(0, size_, buffer);
    const T* const present = at[kParameter];
    at[kParameter] = copied(present, size_, moved);
    for (int i = kState; i < work_.rule_operands; ++i)
      if (is_moved(i)) at[i] = copied(at[i], size_, buffer[i]);
    call_loop(rule_at(moved_.first_set()), at, size_);
    if (sizes_) {
      for (std::int64_t i = 0; i < size_; ++i) sizes_[i] = std::abs(moved[i] - present[i]);
      return;
    }
    for (int i = 0; i < work_.rule_operands; ++i)
      if (is_moved(i)) write_back(i, written_to(i), at[i]);
  }

  void write_back(int operand, const TileBits& bits, const T* values) const {
    const FlatArray& array = this->operand(operand);
    T* const elements = array.stretch(first_) >= size_
                            ? TileAccess<T>::in_place(array.block(first_, size_))
                            : nullptr;
    if (!elements) return store(operand, bits, values);
    this->kernels_.select(bits.bytes().data(), values, elements, size_);
  }

  // ---- a few of a tile ----

  void move_places(Places& places) {
    if (part_.progress)
      places.sort_by(
          [&](std::int64_t place) { return static_cast<std::uint32_t>(progress(place).step); });
    alignas(kCacheLine) Buffer buffer;
    alignas(kCacheLine) T before[kTileSize];
    const std::int64_t count = places.count();
    Elements at{};
    for (int i = 0; i < work_.operands_read; ++i) gather(i, places, at[i] = buffer[i]);
    if (sizes_) std::copy_n(at[kParameter], count, before);
    for (std::int64_t begin = 0; begin < count;) {
      const std::int64_t end = end_of_equal(places, begin);
      call_loop(rule_at(places[begin]), at, end - begin);
      for (T*& elements : at) elements += end - begin;
      begin = end;
    }
    if (sizes_) {
      for (std::int64_t k = 0; k < count; ++k)
        sizes_[places[k]] = std::abs(buffer[kParameter][k] - before[k]);
      return;
    }
    for (int i = 0; i < work_.rule_operands; ++i)
      if (is_moved(i)) scatter(i, places, buffer[i]);
  }

  std::int64_t end_of_equal(const Places& places, std::int64_t begin) const {
    if (!part_.progress) return places.count();
    std::int64_t end = begin + 1;
    while (end < places.count() && progress(places[end]) == progress(places[begin])) ++end;
    return end;
  }

  // Calls visit(k, address) with the memory of each place.
  template <class Visit>
  void for_each_address(int operand, const Places& places, Visit visit) const {
    const FlatArray& array = this->operand(operand);
    if (array.stretch(first_) >= size_) {
      const Block tile = array.block(first_, size_);
      for (std::int64_t k = 0; k < places.count(); ++k)
        visit(k, tile.data + places[k] * tile.column_stride);
    } else {
      for (std::int64_t k = 0; k < places.count(); ++k) visit(k, array.at(first_ + places[k]));
    }
  }

  void gather(int operand, const Places& places, T* values) {
    const DType dtype = this->operand(operand).dtype();
    if ((operand == kGradient && part_.makes_gradients()) || is_in_blocks(dtype)) {
      T buffer[kTileSize];
      const T* const of_tile = reader_.read(operand, first_, size_, buffer);
      for (std::int64_t k = 0; k < places.count(); ++k) values[k] = of_tile[places[k]];
    } else if (is_split(operand)) {
      for (std::int64_t k = 0; k < places.count(); ++k)
        reader_.read(kParameter, first_ + places[k], 1, values + k);
    } else if (dtype == kComputeType<T>) {
      for_each_address(operand, places, [&](std::int64_t k, const std::byte* at) {
        std::memcpy(values + k, at, sizeof(T));
      });
    } else {
      for_each_address(operand, places, [&](std::int64_t k, std::byte* at) {
        access_.load({at, dtype, 1, 1, 0, item_size(dtype)}, values + k);
      });
    }
  }

  void scatter(int operand, const Places& places, const T* values) const {
    const DType dtype = this->operand(operand).dtype();
    const TileBits& bits = written_to(operand);
    for_each_address(operand, places, [&](std::int64_t k, std::byte* at) {
      if (!bits[places[k]]) return;
      if (dtype == kComputeType<T>) {
        std::memcpy(at, values + k, sizeof(T));
        return;
      }
      const auto block_of = [&](int i) -> Block {
        if (i != operand) return this->operand(i).block(first_ + places[k], 1);
        return {at, dtype, 1, 1, 0, item_size(dtype)};
      };
      Mover<T>::store(operand, values + k, block_of, tile(), places[k]);
    });
  }

  // ---- memory ----

  // Elements of a tile: where they are, or copied to the buffer.
  Elements read(std::int64_t begin, std::int64_t end, Buffer& buffer) {
    Elements at{};
    for (int i = 0; i < work_.operands_read; ++i)
      at[i] = reader_.read(i, first_ + begin, end - begin, buffer[i]);
    return at;
  }

  static T* copied(const T* elements, std::int64_t size, T* buffer) {
    if (elements != buffer) std::copy_n(elements, size, buffer);
    return buffer;
  }

  const TileBits& written_to(int operand) const {
    return operand == kParameter ? written_ : moved_;
  }

  // `values` are by place.
  void store(int operand, const TileBits& bits, const T* values) const {
    bits.for_each_run([&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t some; begin < end; begin += some) {
        const std::int64_t at = first_ + begin;
        some = std::min(end - begin, this->operand(operand).stretch(at));
        if (is_split(operand)) some = std::min(some, this->operand(part_.lower_half).stretch(at));
        const auto block_of = [&](int i) { return this->operand(i).block(at, some); };
        Mover<T>::store(operand, values + begin, block_of, tile(), begin);
      }
    });
  }

  std::int64_t tile() const { return first_ / kTileSize; }
  bool is_split(int operand) const { return operand == kParameter && part_.lower_half; }

  const selections::Part& part_;
  PartReader<T> reader_;
  RulesByProgress rules_;
  Ahead ahead_;

  // Of the tile under way.
  std::int64_t first_ = 0, size_ = 0;
  TileBits moved_, written_;
  T* sizes_ = nullptr;  // where nothing is to change: how far it would move
};

}  // namespace fusestep::cpu
