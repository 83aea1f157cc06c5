// CuPy's arrays, and others that have __cuda_array_interface__ (version 2 or 3):
// https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html
#pragma once

#include <Python.h>

#include <cstdint>

#include "arrays/array.h"

namespace fusestep::arrays {

// False for torch's tensors, which have it but say less than through DLPack.
bool has_cuda_interface(PyObject* object);

Array from_cuda_interface(PyObject* object, const Label& label, Expected expected);

// The stream on which the array's library works on the array's device at this moment.
std::uintptr_t cuda_interface_stream(PyObject* object, const Device& device);

}  // namespace fusestep::arrays
