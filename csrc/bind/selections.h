// What where= and the progress of blocks are to Python.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "rules/block_progress.h"
#include "selections/choice.h"

namespace fusestep::bind {

// A selection, and the memory of its mask.
struct Where {
  selections::Choice choice;
  pybind11::object mask;
};

// (elements of a block, updates of each, products of momenta or an empty array), or None where
// blocks do not differ.
pybind11::object block_progress(const rules::BlockProgress* progress);

}  // namespace fusestep::bind
