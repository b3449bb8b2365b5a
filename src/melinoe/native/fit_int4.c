/* The codes, scales and zeros of int4, bit for bit as torch fits them: store/rounding.py says what is computed
and asks, fitting.py when this is compiled and used.

A group of 64 weights stays in registers and the nearest cache from its first step to its last, where torch goes
over a tile some sixty times. Every step is rounded as torch's operation rounds it, so this must be compiled
without contraction (a product and a sum in one rounding). A sum of 64 has one of torch's own orders: of
rows whose inputs lie side by side 16 or 8 partial sums, as wide as its vectors are, and those one after the
other; else four, of every fourth number. */

#include "bfloat16.h"

#define GROUP 64
#define MOST_OUTPUTS 64 /* of a tile */

#define TOGETHER 4 /* outputs: their sums, in which every addition waits for the last, run side by side */
#define LANES 16
#define FOURTHS 4

typedef float rows_of[TOGETHER][GROUP];
typedef float each[TOGETHER];

/* order: how many partial sums there are. */
static inline __attribute__((always_inline)) void sums(rows_of of, each totals, const int order) {
    float parts[TOGETHER][LANES];
    if (order == FOURTHS) {
        float fourths[4][TOGETHER] = {{0}};
        for (int place = 0; place < GROUP / 4; place++)
            for (int part = 0; part < 4; part++)
                for (int one = 0; one < TOGETHER; one++)
                    fourths[part][one] += of[one][4 * place + part];
        for (int one = 0; one < TOGETHER; one++)
            totals[one] = ((fourths[0][one] + fourths[1][one]) + fourths[2][one]) + fourths[3][one];
        return;
    }
    for (int one = 0; one < TOGETHER; one++)
        for (int lane = 0; lane < order; lane++) {
            const float *at = of[one] + lane;
            parts[one][lane] = order == 16 ? ((at[0] + at[16]) + at[32]) + at[48]
                                           : (((at[0] + at[32]) + (at[8] + at[40])) + (at[16] + at[48])) +
                                                 (at[24] + at[56]);
        }
    for (int one = 0; one < TOGETHER; one++)
        totals[one] = 0;
    for (int lane = 0; lane < order; lane++)
        for (int one = 0; one < TOGETHER; one++)
            totals[one] += parts[one][lane];
}

/* A sum that is exact, in whichever order: of codes, and of squares of their distances from their mean, which are
   64ths, at most 7.5 on average, so that their sum has 24 bits. */
static inline __attribute__((always_inline)) float exact_sum(const float *of) {
    float lanes[LANES];
    for (int lane = 0; lane < LANES; lane++)
        lanes[lane] = (of[lane] + of[16 + lane]) + (of[32 + lane] + of[48 + lane]);
    for (int half = LANES / 2; half; half /= 2)
        for (int lane = 0; lane < half; lane++)
            lanes[lane] += lanes[half + lane];
    return lanes[0];
}

static inline float half_of(float value) { return wide(narrow(value)); }

typedef struct {
    each error, scale, zero;
    rows_of codes;
} fit;

/* Takes codes for scales and zeros; keeps them where their error is less than the best. */
static inline __attribute__((always_inline)) void consider(rows_of weights, const each scale, const each zero,
                                                           rows_of codes, fit *best, const int first,
                                                           const int order) {
    rows_of squares;
    each error;
    for (int one = 0; one < TOGETHER; one++) {
        const float divisor = scale[one] == 0 ? 1 : scale[one], factor = scale[one], constant = zero[one];
        for (int place = 0; place < GROUP; place++) {
            float code = rintf((weights[one][place] - constant) / divisor);
            code = code < -8 ? -8 : code;
            code = code > 7 ? 7 : code;
            const float difference = (code * factor + constant) - weights[one][place];
            codes[one][place] = code;
            squares[one][place] = difference * difference;
        }
    }
    sums(squares, error, order);
    for (int one = 0; one < TOGETHER; one++)
        if (first || error[one] < best->error[one]) {
            best->error[one] = error[one], best->scale[one] = scale[one], best->zero[one] = zero[one];
            memcpy(best->codes[one], codes[one], sizeof codes[one]);
        }
}

/* The largest and the smallest of a group. Returns 1 where torch's result hangs on more than values: on what is
   no number, or on the sign of a largest weight that is zero. */
static inline __attribute__((always_inline)) int extremes(const float *weights, float *high, float *low) {
    float highs[LANES], lows[LANES];
    int32_t unusual[LANES], negative_zero = 0;
    for (int lane = 0; lane < LANES; lane++)
        highs[lane] = lows[lane] = weights[lane], unusual[lane] = 0;
    for (int start = 0; start < GROUP; start += LANES)
        for (int lane = 0; lane < LANES; lane++) {
            const float weight = weights[start + lane];
            highs[lane] = weight > highs[lane] ? weight : highs[lane];
            lows[lane] = weight < lows[lane] ? weight : lows[lane];
            unusual[lane] |= !(fabsf(weight) <= 3.4028234e38f);
        }
    for (int half = LANES / 2; half; half /= 2)
        for (int lane = 0; lane < half; lane++) {
            highs[lane] = highs[half + lane] > highs[lane] ? highs[half + lane] : highs[lane];
            lows[lane] = lows[half + lane] < lows[lane] ? lows[half + lane] : lows[lane];
            unusual[lane] |= unusual[half + lane];
        }
    *high = highs[0], *low = lows[0];
    if (*high == 0 && *low == 0)
        for (int place = 0; place < GROUP; place++)
            negative_zero |= signbit(weights[place]) != 0;
    return unusual[0] || negative_zero;
}

