/* bfloat16 to float32 and back, rounding to the nearest, ties to even. */
#include <stdint.h>
#include <string.h>

typedef float f32;
typedef uint16_t bf16;

static inline float up_f32(f32 x) { return x; }
static inline f32 down_f32(float x) { return x; }

static inline float up_bf16(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

static inline bf16 down_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    int is_nan = (bits & 0x7fffffff) > 0x7f800000;
    return is_nan ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
