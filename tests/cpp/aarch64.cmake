# Cross-compiles for 64-bit Arm and runs the tests in an emulator (Debian: g++-aarch64-linux-gnu,
# qemu-user):  cmake -S . -B build/aarch64 -DCMAKE_TOOLCHAIN_FILE=tests/cpp/aarch64.cmake ...
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
# qemu-user 7 aborts in the child when a process with threads forks: that part is left out.
set(CMAKE_CROSSCOMPILING_EMULATOR qemu-aarch64 -E FUSESTEP_NO_FORK=1 -L /usr/aarch64-linux-gnu)
set(CMAKE_FIND_ROOT_PATH /usr/aarch64-linux-gnu)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)
