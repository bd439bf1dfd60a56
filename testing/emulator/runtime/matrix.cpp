// Matrix instructions. A warp's lanes hand in their registers; the last lane computes for all.
//
// A product is taken in double and summed in double over the k of one instruction, with the accumulator, and rounded once to the
// accumulator's type. Tensor cores keep fewer bits and truncate, each generation in its own way: results are those of an ideal
// one, so that tests should allow the error that a sum of k terms in the accumulator's type has.
#include "runtime.h"

#include <string.h>

namespace emulator {

static int bits_of(Number type) {
  switch (type) {
    case Number::f16: case Number::bf16: return 16;
    case Number::e4m3: case Number::e5m2: case Number::s8: case Number::u8: return 8;
    case Number::s4: case Number::u4: return 4;
    default: return 32;
  }
}

static double decode(Number type, uint32_t bits) {
  switch (type) {
    case Number::f16: return half_to_float(uint16_t(bits));
    case Number::bf16: return bfloat_to_float(uint16_t(bits));
    case Number::tf32: return bit_cast<float>(bits & 0xffffe000u);
    case Number::e4m3: return e4m3_to_float(uint8_t(bits));
    case Number::e5m2: return e5m2_to_float(uint8_t(bits));
    case Number::s8: return int8_t(bits);
    case Number::u8: return uint8_t(bits);
    case Number::s4: return int(bits << 28) >> 28;
    case Number::u4: return bits & 15u;
    default: return 0;
  }
}

struct MmaArgument {
  const MmaShape* shape;
  uint32_t* d;
  const uint32_t *a, *b, *c;
};

constexpr int max_k = 64;

// Fragments as in the PTX manual: a register holds `per` neighbours in k; lane = 4 * group + place.
static void take_a(const MmaShape& shape, Gathering& gathering, double (*a)[max_k]) {
  const int bits = bits_of(shape.a), per = 32 / bits, halves = shape.m / 8, count = shape.m * shape.k * bits / 1024;
  for (int lane = 0; lane < warp_lanes; ++lane) {
    const uint32_t* registers = static_cast<MmaArgument*>(gathering.arguments[lane])->a;
    for (int r = 0; r < count; ++r)
      for (int i = 0; i < per; ++i)
        a[lane / 4 + 8 * (r % halves)][(r / halves) * 4 * per + lane % 4 * per + i] = decode(shape.a, registers[r] >> (bits * i));
  }
}
static void take_b(const MmaShape& shape, Gathering& gathering, double (*b)[max_k]) {
  const int bits = bits_of(shape.b), per = 32 / bits, count = shape.k * bits / 128;
  for (int lane = 0; lane < warp_lanes; ++lane) {
    const uint32_t* registers = static_cast<MmaArgument*>(gathering.arguments[lane])->b;
    for (int r = 0; r < count; ++r)
      for (int i = 0; i < per; ++i)
        b[lane / 4][r * 4 * per + lane % 4 * per + i] = decode(shape.b, registers[r] >> (bits * i));
  }
}

static uint32_t added(const MmaShape& shape, double sum, uint32_t c) {
  if (shape.accumulator == Number::f32) return bit_cast<uint32_t>(float(sum + bit_cast<float>(c)));
  const int64_t total = int64_t(sum) + int32_t(c);
  if (!shape.saturate) return uint32_t(total);
  return uint32_t(total > INT32_MAX ? INT32_MAX : total < INT32_MIN ? INT32_MIN : total);
}

static void run_mma(Gathering& gathering) {
  const MmaShape& shape = *static_cast<MmaArgument*>(gathering.arguments[0])->shape;
  static double a[16][max_k], b[8][max_k];
  take_a(shape, gathering, a);
  take_b(shape, gathering, b);
  for (int lane = 0; lane < warp_lanes; ++lane) {
    const auto& argument = *static_cast<MmaArgument*>(gathering.arguments[lane]);
    double sums[4];
    const int count = shape.m / 4;
    for (int i = 0; i < count; ++i) {
      const double *row = a[lane / 4 + 8 * (i / 2)], *column = b[lane % 4 * 2 + i % 2];
      double sum = 0;
      for (int k = 0; k < shape.k; ++k) sum += row[k] * column[k];
      sums[i] = sum;
    }
    if (shape.accumulator == Number::f16)
      for (int r = 0; r < count / 2; ++r)
        argument.d[r] = ptx::pair(double_to_half(sums[2 * r] + half_to_float(uint16_t(argument.c[r]))),
                                  double_to_half(sums[2 * r + 1] + half_to_float(uint16_t(argument.c[r] >> 16))));
    else
      for (int i = 0; i < count; ++i) argument.d[i] = added(shape, sums[i], argument.c[i]);
  }
}

void mma(const MmaShape& shape, uint32_t* d, const uint32_t* a, const uint32_t* b, const uint32_t* c, int line) {
  MmaArgument argument{&shape, d, a, b, c};
  gather("mma", 0xffffffffu, line, &argument, run_mma, true);
}

// ---- matrices of 8 by 8 elements of 16 bits -------------------------------------------------------------------------

struct MatrixArgument {
  uint32_t address;
  int matrices;
  bool transposed;
  uint32_t* d;
  const uint32_t* s;
};

static const char* row_pointer(Gathering& gathering, int row, int line) {
  const uint32_t address = static_cast<MatrixArgument*>(gathering.arguments[row])->address;
  if (address % 16 != 0) fail("line %d: %s of a row at %#x, lane %d, which is no multiple of 16", line, gathering.name, address, row);
  return ptx::shared(address);
}

// Eight rows are read at once, as if eight lanes read 16 bytes each.
static void count_rows(Gathering& gathering, int matrices) {
  for (int row = 0; row < 8 * matrices; ++row)
    count_banks(is_line | gathering.line, state.current->warp * warp_lanes + row,
                static_cast<MatrixArgument*>(gathering.arguments[row])->address, 16);
}

static void run_ldmatrix(Gathering& gathering) {
  const auto& first = *static_cast<MatrixArgument*>(gathering.arguments[0]);
  const int warp = state.current->warp * warp_lanes;
  count_rows(gathering, first.matrices);
  for (int matrix = 0; matrix < first.matrices; ++matrix) {
    for (int lane = 0; lane < warp_lanes; ++lane) {
      uint16_t parts[2];
      for (int i = 0; i < 2; ++i) {
        const int row = first.transposed ? lane % 4 * 2 + i : lane / 4, column = first.transposed ? lane / 4 : lane % 4 * 2 + i;
        const char* pointer = row_pointer(gathering, 8 * matrix + row, gathering.line) + 2 * column;
        check_access(pointer, 2, Access::read, warp + lane, is_line | gathering.line);
        memcpy(&parts[i], pointer, 2);
      }
      static_cast<MatrixArgument*>(gathering.arguments[lane])->d[matrix] = ptx::pair(parts[0], parts[1]);
    }
  }
}

static void run_stmatrix(Gathering& gathering) {
  const auto& first = *static_cast<MatrixArgument*>(gathering.arguments[0]);
  const int warp = state.current->warp * warp_lanes;
  count_rows(gathering, first.matrices);
  for (int matrix = 0; matrix < first.matrices; ++matrix)
    for (int lane = 0; lane < warp_lanes; ++lane) {
      const uint32_t value = static_cast<MatrixArgument*>(gathering.arguments[lane])->s[matrix];
      for (int i = 0; i < 2; ++i) {
        const int row = first.transposed ? lane % 4 * 2 + i : lane / 4, column = first.transposed ? lane / 4 : lane % 4 * 2 + i;
        char* pointer = const_cast<char*>(row_pointer(gathering, 8 * matrix + row, gathering.line)) + 2 * column;
        check_access(pointer, 2, Access::write, warp + lane, is_line | gathering.line);
        const uint16_t part = uint16_t(value >> 16 * i);
        memcpy(pointer, &part, 2);
      }
    }
}

void ldmatrix(uint32_t address, int matrices, bool transposed, uint32_t* d, int line) {
  MatrixArgument argument{address, matrices, transposed, d, nullptr};
  gather("ldmatrix", 0xffffffffu, line, &argument, run_ldmatrix, true);
}

void stmatrix(uint32_t address, int matrices, bool transposed, const uint32_t* s, int line) {
  MatrixArgument argument{address, matrices, transposed, nullptr, s};
  gather("stmatrix", 0xffffffffu, line, &argument, run_stmatrix, true);
}

struct MoveArgument {
  uint32_t source, result;
};

uint32_t movmatrix(uint32_t source, int line) {
  MoveArgument argument{source, 0};
  gather("movmatrix", 0xffffffffu, line, &argument, [](Gathering& gathering) {
    const auto element = [&](int row, int column) {
      return uint16_t(static_cast<MoveArgument*>(gathering.arguments[4 * row + column / 2])->source >> 16 * (column % 2));
    };
    for (int lane = 0; lane < warp_lanes; ++lane)
      static_cast<MoveArgument*>(gathering.arguments[lane])->result =
          ptx::pair(element(lane % 4 * 2, lane / 4), element(lane % 4 * 2 + 1, lane / 4));
  }, true);
  return argument.result;
}

}  // namespace emulator
