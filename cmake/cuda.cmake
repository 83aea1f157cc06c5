# The target fusestep_cuda: kernels for NVIDIA GPUs, or a simulation of them in the host's memory.
# There is none without a CUDA compiler; fusestep.show_config() says so then.

set(fusestep_cuda_sources
  csrc/cuda/driver.cpp
  csrc/cuda/workspace.cpp)

if(FUSESTEP_CUDA STREQUAL "SIMULATED")
  add_library(fusestep_cuda STATIC
    ${fusestep_cuda_sources} csrc/cuda/simulation/runtime.cpp csrc/cuda/simulation/step.cpp)
  target_link_libraries(fusestep_cuda PUBLIC fusestep_core)
  # Nobody waits for the simulation, but for its compilation.
  set_source_files_properties(csrc/cuda/simulation/step.cpp PROPERTIES COMPILE_OPTIONS -O1)
  return()
endif()

if(FUSESTEP_CUDA STREQUAL "OFF" OR FUSESTEP_SANITIZE)
  return()
endif()

if(FUSESTEP_CUDA STREQUAL "AUTO")
  include(CheckLanguage)
  check_language(CUDA)
  if(NOT CMAKE_CUDA_COMPILER)
    message(STATUS "No CUDA compiler: fusestep is built without CUDA kernels")
    return()
  endif()
elseif(NOT FUSESTEP_CUDA STREQUAL "ON")
  message(FATAL_ERROR "FUSESTEP_CUDA is ${FUSESTEP_CUDA}; expected AUTO, ON, OFF or SIMULATED")
endif()

# Before the language is enabled, which would choose the compiler's default architecture.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES OFF)
  set(fusestep_choose_architectures ON)
endif()
enable_language(CUDA)
if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)  # CMake 3.25 and older do not know that nvcc 12 has it
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
  set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION -std=c++20)
endif()
find_package(CUDAToolkit REQUIRED)

if(CUDAToolkit_VERSION VERSION_LESS 12.1)
  set(message "fusestep needs CUDA 12.1 or later, which takes 32 KB of kernel parameters; "
              "this is ${CUDAToolkit_VERSION}")
  if(FUSESTEP_CUDA STREQUAL "ON")
    message(FATAL_ERROR ${message})
  endif()
  message(WARNING ${message} ": built without CUDA kernels")
  return()
endif()

if(fusestep_choose_architectures)
  # Machine code for what each toolkit knows of these, and PTX of the last one for what comes later.
  # That of 8.0 is also for 8.6 and 8.9, as all code is for later minor versions: these kernels wait
  # for memory, so that code of their own would bring nothing but size.
  if(CUDAToolkit_VERSION VERSION_GREATER_EQUAL 12.8)
    set(CMAKE_CUDA_ARCHITECTURES 75-real 80-real 90-real 100-real 120)
  else()
    set(CMAKE_CUDA_ARCHITECTURES 75-real 80-real 90)
  endif()
  if(CUDAToolkit_VERSION VERSION_LESS 13)
    list(PREPEND CMAKE_CUDA_ARCHITECTURES 70-real)
  endif()
endif()
message(STATUS "CUDA ${CUDAToolkit_VERSION}: kernels for ${CMAKE_CUDA_ARCHITECTURES}")

# Drivers of CUDA 12.4 and later can read what is compressed for size.
if(CUDAToolkit_VERSION VERSION_GREATER_EQUAL 13)
  set(fusestep_compression --compress-mode=size)
else()
  set(fusestep_compression -Xfatbin=-compress-all)
endif()

add_library(fusestep_cuda STATIC ${fusestep_cuda_sources} csrc/cuda/runtime.cpp csrc/cuda/step.cu)
set_target_properties(fusestep_cuda PROPERTIES
  CUDA_STANDARD 20 CUDA_STANDARD_REQUIRED ON CUDA_VISIBILITY_PRESET hidden
  CUDA_ARCHITECTURES "${CMAKE_CUDA_ARCHITECTURES}")
target_compile_options(fusestep_cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:
  -fmad=false --prec-div=true --prec-sqrt=true --ftz=false
  ${fusestep_compression} --threads=0
  $<$<BOOL:${FUSESTEP_CUDA_STRICT}>:-Werror=all-warnings -Xptxas=-warn-spills -Xptxas=-Werror>>)
string(REPLACE ";" " " architectures "${CMAKE_CUDA_ARCHITECTURES}")
target_compile_definitions(fusestep_cuda PRIVATE FUSESTEP_CUDA_ARCHITECTURES="${architectures}")
# The runtime is linked in, and nothing of it is visible: no CUDA is needed to install or import.
target_link_libraries(fusestep_cuda PUBLIC fusestep_core CUDA::cudart_static)
target_link_options(fusestep_cuda INTERFACE -Wl,--exclude-libs,ALL)
