// Words that mean one thing to a C++ compiler and another to a CUDA compiler.
#pragma once

// A function both sides may call. It is always inlined: a tier's object file must not leave a
// weak copy behind, or the linker could keep the AVX-512 one for every machine.
#if defined(__CUDACC__)
#define FUSESTEP_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FUSESTEP_HOST_DEVICE __attribute__((always_inline)) inline
#endif

// A loop over registers: on a GPU an array is only kept in registers where every index is constant.
// And one that registers are too few to unroll.
#if defined(__CUDA_ARCH__)
#define FUSESTEP_UNROLL _Pragma("unroll")
#define FUSESTEP_DO_NOT_UNROLL _Pragma("unroll 1")
#else
#define FUSESTEP_UNROLL
#define FUSESTEP_DO_NOT_UNROLL
#endif
