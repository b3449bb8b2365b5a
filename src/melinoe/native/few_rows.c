/* Few bfloat16 rows by a matrix, at the speed of memory; compiled.py says when it is compiled and used.

bfloat16 is widened to float by a shift, sums are in float, an output is rounded once, ties to even. The sum of
a row runs in the same order whatever the number of rows and wherever the tensors lie: 16 partial sums, each of
pairs of neighbouring inputs, added in halves, and then what is left behind the last whole 32 inputs. Blocks of
up to four outputs and four rows are computed at a time, so that an input is read and a weight widened once for
four products, and weights come from memory once. Vectors are the compiler's own (gcc, clang), so that it runs
on whatever processor they know. */

#include "bfloat16.h"

#include <stdlib.h>

#define LANES 16
#define STEP (2 * LANES) /* inputs at a time: in 16 words, the first of a pair is the low half */
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef float eight __attribute__((vector_size(32)));
typedef float four __attribute__((vector_size(16)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));

static inline floats load(const float *from) {
    floats found;
    memcpy(&found, from, sizeof found);
    return found;
}

static inline words pairs(const uint16_t *from) {
    words found;
    memcpy(&found, from, sizeof found);
    return found;
}

static inline float added(floats sums) {
    eight halved[2];
    memcpy(halved, &sums, sizeof halved);
    halved[0] += halved[1];
    four quartered[2];
    memcpy(quartered, halved, sizeof quartered);
    quartered[0] += quartered[1];
    return (quartered[0][0] + quartered[0][2]) + (quartered[0][1] + quartered[0][3]);
}

/* Where an input goes: the even ones of each whole 32, then the odd ones; the rest stays. */
static inline int64_t place_of(int64_t input, int64_t in) {
    const int64_t within = input % STEP;
    return input - within + STEP > in ? input : input - within + (within % 2) * LANES + within / 2;
}

/* A block of outputs and rows at a time: what is widened for one row is used for the others. Both numbers are
   constants where it is called, so that the sums stay in registers. */
static inline __attribute__((always_inline)) void multiply_block(const float *rows, const uint16_t *weight,
                                                                 uint16_t *out, int64_t in, int64_t stride,
                                                                 const int outputs, const int count) {
    const int64_t whole = in / STEP * STEP;
    floats sums[4][4] = {{{0}}};
    for (int64_t place = 0; place < whole; place += STEP)
        for (int output = 0; output < outputs; output++) {
            __builtin_prefetch(weight + (output + 4) * in + place); /* the next block's: see packed_rows.c */
            const words both = pairs(weight + output * in + place);
            const floats even = (floats)(both << 16), odd = (floats)(both & 0xffff0000u);
            for (int row = 0; row < count; row++) {
                sums[output][row] += even * load(rows + row * in + place);
                sums[output][row] += odd * load(rows + row * in + place + LANES);
            }
        }
    for (int output = 0; output < outputs; output++)
        for (int row = 0; row < count; row++) {
            float total = added(sums[output][row]);
            for (int64_t place = whole; place < in; place++)
                total += wide(weight[output * in + place]) * rows[row * in + place];
            out[row * stride + output] = narrow(total);
        }
}

/* Outputs first to last of rows [count, in], in the order of place_of, by weight [.., in], into out
   [count, stride]. */
static void multiply(const float *rows, const uint16_t *weight, uint16_t *out, int64_t count, int64_t in,
                     int64_t stride, int64_t first, int64_t last) {
    for (int64_t output = first; output < last; output += 4) {
        const uint16_t *w = weight + output * in;
        uint16_t *into = out + output;
        int64_t row = 0;
        if (output + 4 > last) {
            for (; output < last; output++, w += in, into++)
                for (row = 0; row < count; row++)
                    multiply_block(rows + row * in, w, into + row * stride, in, stride, 1, 1);
            return;
        }
        for (; row + 4 <= count; row += 4)
            multiply_block(rows + row * in, w, into + row * stride, in, stride, 4, 4);
        for (; row + 2 <= count; row += 2)
            multiply_block(rows + row * in, w, into + row * stride, in, stride, 4, 2);
        for (; row < count; row++)
            multiply_block(rows + row * in, w, into + row * stride, in, stride, 4, 1);
    }
}

/* Rows [count, in] as floats in the order of place_of; NULL where there is no memory. */
static float *widened(const uint16_t *rows, int64_t count, int64_t in) {
    float *found = malloc((size_t)(count * in) * sizeof(float));
    if (found)
        for (int64_t row = 0; row < count; row++)
            for (int64_t input = 0; input < in; input++)
                found[row * in + place_of(input, in)] = wide(rows[row * in + input]);
    return found;
}

