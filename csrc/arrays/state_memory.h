// Memory for state tensors that says when torch has let go of it.
//
// A step must know where the state lies now: users replace it, share_memory_() moves it, p.data =
// ... works for state, too. Asking torch costs 40 ns a tensor, and state is most of the tensors. So
// the memory of state that we make is ours: torch holds it through DLPack and tells us, whatever
// the reason, when no tensor uses it any more. As long as it has not, and the state dict still has
// the very tensor we put there, the address holds. Other tensors are asked at every step.
//
// What this misses: a state tensor that is given other memory while something else keeps the old
// memory alive, or in place another shape. The step then goes on as before, in the old memory.
#pragma once

#include <pybind11/pybind11.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "arrays/dlpack_abi.h"

namespace fusestep::arrays {

class StateMemory {
 public:
  // A DLPack capsule of a new tensor, not initialised; strides are in elements.
  static pybind11::capsule allocate(const std::vector<std::int64_t>& shape,
                                    const std::vector<std::int64_t>& strides,
                                    dlpack::DataType dtype);

  // The memory that starts here, or null if it is not ours.
  static std::shared_ptr<const StateMemory> at(const std::byte* data);

  bool is_in_use() const { return in_use_.load(std::memory_order_acquire); }

 private:
  struct Export;
  std::atomic<bool> in_use_{true};
};

}  // namespace fusestep::arrays
