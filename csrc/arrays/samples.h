// fusestep.Samples and fusestep.Outer: a gradient for each of several samples.
#pragma once

#include <Python.h>

#include <functional>
#include <optional>
#include <string>

#include "arrays/array.h"
#include "gradients/samples.h"

namespace fusestep::arrays {

struct Samples {
  gradients::Samples samples;
  Array values;  // one gradient for each, along the first axis; or errors, the factors of it
  bool is_outer = false;
  std::optional<Array> x = std::nullopt;  // the others, if they are not ones
};

// Tells which classes they are. References to them are kept.
void set_samples_types(PyObject* samples, PyObject* outer);

bool is_samples(PyObject* object);  // or is_outer

// The gradients, or errors, that somebody has a view of, of a parameter. Throws TypeError for
// weights that are not real numbers, ValueError for those that are negative, not finite, or not one
// for each sample, and for factors of which there are not as many; and where weights would have to
// be fetched from a GPU while a CUDA graph is being captured.
using View = std::function<Array(PyObject* object, const Label& label)>;
Samples from_samples(PyObject* object, const Array& parameter, const std::string& name,
                     const View& view = from_object);

}  // namespace fusestep::arrays
