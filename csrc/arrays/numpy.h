// NumPy arrays, by the fields of the array object.
#pragma once

#include <Python.h>

#include <string>

#include "arrays/array.h"

namespace fusestep::arrays {

struct NumpyFields {
  std::byte* data;
  std::size_t ndim;
  const std::int64_t* shape;
  const std::int64_t* strides;
  bool writable, c_contiguous;
  PyObject* descriptor;  // the dtype object
};

NumpyFields numpy_fields(PyObject* array);

bool is_numpy(PyObject* object);

// A numpy.ma.MaskedArray, whose mask would be ignored.
bool is_masked(PyObject* object);
Array from_numpy(PyObject* object, const Label& label, Expected expected);

// A NumPy scalar, such as a reduction returns: read-only, of no dimensions.
bool is_numpy_scalar(PyObject* object);
Array from_numpy_scalar(PyObject* object, const Label& label);

}  // namespace fusestep::arrays