/* rows [count, in] by weight [size_out, in], its outputs first to last, into out [count, size_out].
   Returns 0, or 1 where there is no memory. */
int melinoe_product(const uint16_t *rows, const uint16_t *weight, uint16_t *out, int64_t count, int64_t in,
                    int64_t size_out, int64_t first, int64_t last) {
    float *x = widened(rows, count, in);
    if (!x)
        return 1;
    multiply(x, weight, out, count, in, size_out, first, last);
    free(x);
    return 0;
}

/* `gated` of all rows of both [count, 2 * inner], in the order of place_of. */
static void gate(const uint16_t *both, float *act, int64_t count, int64_t inner) {
    for (int64_t row = 0; row < count; row++)
        for (int64_t place = 0; place < inner; place++)
            act[row * inner + place_of(place, inner)] = gated(both + row * 2 * inner, place, inner);
}

/* Experts, each down(silu(gate(rows)) * up(rows)) of the same rows. rows [count, hidden]; of each expert, up
   [2 * inner, hidden], the gate's half first, down [hidden, inner], and out [count, hidden], one behind the
   other. Returns 0, or 1 where there is no memory. */
int melinoe_gated(const uint16_t *rows, const uint16_t *const *ups, const uint16_t *const *downs, uint16_t *out,
                  int64_t experts, int64_t count, int64_t hidden, int64_t inner) {
    float *x = widened(rows, count, hidden), *act = malloc((size_t)(count * inner) * sizeof(float));
    uint16_t *both = malloc((size_t)(count * 2 * inner) * sizeof(uint16_t));
    const int failed = !x || !act || !both;
    for (int64_t expert = 0; expert < experts && !failed; expert++) {
        multiply(x, ups[expert], both, count, hidden, 2 * inner, 0, 2 * inner);
        gate(both, act, count, inner);
        multiply(act, downs[expert], out + expert * count * hidden, count, inner, hidden, 0, hidden);
    }
    free(x), free(act), free(both);
    return failed;
}

/* silu(gate) * up of both [count, 2 * inner] into act [count, inner], with the roundings of melinoe_gated. */
void melinoe_gate(const uint16_t *both, uint16_t *act, int64_t count, int64_t inner) {
    for (int64_t row = 0; row < count; row++)
        for (int64_t place = 0; place < inner; place++)
            act[row * inner + place] = narrow(gated(both + row * 2 * inner, place, inner));
}

/* Experts first to last, each of rows of its own: of expert e the choices starts[e] to starts[e + 1], each the
   place of a row of out [.., hidden]; a row's input is that of hidden_states [.., hidden] at its place divided by
   top_k. ups and downs as for melinoe_gated, with the same sums. Returns 0, or 1 where there is no memory. */
int melinoe_gated_rows(const uint16_t *hidden_states, const int64_t *choices, const int64_t *starts,
                       const uint16_t *const *ups, const uint16_t *const *downs, uint16_t *out, int64_t top_k,
                       int64_t hidden, int64_t inner, int64_t first, int64_t last) {
    int64_t most = 0;
    for (int64_t expert = first; expert < last; expert++)
        if (starts[expert + 1] - starts[expert] > most)
            most = starts[expert + 1] - starts[expert];
    uint16_t *rows = malloc((size_t)(most * hidden) * sizeof(uint16_t));
    int failed = !rows;
    for (int64_t expert = first; expert < last && !failed; expert++) {
        const int64_t *choice = choices + starts[expert], count = starts[expert + 1] - starts[expert];
        for (int64_t row = 0; row < count; row++)
            memcpy(rows + row * hidden, hidden_states + choice[row] / top_k * hidden, hidden * sizeof(uint16_t));
        float *x = widened(rows, count, hidden), *act = malloc((size_t)(count * inner) * sizeof(float));
        uint16_t *both = malloc((size_t)(count * 2 * inner) * sizeof(uint16_t));
        failed = !x || !act || !both;
        if (!failed) {
            multiply(x, ups[expert], both, count, hidden, 2 * inner, 0, 2 * inner);
            gate(both, act, count, inner);
            multiply(act, downs[expert], rows, count, inner, hidden, 0, hidden);
            for (int64_t row = 0; row < count; row++)
                memcpy(out + choice[row] * hidden, rows + row * hidden, hidden * sizeof(uint16_t));
        }
        free(x), free(act), free(both);
    }
    free(rows);
    return failed;
}
