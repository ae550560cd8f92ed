// Sixteen lanes, whatever the processor: the compiler splits them where its registers are narrower.
//
// Must not know: layers, adapters. Included once by each of plain.cpp, avx2.cpp and avx512.cpp, so everything lies in
// an unnamed namespace: code for one processor must never be linked in place of code for another.
//
// An element is a float32 or a bfloat16. Products see rows as units of four bytes, one float32 or two bfloat16: `dot`
// adds the products of the elements in each unit.
#pragma once
#include <cstdint>
#include <cstring>

namespace motet {
namespace {

#define MOTET_INLINE inline __attribute__((always_inline))

constexpr int LANES = 16;

typedef float f32v __attribute__((vector_size(64)));
typedef int32_t i32v __attribute__((vector_size(64)));
typedef uint32_t u32v __attribute__((vector_size(64)));
typedef uint16_t u16v __attribute__((vector_size(32)));
typedef int8_t i8v __attribute__((vector_size(16)));

MOTET_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
MOTET_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

#define MOTET_ALWAYS __attribute__((always_inline))

MOTET_INLINE f32v broadcast(float x) { return f32v{} + x; }

// The first n lanes; the others are zero.
template <class V>
MOTET_INLINE V load(const void *from, int64_t n = LANES) {
  V value{};
  constexpr size_t lane = sizeof(V) / LANES;
  if (n >= LANES)
    std::memcpy(&value, from, sizeof(V));
  else
    std::memcpy(&value, from, static_cast<size_t>(n) * lane);
  return value;
}

template <class V>
MOTET_INLINE void store(void *to, V value, int64_t n = LANES) {
  constexpr size_t lane = sizeof(V) / LANES;
  if (n >= LANES)
    std::memcpy(to, &value, sizeof(V));
  else
    std::memcpy(to, &value, static_cast<size_t>(n) * lane);
}

// The upper half of each float, rounded to nearest even; NaN stays NaN.
MOTET_INLINE u32v upper_half(f32v x) {
  const u32v bits = reinterpret_cast<u32v>(x);
  const u32v rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return x == x ? rounded : (u32v{} + 0x7fc0);
}

struct Float {
  using type = float;
  static constexpr int PER_UNIT = 1;
  static MOTET_INLINE f32v read(const type *from, int64_t n = LANES) { return load<f32v>(from, n); }
  static MOTET_INLINE void write(type *to, f32v x, int64_t n = LANES) { store(to, x, n); }
  static MOTET_INLINE f32v dot(f32v sum, u32v a, u32v b) {
    return sum + reinterpret_cast<f32v>(a) * reinterpret_cast<f32v>(b);
  }
  static MOTET_INLINE void split(u32v units, f32v *parts) { parts[0] = reinterpret_cast<f32v>(units); }
  static MOTET_INLINE u32v join(const f32v *parts) { return reinterpret_cast<u32v>(parts[0]); }
  // A unit of each lane, from a byte for each element.
  static MOTET_INLINE u32v widen(const int8_t *from) {
    return reinterpret_cast<u32v>(__builtin_convertvector(__builtin_convertvector(load<i8v>(from), i32v), f32v));
  }
  // Units of as many rows as a unit has elements, `stride` apart.
  static MOTET_INLINE u32v side_by_side(const type *rows, int64_t, int64_t n) { return load<u32v>(rows, n); }
};

struct Bfloat {
  using type = uint16_t;
  static constexpr int PER_UNIT = 2;
  static MOTET_INLINE f32v read(const type *from, int64_t n = LANES) {
    return reinterpret_cast<f32v>(__builtin_convertvector(load<u16v>(from, n), u32v) << 16);
  }
  static MOTET_INLINE void write(type *to, f32v x, int64_t n = LANES) {
    store(to, __builtin_convertvector(upper_half(x), u16v), n);
  }
  static MOTET_INLINE f32v dot(f32v sum, u32v a, u32v b) {
#if defined(MOTET_DOT_BF16)
    return reinterpret_cast<f32v>(_mm512_dpbf16_ps(
        reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b)));
#else
    const f32v even = reinterpret_cast<f32v>(a << 16) * reinterpret_cast<f32v>(b << 16);
    return sum + even + reinterpret_cast<f32v>(a & 0xffff0000u) * reinterpret_cast<f32v>(b & 0xffff0000u);
#endif
  }
  static MOTET_INLINE void split(u32v units, f32v *parts) {
    parts[0] = reinterpret_cast<f32v>(units << 16);
    parts[1] = reinterpret_cast<f32v>(units & 0xffff0000u);
  }
  static MOTET_INLINE u32v join(const f32v *parts) { return upper_half(parts[0]) | upper_half(parts[1]) << 16; }
  static MOTET_INLINE u32v widen(const int8_t *from) {
    const u32v both = __builtin_convertvector(load<u16v>(from), u32v);
    const f32v even = __builtin_convertvector(reinterpret_cast<i32v>(both << 24) >> 24, f32v);
    const f32v odd = __builtin_convertvector(reinterpret_cast<i32v>(both << 16) >> 24, f32v);
    return reinterpret_cast<u32v>(even) >> 16 | reinterpret_cast<u32v>(odd);  // seven bits and a sign leave no more
  }
  // The second row may be the first again where its factor is zero.
  static MOTET_INLINE u32v side_by_side(const type *rows, int64_t stride, int64_t n) {
    const u16v first = load<u16v>(rows, n), second = load<u16v>(rows + stride, n);
    return reinterpret_cast<u32v>(__builtin_shufflevector(
        first, second, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13,
        29, 14, 30, 15, 31));
  }
};

// each(first element, units) for the vectors of units that `width` elements are; only the last may be part of one.
template <class E, class Each>
MOTET_INLINE void each_vector(int64_t width, Each each) {
  const int64_t units = width / E::PER_UNIT;
  int64_t u = 0;
  for (; u + LANES <= units; u += LANES) each(u * E::PER_UNIT, LANES);
  if (u < units) each(u * E::PER_UNIT, units - u);
}

MOTET_INLINE float sum_of(f32v x) {
  x += __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
  x += __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
  x += __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
  return x[0] + x[1];
}

// Of two vectors, the runs of `width` lanes with an even number plus those with an odd one; e0 to e7 are the even ones.
#define MOTET_FOLD(a, b, e0, e1, e2, e3, e4, e5, e6, e7, width)                                                        \
  (__builtin_shufflevector(a, b, e0, e1, e2, e3, e4, e5, e6, e7, e0 + 16, e1 + 16, e2 + 16, e3 + 16, e4 + 16, e5 + 16, \
                           e6 + 16, e7 + 16) +                                                                         \
   __builtin_shufflevector(a, b, e0 + width, e1 + width, e2 + width, e3 + width, e4 + width, e5 + width, e6 + width,   \
                           e7 + width, e0 + width + 16, e1 + width + 16, e2 + width + 16, e3 + width + 16,             \
                           e4 + width + 16, e5 + width + 16, e6 + width + 16, e7 + width + 16))

// Lane i of the result is the sum of the lanes of x[i].
MOTET_INLINE f32v sums_of(const f32v *x) {
  f32v by8[8], by4[4], by2[2];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) by8[i] = MOTET_FOLD(x[2 * i], x[2 * i + 1], 0, 1, 2, 3, 4, 5, 6, 7, 8);
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) by4[i] = MOTET_FOLD(by8[2 * i], by8[2 * i + 1], 0, 1, 2, 3, 8, 9, 10, 11, 4);
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++) by2[i] = MOTET_FOLD(by4[2 * i], by4[2 * i + 1], 0, 1, 4, 5, 8, 9, 12, 13, 2);
  return MOTET_FOLD(by2[0], by2[1], 0, 2, 4, 6, 8, 10, 12, 14, 1);
}

