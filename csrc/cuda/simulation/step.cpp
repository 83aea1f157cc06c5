// The very text that nvcc compiles, where launches are loops.
#include "cuda/step.cu"
