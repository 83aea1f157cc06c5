// A thread's share of a tile: reading and writing it, whatever its type and layout.
//
// All operands are read before any of them is converted. A conversion waits for its operand; in
// between, nothing else would be asked of memory.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/dtypes.h"
#include "core/half.h"
#include "cuda/arguments.h"

namespace fusestep::cuda {

struct [[gnu::may_alias]] alignas(16) SixteenBytes {
  std::uint32_t word[4];
};
struct [[gnu::may_alias]] alignas(8) EightBytes {
  std::uint32_t word[2];
};
struct [[gnu::may_alias]] FourBytes {
  std::uint32_t word;
};
struct [[gnu::may_alias]] TwoBytes {
  std::uint16_t word;
};

template <class Bytes>
FUSESTEP_HOST_DEVICE Bytes load(const std::byte* from) {
  return *reinterpret_cast<const Bytes*>(from);
}

template <class Bytes>
FUSESTEP_HOST_DEVICE void store(std::byte* to, const Bytes& bytes) {
  *reinterpret_cast<Bytes*>(to) = bytes;
}

// One element as it is stored: its bits, in the lower of two words or in both.
struct Bits {
  std::uint32_t low, high;

  FUSESTEP_HOST_DEVICE static Bits load(const std::byte* from, std::int64_t size) {
    if (size == 4) return {cuda::load<FourBytes>(from).word, 0};
    if (size == 2) return {cuda::load<TwoBytes>(from).word, 0};
    const auto both = cuda::load<EightBytes>(from);
    return {both.word[0], both.word[1]};
  }

  FUSESTEP_HOST_DEVICE void store(std::byte* to, std::int64_t size) const {
    if (size == 4) return cuda::store(to, FourBytes{low});
    if (size == 2) return cuda::store(to, TwoBytes{static_cast<std::uint16_t>(low)});
    cuda::store(to, EightBytes{{low, high}});
  }

  template <class T>
  FUSESTEP_HOST_DEVICE T as(DType dtype) const {
    switch (dtype) {
      case DType::float32: return cast<T>(bit_cast<float>(low));
      case DType::float16: return cast<T>(Float16{static_cast<std::uint16_t>(low)});
      case DType::bfloat16: return cast<T>(BFloat16{static_cast<std::uint16_t>(low)});
      default: break;
    }
    return cast<T>(bit_cast<double>(std::uint64_t{high} << 32 | low));
  }

  template <class T>
  FUSESTEP_HOST_DEVICE static Bits of(DType dtype, T value) {
    switch (dtype) {
      case DType::float32: return {bit_cast<std::uint32_t>(cast<float>(value)), 0};
      case DType::float16: return {cast<Float16>(value).bits, 0};
      case DType::bfloat16: return {cast<BFloat16>(value).bits, 0};
      default: break;
    }
    const auto bits = bit_cast<std::uint64_t>(cast<double>(value));
    return {static_cast<std::uint32_t>(bits), static_cast<std::uint32_t>(bits >> 32)};
  }

  // The same, of a type of 16 bits, rounded at random.
  template <class T>
  FUSESTEP_HOST_DEVICE static Bits at_random(DType dtype, T value, std::uint32_t random) {
    if (dtype == DType::float16) return {cast_at_random<Float16>(value, random).bits, 0};
    return {cast_at_random<BFloat16>(value, random).bits, 0};
  }
};

// Four consecutive elements of each operand of a dense run, at once: 16 bytes of float32.
template <class Item>
class AdjacentElements {
 public:
  FUSESTEP_HOST_DEVICE static bool suit(const Item& item, std::uint32_t tile) {
    return item.is_aligned && (std::int64_t{tile} + 1) * kTileSize <= item.size;
  }

  FUSESTEP_HOST_DEVICE AdjacentElements(const Item& item, std::int64_t begin)
      : item_(item), begin_(begin) {}

  // Whichever of these suits the type; three, because one that serves all types would have to be
  // copied together, which waits for the load. Each element is set in turn, and not read again.
  class Values {
   public:
    FUSESTEP_HOST_DEVICE Bits get(int k, DType dtype) const {
      switch (item_size(dtype)) {
        case 4: return {low_.word[k], 0};
        case 2: return {half_.word[k / 2] >> 16 * (k % 2) & 0xffffu, 0};
        default: break;
      }
      const SixteenBytes& pair = k < 2 ? low_ : high_;
      return {pair.word[k % 2 * 2], pair.word[k % 2 * 2 + 1]};
    }

