/* Few bfloat16 rows by a matrix of int8 or int4 codes, at the speed of memory; packed.py says when it is used.

store/rounding.py has the codes. Inputs are brought to 16 bits, by groups of 64 with a scale of their own: the
largest is 32512, so each is within 2^-16 of it, a hundredth of what an output loses when it is rounded to
bfloat16. Products and sums of a group are then integers, without any rounding, in whichever order: the two
bytes of an input are multiplied apart, because processors multiply bytes four at a time (AVX512_VNNI). Groups
are added in float, one after the other, so a row has the same sum whatever the number of rows. An output is
rounded once, ties to even. On processors without these instructions torch's kernels do it. */

#include "bfloat16.h"

#include <stdlib.h>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VBMI__) && defined(__AVX512VNNI__)
#include <immintrin.h>

#define GROUP 64 /* inputs that share a scale; int4 codes have a scale and a zero for as many */
#define TILE 64  /* outputs side by side (int4) */
#define AHEAD 2048 /* bytes (int4) */
#define LARGEST 32512 /* 127 * 256: the high byte, rounded, is within -127..127 */

typedef struct {
    const void *codes;
    const uint16_t *scale;
} matrix;

/* GROUP inputs of a row, as integers times scale: 256 * high + low each. */
typedef struct {
    int8_t high[GROUP], low[GROUP];
    int32_t fours[GROUP / 4]; /* 128 times the sum of each four */
    float scale;
    int32_t sum; /* of the integers */
    char rest[56]; /* to whole lines of the cache */
} group_of_inputs;

int melinoe_packed_there(void) { return 1; }

/* rows [count, in], in a multiple of GROUP, as integers [count, in / GROUP]; NULL where there is no memory. */
static group_of_inputs *prepared(const uint16_t *rows, int64_t count, int64_t in) {
    const int64_t groups = count * in / GROUP;
    group_of_inputs *found = aligned_alloc(64, (size_t)groups * sizeof(group_of_inputs));
    if (!found)
        return found;
    for (int64_t group = 0; group < groups; group++, rows += GROUP) {
        group_of_inputs *into = found + group;
        float values[GROUP], largest = 0;
        for (int place = 0; place < GROUP; place++) {
            values[place] = wide(rows[place]);
            const float size = fabsf(values[place]);
            largest = size > largest || size != size ? size : largest; /* what is not a number stays */
        }
        /* smaller ones add nothing to any sum; one that is infinite or no number makes every output so */
        const int usual = largest > 1e-30f && largest <= 3e38f;
        const float inverse = usual ? LARGEST / largest : 0;
        into->scale = largest <= 1e-30f ? 0 : largest / LARGEST;
        int32_t integers[GROUP];
        for (int place = 0; place < GROUP; place++)
            integers[place] = usual ? (int32_t)rintf(values[place] * inverse) : 0;
        for (int place = 0; place < GROUP; place++) {
            const int32_t high = (integers[place] + 128) >> 8;
            into->high[place] = (int8_t)high;
            into->low[place] = (int8_t)(integers[place] - 256 * high);
        }
        into->sum = 0;
        for (int four = 0; four < GROUP / 4; four++) {
            const int32_t *of = integers + 4 * four, sum = of[0] + of[1] + of[2] + of[3];
            into->fours[four] = 128 * sum;
            into->sum += sum;
        }
    }
    return found;
}

static inline __m512i four_inputs(const int8_t *from) {
    int32_t bytes;
    memcpy(&bytes, from, sizeof bytes);
    return _mm512_set1_epi32(bytes);
}

/* One tile of 64 outputs by `count` rows (a constant where it is called). x [count, groups], scale [groups,
   outputs, 2] at this tile's first output, outputs: of the matrix, filled up; sums [count, TILE]. */
