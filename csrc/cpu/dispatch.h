// Which instruction-set tier runs.
//
// Resolved once: the best tier that this machine has, or the one that FUSESTEP_CPU names. A name
// that is unknown, or that this machine cannot run, is an error rather than a silent fallback.
#pragma once

#include <span>
#include <string_view>

#include "cpu/kernels.h"

namespace fusestep::cpu {

struct Tier {
  const char* name;
  const KernelTable* kernels;
  bool (*runs_here)();
};

std::span<const Tier> compiled_tiers();  // best first
const Tier& active_tier();

// Throws ValueError where `name` is not a tier of this build, or not one of this machine.
void use_tier(std::string_view name);

}  // namespace fusestep::cpu
