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

// Throws TypeError for weights that are not real numbers, ValueError for those that are negative,
// not finite, or not one for each sample.
Samples from_samples(PyObject* object, const std::string& name);

}  // namespace fusestep::arrays
