/* target = (w_0 source_0 + ... + w_{k-1} source_{k-1}) / total, added up in this order with one rounding (FMA) a term
   and rounded once. `core/mixing.py` says what is computed. m: elements; sums are float32. */
#include <math.h>

#include "bf16.h"

#if !defined(__FMA__) || !defined(__x86_64__)
#error "PyTorch is known to add with one rounding on x86 processors with FMA instructions only"
#endif

#define BLOCK 1024

void mix(int64_t m, int32_t k, const void *const *sources, const int32_t *is_bf16, const float *w, float total,
         void *target, int32_t target_is_bf16) {
    for (int64_t i = 0; i < m; i += BLOCK) {
        int64_t n = m - i < BLOCK ? m - i : BLOCK;
        float sum[BLOCK] = {0};
        for (int q = 0; q < k; q++) {
            const f32 *s = (const f32 *)sources[q] + i;
            const bf16 *narrow = (const bf16 *)sources[q] + i;
            if (is_bf16[q])
                for (int64_t j = 0; j < n; j++) sum[j] = fmaf(w[q], up_bf16(narrow[j]), sum[j]);
            else
                for (int64_t j = 0; j < n; j++) sum[j] = fmaf(w[q], s[j], sum[j]);
        }
        if (target_is_bf16)
            for (int64_t j = 0; j < n; j++) ((bf16 *)target)[i + j] = down_bf16(sum[j] / total);
        else
            for (int64_t j = 0; j < n; j++) ((f32 *)target)[i + j] = sum[j] / total;
    }
}
