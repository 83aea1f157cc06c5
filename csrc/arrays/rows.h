// fusestep.Rows: a gradient of some rows of a parameter.
#pragma once

#include <Python.h>

#include <cstdint>
#include <string>
#include <vector>

#include "arrays/array.h"
#include "core/device.h"

namespace fusestep::arrays {

struct Rows {
  std::vector<std::int64_t> numbers;  // a copy
  Array values;                       // one row for each of them
};

// Tells which class it is. A reference to it is kept.
void set_rows_type(PyObject* type);

bool is_rows(PyObject* object);

// Throws TypeError for indices that are not int32 or int64, ValueError for those that are not one
// for each row of the values.
Rows from_rows(PyObject* object, const Array& parameter, const std::string& name);

// A one-dimensional array of int32 or int64, in the CPU's memory; or on a GPU, where the parameter
// is on one: then it is waited for.
std::vector<std::int64_t> read_row_numbers(PyObject* object, const Array& parameter,
                                           const Label& label);

// The host must know which rows there are before anything is written, so it has to wait for indices
// on a GPU. Throws std::runtime_error while a CUDA graph is captured there, which waiting would
// spoil; `expected` is what to give instead.
void check_can_be_fetched(const Device& device, std::uintptr_t stream, const Label& label,
                          const char* expected);

// Throws ValueError unless there is a row of values for each of the numbers.
void check_row_count(const Rows& rows, const std::string& name);

}  // namespace fusestep::arrays
