// Stands in for the CUDA driver: remembers what it was asked for. Contexts and modules are numbers.
#include <stdint.h>
#include <string.h>

static char log_text[1 << 16];
static int fail_launch;
static void* current;

static int note(const char* text) {
  strncat(log_text, text, sizeof log_text - strlen(log_text) - 1);
  strncat(log_text, "\n", sizeof log_text - strlen(log_text) - 1);
  return 0;
}

static void number(char* out, long long value) {
  char digits[24];
  int n = 0, negative = value < 0;
  if (negative) value = -value;
  do digits[n++] = '0' + value % 10;
  while (value /= 10);
  if (negative) digits[n++] = '-';
  while (n) *out++ = digits[--n];
  *out = 0;
}

static int note_numbers(const char* name, int count, const long long* values) {
  char line[1024], one[32];
  strcpy(line, name);
  for (int i = 0; i < count; ++i) {
    number(one, values[i]);
    strcat(line, " ");
    strcat(line, one);
  }
  return note(line);
}

const char* fake_log(void) { return log_text; }
void fake_set_current(int device) { current = (void*)(intptr_t)(100 + device); }
void fake_reset(int fail) { log_text[0] = 0; fail_launch = fail; }

int cuInit(unsigned flags) { return flags; }
int cuDeviceGet(int* device, int index) { *device = index; return 0; }
int cuDevicePrimaryCtxRetain(void** context, int device) {
  *context = (void*)(intptr_t)(100 + device);
  long long values[] = {device};
  return note_numbers("retain", 1, values);
}
int cuCtxGetCurrent(void** context) { *context = current; return 0; }
int cuCtxPushCurrent_v2(void* context) { current = context; long long v[] = {(intptr_t)context}; return note_numbers("push", 1, v); }
int cuCtxPopCurrent_v2(void** context) { *context = current; current = 0; return note("pop"); }
int cuModuleLoadData(void** module, const char* image) {
  *module = (void*)7;
  char line[64] = "load ";
  strncat(line, image, 32);
  return note(line);
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
  *function = (void*)(intptr_t)name[7];  // the digit of matmul_N
  char line[128] = "function ";
  strncat(line, name, 100);
  return note(line);
}
int cuFuncSetAttribute(void* function, int attribute, int value) {
  long long values[] = {(intptr_t)function, attribute, value};
  return note_numbers("attribute", 3, values);
}
int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** arguments, void** extra) {
  long long first = *(long long*)arguments[0], last = *(int*)arguments[2];
  long long values[] = {(intptr_t)function, gx, gy, gz, bx, by, bz, shared, (intptr_t)stream, first, last, extra != 0};
  note_numbers("launch", 12, values);
  return fail_launch ? 701 : 0;
}
int cuGetErrorName(int error, const char** name) { *name = "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"; return error == 0; }
int cuStreamGetCaptureInfo_v2(void* stream, int* status, uint64_t* id, void** graph, void** nodes, size_t* count) {
  *status = stream != 0;
  *id = 41 + (intptr_t)stream;
  return graph || nodes || count;
}
