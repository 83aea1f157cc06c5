// Arrays of other libraries, through __dlpack__.
#pragma once

#include <Python.h>

#include "arrays/array.h"

namespace fusestep::arrays {

// Whether an object is one of torch's, or of CuPy's, by the name of its type's module.
bool is_torch(PyObject* object);
bool is_cupy(PyObject* object);

Array from_dlpack(PyObject* object, const Label& label, Expected expected);

// The stream on which the library of `exporter` works on a GPU at this moment, where it is torch's;
// else the default stream.
std::uintptr_t exporter_stream(PyObject* exporter, const Device& device);

// False where `exporter`, whose memory `array` is, has meanwhile got other memory or another shape.
// DLPack keeps memory alive, but a torch tensor may be given another (p.data = ..., model.to(...)).
bool exporter_is_current(PyObject* exporter, const Array& array);

}  // namespace fusestep::arrays
