// A block of a sum of outer products, for tier_kernels.cpp: the one loop whose registers we lay out
// ourselves. As a plain loop it takes 2 to 4 times as long.
//
// In an anonymous namespace, as everything that is compiled once per tier.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#include "cpu/kernels.h"

namespace fusestep::cpu {
namespace {

// A tier's widest vector; and how much of a block its registers hold at a time, besides what is
// multiplied: rows, and vectors along each.
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kRowsAtOnce = 8, kVectorsAtOnce = 3;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kRowsAtOnce = 4, kVectorsAtOnce = 2;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kRowsAtOnce = 8, kVectorsAtOnce = 3;
#else
constexpr int kVectorBytes = 16, kRowsAtOnce = 4, kVectorsAtOnce = 2;
#endif

template <class T>
struct VectorOf {
  typedef T Type __attribute__((vector_size(kVectorBytes)));
};

// Calls visit(i) for i = 0 ... N - 1, each a constant.
template <int N, class Visit>
[[gnu::always_inline]] inline void unrolled(Visit visit) {
  [&]<int... I>(std::integer_sequence<int, I...>) {
    (visit(std::integral_constant<int, I>{}), ...);
  }(std::make_integer_sequence<int, N>{});
}

// The part of it that is kept in registers.
template <class T>
void add_outer_part(const T* error, const T* x, std::int64_t terms, bool begins, T* sum,
                    std::int64_t stride) {
  using Vector = typename VectorOf<T>::Type;
  constexpr int kLanesOfVector = kVectorBytes / static_cast<int>(sizeof(T));
  Vector of_block[kRowsAtOnce][kVectorsAtOnce];
  const auto at = [&](int row, int vector) { return sum + row * stride + vector * kLanesOfVector; };
  unrolled<kRowsAtOnce>([&](auto r) {
    unrolled<kVectorsAtOnce>([&](auto v) {
      of_block[r][v] = -Vector{};  // -0, to which x adds x
      if (!begins) std::memcpy(&of_block[r][v], at(r, v), sizeof(Vector));
    });
  });
  for (std::int64_t k = 0; k < terms; ++k) {
    Vector of_x[kVectorsAtOnce];
    unrolled<kVectorsAtOnce>([&](auto v) {
      std::memcpy(&of_x[v], x + k * kOuterColumns<T> + v * kLanesOfVector, sizeof(Vector));
    });
    unrolled<kRowsAtOnce>([&](auto r) {
      const T times = error[k * kOuterRows + r];
      unrolled<kVectorsAtOnce>([&](auto v) { of_block[r][v] += times * of_x[v]; });
    });
  }
  unrolled<kRowsAtOnce>([&](auto r) {
    unrolled<kVectorsAtOnce>(
        [&](auto v) { std::memcpy(at(r, v), &of_block[r][v], sizeof(Vector)); });
  });
}

template <class T>
void add_outer(const T* error, const T* x, std::int64_t terms, bool begins, T* sum,
               std::int64_t stride) {
  constexpr int kColumnsAtOnce = kVectorsAtOnce * kVectorBytes / static_cast<int>(sizeof(T));
  static_assert(kOuterRows % kRowsAtOnce == 0 && kOuterColumns<T> % kColumnsAtOnce == 0);
  for (std::int64_t row = 0; row < kOuterRows; row += kRowsAtOnce)
    for (std::int64_t column = 0; column < kOuterColumns<T>; column += kColumnsAtOnce)
      add_outer_part(error + row, x + column, terms, begins, sum + row * stride + column, stride);
}

}  // namespace
}  // namespace fusestep::cpu
