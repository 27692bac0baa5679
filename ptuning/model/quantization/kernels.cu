// Packed int4 / int8 weights to float16, bfloat16 or float32, compiled by NVRTC without headers.
//
// One thread writes eight neighbouring weights of one row: one 4-byte (int4) or 8-byte (int8) load and one or two
// 16-byte stores, because the kernel is memory-bound. Rows whose width is not a multiple of eight, or whose addresses
// are not aligned, take the same arithmetic one weight at a time (`wide` is 0).
//
// The product code x scale is exact in float32 (8 and 11 significant bits). It is rounded to float16, as the published
// numbers are, and that value is written in the dtype asked for.
// Int4: the even column is the high nibble, the odd one the low nibble, both signed. `stride` is the distance in bytes
// between consecutive rows of codes.

typedef unsigned short bits16;
typedef unsigned int bits32;

struct alignas(16) Sixteen { bits32 word[4]; };
struct alignas(8) Eight { bits32 word[2]; };
union FloatBits { float value; bits32 bits; };

#ifndef INLINE  // a test compiles this file for the CPU, with its own version of these
#define INLINE static __device__ __forceinline__
#define KERNEL extern "C" __global__ void
#define KERNEL_INDEX ((long long)blockIdx.x * blockDim.x + threadIdx.x)

INLINE float half_to_float(bits16 half) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
    return value;
}

INLINE bits16 float_to_half(float value) {
    bits16 half;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
    return half;
}
#endif

INLINE bits16 float_to_bfloat(float value) {
    FloatBits input;
    input.value = value;
    if ((input.bits & 0x7fffffff) > 0x7f800000) return (bits16)(input.bits >> 16) | 0x40;  // NaN stays NaN
    return (bits16)((input.bits + 0x7fff + ((input.bits >> 16) & 1)) >> 16);
}

// Where a weight goes: one instance per dtype of the output.
struct Half {
    bits16 bits;
    INLINE Half of(bits16 half) { return {half}; }
};
struct Bfloat {
    bits16 bits;
    INLINE Bfloat of(bits16 half) { return {float_to_bfloat(half_to_float(half))}; }
};
struct Single {
    float value;
    INLINE Single of(bits16 half) { return {half_to_float(half)}; }
};

// Code of one column of a row that starts at `row`.
template <int BITS>
INLINE int code_at(const signed char* row, int column) {
    if (BITS == 8) return row[column];
    int byte = row[column / 2];
    return column % 2 ? (signed char)(byte << 4) >> 4 : byte >> 4;
}

// The eight codes that begin at an aligned address, from one load.
template <int BITS>
INLINE void eight_codes(const signed char* packed, int* codes) {
    if (BITS == 8) {
        Eight words = *(const Eight*)packed;
        for (int i = 0; i < 8; i++) codes[i] = (int)(words.word[i / 4] << (24 - 8 * (i % 4))) >> 24;
    } else {
        bits32 word = *(const bits32*)packed;
        for (int i = 0; i < 4; i++) {
            codes[2 * i] = (int)(word << (24 - 8 * i)) >> 28;
            codes[2 * i + 1] = (int)(word << (28 - 8 * i)) >> 28;
        }
    }
}

// Eight weights of T, written as whole 16-byte words.
template <class T>
union EightOf {
    T weights[8];
    Sixteen words[sizeof(T) / 2];
};

template <int BITS, class T>
INLINE void extract(const signed char* packed, const bits16* scale, T* out, long long rows, int columns, int stride,
                    int wide) {
    int groups = (columns + 7) / 8;  // threads per row
    long long row = KERNEL_INDEX / groups;
    if (row >= rows) return;
    int first = (int)(KERNEL_INDEX % groups) * 8;
    const signed char* packed_row = packed + row * stride;
    T* out_row = out + row * columns;
    float row_scale = half_to_float(scale[row]);
    if (wide) {
        int codes[8];
        eight_codes<BITS>(packed_row + first / (8 / BITS), codes);
        EightOf<T> eight;
#pragma unroll
        for (int i = 0; i < 8; i++) eight.weights[i] = T::of(float_to_half((float)codes[i] * row_scale));
#pragma unroll
        for (int i = 0; i < (int)(sizeof(T) / 2); i++) ((Sixteen*)(out_row + first))[i] = eight.words[i];
    } else {
        int end = first + 8 < columns ? first + 8 : columns;
        for (int column = first; column < end; column++)
            out_row[column] = T::of(float_to_half((float)code_at<BITS>(packed_row, column) * row_scale));
    }
}

#define DEFINE_KERNEL(name, bits, type)                                                                     \
    KERNEL name(const signed char* packed, const bits16* scale, type* out, long long rows, int columns,     \
                int stride, int wide) {                                                                     \
        extract<bits, type>(packed, scale, out, rows, columns, stride, wide);                               \
    }

DEFINE_KERNEL(extract_int4_float16, 4, Half)
DEFINE_KERNEL(extract_int4_bfloat16, 4, Bfloat)
DEFINE_KERNEL(extract_int4_float32, 4, Single)
DEFINE_KERNEL(extract_int8_float16, 8, Half)
DEFINE_KERNEL(extract_int8_bfloat16, 8, Bfloat)
DEFINE_KERNEL(extract_int8_float32, 8, Single)