static inline __attribute__((always_inline)) void int4_tile(const group_of_inputs *x, const uint8_t *codes,
                                                            const uint16_t *scale, float *sums, int64_t groups,
                                                            int64_t outputs, const int count) {
    /* Two rows of 32 bytes beside each other, such that the low halves of each 16 bytes of two such pairs are
       together 16 outputs of four inputs, and the high halves the next 16. */
    static const uint8_t beside[64] = {
        0, 32, 1, 33, 2, 34, 3, 35, 16, 48, 17, 49, 18, 50, 19, 51,
        4, 36, 5, 37, 6, 38, 7, 39, 20, 52, 21, 53, 22, 54, 23, 55,
        8, 40, 9, 41, 10, 42, 11, 43, 24, 56, 25, 57, 26, 58, 27, 59,
        12, 44, 13, 45, 14, 46, 15, 47, 28, 60, 29, 61, 30, 62, 31, 63};
    const __m512i order = _mm512_loadu_si512(beside), code = _mm512_set1_epi8(0x0f);
    __m512 total[2][4];
    for (int row = 0; row < count; row++)
        for (int part = 0; part < 4; part++)
            total[row][part] = _mm512_setzero_ps();
    for (int64_t group = 0; group < groups; group++) {
        __m512i high[2][4], low[2][4];
        for (int row = 0; row < count; row++)
            for (int part = 0; part < 4; part++)
                high[row][part] = low[row][part] = _mm512_setzero_si512();
        const uint8_t *from = codes + group * GROUP * (TILE / 2);
#pragma GCC unroll 4
        for (int four = 0; four < GROUP; four += 4, from += 2 * TILE) {
            _mm_prefetch((const char *)from + AHEAD, _MM_HINT_T0); /* a processor alone looks less far ahead */
            _mm_prefetch((const char *)from + AHEAD + 64, _MM_HINT_T0);
            const __m512i first = _mm512_permutexvar_epi8(order, _mm512_loadu_si512(from));
            const __m512i second = _mm512_permutexvar_epi8(order, _mm512_loadu_si512(from + TILE));
            const __m512i left = _mm512_unpacklo_epi16(first, second), right = _mm512_unpackhi_epi16(first, second);
            const __m512i parts[4] = {
                _mm512_and_si512(left, code), _mm512_and_si512(right, code),
                _mm512_and_si512(_mm512_srli_epi16(left, 4), code),
                _mm512_and_si512(_mm512_srli_epi16(right, 4), code)};
            for (int row = 0; row < count; row++) {
                const group_of_inputs *inputs = x + row * groups + group;
                const __m512i high_bytes = four_inputs(inputs->high + four), low_bytes = four_inputs(inputs->low + four);
                for (int part = 0; part < 4; part++) {
                    high[row][part] = _mm512_dpbusd_epi32(high[row][part], parts[part], high_bytes);
                    low[row][part] = _mm512_dpbusd_epi32(low[row][part], parts[part], low_bytes);
                }
            }
        }
        for (int part = 0; part < 4; part++) {
            const __m512i words = _mm512_loadu_si512(scale + 2 * (group * outputs + 16 * part));
            const __m512 scales = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
            const __m512 zeros = _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32((int)0xffff0000)));
            for (int row = 0; row < count; row++) {
                const group_of_inputs *inputs = x + row * groups + group;
                __m512i products = _mm512_add_epi32(_mm512_slli_epi32(high[row][part], 8), low[row][part]);
                products = _mm512_sub_epi32(products, _mm512_set1_epi32(8 * inputs->sum));
                const __m512 weights = _mm512_fmadd_ps(scales, _mm512_cvtepi32_ps(products),
                                                       _mm512_mul_ps(zeros, _mm512_set1_ps((float)inputs->sum)));
                total[row][part] = _mm512_fmadd_ps(weights, _mm512_set1_ps(inputs->scale), total[row][part]);
            }
        }
    }
    for (int row = 0; row < count; row++)
        for (int part = 0; part < 4; part++)
            _mm512_storeu_ps(sums + row * TILE + 16 * part, total[row][part]);
}

/* Outputs first to last (whole tiles, but for the matrix's last) of x by an int4 matrix into out [count, stride]. */
static void int4_product(const group_of_inputs *x, matrix weight, uint16_t *out, int64_t count, int64_t groups,
                         int64_t stride, int64_t size_out, int64_t first, int64_t last) {
    const int64_t outputs = (size_out + TILE - 1) / TILE * TILE;
    float sums[2 * TILE];
    for (int64_t output = first; output < last; output += TILE) {
        const uint8_t *codes = (const uint8_t *)weight.codes + output / TILE * groups * GROUP * (TILE / 2);
        const uint16_t *scale = weight.scale + 2 * output;
        const int64_t there = last - output < TILE ? last - output : TILE;
        for (int64_t row = 0; row < count; row += 2) {
            const int two = row + 2 <= count;
            if (two)
                int4_tile(x + row * groups, codes, scale, sums, groups, outputs, 2);
            else
                int4_tile(x + row * groups, codes, scale, sums, groups, outputs, 1);
            for (int at = 0; at < 1 + two; at++)
                for (int64_t place = 0; place < there; place++)
                    out[(row + at) * stride + output + place] = narrow(sums[at * TILE + place]);
        }
    }
}

/* A block of outputs and rows at a time; both numbers are constants where it is called. codes [outputs, in]. */
static inline __attribute__((always_inline)) void int8_block(const group_of_inputs *x, const int8_t *codes,
                                                             const uint16_t *scale, uint16_t *out, int64_t groups,
                                                             int64_t stride, const int outputs, const int count) {
    const __m512i sign = _mm512_set1_epi8((char)0x80); /* codes are 128 more, so that they have no sign */
    __m512 total[4][2];
    for (int output = 0; output < outputs; output++)
        for (int row = 0; row < count; row++)
            total[output][row] = _mm512_setzero_ps();
    for (int64_t group = 0; group < groups; group++)
        for (int output = 0; output < outputs; output++) {
            const int8_t *from = codes + (output * groups + group) * GROUP;
            _mm_prefetch((const char *)from + 4 * groups * GROUP, _MM_HINT_T0); /* the next block's */
            const __m512i some = _mm512_xor_si512(_mm512_loadu_si512(from), sign);
            for (int row = 0; row < count; row++) {
                const group_of_inputs *inputs = x + row * groups + group;
                const __m512i zero = _mm512_setzero_si512(), off = _mm512_load_si512(inputs->fours);
                const __m512i high = _mm512_dpbusd_epi32(zero, some, _mm512_load_si512(inputs->high));
                const __m512i low = _mm512_sub_epi32(zero, off);
                const __m512i products = _mm512_add_epi32(
                    _mm512_slli_epi32(high, 8), _mm512_dpbusd_epi32(low, some, _mm512_load_si512(inputs->low)));
                total[output][row] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products),
                                                     _mm512_set1_ps(inputs->scale), total[output][row]);
            }
        }
    for (int output = 0; output < outputs; output++)
        for (int row = 0; row < count; row++)
            out[row * stride + output] = narrow(_mm512_reduce_add_ps(total[output][row]) * wide(scale[output]));
}

