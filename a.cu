
#ifdef __CUDACC_RTC__
  #include <cuda/std/cstdint>
  using cuda::std::uint8_t;
  using cuda::std::uint16_t;
  using cuda::std::uint32_t;
  using cuda::std::uint64_t;
  using cuda::std::int8_t;
  using cuda::std::int16_t;
  using cuda::std::int32_t;
  using cuda::std::int64_t;

  #include <cuda/std/type_traits>
  namespace std {
    using cuda::std::is_same;
    using cuda::std::is_same_v;
    using cuda::std::is_integral;
    using cuda::std::is_signed;
    using cuda::std::is_unsigned;
    using cuda::std::is_floating_point;
    using cuda::std::enable_if;
    using cuda::std::conditional;
  }

  // NVRTC uses asm/volatile instead of __asm__/__volatile__ (gcc extension).
  #ifndef __asm__
  #define __asm__ asm
  #endif
  #ifndef __volatile__
  #define __volatile__ volatile
  #endif
#else
  #include <cstdint>
  #include <type_traits>
  #include <cuda.h>
#endif

#if !defined(__CUDA_ARCH__) || (__CUDA_ARCH__ >= 530)
#include <cuda_fp16.h>
__device__ half max(half a, half b)
{
  return __hgt(__half(a), __half(b)) ? a : b;
}
__device__ half min(half a, half b)
{
  return __hlt(__half(a), __half(b)) ? a : b;
}
#endif // __CUDA_ARCH__ >= 530

// Pack two half values.
static inline __device__ __host__ unsigned
__pack_half2(const half x, const half y) {
  unsigned v0 = *((unsigned short *)&x);
  unsigned v1 = *((unsigned short *)&y);
  return (v1 << 16) | v0;
}

#define CUDA_UNSUPPORTED_HALF_MATH_BINARY(HALF_MATH_NAME, FP32_MATH_NAME) \
static inline __device__ __host__ half HALF_MATH_NAME(half x, half y) {   \
  float tmp_x = __half2float(x);                                          \
  float tmp_y = __half2float(y);                                          \
  float result = FP32_MATH_NAME(tmp_x, tmp_y);                            \
  return __float2half(result);                                            \
}

#define CUDA_UNSUPPORTED_HALF_MATH_UNARY(HALF_MATH_NAME, FP32_MATH_NAME) \
static inline __device__ __host__ half HALF_MATH_NAME(half x) {          \
  float tmp_x = __half2float(x);                                         \
  float result = FP32_MATH_NAME(tmp_x);                                  \
  return __float2half(result);                                           \
}

// Some fp16 math functions are not supported in cuda_fp16.h,
// so we define them here to make sure the generated CUDA code
// is valid.
#if defined(__CUDA_ARCH__)
#if (__CUDA_ARCH__ >= 530)
CUDA_UNSUPPORTED_HALF_MATH_BINARY(hpow, powf)
#if ((__CUDACC_VER_MAJOR__ < 12) || ((__CUDACC_VER_MAJOR__ == 12) && (__CUDACC_VER_MINOR__ < 8)))
CUDA_UNSUPPORTED_HALF_MATH_UNARY(htanh, tanhf)
#endif
CUDA_UNSUPPORTED_HALF_MATH_UNARY(htan, tanf)
CUDA_UNSUPPORTED_HALF_MATH_UNARY(hatan, atanf)
CUDA_UNSUPPORTED_HALF_MATH_UNARY(herf, erf)
#else
CUDA_UNSUPPORTED_HALF_MATH_UNARY(hexp, exp)
#endif
#endif

#undef CUDA_UNSUPPORTED_HALF_MATH_BINARY
#undef CUDA_UNSUPPORTED_HALF_MATH_UNARY

template <typename T, typename TVec2>
struct __align__(8) half4_bfloat164 {
  T x, y, z, w;
  __host__ __device__ half4_bfloat164() : x(T(0)), y(T(0)), z(T(0)), w(T(0)) {}
  __host__ __device__ half4_bfloat164(T x, T y, T z, T w) : x(x), y(y), z(z), w(w) {}

};