MOTET_INLINE float largest_of(f32v x) {
  float largest = x[0];
  for (int i = 1; i < LANES; i++) largest = x[i] > largest ? x[i] : largest;
  return largest;
}

// e^x to 2 units in the last place; arguments beyond ±87 count as ±87, NaN stays NaN.
MOTET_INLINE f32v exp_of(f32v x) {
  x = x < -87.f ? broadcast(-87.f) : x;
  x = x > 87.f ? broadcast(87.f) : x;
  const f32v magic = broadcast(12582912.f);  // 1.5 · 2²³: adding it rounds to an integer in the low bits
  const f32v shifted = x * 1.44269504f + magic;
  const f32v n = shifted - magic;
  const f32v f = x - n * 0.693359375f + n * 2.12194440e-4f;
  f32v p = broadcast(1.f / 5040);  // Taylor's series: |f| ≤ ln 2 / 2, so the next term is below 6e-9
  p = p * f + 1.f / 720;
  p = p * f + 1.f / 120;
  p = p * f + 1.f / 24;
  p = p * f + 1.f / 6;
  p = p * f + .5f;
  p = p * f + 1.f;
  p = p * f + 1.f;
  return reinterpret_cast<f32v>(reinterpret_cast<i32v>(p) + (reinterpret_cast<i32v>(shifted) << 23));
}

}  // namespace
}  // namespace motet
