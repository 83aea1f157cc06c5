// The extension with the CUDA kernels, if this build has one.
#pragma once

#include "cuda/driver.h"

namespace fusestep::arrays {

bool has_cuda_driver();

// Throws std::runtime_error where there is none. Needs the GIL.
const cuda::Driver& cuda_driver();

}  // namespace fusestep::arrays
