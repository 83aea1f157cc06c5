// What a caller can do wrong. The core throws these; the binding turns them into Python's classes.
#pragma once

#include <stdexcept>

namespace fusestep {

struct TypeError : std::runtime_error {  // the wrong kind of thing: Python's TypeError
  using std::runtime_error::runtime_error;
};

struct ValueError : std::runtime_error {  // the right kind, a wrong value: Python's ValueError
  using std::runtime_error::runtime_error;
};

struct IndexError : std::runtime_error {  // there is no such row: Python's IndexError
  using std::runtime_error::runtime_error;
};

}  // namespace fusestep
