// fusestep.Samples: a gradient for each of several samples.
#pragma once

#include <Python.h>

#include <string>

#include "arrays/array.h"
#include "gradients/samples.h"

namespace fusestep::arrays {

struct Samples {
  gradients::Samples samples;
  Array values;  // one gradient for each, along the first axis
};

// Tells which class it is. A reference to it is kept.
void set_samples_type(PyObject* type);

bool is_samples(PyObject* object);

// The gradients that somebody has a view of, of a parameter. Throws TypeError for weights that are
// not real numbers, ValueError for those that are negative, not finite, or not one for each sample;
// and where they would have to be fetched from a GPU while a CUDA graph is being captured.
Samples from_samples(PyObject* object, Array values, const Array& parameter,
                     const std::string& name);

// The same of the arrays of any library.
Samples from_samples(PyObject* object, const Array& parameter, const std::string& name);

}  // namespace fusestep::arrays
