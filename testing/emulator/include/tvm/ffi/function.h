// Stands in for tvm-ffi's header, which takes five times as long to compile: what a generated launcher uses of it.
#pragma once
#include <tvm/ffi/c_api.h>

#include <exception>

#define TVM_FFI_SAFE_CALL_BEGIN() \
  try {                           \
  (void)0
#define TVM_FFI_SAFE_CALL_END()                                  \
  return 0;                                                      \
  }                                                              \
  catch (const std::exception& error) {                          \
    TVMFFIErrorSetRaisedFromCStr("InternalError", error.what()); \
    return -1;                                                   \
  }                                                              \
  __builtin_unreachable()