using half4 = half4_bfloat164<__half, __half2>;
__host__ __device__ half4 make_half4(__half x, __half y, __half z, __half w) {
    return half4(x, y, z, w);
}

#if (((__CUDACC_VER_MAJOR__ == 11) && (__CUDACC_VER_MINOR__ >= 4)) || \
     (__CUDACC_VER_MAJOR__ > 11))
#define TVM_ENABLE_L2_PREFETCH 1
#else
#define TVM_ENABLE_L2_PREFETCH 0
#endif

#ifdef _WIN32
  using uint = unsigned int;
  using uchar = unsigned char;
  using ushort = unsigned short;
  using int64_t = long long;
  using uint64_t = unsigned long long;
#else
  #define uint unsigned int
  #define uchar unsigned char
  #define ushort unsigned short
#endif
extern "C" __global__ void __launch_bounds__(32) matmul_0_kernel(half* __restrict__ A_ptr, signed char* __restrict__ B_ptr, half* __restrict__ O_ptr, int m);
extern "C" __global__ void __launch_bounds__(32) matmul_0_kernel(half* __restrict__ A_ptr, signed char* __restrict__ B_ptr, half* __restrict__ O_ptr, int m) {
  extern __shared__ __align__(64) half S_ptr[];
  alignas(64) uint R_ptr[1];
  int cse_v2 = (((int)blockIdx.y) * 512);
  S_ptr[((int)threadIdx.x)] = A_ptr[((((int)blockIdx.y) * 512) + ((int)threadIdx.x))];
  __syncthreads();
  bitblas_foo((&(R_ptr[0])), (&(S_ptr[0])), (&(B_ptr[(((int)threadIdx.x) * 4)])));
  if (((((int)blockIdx.y) * 8) + ((int)blockIdx.x)) < m) {
    O_ptr[(((((int)blockIdx.y) * 512) + (((int)blockIdx.x) * 64)) + ((int)threadIdx.x))] = (S_ptr[(31 - ((int)threadIdx.x))] + ((half)R_ptr[0]));
  }
}