    FUSESTEP_HOST_DEVICE void set(int k, DType dtype, Bits bits) {
      switch (item_size(dtype)) {
        case 4: low_.word[k] = bits.low; return;
        case 2: {
          std::uint32_t& word = new_half_.word[k / 2];
          word = k % 2 == 0 ? bits.low : word | bits.low << 16;
          return;
        }
        default: break;
      }
      SixteenBytes& pair = k < 2 ? low_ : high_;
      pair.word[k % 2 * 2] = bits.low;
      pair.word[k % 2 * 2 + 1] = bits.high;
    }

   private:
    friend AdjacentElements;
    SixteenBytes low_, high_;
    EightBytes half_;
    EightBytes new_half_;  // an element is set while its neighbour in the word is still to be read
  };

  // By which an element is rounded.
  FUSESTEP_HOST_DEVICE std::int64_t number(int k) const { return item_.first_number + begin_ + k; }

  // So many bytes further on: in another row, say.
  FUSESTEP_HOST_DEVICE Values load(int operand, std::int64_t offset = 0) const {
    const std::int64_t size = item_size(item_.operand(operand).dtype);
    const std::byte* from = item_.data[operand] + begin_ * size + offset;
    Values values;
    if (size == 2) {
      values.half_ = cuda::load<EightBytes>(from);
    } else {
      values.low_ = cuda::load<SixteenBytes>(from);
      if (size == 8) values.high_ = cuda::load<SixteenBytes>(from + sizeof(SixteenBytes));
    }
    return values;
  }

  FUSESTEP_HOST_DEVICE void store(int operand, const Values& values,
                                  std::int64_t offset = 0) const {
    const std::int64_t size = item_size(item_.operand(operand).dtype);
    std::byte* to = item_.data[operand] + begin_ * size + offset;
    if (size == 2) return cuda::store(to, values.new_half_);
    cuda::store(to, values.low_);
    if (size == 8) cuda::store(to + sizeof(SixteenBytes), values.high_);
  }

 private:
  const Item& item_;
  std::int64_t begin_;
};

// A tile of a dense run: where its elements are, and how many.
template <class Item>
class DensePlace {
 public:
  static constexpr int kUnroll = 8;  // loads under way at a time, in a sum

  template <class ItemList>
  FUSESTEP_HOST_DEVICE DensePlace(const ItemList&, const Item& item, std::uint32_t tile)
      : item_(item), begin_(std::int64_t{tile} * kTileSize) {}

  FUSESTEP_HOST_DEVICE int count() const {
    const std::int64_t rest = item_.size - begin_;
    return static_cast<int>(rest < kTileSize ? rest : kTileSize);
  }
  FUSESTEP_HOST_DEVICE std::byte* at(int operand, int i, std::int64_t size) const {
    return item_.data[operand] + (begin_ + i) * size;
  }
  FUSESTEP_HOST_DEVICE std::int64_t number(int i) const { return item_.first_number + begin_ + i; }

 private:
  const Item& item_;
  std::int64_t begin_;
};

// A tile of strided arrays. Its elements are counted row after row.
template <class Item>
class StridedPlace {
 public:
  static constexpr int kUnroll = 2;

  template <class ItemList>
  FUSESTEP_HOST_DEVICE StridedPlace(const ItemList& list, const Item& item, std::uint32_t tile)
      : tiling_(list.tiling(item)) {
    FUSESTEP_UNROLL
    for (int i = 0; i < Item::kOperands; ++i) data_[i] = item.data[i];
    tiling_.for_each_axis(tile, [&](int k, std::int64_t begin, std::int64_t extent) {
      FUSESTEP_UNROLL
      for (int i = 0; i < Item::kOperands; ++i) data_[i] += begin * tiling_.axes[k].stride[i];
      if (k == tiling_.column_axis)
        columns_ = static_cast<unsigned>(extent);
      else if (k == tiling_.row_axis)
        rows_ = static_cast<unsigned>(extent);
    });
    if constexpr (kIsFull<Item>) find_number(item, tile);
  }

