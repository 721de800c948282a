# libtorch comes from the torch wheel of the interpreter PRISMAQUANT_PYTHON; the small libraries from the system.
# The wheel's own CMake package is not used: with CUDA it demands a toolkit, which linking does not need, as the
# libraries find NVIDIA's through their own paths.
set(PRISMAQUANT_PYTHON "python3" CACHE STRING "Python interpreter whose torch wheel provides libtorch")
execute_process(
  COMMAND ${PRISMAQUANT_PYTHON} -c "import torch; print(torch.__path__[0])"
  OUTPUT_VARIABLE torch_folder OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE torch_missing)
if(torch_missing)
  message(FATAL_ERROR "${PRISMAQUANT_PYTHON} has no torch; run scripts/setup.sh or set PRISMAQUANT_PYTHON")
endif()
message(STATUS "libtorch: ${torch_folder}")

# The wheel's include folder carries its own fmt and pybind11. Searching it after the system's folders keeps
# every translation unit on the one system fmt that is linked.
add_library(pq_torch INTERFACE)
target_compile_definitions(pq_torch INTERFACE USE_C10D_GLOO USE_DISTRIBUTED USE_RPC USE_TENSORPIPE)
target_compile_options(pq_torch INTERFACE
  "SHELL:-idirafter ${torch_folder}/include" "SHELL:-idirafter ${torch_folder}/include/torch/csrc/api/include")
# at::parallel_for is compiled where it is used, and runs on one thread without OpenMP. The runtime is the wheel's own,
# so that there is one pool of threads.
target_compile_options(pq_torch INTERFACE -fopenmp)
file(GLOB torch_openmp ${torch_folder}/lib/libgomp*.so*)
if(NOT torch_openmp)
  set(torch_openmp -fopenmp)
endif()
target_link_libraries(pq_torch INTERFACE ${torch_openmp})
# libtorch.so has no symbols of its own: it is what loads libtorch_cuda.so where the wheel has one.
target_link_libraries(pq_torch INTERFACE
  ${torch_folder}/lib/libtorch_cpu.so ${torch_folder}/lib/libc10.so
  "-Wl,--push-state,--no-as-needed,${torch_folder}/lib/libtorch.so,--pop-state")
target_link_options(pq_torch INTERFACE -Wl,--allow-shlib-undefined)

find_package(nlohmann_json REQUIRED)
find_package(fmt REQUIRED)
find_package(CLI11 REQUIRED)
find_package(SQLite3 REQUIRED)
find_package(Threads REQUIRED)
find_package(PkgConfig REQUIRED)
pkg_check_modules(PCRE2 REQUIRED IMPORTED_TARGET libpcre2-8)
pkg_check_modules(UTF8PROC REQUIRED IMPORTED_TARGET libutf8proc)
pkg_check_modules(CRYPTO REQUIRED IMPORTED_TARGET libcrypto)
if(PRISMAQUANT_TESTS)
  find_package(GTest REQUIRED)
endif()
if(PRISMAQUANT_BENCH)
  find_package(benchmark QUIET)
endif()
