// What a launch is handed: a list of parameters, by value.
//
// Kernel parameters may be 32 KB from CUDA 12.1 on. So a whole list goes along with the launch:
// nothing is copied to the device beforehand, nothing has to be kept until it has arrived, and a
// CUDA graph remembers it. Short lists have structs of their own, because all of a parameter is
// copied at every launch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "core/blocks.h"
#include "core/dtypes.h"
#include "core/random.h"
#include "core/tiling.h"
#include "gradients/sum_of_samples.h"
#include "rules/rule.h"

namespace fusestep::cuda {

inline constexpr std::size_t kMostParameterBytes = 32764;

inline constexpr int kThreads = 256;  // of a block
inline constexpr int kPerThread = 4;  // consecutive elements: 16 bytes of float32
inline constexpr int kWarpSize = 32;  // lanes of a reduction, too
inline constexpr int kWarps = kThreads / kWarpSize;
static_assert(kThreads * kPerThread == kTileSize, "a block moves one tile");

inline constexpr int kDTypeBits = 2;

// Integers that stand for parts of floats are known by their places. The lower half of a float has
// the size of this float, and state in blocks is read as that one.
constexpr DType stored(DType dtype) {
  if (is_in_blocks(dtype)) return DType::float32;
  return is_float(dtype) ? dtype : DType::bfloat16;
}

// Anchors and averages are float32 or float64, and so is most state: to say so saves a quarter of
// the machine code. No state is float16.
FUSESTEP_HOST_DEVICE DType wide(DType dtype) {
  return dtype == DType::float64 ? DType::float64 : DType::float32;
}
FUSESTEP_HOST_DEVICE DType of_state(DType dtype) {
  return dtype == DType::bfloat16 ? DType::bfloat16 : wide(dtype);
}

// One parameter with its gradient and state.
template <int operands, class TileNumber = std::uint32_t>
struct ItemOf {
  using Number = TileNumber;
  using DTypes = std::conditional_t<operands * kDTypeBits <= 16, std::uint16_t, std::uint32_t>;
  static constexpr int kOperands = operands;
  static constexpr int kTilesPerBlock = 1;

  std::byte* data[operands];
  std::int64_t size;                                     // elements
  Number first_tile;                                     // in the list
  std::uint32_t rule;                                    // its place among the rules
  std::uint8_t first_axis, axes, row_axis, column_axis;  // none where all is one dense run
  DTypes dtypes;                                         // so many bits for each operand
  bool is_aligned;  // four consecutive elements of every operand can be had at once
  bool in_double;   // what the rule computes in

  FUSESTEP_HOST_DEVICE Operand operand(int i) const {
    const Operand any = any_operand(i);
    return i < kState ? any : Operand{any.data, wide(any.dtype)};
  }

 protected:
  FUSESTEP_HOST_DEVICE Operand any_operand(int i) const {
    constexpr int kMask = (1 << kDTypeBits) - 1;
    return {data[i], static_cast<DType>(dtypes >> kDTypeBits * i & kMask)};
  }
};
using Item = ItemOf<kRuleOperands>;
static_assert(sizeof(Item) == 64);

// The same with room for an anchor (rules/anchor.h), whose reference and importance are the
// operands after the state that the rule has.
template <class Number = std::uint32_t, int operands = kRuleOperands + 2>
struct AnchoredItemOf : ItemOf<operands, Number> {
  double lambda, lr;  // the rate is in the table where there is one
  bool is_anchored, has_importance;
};
using AnchoredItem = AnchoredItemOf<>;

template <class Item>
inline constexpr bool kMayBeAnchored = requires(const Item& item) { item.is_anchored; };

// The same with what random numbers go by.
template <class Item>
struct RoundedOf : Item {
  RandomStream rounding;      // the stream is in the table where there is one
  std::int64_t first_number;  // of elements, as in Work::Numbers
};

template <class Item>
inline constexpr bool kIsRounded = requires(const Item& item) { item.rounding; };

// An item with room for all that a step can do: an average and a copy of the parameter and the
// lower half of its bits, which are the operands after those of an anchor; rounding at random;
// state of 16 bits; and a bound for gradients, which is the launch's. These have kernels of their
// own, because each kernel takes the registers of all that it can do.
template <class Number = std::uint32_t>
struct FullItemOf : RoundedOf<AnchoredItemOf<Number, kRuleOperands + 5>> {
  double decay;                // of the average
  bool is_numbered_by_stride;  // by those of an operand that comes last: kNumbers
  bool has_average, has_copy, has_lower_half;
  bool rounds_parameter, rounds_state;  // at random

