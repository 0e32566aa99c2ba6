# Read by the build of llama-cpp-python (scripts/setup.sh dev), after its first project(): llama.cpp without its library
# for programs, which the package does not use. The package's own setting of the cache variable does not change this one.
set(LLAMA_BUILD_COMMON OFF)
