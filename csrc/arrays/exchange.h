// Tensors as DLPack describes them, and the table of functions through which a library lets its
// tensors be read without running Python code (torch has it from 2.10 on).
#pragma once

#include <Python.h>

#include <cstdint>
#include <optional>
#include <span>

#include "arrays/array.h"
#include "arrays/dlpack_abi.h"

namespace fusestep::arrays {

// The table of a type, or null. Of types that publish it themselves, and of torch.nn.Parameter; a
// type that merely inherits it (a DTensor) may hold its numbers somewhere else.
const dlpack::ExchangeApi* exchange_api(PyTypeObject* type);

// A view that can tell whether it is current.
Array from_exchange(PyObject* object, const dlpack::ExchangeApi& api, const Label& label,
                    Expected expected);

// A view of what was read. `owner`, a reference that it takes over, keeps the memory alive and may
// be null.
Array from_tensor(const dlpack::Tensor& tensor, PyObject* owner, Expected expected,
                  const Label& label);

// The same into `view`, an empty array, where the tensor has the dtype, shape and strides of `like`
// (from which the view borrows them, and allocates nothing); false where it has not.
bool view_like(const Array& like, const dlpack::Tensor& tensor, PyObject* owner, Array& view);

// Throws TypeError for what an exporter that lies would lead us to read.
void check_plausible(std::span<const std::int64_t> shape, const void* data, const Label& label);

// The device that DLPack means. Throws TypeError unless it is one of ours.
Device device_of(const dlpack::Device& device, const Label& label);

// The stream on which a library works on a GPU at this moment, if its table says.
std::optional<std::uintptr_t> exchange_stream(const dlpack::ExchangeApi& api, const Device& device);

// True for a view of torch's whose numbers in memory are still to be negated or conjugated.
// Such views are strided (z.conj().imag) or of one element, so others are not asked.
bool is_lazily_negated(PyObject* object, const Array& array);

}  // namespace fusestep::arrays
