#include "cpu/dispatch.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <atomic>
#include <cstdlib>
#include <string>

#include "core/errors.h"

namespace fusestep::cpu {

#if defined(__x86_64__)

extern const KernelTable kernels_base, kernels_avx2, kernels_avx512;

namespace {

bool always() { return true; }

// Three that clang 14 has no name for in __builtin_cpu_supports.
bool has_f16c_movbe_lzcnt() {
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_F16C) || !(c & bit_MOVBE)) return false;
  return __get_cpuid(0x80000001, &a, &b, &c, &d) && (c & bit_LZCNT);
}

bool has_avx2() {  // what -march=x86-64-v3 may use
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") && has_f16c_movbe_lzcnt();
}

bool has_avx512() {  // what -march=x86-64-v4 may use
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}

constexpr Tier kTiers[] = {{"avx512", &kernels_avx512, has_avx512},
                           {"avx2", &kernels_avx2, has_avx2},
                           {"base", &kernels_base, always}};

#else

extern const KernelTable kernels_neon;

namespace {

bool always() { return true; }

constexpr Tier kTiers[] = {{"neon", &kernels_neon, always}};

#endif

const Tier& best() {
  for (const Tier& tier : kTiers)
    if (tier.runs_here()) return tier;
  return kTiers[std::size(kTiers) - 1];
}

const Tier& find(std::string_view name) {
  std::string available;
  for (const Tier& tier : kTiers) {
    if (!tier.runs_here()) continue;
    if (tier.name == name) return tier;
    available += (available.empty() ? "" : ", ") + std::string(tier.name);
  }
  for (const Tier& tier : kTiers)
    if (tier.name == name)
      throw ValueError("instruction set '" + std::string(name) +
                       "' is not available on this machine; available: " + available);
  throw ValueError("unknown instruction set '" + std::string(name) + "'; available: " + available);
}

std::atomic<const Tier*> active{nullptr};

}  // namespace

std::span<const Tier> compiled_tiers() { return kTiers; }

const Tier& active_tier() {
  const Tier* tier = active.load(std::memory_order_acquire);
  if (tier) return *tier;
  const char* wanted = std::getenv("FUSESTEP_CPU");
  const Tier& chosen = wanted && *wanted ? find(wanted) : best();
  active.store(&chosen, std::memory_order_release);
  return chosen;
}

void use_tier(std::string_view name) { active.store(&find(name), std::memory_order_release); }

}  // namespace fusestep::cpu
