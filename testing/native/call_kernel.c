/* Calls kernels that are linked to it, by tvm-ffi's convention and without tvm-ffi: `call_kernel CALLS OUTPUTS`.
 *
 * CALLS holds little-endian int64, and data: for each call the number of the kernel and of its tensors; then for each
 * tensor DLPack's type code, the bits, the number of dimensions, the shape, and but for the last one, the output, its
 * bytes. Each output is appended to OUTPUTS. Every tensor ends where a page without access begins, so that a kernel
 * that reads or writes beyond one is killed. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <tvm/ffi/c_api.h>
#include <unistd.h>

enum { MOST_TENSORS = 8, MOST_DIMENSIONS = 4 };

#define KERNEL(name) __attribute__((weak)) int __tvm_ffi_##name(void*, const TVMFFIAny*, int32_t, TVMFFIAny*)
KERNEL(matmul_0);
KERNEL(matmul_1);
KERNEL(matmul_2);
KERNEL(matmul_3);
KERNEL(attention_0);
KERNEL(attention_1);
KERNEL(attention_2);
KERNEL(attention_3);

/* In the order of testing/python/neon.py. */
static const TVMFFISafeCallType kernels[] = {__tvm_ffi_matmul_0,    __tvm_ffi_matmul_1,    __tvm_ffi_matmul_2,
                                             __tvm_ffi_matmul_3,    __tvm_ffi_attention_0, __tvm_ffi_attention_1,
                                             __tvm_ffi_attention_2, __tvm_ffi_attention_3};

typedef struct {
  DLTensor tensor;
  int64_t shape[MOST_DIMENSIONS], strides[MOST_DIMENSIONS];
  void* mapped;
  size_t mapped_bytes, bytes;
} Operand;

static void fail(const char* what) {
  fprintf(stderr, "call_kernel: %s\n", what);
  exit(1);
}

static void read_bytes(FILE* file, void* into, size_t bytes) {
  if (fread(into, 1, bytes, file) != bytes) fail("the calls end too early");
}

static int64_t read_number(FILE* file, int64_t low, int64_t high, const char* what) {
  int64_t number;
  read_bytes(file, &number, sizeof number);
  if (number < low || number > high) fail(what);
  return number;
}

/* Memory whose last byte is the last before a page without access. */
static void place(Operand* operand) {
  size_t page = (size_t)sysconf(_SC_PAGESIZE), pages = (operand->bytes + page - 1) / page + 1;
  operand->mapped_bytes = pages * page;
  operand->mapped = mmap(0, operand->mapped_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (operand->mapped == MAP_FAILED) fail("no memory");
  char* end = (char*)operand->mapped + operand->mapped_bytes - page;
  if (mprotect(end, page, PROT_NONE)) fail("a page cannot be protected");
  operand->tensor.data = end - operand->bytes;
}

static void read_operand(FILE* file, Operand* operand, int is_output) {
  memset(operand, 0, sizeof *operand);
  DLTensor* tensor = &operand->tensor;
  tensor->device.device_type = kDLCPU;
  tensor->dtype.code = (uint8_t)read_number(file, 0, 255, "a type code");
  tensor->dtype.bits = (uint8_t)read_number(file, 8, 64, "bits of a type");
  tensor->dtype.lanes = 1;
  tensor->ndim = (int32_t)read_number(file, 1, MOST_DIMENSIONS, "a number of dimensions");
  tensor->shape = operand->shape;
  tensor->strides = operand->strides;
  for (int d = 0; d < tensor->ndim; ++d) operand->shape[d] = read_number(file, 1, 1 << 28, "a shape");
  int64_t elements = 1;
  for (int d = tensor->ndim; d-- > 0; elements *= operand->shape[d]) operand->strides[d] = elements;
  operand->bytes = (size_t)elements * tensor->dtype.bits / 8;
  place(operand);
  if (is_output)
    memset(tensor->data, 0x7f, operand->bytes); /* what no kernel writes: a NaN or a number far away */
  else
    read_bytes(file, tensor->data, operand->bytes);
}

static void call(FILE* calls, FILE* outputs, int64_t number) {
  Operand operands[MOST_TENSORS];
  TVMFFIAny arguments[MOST_TENSORS], result;
  memset(arguments, 0, sizeof arguments);
  memset(&result, 0, sizeof result);
  int count = (int)read_number(calls, 1, MOST_TENSORS, "a number of tensors");
  for (int i = 0; i < count; ++i) {
    read_operand(calls, &operands[i], i == count - 1);
    arguments[i].type_index = kTVMFFIDLTensorPtr;
    arguments[i].v_ptr = &operands[i].tensor;
  }
  if (number < 0 || number >= (int64_t)(sizeof kernels / sizeof *kernels) || !kernels[number]) fail("no such kernel");
  if (kernels[number](0, arguments, count, &result)) fail("a kernel returned an error");
  const Operand* output = &operands[count - 1];
  if (fwrite(output->tensor.data, 1, output->bytes, outputs) != output->bytes) fail("the output cannot be written");
  for (int i = 0; i < count; ++i) munmap(operands[i].mapped, operands[i].mapped_bytes);
}

int main(int argc, char** argv) {
  if (argc != 3) fail("usage: call_kernel CALLS OUTPUTS");
  FILE *calls = fopen(argv[1], "rb"), *outputs = fopen(argv[2], "wb");
  if (!calls || !outputs) fail("a file cannot be opened");
  int64_t number;
  while (fread(&number, sizeof number, 1, calls) == 1) call(calls, outputs, number);
  if (fclose(outputs)) fail("the outputs cannot be written");
  return 0;
}