#include <tvm/ffi/c_api.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/extra/cuda/device_guard.h>
#include <tvm/ffi/function.h>
#include <cuda.h>
#include <cuda_runtime.h>
#include <math.h>
#define TVM_DLL TVM_FFI_DLL_EXPORT
void* __tvm_ffi__library_ctx = NULL;
static int tvm_cuda_host_check(cudaError_t error, bool allow_unloading = false) {
  if (error == cudaSuccess || (allow_unloading && error == cudaErrorCudartUnloading)) return 0;
  const char* parts[] = {"CUDA launch: ", cudaGetErrorString(error)};
  TVMFFIErrorSetRaisedFromCStrParts("CUDAError", parts, 2);
  cudaGetLastError();
  return -1;
}
template <typename... Params, typename... Args>
static cudaError_t tvm_cuda_host_launch(void (*kernel)(Params...), const cudaLaunchConfig_t* config, Args... args) {
  static_assert(sizeof...(Params) == sizeof...(Args), "kernel argument count mismatch");
  return cudaLaunchKernelEx(config, kernel, ((Params)args)...);
}
#ifdef __cplusplus
extern "C"
#endif
TVM_DLL int32_t __tvm_ffi_matmul_0(void* self_handle, void* args, int32_t num_args, void* result);
#ifdef __cplusplus
extern "C"
#endif
TVM_DLL int32_t __tvm_ffi_matmul_0(void* self_handle, void* args, int32_t num_args, void* result) {
  TVM_FFI_SAFE_CALL_BEGIN();
  try {
  TVMFFIAny stack[9];
  void* stack_ffi_any = (void*)((void*)stack);
  if (!((num_args == 3))) {
    const char* __tvm_assert_parts[6] = {"Expected ", "3", " arguments", " when calling:\n  `", "matmul_0(A: Tensor([m, 64], float16), B: Tensor([1024], int8), O: Tensor([m, 64], float16))", "`"};
    TVMFFIErrorSetRaisedFromCStrParts("TypeError", __tvm_assert_parts, 6);
    return -1;
  }
  if (!(!(args == NULL))) {
    const char* __tvm_assert_parts[4] = {"args pointer is NULL", " when calling:\n  `", "matmul_0(A: Tensor([m, 64], float16), B: Tensor([1024], int8), O: Tensor([m, 64], float16))", "`"};
    TVMFFIErrorSetRaisedFromCStrParts("TypeError", __tvm_assert_parts, 4);
    return -1;
  }
  int32_t A_type_index = (((TVMFFIAny*)args)[0].type_index);
  if (!(((((A_type_index == 0) || (A_type_index == 4)) || (A_type_index == 7)) || (A_type_index >= 64)))) {
    const char* __tvm_assert_parts[6] = {"Mismatched type on argument #", "0", " when calling:\n  `", "matmul_0(A: Tensor([m, 64], float16), B: Tensor([1024], int8), O: Tensor([m, 64], float16))", "`,\n  expected ", "Tensor"};
    TVMFFIErrorSetRaisedFromCStrParts("TypeError", __tvm_assert_parts, 6);
    return -1;
  }
  void* condval;
  if (A_type_index == 70) {
    condval = ((void*)((char*)(((TVMFFIAny*)args)[0].v_ptr) + 24));
  } else {
    condval = (((TVMFFIAny*)args)[0].v_ptr);
  }
  void* A_handle = (void*)condval;
  int32_t B_type_index = (((TVMFFIAny*)args)[1].type_index);
  if (!(((((B_type_index == 0) || (B_type_index == 4)) || (B_type_index == 7)) || (B_type_index >= 64)))) {
    const char* __tvm_assert_parts[6] = {"Mismatched type on argument #", "1", " when calling:\n  `", "matmul_0(A: Tensor([m, 64], float16), B: Tensor([1024], int8), O: Tensor([m, 64], float16))", "`,\n  expected ", "Tensor"};
    TVMFFIErrorSetRaisedFromCStrParts("TypeError", __tvm_assert_parts, 6);
    return -1;
  }
  void* condval_1;
  if (B_type_index == 70) {
    condval_1 = ((void*)((char*)(((TVMFFIAny*)args)[1].v_ptr) + 24));
  } else {
    condval_1 = (((TVMFFIAny*)args)[1].v_ptr);
  }
  void* B_handle = (void*)condval_1;
  int32_t O_type_index = (((TVMFFIAny*)args)[2].type_index);
  if (!(((((O_type_index == 0) || (O_type_index == 4)) || (O_type_index == 7)) || (O_type_index >= 64)))) {
    const char* __tvm_assert_parts[6] = {"Mismatched type on argument #", "2", " when calling:\n  `", "matmul_0(A: Tensor([m, 64], float16), B: Tensor([1024], int8), O: Tensor([m, 64], float16))", "`,\n  expected ", "Tensor"};
    TVMFFIErrorSetRaisedFromCStrParts("TypeError", __tvm_assert_parts, 6);
    return -1;
  }
  void* condval_2;
  if (O_type_index == 70) {
    condval_2 = ((void*)((char*)(((TVMFFIAny*)args)[2].v_ptr) + 24));
  } else {
    condval_2 = (((TVMFFIAny*)args)[2].v_ptr);
  }
  void* O_handle = (void*)condval_2;
  if (!(!(A_handle == NULL))) {
    const char* __tvm_assert_parts[6] = {"Mismatched type on argument #", "0", " when calling:\n  `", "matmul_0(A: Tensor([m, 64], float16), B: Tensor([1024], int8), O: Tensor([m, 64], float16))", "`,\n  expected ", "Tensor"};
    TVMFFIErrorSetRaisedFromCStrParts("TypeError", __tvm_assert_parts, 6);
    return -1;
  }
  if (!((2 == (((DLTensor*)A_handle)[0].ndim)))) {
    const char* __tvm_assert_parts[8] = {"Mismatched ", "A", ".ndim on argument #", "0", " when calling:\n  `", "matmul_0(A: Tensor([m, 64], float16), B: Tensor([1024], int8), O: Tensor([m, 64], float16))", "`,\n  expected ", "2"};
    TVMFFIErrorSetRaisedFromCStrParts("ValueError", __tvm_assert_parts, 8);
    return -1;
  }
  if (!(((((((DLTensor*)A_handle)[0].dtype.code) == (uint8_t)2) && ((((DLTensor*)A_handle)[0].dtype.bits) == (uint8_t)16)) && ((((DLTensor*)A_handle)[0].dtype.lanes) == (uint16_t)1)))) {
    const char* __tvm_assert_parts[8] = {"Mismatched ", "A", ".dtype on argument #", "0", " when calling:\n  `", "matmul_0(A: Tensor([m, 64], float16), B: Tensor([1024], int8), O: Tensor([m, 64], float16))", "`,\n  expected ", "float16"};
    TVMFFIErrorSetRaisedFromCStrParts("TypeError", __tvm_assert_parts, 8);
    return -1;
  }
  int64_t* matmul_0_A_shape = (int64_t*)(((DLTensor*)A_handle)[0].shape);
  int32_t m = ((int32_t)(((int64_t*)matmul_0_A_shape)[0]));
  int64_t* matmul_0_A_strides = (int64_t*)(((DLTensor*)A_handle)[0].strides);
  if (!(((((DLTensor*)A_handle)[0].device.device_type) == 2))) {
    const char* __tvm_assert_parts[8] = {"Mismatched ", "A", ".device_type on argument #", "0", " when calling:\n  `", "matmul_0(A: Tensor([m, 64], float16), B: Tensor([1024], int8), O: Tensor([m, 64], float16))", "`,\n  expected ", "cuda"};
    TVMFFIErrorSetRaisedFromCStrParts("ValueError", __tvm_assert_parts, 8);
    return -1;
  }
  int32_t dev_id = (((DLTensor*)A_handle)[0].device.device_id);
  if (!(!(B_handle == NULL))) {
    const char* __tvm_assert_parts[6] = {"Mismatched type on argument #", "1", " when calling:\n  `", "matmul_0(A: Tensor([m, 64], float16), B: Tensor([1024], int8), O: Tensor([m, 64], float16))", "`,\n  expected ", "Tensor"};
    TVMFFIErrorSetRaisedFromCStrParts("TypeError", __tvm_assert_parts, 6);
    return -1;
  }
  if (!((1 == (((DLTensor*)B_handle)[0].ndim)))) {
    const char* __tvm_assert_parts[8] = {"Mismatched ", "B", ".ndim on argument #", "1", " when calling:\n  `", "matmul_0(A: Tensor([m, 64], float16), B: Tensor([1024], int8), O: Tensor([m, 64], float16))", "`,\n  expected ", "1"};
    TVMFFIErrorSetRaisedFromCStrParts("ValueError", __tvm_assert_parts, 8);
    return -1;
  }
  if (!(((((((DLTensor*)B_handle)[0].dtype.code) == (uint8_t)0) && ((((DLTensor*)B_handle)[0].dtype.bits) == (uint8_t)8)) && ((((DLTensor*)B_handle)[0].dtype.lanes) == (uint16_t)1)))) {
    const char* __tvm_assert_parts[8] = {"Mismatched ", "B", ".dtype on argument #", "1", " when calling:\n  `", "matmul_0(A: Tensor([m, 64], float16), B: Tensor([1024], int8), O: Tensor([m, 64], float16))", "`,\n  expected ", "int8"};
    TVMFFIErrorSetRaisedFromCStrParts("TypeError", __tvm_assert_parts, 8);
    return -1;
  }
  int64_t* matmul_0_B_shape = (int64_t*)(((DLTensor*)B_handle)[0].shape);
  int64_t* matmul_0_B_strides = (int64_t*)(((DLTensor*)B_handle)[0].strides);
  if (!(((((DLTensor*)B_handle)[0].device.device_type) == 2))) {
    const char* __tvm_assert_parts[8] = {"Mismatched ", "B", ".device_type on argument #", "1", " when calling:\n  `", "matmul_0(A: Tensor([m, 64], float16), B: Tensor([1024], int8), O: Tensor([m, 64], float16))", "`,\n  expected ", "cuda"};
    TVMFFIErrorSetRaisedFromCStrParts("ValueError", __tvm_assert_parts, 8);
    return -1;
  }
  if (!(!(O_handle == NULL))) {
    const char* __tvm_assert_parts[6] = {"Mismatched type on argument #", "2", " when calling:\n  `", "matmul_0(A: Tensor([m, 64], float16), B: Tensor([1024], int8), O: Tensor([m, 64], float16))", "`,\n  expected ", "Tensor"};
    TVMFFIErrorSetRaisedFromCStrParts("TypeError", __tvm_assert_parts, 6);
    return -1;
  }
  if (!((2 == (((DLTensor*)O_handle)[0].ndim)))) {
    const char* __tvm_assert_parts[8] = {"Mismatched ", "O", ".ndim on argument #", "2", " when calling:\n  `", "matmul_0(A: Tensor([m, 64], float16), B: Tensor([1024], int8), O: Tensor([m, 64], float16))", "`,\n  expected ", "2"};
    TVMFFIErrorSetRaisedFromCStrParts("ValueError", __tvm_assert_parts, 8);
    return -1;
  }
  if (!(((((((DLTensor*)O_handle)[0].dtype.code) == (uint8_t)2) && ((((DLTensor*)O_handle)[0].dtype.bits) == (uint8_t)16)) && ((((DLTensor*)O_handle)[0].dtype.lanes) == (uint16_t)1)))) {
    const char* __tvm_assert_parts[8] = {"Mismatched ", "O", ".dtype on argument #", "2", " when calling:\n  `", "matmul_0(A: Tensor([m, 64], float16), B: Tensor([1024], int8), O: Tensor([m, 64], float16))", "`,\n  expected ", "float16"};
    TVMFFIErrorSetRaisedFromCStrParts("TypeError", __tvm_assert_parts, 8);
    return -1;
  }
  int64_t* matmul_0_O_shape = (int64_t*)(((DLTensor*)O_handle)[0].shape);
  int64_t* matmul_0_O_strides = (int64_t*)(((DLTensor*)O_handle)[0].strides);
  if (!(((((DLTensor*)O_handle)[0].device.device_type) == 2))) {
    const char* __tvm_assert_parts[8] = {"Mismatched ", "O", ".device_type on argument #", "2", " when calling:\n  `", "matmul_0(A: Tensor([m, 64], float16), B: Tensor([1024], int8), O: Tensor([m, 64], float16))", "`,\n  expected ", "cuda"};
    TVMFFIErrorSetRaisedFromCStrParts("ValueError", __tvm_assert_parts, 8);
    return -1;
  }
  if (!(matmul_0_A_strides == NULL)) {
    if (!(((1 == ((int32_t)(((int64_t*)matmul_0_A_strides)[1]))) && ((m == 1) || (64 == ((int32_t)(((int64_t*)matmul_0_A_strides)[0]))))))) {
      const char* __tvm_assert_parts[7] = {"Mismatched ", "A", ".strides on argument #", "0", " when calling:\n  `", "matmul_0(A: Tensor([m, 64], float16), B: Tensor([1024], int8), O: Tensor([m, 64], float16))", "`,\n  expected to be compact array"};
      TVMFFIErrorSetRaisedFromCStrParts("ValueError", __tvm_assert_parts, 7);
      return -1;
    }
  }
  if (!((((m * 64) == 0) || !(((half*)(((DLTensor*)A_handle)[0].data)) == NULL)))) {
    const char* __tvm_assert_parts[6] = {"A", " data pointer is NULL on argument #", "0", " when calling:\n  `", "matmul_0(A: Tensor([m, 64], float16), B: Tensor([1024], int8), O: Tensor([m, 64], float16))", "`,\n  expected non-NULL data pointer"};
    TVMFFIErrorSetRaisedFromCStrParts("ValueError", __tvm_assert_parts, 6);
    return -1;
  }
  if (!(matmul_0_B_strides == NULL)) {
    if (!((1 == ((int32_t)(((int64_t*)matmul_0_B_strides)[0]))))) {
      const char* __tvm_assert_parts[7] = {"Mismatched ", "B", ".strides on argument #", "1", " when calling:\n  `", "matmul_0(A: Tensor([m, 64], float16), B: Tensor([1024], int8), O: Tensor([m, 64], float16))", "`,\n  expected to be compact array"};
      TVMFFIErrorSetRaisedFromCStrParts("ValueError", __tvm_assert_parts, 7);
      return -1;
    }
  }
  if (!((dev_id == (((DLTensor*)B_handle)[0].device.device_id)))) {
    const char* __tvm_assert_parts[8] = {"Mismatched ", "B.device_id", " on argument #", "1", " when calling:\n  `", "matmul_0(A: Tensor([m, 64], float16), B: Tensor([1024], int8), O: Tensor([m, 64], float16))", "`,\n  expected to match ", "A.device_id"};
    TVMFFIErrorSetRaisedFromCStrParts("ValueError", __tvm_assert_parts, 8);
    return -1;
  }
  if (!(!(((int8_t*)(((DLTensor*)B_handle)[0].data)) == NULL))) {
    const char* __tvm_assert_parts[6] = {"B", " data pointer is NULL on argument #", "1", " when calling:\n  `", "matmul_0(A: Tensor([m, 64], float16), B: Tensor([1024], int8), O: Tensor([m, 64], float16))", "`,\n  expected non-NULL data pointer"};
    TVMFFIErrorSetRaisedFromCStrParts("ValueError", __tvm_assert_parts, 6);
    return -1;
  }
  if (!((m == ((int32_t)(((int64_t*)matmul_0_O_shape)[0]))))) {
    const char* __tvm_assert_parts[8] = {"Mismatched ", "O.shape[0]", " on argument #", "2", " when calling:\n  `", "matmul_0(A: Tensor([m, 64], float16), B: Tensor([1024], int8), O: Tensor([m, 64], float16))", "`,\n  expected to match ", "A.shape[0]"};
    TVMFFIErrorSetRaisedFromCStrParts("ValueError", __tvm_assert_parts, 8);
    return -1;
  }
  if (!(matmul_0_O_strides == NULL)) {
    if (!(((1 == ((int32_t)(((int64_t*)matmul_0_O_strides)[1]))) && ((m == 1) || (64 == ((int32_t)(((int64_t*)matmul_0_O_strides)[0]))))))) {
      const char* __tvm_assert_parts[7] = {"Mismatched ", "O", ".strides on argument #", "2", " when calling:\n  `", "matmul_0(A: Tensor([m, 64], float16), B: Tensor([1024], int8), O: Tensor([m, 64], float16))", "`,\n  expected to be compact array"};
      TVMFFIErrorSetRaisedFromCStrParts("ValueError", __tvm_assert_parts, 7);
      return -1;
    }
  }
  if (!((dev_id == (((DLTensor*)O_handle)[0].device.device_id)))) {
    const char* __tvm_assert_parts[8] = {"Mismatched ", "O.device_id", " on argument #", "2", " when calling:\n  `", "matmul_0(A: Tensor([m, 64], float16), B: Tensor([1024], int8), O: Tensor([m, 64], float16))", "`,\n  expected to match ", "A.device_id"};
    TVMFFIErrorSetRaisedFromCStrParts("ValueError", __tvm_assert_parts, 8);
    return -1;
  }
  if (!((((m * 64) == 0) || !(((half*)(((DLTensor*)O_handle)[0].data)) == NULL)))) {
    const char* __tvm_assert_parts[6] = {"O", " data pointer is NULL on argument #", "2", " when calling:\n  `", "matmul_0(A: Tensor([m, 64], float16), B: Tensor([1024], int8), O: Tensor([m, 64], float16))", "`,\n  expected non-NULL data pointer"};
    TVMFFIErrorSetRaisedFromCStrParts("ValueError", __tvm_assert_parts, 6);
    return -1;
  }
  if (!((((int32_t)(((int64_t*)matmul_0_A_shape)[1])) == 64))) {
    const char* __tvm_assert_parts[8] = {"Invalid ", "A.shape[1]", " on argument #", "0", " when calling:\n  `", "matmul_0(A: Tensor([m, 64], float16), B: Tensor([1024], int8), O: Tensor([m, 64], float16))", "`,\n  expected ", "64"};
    TVMFFIErrorSetRaisedFromCStrParts("ValueError", __tvm_assert_parts, 8);
    return -1;
  }
  if (!(((uint64_t)0ULL == (((DLTensor*)A_handle)[0].byte_offset)))) {
    const char* __tvm_assert_parts[8] = {"Invalid ", "A.byte_offset", " on argument #", "0", " when calling:\n  `", "matmul_0(A: Tensor([m, 64], float16), B: Tensor([1024], int8), O: Tensor([m, 64], float16))", "`,\n  expected ", "0"};
    TVMFFIErrorSetRaisedFromCStrParts("ValueError", __tvm_assert_parts, 8);
    return -1;
  }
  if (!((((int32_t)(((int64_t*)matmul_0_B_shape)[0])) == 1024))) {
    const char* __tvm_assert_parts[8] = {"Invalid ", "B.shape[0]", " on argument #", "1", " when calling:\n  `", "matmul_0(A: Tensor([m, 64], float16), B: Tensor([1024], int8), O: Tensor([m, 64], float16))", "`,\n  expected ", "1024"};
    TVMFFIErrorSetRaisedFromCStrParts("ValueError", __tvm_assert_parts, 8);
    return -1;
  }
  if (!(((uint64_t)0ULL == (((DLTensor*)B_handle)[0].byte_offset)))) {
    const char* __tvm_assert_parts[8] = {"Invalid ", "B.byte_offset", " on argument #", "1", " when calling:\n  `", "matmul_0(A: Tensor([m, 64], float16), B: Tensor([1024], int8), O: Tensor([m, 64], float16))", "`,\n  expected ", "0"};
    TVMFFIErrorSetRaisedFromCStrParts("ValueError", __tvm_assert_parts, 8);
    return -1;
  }
  if (!((((int32_t)(((int64_t*)matmul_0_O_shape)[1])) == 64))) {
    const char* __tvm_assert_parts[8] = {"Invalid ", "O.shape[1]", " on argument #", "2", " when calling:\n  `", "matmul_0(A: Tensor([m, 64], float16), B: Tensor([1024], int8), O: Tensor([m, 64], float16))", "`,\n  expected ", "64"};
    TVMFFIErrorSetRaisedFromCStrParts("ValueError", __tvm_assert_parts, 8);
    return -1;
  }
  if (!(((uint64_t)0ULL == (((DLTensor*)O_handle)[0].byte_offset)))) {
    const char* __tvm_assert_parts[8] = {"Invalid ", "O.byte_offset", " on argument #", "2", " when calling:\n  `", "matmul_0(A: Tensor([m, 64], float16), B: Tensor([1024], int8), O: Tensor([m, 64], float16))", "`,\n  expected ", "0"};
    TVMFFIErrorSetRaisedFromCStrParts("ValueError", __tvm_assert_parts, 8);
    return -1;
  }
  half* A = ((half*)((half*)(((DLTensor*)A_handle)[0].data)));
  int8_t* B = ((int8_t*)((int8_t*)(((DLTensor*)B_handle)[0].data)));
  half* O = ((half*)((half*)(((DLTensor*)O_handle)[0].data)));
  (((TVMFFIAny*)stack_ffi_any)[0].type_index) = 1;
  (((TVMFFIAny*)stack_ffi_any)[0].zero_padding) = 0;
  (((TVMFFIAny*)stack_ffi_any)[0].v_int64) = ((int64_t)2);
  (((TVMFFIAny*)stack_ffi_any)[1].type_index) = 1;
  (((TVMFFIAny*)stack_ffi_any)[1].zero_padding) = 0;
  (((TVMFFIAny*)stack_ffi_any)[1].v_int64) = ((int64_t)dev_id);
  (((TVMFFIAny*)stack_ffi_any)[2].type_index) = 0;
  (((TVMFFIAny*)stack_ffi_any)[2].zero_padding) = 0;
  (((TVMFFIAny*)stack_ffi_any)[2].v_int64) = (int64_t)0;
  if (((TVMFFIAny*)stack_ffi_any + 0)[0].v_int64 != kDLCUDA) {
  TVMFFIErrorSetRaisedFromCStr("ValueError", "cuda_host requires a CUDA device");
  return -1;
}
  tvm::ffi::CUDADeviceGuard cuda_device_guard(((TVMFFIAny*)stack_ffi_any + 0)[1].v_int64);
  0;
  int32_t cse_v1 = (m * 64);
  auto cuda_arg = A;
  auto cuda_arg_1 = B;
  auto cuda_arg_2 = O;
  auto cuda_arg_3 = m;
  auto cuda_arg_4 = ((m + 7) >> 3);
  auto cuda_arg_5 = 2;
  auto cuda_arg_6 = 32;
  auto cuda_arg_7 = (int64_t)64;
  size_t cuda_dim = static_cast<size_t>(cuda_arg_5);
  if (cuda_dim == 0) cuda_dim = 1;
  size_t cuda_dim_1 = static_cast<size_t>(cuda_arg_4);
  if (cuda_dim_1 == 0) cuda_dim_1 = 1;
  size_t cuda_dim_2 = static_cast<size_t>(cuda_arg_6);
  if (cuda_dim_2 == 0) cuda_dim_2 = 1;
  int cuda_device;
  if (::tvm_cuda_host_check(cudaGetDevice(&cuda_device)) != 0) return -1;
  cudaStream_t cuda_stream = static_cast<cudaStream_t>(TVMFFIEnvGetStream(kDLCUDA, cuda_device));
  if (cuda_arg_7 >= 49152) {
    if (::tvm_cuda_host_check(cudaFuncSetAttribute(::matmul_0_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, cuda_arg_7)) != 0) return -1;
  }
  cudaLaunchConfig_t cuda_config = {};
  cuda_config.gridDim = dim3(cuda_dim, cuda_dim_1, 1);
  cuda_config.blockDim = dim3(cuda_dim_2, 1, 1);
  cuda_config.dynamicSmemBytes = cuda_arg_7;
  cuda_config.stream = cuda_stream;
  if (::tvm_cuda_host_check(tvm_cuda_host_launch(::matmul_0_kernel, &cuda_config, cuda_arg, cuda_arg_1, cuda_arg_2, cuda_arg_3), true) != 0) return -1;
  0;
  return 0;
  } catch (...) {
    cudaGetLastError();
    throw;
  }
  TVM_FFI_SAFE_CALL_END();
}

#ifdef __cplusplus
extern "C"
#endif
TVM_DLL int32_t __tvm_ffi_main(void* self, void* args, int num_args, void* result) {
  return __tvm_ffi_matmul_0(self, args, num_args, result);
}
