// State in 8 bits on a GPU: sixteen threads for each block, with four elements each.
//
// The power of a block is worked out from what all sixteen have moved. So state is read and moved
// with the rest of a thread's share (share.h), and stored afterwards, by all of them together.
#pragma once

#include <cstdint>

#include "core/blocks.h"
#include "core/random.h"
#include "cuda/elements.h"
#include "cuda/rows.h"
#include "cuda/warp.h"

namespace fusestep::cuda {

// ---- codes of state that has a sign, or has none ------------------------------------------------

FUSESTEP_HOST_DEVICE float decoded(bool is_signed, std::uint8_t code, SharedPower power) {
  return is_signed ? SmallFloat<true>::decode_any(code, power.value())
                   : SmallFloat<false>::decode_any(code, power.value());
}

FUSESTEP_HOST_DEVICE std::byte encoded(bool is_signed, float x, SharedPower power,
                                       std::uint32_t random) {
  return static_cast<std::byte>(is_signed
                                    ? SmallFloat<true>::encode_any(x, power.inverse(), random)
                                    : SmallFloat<false>::encode_any(x, power.inverse(), random));
}

FUSESTEP_HOST_DEVICE SharedPower shared_power(bool is_signed, std::uint32_t largest) {
  return is_signed ? SharedPower::of<true>(largest) : SharedPower::of<false>(largest);
}
FUSESTEP_HOST_DEVICE SharedPower shared_power_of_any(bool is_signed, std::uint32_t finite) {
  return is_signed ? SharedPower::of_any<true>(finite) : SharedPower::of_any<false>(finite);
}

// ---- what a thread has of a block ---------------------------------------------------------------

// Elements of a row from one on, counted in C order.
template <class Row>
class PlaceInCOrder {
 public:
  template <class ItemList>
  FUSESTEP_HOST_DEVICE PlaceInCOrder(const ItemList& list, const Row& row, std::int64_t begin)
      : row_(row), axes_(list.axis + row.first_axis), begin_(begin) {}

  FUSESTEP_HOST_DEVICE int count() const {
    const std::int64_t rest = row_.size - begin_;
    return static_cast<int>(rest < kBlockElements ? rest : kBlockElements);
  }
  FUSESTEP_HOST_DEVICE std::int64_t number(int i) const { return row_.first_number + begin_ + i; }

  FUSESTEP_HOST_DEVICE std::byte* at(int operand, int i, std::int64_t size) const {
    if constexpr (kIsFull<Row>)
      return at_element(operand, row_.is_counted ? number(i) : begin_ + i);
    else
      return row_.data[operand] + (begin_ + i) * size;
  }

  // In a piece of state: the codes of the block, and the power that they share.
  FUSESTEP_HOST_DEVICE std::byte* codes(int state) const {
    return row_.data[kState + state] + first_of_state();
  }
  FUSESTEP_HOST_DEVICE std::byte* power(int state) const {
    return row_.powers[state] + first_of_state() / kBlockElements;
  }

 private:
  FUSESTEP_HOST_DEVICE std::byte* at_element(int operand, std::int64_t element) const {
    if (operand == kGradient && row_.gradient_row != 0) element %= row_.gradient_row;
    std::byte* address = row_.data[operand];
    FUSESTEP_DO_NOT_UNROLL
    for (int k = row_.axes; k-- > 1; element /= axes_[k].extent)
      address += element % axes_[k].extent * axes_[k].stride[operand];
    return address + element * axes_[0].stride[operand];
  }

  FUSESTEP_HOST_DEVICE std::int64_t first_of_state() const {
    if constexpr (kIsFull<Row>)
      if (row_.is_counted) return number(0);
    return begin_;
  }

  const Row& row_;
  const TileAxis* axes_;
  std::int64_t begin_;
};

// A thread's share of a block, of which not all elements need be there, nor change their value.
// What state becomes is not stored but goes to `moved`, to be encoded when all of the block has
// been there.
template <class Rule, int states, class Row>
class ElementsOfBlock : public SpreadElements<kLanesOfBlock, Row, PlaceInCOrder<Row>> {
  using Spread = SpreadElements<kLanesOfBlock, Row, PlaceInCOrder<Row>>;

 public:
  struct Moved {
    float state[states][kPerThread];
  };
  using Spread::has, Spread::index;

  // Codes are decoded when they are asked for, and by then all operands are under way.
  class Values : public Spread::Values {
   public:
    FUSESTEP_HOST_DEVICE Bits get(int k, DType dtype) const {
      const Bits bits = as_set(k, dtype);
      if (!is_code_) return bits;
      const float x = decoded(is_signed_, static_cast<std::uint8_t>(bits.low), power_);
      return {bit_cast<std::uint32_t>(x), 0};
    }
    FUSESTEP_HOST_DEVICE Bits as_set(int k, DType dtype) const {
      return Spread::Values::get(k, dtype);
    }

   private:
    friend ElementsOfBlock;
    bool is_code_ = false, is_signed_ = false;
    SharedPower power_{0};
  };

