# SPDX-License-Identifier: Apache-2.0
# find_package(flashinfer) -> target flashinfer::flashinfer, the headers of C++. The folders lie side by side in a source
# tree and in an installed package: `flashinfer cpp --cmake` prints where this file is.
get_filename_component(_flashinfer_root "${CMAKE_CURRENT_LIST_DIR}/../.." ABSOLUTE)
set(flashinfer_INCLUDE_DIR "${_flashinfer_root}/include")
set(flashinfer_KERNELS_INCLUDE_DIR "${_flashinfer_root}/csrc")
set(flashinfer_SOURCE_DIR "${_flashinfer_root}/cpp") # of the C interface and the benchmarks: add_subdirectory()

if(NOT TARGET flashinfer::flashinfer)
  add_library(flashinfer::flashinfer INTERFACE IMPORTED)
  set_target_properties(
    flashinfer::flashinfer
    PROPERTIES INTERFACE_INCLUDE_DIRECTORIES "${flashinfer_INCLUDE_DIR};${flashinfer_KERNELS_INCLUDE_DIR}"
               INTERFACE_COMPILE_FEATURES cxx_std_17
               INTERFACE_LINK_LIBRARIES "${CMAKE_DL_LIBS}")
endif()
