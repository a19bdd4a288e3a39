# The CUDA kernels as a part of qaa. nvcc comes from CUDACXX, from the wheels nvidia-cuda-nvcc, nvidia-cuda-crt,
# nvidia-nvvm, nvidia-cuda-runtime and nvidia-cuda-cccl if they are in the Python environment that builds, or from PATH.
cmake_minimum_required(VERSION 3.26)  # the first that knows C++20 of nvcc
if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  find_package(Python COMPONENTS Interpreter)
  execute_process(COMMAND ${Python_EXECUTABLE} -c "import nvidia; print(*nvidia.__path__, sep=';')"
    OUTPUT_VARIABLE wheels OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  list(TRANSFORM wheels APPEND /cu13)
  find_program(QAA_NVCC nvcc PATHS ${wheels} PATH_SUFFIXES bin NO_DEFAULT_PATH)
  foreach(folder IN LISTS wheels)  # their libraries are where nvcc does not look
    set(ENV{LIBRARY_PATH} "${folder}/lib:$ENV{LIBRARY_PATH}")
  endforeach()
  find_program(QAA_NVCC nvcc PATHS /usr/local/cuda/bin)
  if(QAA_NVCC)
    set(CMAKE_CUDA_COMPILER ${QAA_NVCC})
  endif()
endif()
if(QAA_CUDA STREQUAL "AUTO" AND NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  target_sources(qaa PRIVATE csrc/cuda_absent.cpp)
  return()
endif()

# Real code for every generation since Turing; the last entry carries PTX for those to come.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 75-real 80-real 86-real 89-real 90-real 100-real 120)
endif()
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)  # so that a machine without CUDA can load the module
enable_language(CUDA)

# The kernels' source as text, for compilers at run time: one file, without includes.
set(headers csrc/basic.h csrc/cuda/layout.h csrc/cuda/portable.cuh csrc/cuda/kernels.cuh)
set(text "")
foreach(header IN LISTS headers)
  file(READ ${header} content)
  string(REGEX REPLACE "#(include \"|pragma once)[^\n]*" "" content "${content}")
  string(APPEND text "${content}")
endforeach()
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${headers})
file(CONFIGURE OUTPUT kernel_headers.cpp @ONLY CONTENT
  "#include \"cuda.h\"\n\nconst char* qaa::cuda::kernel_headers() {\n  return R\"qaa(@text@)qaa\";\n}\n")

add_library(qaa_cuda OBJECT csrc/cuda/program.cpp csrc/cuda/specialize.cpp csrc/cuda/launch.cu
  ${PROJECT_BINARY_DIR}/kernel_headers.cpp)
target_include_directories(qaa_cuda PRIVATE csrc csrc/cuda)
target_compile_options(qaa_cuda PRIVATE
  $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra>
  "$<$<COMPILE_LANGUAGE:CUDA>:-O3;-Werror=all-warnings;--threads=0;-Xcompiler=-Wall,-Wextra>")
target_sources(qaa PRIVATE $<TARGET_OBJECTS:qaa_cuda>)
find_library(QAA_CUDART cudart_static HINTS ${CMAKE_CUDA_IMPLICIT_LINK_DIRECTORIES} REQUIRED)
target_link_libraries(qaa PRIVATE ${QAA_CUDART} ${CMAKE_DL_LIBS} rt)
