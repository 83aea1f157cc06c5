// The binary layout of DLPack tensors, https://dmlc.github.io/dlpack/latest/c_api.html (version 1).
#pragma once

#include <cstdint>

namespace fusestep::arrays::dlpack {

enum DeviceType : std::int32_t { kCpu = 1, kCuda = 2, kCudaHost = 3, kCudaManaged = 13 };
enum TypeCode : std::uint8_t { kInt = 0, kUnsigned = 1, kFloat = 2, kBfloat = 4, kComplex = 5 };

inline constexpr std::uint64_t kReadOnly = 1, kCopied = 2;

struct Device {
  std::int32_t type;
  std::int32_t id;
};

struct DataType {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  std::int32_t ndim;
  DataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;  // in elements; null means C order
  std::uint64_t byte_offset;
};

struct Managed {  // capsule "dltensor"
  Tensor tensor;
  void* context;
  void (*deleter)(Managed*);
};

struct ManagedVersioned {  // capsule "dltensor_versioned"
  std::uint32_t major, minor;
  void* context;
  void (*deleter)(ManagedVersioned*);
  std::uint64_t flags;
  Tensor tensor;
};

// The table of functions that a type publishes as __dlpack_c_exchange_api__ (DLPack 1.3), in a
// capsule of this name. Of its functions we call two.
inline constexpr const char* kExchangeApiName = "dlpack_exchange_api";

struct ExchangeApi {
  std::uint32_t major, minor;
  const ExchangeApi* older;  // or null
  void* allocate;
  void* export_owned;
  void* import_owned;
  // Fills in the tensor as it is at this moment; -1 with a Python exception on failure. May be
  // null.
  int (*read)(void* object, Tensor* out);
  // The stream on which the library works on a device at this moment. May be null.
  int (*current_stream)(std::int32_t device_type, std::int32_t device_id, void** out);
};

}  // namespace fusestep::arrays::dlpack
