// kernels.cu as host code: a loop over the grid's threads takes the place of the GPU, and these definitions that of what
// the source takes from it: a thread's index in the whole grid, and conversions by device assembly.
#define INLINE static inline
#define KERNEL extern "C" void
#define KERNEL_INDEX host_index

typedef unsigned short bits16;
typedef unsigned int bits32;
union Bits { float value; bits32 bits; };

static thread_local long long host_index;

INLINE float power_of_two(int exponent) {
    Bits power;
    power.bits = (bits32)(exponent + 127) << 23;
    return power.value;
}

INLINE float half_to_float(bits16 half) {
    int exponent = (half >> 10) & 31;
    float fraction = (float)(half & 1023);
    float magnitude = exponent == 0    ? fraction * power_of_two(-24)
                      : exponent == 31 ? (fraction == 0 ? __builtin_inff() : __builtin_nanf(""))
                                       : (1024.0f + fraction) * power_of_two(exponent - 25);
    return half & 0x8000 ? -magnitude : magnitude;
}

INLINE bits16 float_to_half(float value) {
    Bits input;
    input.value = value;
    bits16 sign = (bits16)((input.bits >> 16) & 0x8000);
    bits32 magnitude = input.bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return sign | 0x7e00;   // NaN
    if (magnitude >= 0x477ff000) return sign | 0x7c00;  // 65520 and above round to infinity
    if (magnitude < 0x38800000) {                       // below 2^-14: the float16 result is subnormal
        // Adding 0.5 leaves a unit of 2^-24 in the last place, so the addition itself rounds to nearest even.
        Bits shifted;
        shifted.bits = magnitude;
        shifted.value += 0.5f;
        return sign | (bits16)(shifted.bits - 0x3f000000);
    }
    bits32 odd = (magnitude >> 13) & 1;
    return sign | (bits16)((magnitude - 0x38000000 + 0x0fff + odd) >> 13);
}

#include KERNEL_SOURCE

typedef void (*Kernel)(const signed char*, const bits16*, void*, long long, int, int, int);

extern "C" void walk(Kernel kernel, long long threads, const signed char* packed, const bits16* scale, void* out,
                     long long rows, int columns, int stride, int wide) {
    for (host_index = 0; host_index < threads; host_index++) kernel(packed, scale, out, rows, columns, stride, wide);
}

// A thread outside the grid must touch nothing, so this one would crash if it did.
extern "C" void walk_one(Kernel kernel, long long index, long long rows, int columns) {
    host_index = index;
    kernel(nullptr, nullptr, nullptr, rows, columns, columns, 1);
}
