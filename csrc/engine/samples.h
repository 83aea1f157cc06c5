// Gradients of samples, as work.
#pragma once

#include <cstdint>

#include "arrays/array.h"
#include "core/work.h"

namespace fusestep::engine {

struct Update;

// Sample 0's gradient for a parameter, to be summed; the next one's is a stride further, in bytes.
Work one_sample(const Update& update);
std::int64_t stride_of_samples(const Update& update);

// The same beside the array in C order that all of them are added up to, in place of a parameter.
Work one_sample_of(const Update& update, const arrays::Array& sum);

}  // namespace fusestep::engine
