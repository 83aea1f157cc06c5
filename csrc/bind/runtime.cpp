// Threads and instruction sets.

#include <pybind11/stl.h>

#include "bind/register.h"
#include "cpu/dispatch.h"
#include "cpu/thread_pool.h"

namespace py = pybind11;

namespace fusestep::bind {

void register_runtime(py::module_& module) {
  using namespace py::literals;
  cpu::fork_generation();  // counts from here on, for locks that a forked child inherits
  module.def("num_threads", &cpu::own_threads);
  module.def("set_num_threads", &cpu::set_num_threads, "n"_a);
  module.def("active_tier", [] { return std::string(cpu::active_tier().name); });
  module.def("use_tier", [](const std::string& name) { cpu::use_tier(name); }, "name"_a);
  module.def("tiers", [] {
    std::vector<std::pair<std::string, bool>> tiers;  // name, runs on this machine; best first
    for (const cpu::Tier& tier : cpu::compiled_tiers())
      tiers.emplace_back(tier.name, tier.runs_here());
    return tiers;
  });
}

}  // namespace fusestep::bind
