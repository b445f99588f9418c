# Horovod 0.28.1 asks CMake for C++14, and the headers of torch >= 2.1 need C++17. With CMAKE_TOOLCHAIN_FILE naming
# this file, CMake's "C++14" means C++17 everywhere in the build (Horovod, and the Gloo inside it, which must not differ),
# and no source file is touched.
#
# CMake reads it twice: as the toolchain file, and again as the rules override, which runs after CMake's own compiler
# module has set these variables. Needs CMake >= 3.21, the first to take a toolchain file from the environment.
set(CMAKE_USER_MAKE_RULES_OVERRIDE_CXX "${CMAKE_CURRENT_LIST_FILE}")
set(CMAKE_CXX14_STANDARD_COMPILE_OPTION "-std=c++17")
set(CMAKE_CXX14_EXTENSION_COMPILE_OPTION "-std=gnu++17")

# Horovod builds RelWithDebInfo and turns its -O2 into -O3. Optimisation stays (an -O1 build is up to 10 % slower in
# allreduce); the debug information goes: it is 60 MB of a 65 MB library.
set(CMAKE_CXX_FLAGS_RELWITHDEBINFO_INIT "-O2 -DNDEBUG")