  FUSESTEP_HOST_DEVICE int count() const { return static_cast<int>(rows_ * columns_); }
  FUSESTEP_HOST_DEVICE std::byte* at(int operand, int i, std::int64_t) const {
    return data_[operand] + offset(operand, i);
  }
  FUSESTEP_HOST_DEVICE std::int64_t number(int i) const {
    return number_ + (is_numbered_by_stride_ ? offset(kNumbers, i) : i);
  }

 private:
  FUSESTEP_HOST_DEVICE std::int64_t offset(int operand, int i) const {
    const unsigned row = static_cast<unsigned>(i) / columns_;
    const unsigned column = static_cast<unsigned>(i) % columns_;
    return row * tiling_.axes[tiling_.row_axis].stride[operand] +
           column * tiling_.axes[tiling_.column_axis].stride[operand];
  }

  FUSESTEP_HOST_DEVICE void find_number(const Item& item, std::uint32_t tile) {
    is_numbered_by_stride_ = item.is_numbered_by_stride;
    number_ = item.first_number;
    if (!is_numbered_by_stride_)
      number_ += tile * kTileSize;
    else
      tiling_.for_each_axis(tile, [&](int k, std::int64_t begin, std::int64_t) {
        number_ += begin * tiling_.axes[k].stride[kNumbers];
      });
  }

  Tiling tiling_;
  std::byte* data_[Item::kOperands];
  unsigned rows_ = 1, columns_ = 1;
  std::int64_t number_ = 0;  // of the tile's first element
  bool is_numbered_by_stride_ = false;
};

// Four elements of each operand, as far apart as there are threads at work on the tile: so
// neighbouring threads have neighbouring elements, which need not be aligned, nor all be there.
template <int threads, class Item, class Place>
class SpreadElements {
 public:
  FUSESTEP_HOST_DEVICE SpreadElements(const Item& item, const Place& place, int first)
      : item_(item), place_(place), first_(first) {}

  class Values {
   public:
    FUSESTEP_HOST_DEVICE Bits get(int k, DType) const { return bits_[k]; }
    FUSESTEP_HOST_DEVICE void set(int k, DType, Bits bits) { bits_[k] = bits; }

   private:
    friend SpreadElements;
    Bits bits_[kPerThread];
  };

  FUSESTEP_HOST_DEVICE std::int64_t number(int k) const { return place_.number(index(k)); }

  FUSESTEP_HOST_DEVICE Values load(int operand, std::int64_t offset = 0) const {
    const std::int64_t size = item_size(item_.operand(operand).dtype);
    Values values;
    FUSESTEP_UNROLL
    for (int k = 0; k < kPerThread; ++k) {
      values.bits_[k] = {0, 0};
      if (has(k)) values.bits_[k] = Bits::load(place_.at(operand, index(k), size) + offset, size);
    }
    return values;
  }

  FUSESTEP_HOST_DEVICE void store(int operand, const Values& values,
                                  std::int64_t offset = 0) const {
    const std::int64_t size = item_size(item_.operand(operand).dtype);
    FUSESTEP_UNROLL
    for (int k = 0; k < kPerThread; ++k)
      if (has(k)) values.bits_[k].store(place_.at(operand, index(k), size) + offset, size);
  }

 protected:
  FUSESTEP_HOST_DEVICE bool has(int k) const { return index(k) < place_.count(); }
  FUSESTEP_HOST_DEVICE int index(int k) const { return first_ + k * threads; }

  const Item& item_;
  const Place& place_;
  int first_;
};

template <int threads, class Item, class Place>
FUSESTEP_HOST_DEVICE SpreadElements<threads, Item, Place> spread(const Item& item,
                                                                 const Place& place, int first) {
  return {item, place, first};
}

// Calls visit(elements) with a thread's share of a tile of an item.
template <class ItemList, class Item, class Visit>
FUSESTEP_HOST_DEVICE void visit_elements(const ItemList& list, const Item& item, std::uint32_t tile,
                                         int thread, Visit visit) {
  if constexpr (ItemList::kAxes > 0) {
    const StridedPlace place(list, item, tile);
    visit(spread<kThreads>(item, place, thread));
  } else if (AdjacentElements<Item>::suit(item, tile)) {
    visit(AdjacentElements(item, std::int64_t{tile} * kTileSize + thread * kPerThread));
  } else {
    const DensePlace place(list, item, tile);
    visit(spread<kThreads>(item, place, thread));
  }
}

}  // namespace fusestep::cuda