/* Outputs first to last of x by an int8 matrix into out [count, stride]. */
static void int8_product(const group_of_inputs *x, matrix weight, uint16_t *out, int64_t count, int64_t groups,
                         int64_t stride, int64_t first, int64_t last) {
    const int64_t in = groups * GROUP;
    for (int64_t output = first; output < last; output += 4) {
        const int8_t *codes = (const int8_t *)weight.codes + output * in;
        const uint16_t *scale = weight.scale + output;
        uint16_t *into = out + output;
        int64_t row = 0;
        if (output + 4 > last) {
            for (int64_t rest = 0; rest < last - output; rest++)
                for (row = 0; row < count; row++)
                    int8_block(x + row * groups, codes + rest * in, scale + rest, into + row * stride + rest, groups,
                               stride, 1, 1);
            return;
        }
        for (; row + 2 <= count; row += 2)
            int8_block(x + row * groups, codes, scale, into + row * stride, groups, stride, 4, 2);
        for (; row < count; row++)
            int8_block(x + row * groups, codes, scale, into + row * stride, groups, stride, 4, 1);
    }
}

static void product(const group_of_inputs *x, matrix weight, uint16_t *out, int64_t count, int64_t in,
                    int64_t stride, int64_t size_out, int64_t first, int64_t last, int64_t bits) {
    if (bits == 8)
        int8_product(x, weight, out, count, in / GROUP, stride, first, last);
    else
        int4_product(x, weight, out, count, in / GROUP, stride, size_out, first, last);
}

/* rows [count, in], in a multiple of 64, by a matrix of 8 or 4 bits, its outputs first to last, into out
   [count, size_out]. Returns 0, or 1 where there is no memory. */
int melinoe_packed_product(const uint16_t *rows, const void *codes, const uint16_t *scale, uint16_t *out,
                           int64_t count, int64_t in, int64_t size_out, int64_t first, int64_t last, int64_t bits) {
    group_of_inputs *x = prepared(rows, count, in);
    if (!x)
        return 1;
    const matrix weight = {codes, scale};
    product(x, weight, out, count, in, size_out, size_out, first, last, bits);
    free(x);
    return 0;
}

/* silu(gate) * up of both [count, 2 * inner], each step rounded as torch does one by one, into act [count, padded]. */
void melinoe_packed_gate(const uint16_t *both, uint16_t *act, int64_t count, int64_t inner, int64_t padded) {
    for (int64_t row = 0; row < count; row++)
        for (int64_t place = 0; place < inner; place++)
            act[row * padded + place] = narrow(gated(both + row * 2 * inner, place, inner));
}

/* Experts, each down(silu(gate(rows)) * up(rows)) of the same rows [count, in], in a multiple of 64. weights: of
   each expert the codes and the scales of up (2 * inner outputs, the gate's half first) and those of down
   (hidden outputs). out [count, hidden] of each, one behind the other. Returns 0, or 1 where there is no memory. */
int melinoe_packed_gated(const uint16_t *rows, const void *const *weights, uint16_t *out, int64_t experts,
                         int64_t count, int64_t in, int64_t hidden, int64_t inner, int64_t bits) {
    const int64_t padded = (inner + 63) / 64 * 64;
    group_of_inputs *x = prepared(rows, count, in);
    uint16_t *both = malloc((size_t)(count * 2 * inner) * sizeof(uint16_t));
    uint16_t *act = calloc((size_t)(count * padded), sizeof(uint16_t));
    int failed = !x || !both || !act;
    for (int64_t expert = 0; expert < experts && !failed; expert++, weights += 4) {
        const matrix up = {weights[0], weights[1]}, down = {weights[2], weights[3]};
        product(x, up, both, count, in, 2 * inner, 2 * inner, 0, 2 * inner, bits);
        melinoe_packed_gate(both, act, count, inner, padded);
        group_of_inputs *y = prepared(act, count, padded);
        failed = !y;
        if (!failed)
            product(y, down, out + expert * count * hidden, count, padded, hidden, hidden, 0, hidden, bits);
        free(y);
    }
    free(x), free(both), free(act);
    return failed;
}

#else
int melinoe_packed_there(void) { return 0; }
#endif
