// Arrays of other libraries, through __dlpack__.
#pragma once

#include <Python.h>

#include "arrays/array.h"

namespace fusestep::arrays {

Array from_dlpack(PyObject* object, const Label& label);

// False where `exporter`, whose memory `array` is, has meanwhile got other memory or another shape.
// DLPack keeps memory alive, but a torch tensor may be given another (p.data = ..., model.to(...)).
bool exporter_is_current(PyObject* exporter, const Array& array);

}  // namespace fusestep::arrays