  FUSESTEP_HOST_DEVICE ElementsOfBlock(const Row& row, const PlaceInCOrder<Row>& place, int lane,
                                       std::int64_t written, Moved& moved)
      : Spread(row, place, lane), written_(written), moved_(moved) {}

  FUSESTEP_HOST_DEVICE static constexpr bool is_signed(int state) {
    return Rule::is_signed(static_cast<std::size_t>(state));
  }

  FUSESTEP_HOST_DEVICE Values load(int operand, std::int64_t offset = 0) const {
    Values values;
    if (!is_state(operand)) {
      static_cast<typename Spread::Values&>(values) = Spread::load(operand, offset);
      return values;
    }
    const int state = operand - kState;
    values.is_code_ = true;
    values.is_signed_ = is_signed(state);
    values.power_ = {static_cast<std::uint8_t>(*this->place_.power(state))};
    FUSESTEP_UNROLL
    for (int k = 0; k < kPerThread; ++k) {
      const auto bits = has(k) ? static_cast<std::uint32_t>(*code(state, k)) : 0u;
      values.set(k, DType::float32, {bits, 0});
    }
    return values;
  }

  FUSESTEP_HOST_DEVICE void store(int operand, const Values& values,
                                  std::int64_t offset = 0) const {
    const DType dtype = this->item_.operand(operand).dtype;
    const std::int64_t size = item_size(dtype);
    FUSESTEP_UNROLL
    for (int k = 0; k < kPerThread; ++k) {
      const Bits bits = values.as_set(k, dtype);
      if (is_state(operand))
        moved_.state[operand - kState][k] = has(k) ? bit_cast<float>(bits.low) : 0.0f;
      else if (has(k) && written_ >> this->index(k) & 1)
        bits.store(this->place_.at(operand, this->index(k), size) + offset, size);
    }
  }

  FUSESTEP_HOST_DEVICE std::byte* code(int state, int k) const {
    return this->place_.codes(state) + this->index(k);
  }

 private:
  FUSESTEP_HOST_DEVICE static bool is_state(int operand) {
    return operand >= kState && operand < kState + states;
  }

  std::int64_t written_;  // a bit for each element of the block
  Moved& moved_;
};

// ---- what all of them have of it ----------------------------------------------------------------

template <class Rule, int states, class Row>
class SharesOfBlock {
 public:
  using Elements = ElementsOfBlock<Rule, states, Row>;

  FUSESTEP_HOST_DEVICE SharesOfBlock(int thread, const Row& row, const PlaceInCOrder<Row>& place,
                                     std::int64_t written)
      : thread_(thread), row_(row), place_(place), written_(written) {}

  // Calls visit(elements) with each share.
  template <class Visit>
  FUSESTEP_HOST_DEVICE void for_each(Visit visit) {
    in_each_lane_of_block(thread_, [&](int lane) { visit(elements(lane)); });
  }

  // Encodes the state that has moved.
  FUSESTEP_HOST_DEVICE void store_state(const RandomStream& stream) {
    FUSESTEP_UNROLL
    for (int i = 0; i < states; ++i) {
      const bool is_signed = Elements::is_signed(i);
      const SharedPower power = power_of_state(i);
      const std::int64_t number = place_.number(0);
      const TileRandom random = TileRandom::of(stream, kState + i, number / kTileSize)
                                    .at(static_cast<std::uint32_t>(number % kTileSize));
      in_each_lane_of_block(thread_, [&](int lane) {
        const Elements share = elements(lane);
        FUSESTEP_UNROLL
        for (int k = 0; k < kPerThread; ++k) {
          if (!share.has(k)) continue;
          const std::uint32_t bits = random.bits(static_cast<std::uint32_t>(share.index(k)));
          const float x = moved_.of(lane).state[i][k];
          *share.code(i, k) = encoded(is_signed, x, power, bits);
        }
        if (lane == 0) *place_.power(i) = static_cast<std::byte>(power.field);
      });
    }
  }

 private:
  FUSESTEP_HOST_DEVICE Elements elements(int lane) {
    return {row_, place_, lane, written_, moved_.of(lane)};
  }

  FUSESTEP_HOST_DEVICE SharedPower power_of_state(int i) {
    constexpr std::uint32_t kAll = ~0u;
    const std::uint32_t most = largest(i, kAll);
    if (most < SharedPower::kHuge) return shared_power(Elements::is_signed(i), most);
    return shared_power_of_any(Elements::is_signed(i), largest(i, kInfinityBits));
  }

  // The largest magnitude below some bits.
  FUSESTEP_HOST_DEVICE std::uint32_t largest(int i, std::uint32_t end) {
    return largest_in_block(thread_, [&](int lane) {
      std::uint32_t most = 0;
      FUSESTEP_UNROLL
      for (int k = 0; k < kPerThread; ++k) {
        const std::uint32_t magnitude = magnitude_bits(moved_.of(lane).state[i][k]);
        most = larger(most, magnitude < end ? magnitude : 0u);
      }
      return most;
    });
  }

  int thread_;
  const Row& row_;
  const PlaceInCOrder<Row>& place_;
  std::int64_t written_;
  OfEachLane<typename Elements::Moved> moved_;
};

}  // namespace fusestep::cuda
