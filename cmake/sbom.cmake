# What is compiled into the wheel, as CycloneDX in its .dist-info/sboms (PEP 770).
set(xla ${PROJECT_SOURCE_DIR}/csrc/third_party/xla/ffi/api/c_api.h)
file(SHA256 ${xla} QAA_XLA_HASH)
file(STRINGS ${xla} lines REGEX "define XLA_FFI_API_(MAJOR|MINOR) ")
string(REGEX MATCHALL "[0-9]+" QAA_XLA_VERSION "${lines}")
list(JOIN QAA_XLA_VERSION "." QAA_XLA_VERSION)

set(QAA_SBOM_REFS "\"pkg:pypi/pybind11@${pybind11_VERSION}\", \"xla-ffi-c-api\"")
if(TARGET qaa_cuda)  # NVIDIA's static runtime; the header has its version as 1000 major + 10 minor
  find_file(QAA_CUDA_HEADER cuda_runtime_api.h HINTS ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES} REQUIRED)
  file(STRINGS ${QAA_CUDA_HEADER} line REGEX "define CUDART_VERSION ")
  string(REGEX MATCH "[0-9]+$" number "${line}")
  math(EXPR major "${number} / 1000")
  math(EXPR minor "${number} % 1000 / 10")
  set(QAA_SBOM_CUDA ",
    {
      \"type\": \"library\",
      \"bom-ref\": \"cudart-static\",
      \"name\": \"NVIDIA CUDA runtime\",
      \"version\": \"${major}.${minor}\",
      \"description\": \"cudart_static, linked into libqaa\",
      \"licenses\": [{\"license\": {\"name\": \"NVIDIA CUDA Toolkit EULA\"}}]
    }")
  string(APPEND QAA_SBOM_REFS ", \"cudart-static\"")
endif()
configure_file(${PROJECT_SOURCE_DIR}/cmake/sbom.cdx.json.in ${PROJECT_BINARY_DIR}/sbom.cdx.json @ONLY)
install(FILES ${PROJECT_BINARY_DIR}/sbom.cdx.json DESTINATION ${SKBUILD_METADATA_DIR}/sboms RENAME qaa.cdx.json)