static inline __attribute__((always_inline)) int fitted(rows_of weights, fit *best, const int order) {
    each high, low, mean, slope, scale, zero, code_mean, spread;
    for (int one = 0; one < TOGETHER; one++)
        if (extremes(weights[one], high + one, low + one))
            return 1;
    sums(weights, mean, order);
    const float shrink[2] = {(float)(1.0 / 2), (float)(0.85 / 2)};
    rows_of codes, products;
    for (int start = 0; start < 2; start++) {
        for (int one = 0; one < TOGETHER; one++) {
            const float middle = (high[one] + low[one]) / 2, half = (high[one] - low[one]) * shrink[start];
            scale[one] = half_of(half * (float)(2.0 / 15));
            zero[one] = half_of((middle - half) + 8 * scale[one]);
        }
        consider(weights, scale, zero, codes, best, start == 0, order);
        for (int one = 0; one < TOGETHER; one++) {
            const float middle = code_mean[one] = exact_sum(codes[one]) / GROUP;
            for (int place = 0; place < GROUP; place++) {
                codes[one][place] -= middle;
                products[one][place] = codes[one][place] * weights[one][place];
                codes[one][place] *= codes[one][place];
            }
            spread[one] = exact_sum(codes[one]);
        }
        sums(products, slope, order);
        for (int one = 0; one < TOGETHER; one++) {
            const float least = 1e-6f, above = spread[one] < least ? least : spread[one];
            scale[one] = half_of(spread[one] == 0 ? scale[one] : slope[one] / above);
            zero[one] = half_of(mean[one] / GROUP - scale[one] * code_mean[one]);
        }
        consider(weights, scale, zero, codes, best, 0, order);
    }
    return 0;
}

static inline __attribute__((always_inline)) int64_t tile_of(const float *rows, int64_t outputs, int64_t groups,
                                                             uint8_t *codes, uint16_t *scales,
                                                             int64_t stride, const int order) {
    uint8_t found[MOST_OUTPUTS][GROUP];
    rows_of weights;
    fit best;
    for (int64_t group = 0; group < groups; group++) {
        for (int64_t output = 0; output < outputs; output += TOGETHER) {
            for (int one = 0; one < TOGETHER; one++)
                memcpy(weights[one], rows + ((output + one) * groups + group) * GROUP, sizeof weights[one]);
            if (fitted(weights, &best, order))
                return 1;
            for (int one = 0; one < TOGETHER; one++) {
                for (int place = 0; place < GROUP; place++)
                    found[output + one][place] = (uint8_t)(int32_t)(best.codes[one][place] + 8);
                uint16_t *into = scales + group * stride + 2 * (output + one);
                into[0] = narrow(best.scale[one]), into[1] = narrow(best.zero[one]);
            }
        }
        const int64_t half = outputs / 2;
        for (int place = 0; place < GROUP; place++, codes += half)
            for (int64_t output = 0; output < half; output++)
                codes[output] = (uint8_t)(found[output][place] | found[half + output][place] << 4);
    }
    return 0;
}

/* rows [outputs, groups * 64] float, outputs 32 or 64, into codes [groups * 64, outputs / 2] and scales, bfloat16
   pairs [groups, outputs], `stride` numbers from a group to the next. order: of sums. Returns 1 where
   torch must do it, and what was written by then means nothing. */
int64_t melinoe_fit_int4(const float *rows, int64_t outputs, int64_t groups, uint8_t *codes, uint16_t *scales,
                         int64_t stride, int64_t order) {
    if (outputs > MOST_OUTPUTS || outputs % TOGETHER)
        return 1;
    if (order == 16)
        return tile_of(rows, outputs, groups, codes, scales, stride, 16);
    if (order == 8)
        return tile_of(rows, outputs, groups, codes, scales, stride, 8);
    return tile_of(rows, outputs, groups, codes, scales, stride, FOURTHS);
}

/* The sums of `count` groups, four at a time, in an order. */
void melinoe_sums_of_64(float *groups, int64_t count, float *totals, int64_t order) {
    for (int64_t group = 0; group + TOGETHER <= count; group += TOGETHER) {
        float(*of)[GROUP] = (float(*)[GROUP])(groups + group * GROUP);
        if (order == 16)
            sums(of, totals + group, 16);
        else if (order == 8)
            sums(of, totals + group, 8);
        else
            sums(of, totals + group, FOURTHS);
    }
}
