/* target = a mean that moves towards one source after another, in one pass over memory: every source is read once, the
   target written once, past the caches. `core/merge.py` says what is computed; the bits are the same, since both add
   with one rounding (FMA), and from the nearer end, as `torch.lerp` does.

   A tensor is float32 or bfloat16; means are float32. m: elements; k: sources beside the first. */
#include <math.h>
#if defined(__AVX__)
#include <immintrin.h>
#endif

#include "bf16.h"

#if !defined(__FMA__) && !defined(__ARM_FEATURE_FMA)
#error "without FMA instructions fmaf is slow, and PyTorch rounds twice"
#endif

/* Sources that are read at a time; more would outnumber the registers. */
#define MAX_TERMS 16
#define BLOCK 1024
/* Rows a power of two apart would compete for the same cache sets. */
#define ROW (BLOCK + 16)
/* Elements of a chunk: whole cache lines. */
#define CHUNK 32
#define LINE 64

/* Whether a source is nearer to the new mean than the old mean is. */
static inline int is_nearer(float share) { return !(fabsf(share) < 0.5f); }

/* Write whole cache lines past the caches, which would first read what is overwritten; a model does not stay in them. */
static inline void write_past(void *to, const void *from, int64_t bytes) {
#if defined(__AVX512F__)
    for (int64_t i = 0; i < bytes; i += 64)
        _mm512_stream_si512((void *)((char *)to + i), _mm512_load_si512((const char *)from + i));
#elif defined(__AVX__)
    for (int64_t i = 0; i < bytes; i += 32)
        _mm256_stream_si256((void *)((char *)to + i), _mm256_load_si256((const void *)((const char *)from + i)));
#else
    memcpy(to, from, bytes);
#endif
}

/* After this, other threads see what `write_past` wrote. */
static inline void finish_writes(void) {
#if defined(__AVX__)
    _mm_sfence();
#endif
}

/* The number of terms is known to the compiler, so that all of them are read side by side. Of `k` terms only the first
   may be nearer. `mean_`: elements i to i + m; `blend_`: all m of them. */
#define KERNEL(T, K) \
    static inline __attribute__((always_inline)) void mean_##T##_##K( \
        int64_t i, int64_t m, const T *start, const T *const *p, const float *c, int nearer, T *out) { \
        _Pragma("omp simd") for (int64_t j = 0; j < m; j++) { \
            float mean = up_##T(start[i + j]); \
            _Pragma("GCC unroll 16") for (int k = 0; k < K; k++) { \
                float x = up_##T(p[k][i + j]); \
                mean = fmaf(c[k], x - mean, k == 0 && nearer ? x : mean); \
            } \
            out[j] = down_##T(mean); \
        } \
    } \
    static void blend_##T##_##K(int64_t m, const T *start, const T *const *s, const float *share, T *out, \
                                int past_caches) { \
        const T *p[K + 1]; \
        float c[K + 1]; \
        int nearer = K > 0 && is_nearer(share[0]); \
        for (int k = 0; k < K; k++) p[k] = s[k], c[k] = k == 0 ? share[k] - nearer : share[k]; \
        int64_t i = 0; \
        if (past_caches) { \
            _Alignas(LINE) T chunk[CHUNK]; \
            int64_t head = -(uintptr_t)out % LINE / sizeof(T); \
            i = head < m ? head : m; \
            mean_##T##_##K(0, i, start, p, c, nearer, out); \
            for (; i + CHUNK <= m; i += CHUNK) { \
                mean_##T##_##K(i, CHUNK, start, p, c, nearer, chunk); \
                write_past(out + i, chunk, sizeof chunk); \
            } \
        } \
        mean_##T##_##K(i, m - i, start, p, c, nearer, out + i); \
    }
#define ALL(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13) X(14) X(15) X(16)
#define KERNELS(K) KERNEL(f32, K) KERNEL(bf16, K)
ALL(KERNELS)

typedef void (*blend_f32)(int64_t, const f32 *, const f32 *const *, const float *, f32 *, int);
typedef void (*blend_bf16)(int64_t, const bf16 *, const bf16 *const *, const float *, bf16 *, int);
#define BLEND_F32(K) blend_f32_##K,
#define BLEND_BF16(K) blend_bf16_##K,
static const blend_f32 blends_f32[] = {ALL(BLEND_F32)};
static const blend_bf16 blends_bf16[] = {ALL(BLEND_BF16)};

/* A block of a tensor as float32: itself, or widened into `row`. */
static const float *widened(const void *tensor, int is_bf16, int64_t i, int64_t m, float *row) {
    if (!is_bf16) return (const float *)tensor + i;
    const bf16 *block = (const bf16 *)tensor + i;
    for (int64_t j = 0; j < m; j++) row[j] = up_bf16(block[j]);
    return row;
}

/* Any mixture of precisions, any number of terms, any shares, in blocks that stay in the first cache. */
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
            int terms = 0;
            for (; done < k && terms < MAX_TERMS && !(terms > 0 && is_nearer(share[done])); done++, terms++)
                p[terms] = widened(s[1 + done], is_bf16[1 + done], i, m, rows[terms]);
            blends_f32[terms](m, start, p, share + done - terms, mean, 0);
            start = mean;
        } while (done < k);
        if (target_is_bf16)
            for (int64_t j = 0; j < m; j++) ((bf16 *)target)[i + j] = down_bf16(mean[j]);
    }
}

/* Merge pieces of tensors. sources: k + 1 tables of the pieces' addresses, in the order of the shares. */
void merge(int64_t num_pieces, const int64_t *numels, int32_t k, const void *const *const *sources,
           const int32_t *is_bf16, const float *share, void *const *targets, int32_t target_is_bf16) {
    int in_one_pass = k <= MAX_TERMS;
    for (int q = 1; q < k; q++) in_one_pass = in_one_pass && !is_nearer(share[q]);
    for (int q = 0; q <= k; q++) in_one_pass = in_one_pass && !is_bf16[q] == !target_is_bf16;
    const void *s[k + 1];
    for (int64_t piece = 0; piece < num_pieces; piece++) {
        for (int q = 0; q <= k; q++) s[q] = sources[q][piece];
        if (!in_one_pass)
            merge_blocks(numels[piece], k, s, is_bf16, share, targets[piece], target_is_bf16);
        else if (target_is_bf16)
            blends_bf16[k](numels[piece], s[0], (const bf16 *const *)s + 1, share, targets[piece], 1);
        else
            blends_f32[k](numels[piece], s[0], (const f32 *const *)s + 1, share, targets[piece], 1);
    }
    finish_writes();
}
