/* Few bfloat16 rows by a matrix, at the speed of memory; compiled.py says when it is compiled and used.

bfloat16 is widened to float by a shift, sums are in float, an output is rounded once, ties to even. The sum of
a row runs in the same order whatever the number of rows and wherever the tensors lie: 16 partial sums, each of
pairs of neighbouring inputs, added in halves, and then what is left behind the last whole 32 inputs. Four
outputs are computed at a time, so that an input is read once for four weights, and all rows for these four, so
that weights come from memory once. Vectors are the compiler's own (gcc, clang), so that it runs on whatever
processor they know. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

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

/* The sums with 32 more inputs; even and odd: the inputs that stand first and second in their pairs. */
static inline floats more(floats sums, const uint16_t *weights, floats even, floats odd) {
    const words both = pairs(weights);
    sums += (floats)(both << 16) * even;
    return sums + (floats)(both & 0xffff0000u) * odd;
}

static inline float wide(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float found;
    memcpy(&found, &bits, sizeof found);
    return found;
}

static inline uint16_t narrow(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7fffffff) > 0x7f800000)
        return 0x7fc0; /* not a number */
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
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

/* Outputs first to last of rows [count, in], in the order of place_of, by weight [.., in], into out
   [count, stride]. */
static void multiply(const float *rows, const uint16_t *weight, uint16_t *out, int64_t count, int64_t in,
                     int64_t stride, int64_t first, int64_t last) {
    const int64_t whole = in / STEP * STEP;
    int64_t output = first;
    for (; output + 4 <= last; output += 4) {
        const uint16_t *w0 = weight + output * in, *w1 = w0 + in, *w2 = w1 + in, *w3 = w2 + in;
        for (int64_t row = 0; row < count; row++) {
            const float *x = rows + row * in;
            floats s0 = {0}, s1 = {0}, s2 = {0}, s3 = {0};
            for (int64_t place = 0; place < whole; place += STEP) {
                const floats even = load(x + place), odd = load(x + place + LANES);
                s0 = more(s0, w0 + place, even, odd);
                s1 = more(s1, w1 + place, even, odd);
                s2 = more(s2, w2 + place, even, odd);
                s3 = more(s3, w3 + place, even, odd);
            }
            float t0 = added(s0), t1 = added(s1), t2 = added(s2), t3 = added(s3);
            for (int64_t place = whole; place < in; place++) {
                t0 += wide(w0[place]) * x[place];
                t1 += wide(w1[place]) * x[place];
                t2 += wide(w2[place]) * x[place];
                t3 += wide(w3[place]) * x[place];
            }
            uint16_t *into = out + row * stride + output;
            into[0] = narrow(t0), into[1] = narrow(t1), into[2] = narrow(t2), into[3] = narrow(t3);
        }
    }
    for (; output < last; output++) {
        const uint16_t *w = weight + output * in;
        for (int64_t row = 0; row < count; row++) {
            const float *x = rows + row * in;
            floats sums = {0};
            for (int64_t place = 0; place < whole; place += STEP)
                sums = more(sums, w + place, load(x + place), load(x + place + LANES));
            float total = added(sums);
            for (int64_t place = whole; place < in; place++)
                total += wide(w[place]) * x[place];
            out[row * stride + output] = narrow(total);
        }
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

/* silu(gate) * up of both [count, 2 * inner], each step rounded as torch does one by one, in the order of
   place_of. */
static void gate(const uint16_t *both, float *act, int64_t count, int64_t inner) {
    for (int64_t row = 0; row < count; row++) {
        const uint16_t *from = both + row * 2 * inner;
        for (int64_t place = 0; place < inner; place++) {
            const float value = wide(from[place]);
            const float silu = wide(narrow(value / (1.0f + expf(-value))));
            act[row * inner + place_of(place, inner)] = wide(narrow(silu * wide(from[inner + place])));
        }
    }
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
