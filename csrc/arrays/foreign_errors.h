// Errors of somebody else's code, met while it was asked about an array.
#pragma once

#include <pybind11/pybind11.h>

#include <initializer_list>
#include <string>

#include "core/errors.h"

namespace fusestep::arrays {

// Those that are about the array become a TypeError, `sentence` and what the error says; others (a
// KeyboardInterrupt, say) go through as they are. To be called where `error` has been caught.
[[noreturn]] inline void rethrow_as_type_error(const pybind11::error_already_set& error,
                                               std::initializer_list<PyObject*> about_the_array,
                                               const std::string& sentence) {
  for (PyObject* kind : about_the_array)
    if (error.matches(kind))
      throw TypeError(sentence + pybind11::str(error.value()).cast<std::string>());
  throw;
}

}  // namespace fusestep::arrays
