// torch's tensors, as its optimizers meet them: parameters that may be given other memory between
// two steps, gradients that are new with every backward, state that users replace.
//
// Nothing of libtorch is linked. A tensor is read through torch's table of functions for DLPack, in
// 40 ns and without running Python code; before torch 2.10, which has no such table, through the
// tensor's Python methods. What must be decided by type or layout is decided in Python, in
// fusestep/torch/_tensors.py, and only for tensors that are not plain.
#pragma once

#include <Python.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "arrays/array.h"
#include "arrays/dlpack_abi.h"
#include "core/device.h"

namespace fusestep::arrays {

class TorchTensors {
 public:
  // `module` is fusestep.torch._tensors.
  TorchTensors(const pybind11::object& module, bool use_exchange_table);

  // The tensor's memory as it is now, seen as real; or of integers that stand for bits. Nothing is
  // kept alive.
  Array view(PyObject* tensor, const Label& label,
             Expected expected = Expected::complex_as_real) const;

  // True where view() would find this very memory and geometry.
  bool is_at(PyObject* tensor, const Array& array) const;

  // A new reference to parameter.grad, or to None.
  PyObject* gradient_of(PyObject* parameter) const;

  // Makes `view`, an empty array, one of a parameter's gradient that keeps the memory alive, and
  // borrows the geometry of the parameter's own view. False where the gradient is not as usual.
  bool view_usual_gradient(PyObject* parameter, const Array& parameter_view, PyObject* gradient,
                           Array& view) const;

  struct Gradient {
    Array view;                                            // keeps the memory alive
    std::optional<std::vector<std::int64_t>> row_numbers;  // where it is sparse
    bool is_copy;  // made because the gradient was not yet conjugated, or lay otherwise
  };
  // A gradient of any kind. Throws TypeError for one that a step cannot read.
  // Throws ValueError for a sparse one of a table with another number of rows.
  Gradient unusual_gradient(PyObject* parameter, const Array& parameter_view, PyObject* gradient,
                            const Label& label) const;

  // The gradients of samples, one for each along the first axis, likewise; of a copy, if they were
  // not yet conjugated.
  Array view_samples(PyObject* values, const Label& label) const;

  // Set where looking at tensors has run Python code, which may have changed anything.
  mutable bool has_run_code = false;

  // Where a tensor of one number is, if that is on a GPU; none for everything else.
  struct NumberOnGpu {
    Device device;
    std::byte* data;
    bool is_double;
  };
  std::optional<NumberOnGpu> number_on_gpu(PyObject* object) const;

  // The stream on which torch works on a GPU at this moment.
  std::uintptr_t current_stream(const Device& device) const;

  // How often autograd knows a tensor to have changed.
  std::int64_t version_of(PyObject* tensor) const;

  // Tells autograd that these tensors have changed.
  void increment_versions(PyObject* tensors) const noexcept;

  // What torch's own zero_grad does to a gradient that it is to keep.
  void clear_gradient(PyObject* gradient) const noexcept;

 private:
  pybind11::object attribute(PyObject* tensor, const pybind11::object& descriptor,
                             const char* name) const;
  // True for a tensor that is read without running Python code, where there is a table.
  bool is_plain(PyObject* tensor) const {
    return Py_TYPE(tensor) == tensor_type_ || Py_TYPE(tensor) == parameter_type_;
  }
  pybind11::object plain(PyObject* tensor) const;
  bool read(PyObject* tensor, dlpack::Tensor& fields) const;
  [[noreturn]] void refuse(PyObject* tensor, const Label& label) const;
  bool is_lazily_conjugated(PyObject* tensor, const dlpack::Tensor& fields,
                            const Array& array) const;
  Gradient dense_gradient(const pybind11::object& tensor, const Label& label) const;
  Gradient sparse_gradient(const Array& parameter_view, const pybind11::object& tensor,
                           const Label& label) const;

  PyTypeObject* tensor_type_;
  PyTypeObject* parameter_type_;
  pybind11::object local_, local_gradient_, resolved_, rows_of_, refusal_, describe_,
      increment_versions_, clear_gradient_, current_stream_;
  pybind11::object grad_descriptor_, version_descriptor_;
  const dlpack::ExchangeApi* api_;
  mutable std::vector<std::int64_t> numbers_;  // shape and strides of the last tensor without table
};

}  // namespace fusestep::arrays