  FUSESTEP_HOST_DEVICE Operand operand(int i) const { return this->any_operand(i); }
};
using FullItem = FullItemOf<>;
inline constexpr int kNumbers = kMaxOperands - 1;

template <class Item>
inline constexpr bool kIsFull = requires(const Item& item) { item.has_average; };

// The rows that move, and which values are added up for them: as in gradients/rows.h, in device
// memory, and null where that is empty.
struct RowList {
  const std::int64_t* row = nullptr;
  const std::int64_t* first = nullptr;
  const std::int64_t* source = nullptr;
  const std::int64_t* state = nullptr;
  const std::int64_t* number = nullptr;
  bool is_in_place = false;  // without sources: the values of a row are that row
};

// A table of which some rows move. The arrays and their size are those of row 0; dense rows have an
// axis, too, and are aligned if all are. Rows are short: what a block of other parameters is, a
// warp is here, with a chunk of a tile: first those of the first row that moves, then the next's.
template <class OneRow>
struct TableOf : OneRow {
  using Row = OneRow;
  static constexpr int kTilesPerBlock = kWarps;

  RowList rows;
  std::uint32_t tiles;                     // of a row
  std::uint32_t chunks;                    // of a tile
  std::int64_t stride[OneRow::kOperands];  // from one row to the next, in bytes
  Operand row_state;                       // of a row-wise rule
  std::int64_t row_state_stride;
};
using RowsItem = TableOf<AnchoredItemOf<std::int64_t>>;
using FullRowsItem = TableOf<FullItemOf<std::int64_t>>;
inline constexpr int kChunk = kWarpSize * kPerThread;

template <class Item>
inline constexpr bool kIsTable = requires { typename Item::Row; };

// A parameter whose state is in blocks (core/blocks.h): a table, if only of one row, and what a
// warp has of others, sixteen threads have of it, a block. All is in C order, and there is nothing
// besides.
inline constexpr int kLanesOfBlock = static_cast<int>(kBlockElements) / kPerThread;

template <class Item>
struct BlocksRowOf : Item {
  std::byte* powers[kMaxStates];
};
using BlocksRow = BlocksRowOf<RoundedOf<ItemOf<kRuleOperands, std::int64_t>>>;

template <class OneRow>
struct BlocksOf : TableOf<OneRow> {
  static constexpr int kTilesPerBlock = kThreads / kLanesOfBlock;
};
using BlocksItem = BlocksOf<BlocksRow>;

template <class Item>
inline constexpr bool kHasBlocks = requires(const Item& item) { item.powers; };

// The same with room for all that a step can do. Operands that are not in C order have the axes of
// the whole parameter, outermost first; then a row begins at the element that its number says, and
// strides from one row to the next are 0. Where all is in C order a row has one axis.
struct FullBlocksRow : BlocksRowOf<FullItemOf<std::int64_t>> {
  bool is_counted;            // by numbers, in the whole parameter
  std::int64_t gradient_row;  // then: elements of a row, where the gradient is one of rows
};
struct FullBlocksItem : BlocksOf<FullBlocksRow> {
  // A word for each block of each row that moves: which elements change their value, and not only
  // their state. Null: all of them.
  const std::int64_t* written;
};

// One of the samples that are there: which, and what its gradient is multiplied by.
struct WeighedSample {
  std::int64_t number;
  double times;
};

// A gradient that is to be made of those of samples. Of its two operands, the first, in place of a
// parameter, is the array in C order that it is made in.
struct MadeItem : ItemOf<2> {
  const WeighedSample* samples;  // in device memory
  std::int64_t count;
  gradients::Noise noise;
  bool has_noise;
};

// The second operand are the values of sample 0.
struct SamplesItem : MadeItem {
  std::int64_t stride;  // to the values of the next sample, in bytes
};

// One factor of outer products: an array of samples, of positions and of elements, with strides in
// bytes. Without data, it is 1.
struct Factor {
  Operand values;
  std::int64_t sample_stride = 0, position_stride = 0, element_stride = 0;
};
struct Factors {
  Factor error, x;
  std::int64_t columns, positions;
};

// The second operand is the first one. Samples are numbered with their positions.
struct OuterItem : MadeItem {
  Factors factors;
};

// Up to `items` parameters in a row, cut into tiles that are numbered through.
template <int items, int axes, class OneItem = Item>
struct List {
  using Item = OneItem;
  using Number = typename Item::Number;
  static constexpr int kItems = items, kAxes = axes;

