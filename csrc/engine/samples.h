// Gradients of samples, as work.
#pragma once

#include <cstdint>
#include <optional>

#include "arrays/array.h"
#include "core/work.h"
#include "cuda/arguments.h"

namespace fusestep::engine {

struct Update;

// Sample 0's gradient for a parameter, to be summed; the next one's is a stride further, in bytes.
Work one_sample(const Update& update);
std::int64_t stride_of_samples(const Update& update);

// All of them, and the array in C order that they are added up to.
struct SamplesToAdd {
  Work work;
  std::int64_t stride = 0;
  std::optional<cuda::Factors> factors = std::nullopt;
};
SamplesToAdd samples_to_add(const Update& update, const arrays::Array& sum);

}  // namespace fusestep::engine
