// Where an array's memory is.
#pragma once

#include <cstdint>
#include <string>

namespace fusestep {

struct Device {
  enum Kind : std::uint8_t { cpu, cuda };

  Kind kind = cpu;
  std::int32_t index = 0;  // of a GPU, as CUDA counts them

  bool operator==(const Device&) const = default;
};

// As PyTorch spells it: "cpu", "cuda:1".
inline std::string name_of(const Device& device) {
  return device.kind == Device::cpu ? "cpu" : "cuda:" + std::to_string(device.index);
}

}  // namespace fusestep