  std::int32_t count;
  Number tiles;
  Item item[items];
  TileAxis axis[axes > 0 ? axes : 1];

  // The item that a tile belongs to: the last one that begins at it or before.
  FUSESTEP_HOST_DEVICE const Item& item_of(Number tile) const {
    int first = 0, last = count;
    while (last - first > 1) {
      const int middle = (first + last) / 2;
      (item[middle].first_tile <= tile ? first : last) = middle;
    }
    return item[first];
  }

  template <class One>
  FUSESTEP_HOST_DEVICE Tiling tiling(const One& one) const {
    return {axis + one.first_axis, one.axes, one.row_axis, one.column_axis};
  }
};

// An array may have 64 axes, of which each may be needed.
using ShortList = List<32, 0>;
using LongList = List<440, 0>;
using StridedList = List<256, 104>;
using AnchoredList = List<128, 0, AnchoredItem>;
using StridedAnchoredList = List<128, 104, AnchoredItem>;
using FullList = List<128, 0, FullItem>;
using StridedFullList = List<96, 64, FullItem>;
using RowsList = List<32, 64, RowsItem>;
using FullRowsList = List<32, 64, FullRowsItem>;
using BlocksList = List<96, 0, BlocksItem>;
using FullBlocksList = List<48, 64, FullBlocksItem>;
using SamplesList = List<64, 64, SamplesItem>;
using OuterList = List<16, 0, OuterItem>;

// How many different coefficients go along with a launch.
template <class ItemList>
inline constexpr int kRules = ItemList::kItems > 32 ? 48 : 8;

// Coefficients, and what else the gradients of the parameters that share them are multiplied by.
template <class Rule>
struct RuleEntry {
  alignas(Rule) unsigned char bytes[sizeof(Rule)];  // rules have no default constructor
  double gradient_factor;

  FUSESTEP_HOST_DEVICE const Rule& rule() const { return *reinterpret_cast<const Rule*>(bytes); }
};

// The same with the type forgotten: an entry of the table that Advance fills on the device.
struct alignas(16) AnyRuleEntry {
  unsigned char bytes[112];
  double lr;
  RandomStream rounding;
};
static_assert(sizeof(AnyRuleEntry) == 128);

// Whether a step happens, and how; worked out on the device.
struct Decision {
  double gradient_factor;  // of all gradients: unscaling and clipping
  std::uint32_t take;      // 0: the step is left out
};

struct Counters {
  std::int64_t steps, skipped_steps;
};

// A number in device memory, which others may write: a float32 or a float64.
struct Scalar {
  void* address = nullptr;
  bool is_double = false;

  FUSESTEP_HOST_DEVICE double read() const {
    return is_double ? *static_cast<const double*>(address) : *static_cast<const float*>(address);
  }
  FUSESTEP_HOST_DEVICE void write(double value) const {
    if (is_double)
      *static_cast<double*>(address) = value;
    else
      *static_cast<float*>(address) = static_cast<float>(value);
  }
};

}  // namespace fusestep::cuda
