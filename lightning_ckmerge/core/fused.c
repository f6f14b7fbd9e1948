/* target = a mean that moves towards one source after another, in one pass over memory: every source is read once, the
   target written once. `core/merge.py` says what is computed; the bits are the same, since both add with one rounding
   (FMA), and from the nearer end, as `torch.lerp` does.

   A tensor is float32 or bfloat16; means are float32. m: elements; k: sources beside the first. */
#include <math.h>

#include "bf16.h"

#if !defined(__FMA__) && !defined(__ARM_FEATURE_FMA)
#error "without FMA instructions fmaf is slow, and PyTorch rounds twice"
#endif

/* Streams that are read at a time; more would outnumber the registers. */
#define MAX_TERMS 16
#define BLOCK 1024
/* Rows a power of two apart would compete for the same cache sets. */
#define ROW (BLOCK + 16)

/* The number of terms is known to the compiler, so that all of them are read side by side. */
#define KERNEL(T, K) \
    static void blend_##T##_##K(int64_t m, const T *start, const T *const *s, const float *share, T *out) { \
        const T *p[K + 1]; \
        float c[K + 1], near[K + 1]; \
        for (int k = 0; k < K; k++) { \
            p[k] = s[k]; \
            near[k] = fabsf(share[k]) < 0.5f ? 0 : 1; \
            c[k] = share[k] - near[k]; \
        } \
        _Pragma("omp simd") for (int64_t j = 0; j < m; j++) { \
            float mean = up_##T(start[j]); \
            _Pragma("GCC unroll 16") for (int k = 0; k < K; k++) { \
                float x = up_##T(p[k][j]); \
                mean = fmaf(c[k], x - mean, near[k] != 0 ? x : mean); \
            } \
            out[j] = down_##T(mean); \
        } \
    }
#define NAME(T, K) blend_##T##_##K,
#define ALL(X, T) X(T, 0) X(T, 1) X(T, 2) X(T, 3) X(T, 4) X(T, 5) X(T, 6) X(T, 7) X(T, 8) X(T, 9) X(T, 10) X(T, 11) \
    X(T, 12) X(T, 13) X(T, 14) X(T, 15) X(T, 16)

ALL(KERNEL, f32)
ALL(KERNEL, bf16)
typedef void (*kernel_f32)(int64_t, const f32 *, const f32 *const *, const float *, f32 *);
typedef void (*kernel_bf16)(int64_t, const bf16 *, const bf16 *const *, const float *, bf16 *);
static const kernel_f32 blend_f32[] = {ALL(NAME, f32)};
static const kernel_bf16 blend_bf16[] = {ALL(NAME, bf16)};

/* A block of a tensor as float32: itself, or widened into `row`. */
static const float *widened(const void *tensor, int is_bf16, int64_t i, int64_t m, float *row) {
    if (!is_bf16) return (const float *)tensor + i;
    const bf16 *block = (const bf16 *)tensor + i;
    for (int64_t j = 0; j < m; j++) row[j] = up_bf16(block[j]);
    return row;
}

/* Any mixture of precisions and any number of terms, in blocks that stay in the first cache. */
static void merge_blocks(int64_t n, int k, const void **s, const int32_t *is_bf16, const float *share, void *target,
                         int target_is_bf16) {
    float rows[MAX_TERMS + 2][ROW];
    const float *p[MAX_TERMS];
    for (int64_t i = 0; i < n; i += BLOCK) {
        int64_t m = n - i < BLOCK ? n - i : BLOCK;
        float *mean = target_is_bf16 ? rows[MAX_TERMS + 1] : (float *)target + i;
        const float *start = widened(s[0], is_bf16[0], i, m, rows[MAX_TERMS]);
        int done = 0;
        do {
            int terms = k - done < MAX_TERMS ? k - done : MAX_TERMS;
            for (int q = 0; q < terms; q++) {
                int source = 1 + done + q;
                p[q] = widened(s[source], is_bf16[source], i, m, rows[q]);
            }
            blend_f32[terms](m, start, p, share + done, mean);
            start = mean;
            done += terms;
        } while (done < k);
        if (target_is_bf16)
            for (int64_t j = 0; j < m; j++) ((bf16 *)target)[i + j] = down_bf16(mean[j]);
    }
}

/* Merge pieces of tensors. sources: k + 1 tables of the pieces' addresses, in the order of the shares. */
void merge(int64_t num_pieces, const int64_t *numels, int32_t k, const void *const *const *sources,
           const int32_t *is_bf16, const float *share, void *const *targets, int32_t target_is_bf16) {
    int all_bf16 = target_is_bf16 && k <= MAX_TERMS;
    for (int q = 0; q <= k; q++) all_bf16 = all_bf16 && is_bf16[q];
    const void *s[k + 1];
    for (int64_t piece = 0; piece < num_pieces; piece++) {
        for (int q = 0; q <= k; q++) s[q] = sources[q][piece];
        if (all_bf16)
            blend_bf16[k](numels[piece], s[0], (const bf16 *const *)s + 1, share, targets[piece]);
        else
            merge_blocks(numels[piece], k, s, is_bf16, share, targets[piece], target_is_bf16);
    }
}
