// The part of the CUDA runtime that a generated launcher calls, and everything that nvcc includes by itself.
#pragma once
#include <emulator/core.h>
#include <emulator/math.h>
#include <emulator/warp.h>
#include <emulator/atomics.h>
#include <emulator/ptx.h>

typedef int cudaError_t;
enum {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorCudartUnloading = 4,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719,
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9,
};
enum cudaLaunchAttributeID {
  cudaLaunchAttributeIgnore = 0,
  cudaLaunchAttributeCooperative = 2,
  cudaLaunchAttributeClusterDimension = 4,
  cudaLaunchAttributeProgrammaticStreamSerialization = 6,
};
union cudaLaunchAttributeValue {
  char pad[64];
  int cooperative;
  int programmaticStreamSerializationAllowed;
  struct {
    unsigned x, y, z;
  } clusterDim;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
typedef struct CUstream_st* cudaStream_t;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidValue; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorName(cudaError_t) { return "cudaErrorEmulated"; }
inline const char* cudaGetErrorString(cudaError_t) { return emulator::last_error_text(); }

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  return emulator::set_dynamic_shared_limit((const void*)kernel, value, __CUDA_ARCH__);
}

namespace emulator {

extern "C" const char __ehdr_start __attribute__((visibility("hidden")));
extern "C" const char _end __attribute__((visibility("hidden")));

// A kernel's arguments, kept until its grid has run.
template <typename... Params>
struct Bound;
template <>
struct Bound<> {
  template <typename Kernel, typename... Given>
  EMULATOR_PLAIN void call(Kernel* kernel, Given... given) {
    kernel(given...);
  }
};
template <typename First, typename... Rest>
struct Bound<First, Rest...> {
  First first;
  Bound<Rest...> rest;
  EMULATOR_PLAIN Bound(First first_, Rest... rest_) : first(first_), rest(rest_...) {}
  template <typename Kernel, typename... Given>
  EMULATOR_PLAIN void call(Kernel* kernel, Given... given) {
    rest.call(kernel, given..., first);
  }
};
template <typename... Params>
struct Bind {
  void (*kernel)(Params...);
  Bound<Params...> bound;
  EMULATOR_PLAIN static void call(void* self) {
    auto* bind = static_cast<Bind*>(self);
    bind->bound.call(bind->kernel);
  }
};

}  // namespace emulator

template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args... args) {
  emulator::Bind<Params...> bind{kernel, emulator::Bound<Params...>(static_cast<Params>(args)...)};
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    if (attribute.id == cudaLaunchAttributeCooperative ||
        (attribute.id == cudaLaunchAttributeClusterDimension &&
         attribute.val.clusterDim.x * attribute.val.clusterDim.y * attribute.val.clusterDim.z > 1))
      return emulator::refuse("cooperative launches and clusters are not emulated: blocks run one after the other");
  }
  emulator::set_arch(__CUDA_ARCH__);
  return emulator::run_grid({config->gridDim, config->blockDim, config->dynamicSmemBytes, (const void*)kernel,
                             &emulator::__ehdr_start, &emulator::_end, &emulator::Bind<Params...>::call, &bind});
}
