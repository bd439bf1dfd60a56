// Stands in for tvm-ffi's header: there is one device, so that nothing needs to be guarded.
#pragma once

namespace tvm {
namespace ffi {
struct CUDADeviceGuard {
  explicit CUDADeviceGuard(int) {}
  ~CUDADeviceGuard() {}
};
}  // namespace ffi
}  // namespace tvm
