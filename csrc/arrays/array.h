// From a Python object to a pointer, a dtype, a shape and strides.
//
// NumPy arrays are read through the fields of the array object (a few nanoseconds, where the
// buffer protocol takes 40 and does not know bfloat16); tensors of a library that publishes a table
// of functions for it through that table (40 ns); CuPy's through __cuda_array_interface__;
// everything else through __dlpack__. All functions need the GIL.
#pragma once

#include <Python.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "arrays/dlpack_abi.h"
#include "core/device.h"
#include "core/layout.h"
#include "core/operand.h"

namespace fusestep::arrays {

// How error messages call an array, put together only when one is raised: "the gradient of " and
// "parameter 'W'".
struct Label {
  const char* role;
  const std::string& name;

  std::string text() const { return role + name; }
};

// Which elements an array is to have: floats; or complex numbers, too, seen as floats with a last
// axis of two; or integers that stand for something else, of 8 or 16 bits.
enum class Expected { floats, complex_as_real, bits };

// A borrowed view of an array's memory that keeps the memory's owner alive.
class Array {
 public:
  Array() = default;
  Array(Array&& other) noexcept { swap(other); }
  Array& operator=(Array&& other) noexcept {
    swap(other);
    return *this;
  }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  ~Array() { release(); }

  std::byte* data = nullptr;
  Device device;
  DType dtype = DType::float32;
  bool writable = false;
  bool c_contiguous = false;
  std::int64_t size = 0;  // elements

  // Of memory that the caller keeps, in C order.
  static Array dense(std::byte* data, DType dtype, std::span<const std::int64_t> shape,
                     const Device& device);

  // On a GPU: the cudaStream_t on which its library worked when the view was made. What is in the
  // array now is complete when that stream has got there.
  std::uintptr_t stream = 0;

  PyObject* owner() const { return owner_; }

  Geometry geometry() const { return {{shape_, ndim_}, {strides_, ndim_}}; }
  Operand operand() const { return {data, dtype}; }

  // Copies shape and strides, so that the view outlives an in-place reshape of its owner.
  void pin();

  // False where the owner has since been resized, reshaped, made read-only or moved. Only a pinned
  // view can tell.
  bool is_current() const;

  // True where getting at its memory has run somebody else's code.
  bool is_foreign() const { return managed_ != nullptr || is_cuda_interface_; }

  // True for memory of a GPU that its library, which knows nothing of streams but its own, may use
  // again as soon as the view is gone.
  bool is_lent_for_the_call() const;

  // The stream on which its library works at this moment. May run Python code.
  std::uintptr_t current_stream() const;

  // True where that is the stream of another array, too, as far as can be told without asking.
  bool is_of_library_of(const Array& other) const;

  // True where a tensor has this view's dtype, shape and strides; and its memory, too.
  bool has_geometry_of(const dlpack::Tensor& tensor) const;
  bool is_view_of(const dlpack::Tensor& tensor) const;

  // The bytes the array reaches over: [first, last).
  struct Interval {
    std::uintptr_t first, last;
  };
  Interval interval() const;

 private:
  friend Array from_numpy(PyObject* object, const Label& label, Expected expected);
  friend Array from_dlpack(PyObject* object, const Label& label, Expected expected);
  friend Array from_cuda_interface(PyObject* object, const Label& label, Expected expected);
  friend Array from_exchange(PyObject* object, const dlpack::ExchangeApi& api, const Label& label,
                             Expected expected);
  friend Array from_tensor(const dlpack::Tensor& tensor, PyObject* owner, Expected expected,
                           const Label& label);
  friend bool view_like(const Array& like, const dlpack::Tensor& tensor, PyObject* owner,
                        Array& view);

  // Takes over what a DLPack tensor says of its memory; throws TypeError for what we cannot update.
  void describe(const dlpack::Tensor& tensor, Expected expected, const Label& label);
  // A GPU reads an element only where its size divides its address.
  void check_alignment(const Label& label) const;
  void swap(Array& other) noexcept;
  void release() noexcept;

  const std::int64_t* shape_ = nullptr;
  const std::int64_t* strides_ = nullptr;
  std::size_t ndim_ = 0;
  std::vector<std::int64_t> owned_;  // shape and strides, where the object has none of our kind
  PyObject* owner_ = nullptr;        // a reference to the object, unless it is kept otherwise
  PyObject* descriptor_ = nullptr;   // a reference to a NumPy array's dtype object, once pinned
  const dlpack::ExchangeApi* api_ = nullptr;  // the table it was read through
  void* managed_ = nullptr;                   // or its DLPack tensor
  void (*delete_managed_)(void*) = nullptr;
  bool is_cuda_interface_ = false;  // or its __cuda_array_interface__
};

// Throws TypeError for something that is not an array of a supported dtype on a device of ours; the
// second one for all but Expected::bits.
Array from_object(PyObject* object, const Label& label);
Array bits_from_object(PyObject* object, const Label& label);

// How messages name the dtypes that are expected.
const char* dtypes_text(Expected expected);

// True where two arrays share at least one byte. Exact: interleaved slices of one array do not.
bool share_memory(const Array& a, const Array& b);

std::string shape_text(std::span<const std::int64_t> shape);
std::string shape_text(const Array& array);

// The library's opinion of whether an object is an array at all (and not, say, a list of arrays).
bool is_array(PyObject* object);

}  // namespace fusestep::arrays
