/* A list of small operators on small tensors, one call for all; decoding/program.py writes the list.

Each operator is one of torch's, with its roundings: it reads bfloat16 or float, computes one operation in float,
and rounds once where its result is bfloat16. No result is an input. A tensor is a pointer, an offset and
strides; views have no operator. */

#include "bfloat16.h"

#ifdef __SSE2__
#include <xmmintrin.h>
#endif

enum { COPY, NEG, SQUARE, RSQRT, ADD, MUL, ADD_SCALAR, MUL_SCALAR, MEAN, PRODUCT, TILED };
enum { FLOAT, BFLOAT16 };
enum { DIMS = 4, LEVELS = 4, PARTIAL = 4 };

typedef struct {
    int64_t pointer, offset, dtype, strides[DIMS]; /* offset and strides in elements */
} tensor;

typedef struct {
    int64_t code, extra; /* the scalar's bits, the lanes of a mean, the function of a product */
    int64_t sizes[DIMS]; /* of a product: rows, inputs, outputs */
    tensor out, a, b;
} operation;

typedef int (*product)(const uint16_t *, const uint16_t *, uint16_t *, int64_t, int64_t, int64_t, int64_t, int64_t);

#define INLINE static inline __attribute__((always_inline))

INLINE float get(const void *from, int64_t at, const int dtype) {
    return dtype == FLOAT ? ((const float *)from)[at] : wide(((const uint16_t *)from)[at]);
}

INLINE void put(void *to, int64_t at, float value, const int dtype) {
    if (dtype == FLOAT)
        ((float *)to)[at] = value;
    else
        ((uint16_t *)to)[at] = narrow(value);
}

INLINE float computed(const int code, float a, float b) {
    switch (code) {
    case NEG: return -a;
    case SQUARE: return a * a;
    case RSQRT: return 1.0f / sqrtf(a);
    case ADD: case ADD_SCALAR: return a + b;
    case MUL: case MUL_SCALAR: return a * b;
    default: return a;
    }
}

/* One row. Codes, dtypes and usual strides are constants where it is called. */
INLINE void row(const int code, void *restrict out, const void *a, const void *b, float scalar, int64_t count,
                const int to, const int ta, const int tb, const int64_t so, const int64_t sa, const int64_t sb) {
    const int two = code == ADD || code == MUL;
    for (int64_t at = 0; at < count; at++)
        put(out, at * so, computed(code, get(a, at * sa, ta), two ? get(b, at * sb, tb) : scalar), to);
}

typedef void (*rows)(const operation *, void *, const void *, const void *, float);

#define ROWS(name, code, to, ta, tb)                                                                          \
    static void name(const operation *op, void *out, const void *a, const void *b, float scalar) {            \
        const int64_t n = op->sizes[3], so = op->out.strides[3], sa = op->a.strides[3], sb = op->b.strides[3]; \
        const int two = code == ADD || code == MUL;                                                           \
        if (so == 1 && sa == 1 && (sb == 1 || !two))                                                          \
            row(code, out, a, b, scalar, n, to, ta, tb, 1, 1, 1);                                             \
        else                                                                                                  \
            row(code, out, a, b, scalar, n, to, ta, tb, so, sa, sb);                                          \
    }

ROWS(copy_ff, COPY, FLOAT, FLOAT, FLOAT)
ROWS(copy_fh, COPY, FLOAT, BFLOAT16, FLOAT)
ROWS(copy_hf, COPY, BFLOAT16, FLOAT, FLOAT)
ROWS(copy_hh, COPY, BFLOAT16, BFLOAT16, FLOAT)
ROWS(neg_ff, NEG, FLOAT, FLOAT, FLOAT)
ROWS(neg_hh, NEG, BFLOAT16, BFLOAT16, FLOAT)
ROWS(square_ff, SQUARE, FLOAT, FLOAT, FLOAT)
ROWS(square_hh, SQUARE, BFLOAT16, BFLOAT16, FLOAT)
ROWS(rsqrt_ff, RSQRT, FLOAT, FLOAT, FLOAT)
ROWS(add_scalar_ff, ADD_SCALAR, FLOAT, FLOAT, FLOAT)
ROWS(mul_scalar_ff, MUL_SCALAR, FLOAT, FLOAT, FLOAT)
ROWS(add_fff, ADD, FLOAT, FLOAT, FLOAT)
ROWS(add_ffh, ADD, FLOAT, FLOAT, BFLOAT16)
ROWS(add_fhf, ADD, FLOAT, BFLOAT16, FLOAT)
ROWS(add_hhh, ADD, BFLOAT16, BFLOAT16, BFLOAT16)
ROWS(mul_fff, MUL, FLOAT, FLOAT, FLOAT)
ROWS(mul_ffh, MUL, FLOAT, FLOAT, BFLOAT16)
ROWS(mul_fhf, MUL, FLOAT, BFLOAT16, FLOAT)
ROWS(mul_hhh, MUL, BFLOAT16, BFLOAT16, BFLOAT16)

/* By code and by the dtypes of the result, of a and of b (4, 2, 1). */
static const rows ROWS_OF[MEAN][8] = {
    [COPY] = {copy_ff, 0, copy_fh, 0, copy_hf, 0, copy_hh, 0},
    [NEG] = {neg_ff, 0, 0, 0, 0, 0, neg_hh, 0},
    [SQUARE] = {square_ff, 0, 0, 0, 0, 0, square_hh, 0},
    [RSQRT] = {rsqrt_ff},
    [ADD] = {add_fff, add_ffh, add_fhf, 0, 0, 0, 0, add_hhh},
    [MUL] = {mul_fff, mul_ffh, mul_fhf, 0, 0, 0, 0, mul_hhh},
    [ADD_SCALAR] = {add_scalar_ff},
    [MUL_SCALAR] = {mul_scalar_ff},
};

/* Whether there is such an operator. */
int melinoe_program_has(int64_t code, int64_t out, int64_t a, int64_t b) {
    return code < MEAN ? ROWS_OF[code][out * 4 + a * 2 + b] != 0 : out == (code > MEAN) && a == out && b == out;
}

static int64_t ceil_log2(int64_t value) {
    int64_t found = 1;
    while (((int64_t)1 << found) < value)
        found++;
    return found;
}

/* The sum of a row in the order of torch's kernel on vectors of so many lanes: four partial sums of vectors side
   by side, each added up in groups of 16 or more, groups in groups of as many, and so on. */
#define TOTAL(name, lanes)                                                                  \
    typedef float name##_vector __attribute__((vector_size(4 * lanes)));                    \
    static inline name##_vector name##_load(const float *from) {                            \
        name##_vector found;                                                                \
        memcpy(&found, from, sizeof found);                                                 \
        return found;                                                                       \
    }                                                                                       \
    static float name(const float *x, int64_t count) {                                      \
        name##_vector sums[LEVELS][PARTIAL] = {{{0}}};                                      \
        const int64_t vectors = count / lanes, size = vectors / PARTIAL;                    \
        const int64_t log = ceil_log2(size) / LEVELS, power = log > 4 ? log : 4;            \
        const int64_t step = (int64_t)1 << power;                                           \
        int64_t at = 0;                                                                     \
        while (at + step <= size) {                                                         \
            for (int64_t end = at + step; at < end; at++)                                   \
                for (int part = 0; part < PARTIAL; part++)                                  \
                    sums[0][part] += name##_load(x + (at * PARTIAL + part) * lanes);        \
            for (int level = 1; level < LEVELS; level++) {                                  \
                for (int part = 0; part < PARTIAL; part++) {                                \
                    sums[level][part] += sums[level - 1][part];                             \
                    sums[level - 1][part] = (name##_vector){0};                             \
                }                                                                           \
                if (at & ((step - 1) << (level * power)))                                   \
                    break;                                                                  \
            }                                                                               \
        }                                                                                   \
        for (; at < size; at++)                                                             \
            for (int part = 0; part < PARTIAL; part++)                                      \
                sums[0][part] += name##_load(x + (at * PARTIAL + part) * lanes);            \
        for (int level = 1; level < LEVELS; level++)                                        \
            for (int part = 0; part < PARTIAL; part++)                                      \
                sums[0][part] += sums[level][part];                                         \
        for (int64_t vector = size * PARTIAL; vector < vectors; vector++)                   \
            sums[0][0] += name##_load(x + vector * lanes);                                  \
        for (int part = 1; part < PARTIAL; part++)                                          \
            sums[0][0] += sums[0][part];                                                    \
        float found = 0;                                                                    \
        for (int64_t place = vectors * lanes; place < count; place++)                       \
            found += x[place];                                                              \
        for (int lane = 0; lane < lanes; lane++)                                            \
            found += sums[0][0][lane];                                                      \
        return found;                                                                       \
    }

TOTAL(total_16, 16)
TOTAL(total_8, 8)

enum { TILE = 32, OUTPUTS = 16 }; /* inputs at a time; outputs side by side */
typedef float floats __attribute__((vector_size(4 * OUTPUTS)));
typedef uint32_t words __attribute__((vector_size(4 * OUTPUTS)));

/* rows [count, in] by weight [size_out, in] in the order of tiles of matrix instructions (AMX), which is torch's where
   oneDNN uses them: 32 inputs at a time, the even and the odd ones apart, one after the other, then their sum is
   added. Products are exact. Those instructions have no subnormal numbers. in: a multiple of 32. */
static void tiled(const uint16_t *rows, const uint16_t *weight, uint16_t *out, int64_t count, int64_t in,
                  int64_t size_out) {
#ifdef __SSE2__
    const unsigned before = _mm_getcsr();
    _mm_setcsr(before | 0x8040);
#endif
    for (int64_t first = 0; first < size_out; first += OUTPUTS) {
        const int64_t outputs = size_out - first < OUTPUTS ? size_out - first : OUTPUTS;
        for (int64_t row = 0; row < count; row++) {
            floats total = {0};
            for (int64_t at = 0; at < in; at += TILE) {
                uint32_t pairs[TILE / 2][OUTPUTS] = {{0}};
                for (int64_t output = 0; output < outputs; output++) {
                    uint32_t some[TILE / 2];
                    memcpy(some, weight + (first + output) * in + at, sizeof some);
                    for (int pair = 0; pair < TILE / 2; pair++)
                        pairs[pair][output] = some[pair];
                }
                floats even = {0}, odd = {0};
                for (int pair = 0; pair < TILE / 2; pair++) {
                    words both;
                    memcpy(&both, pairs[pair], sizeof both);
                    const uint16_t *inputs = rows + row * in + at + 2 * pair;
                    even += (floats)(both << 16) * wide(inputs[0]);
                    odd += (floats)(both & 0xffff0000u) * wide(inputs[1]);
                }
                total += even + odd;
            }
            for (int64_t output = 0; output < outputs; output++)
                out[row * size_out + first + output] = narrow(total[output]);
        }
    }
#ifdef __SSE2__
    _mm_setcsr(before);
#endif
}

/* pointers: of the tensors, by number. Returns 0, or 1 where a product had no memory. */
int melinoe_program(const operation *program, int64_t count, char *const *pointers) {
    for (const operation *op = program; op < program + count; op++) {
        const int64_t *sizes = op->sizes, *so = op->out.strides, *sa = op->a.strides, *sb = op->b.strides;
        const int64_t wide_out = op->out.dtype == FLOAT ? 4 : 2, wide_a = op->a.dtype == FLOAT ? 4 : 2;
        const int64_t wide_b = op->b.dtype == FLOAT ? 4 : 2;
        char *out = pointers[op->out.pointer] + op->out.offset * wide_out;
        const char *a = pointers[op->a.pointer] + op->a.offset * wide_a;
        const char *b = pointers[op->b.pointer] + op->b.offset * wide_b;
        if (op->code == PRODUCT) {
            if (((product)(intptr_t)op->extra)((const uint16_t *)a, (const uint16_t *)b, (uint16_t *)out, sizes[0],
                                               sizes[1], sizes[2], 0, sizes[2]))
                return 1;
            continue;
        }
        if (op->code == TILED) {
            tiled((const uint16_t *)a, (const uint16_t *)b, (uint16_t *)out, sizes[0], sizes[1], sizes[2]);
            continue;
        }
        const rows compute = op->code < MEAN ? ROWS_OF[op->code][op->out.dtype * 4 + op->a.dtype * 2 + op->b.dtype] : 0;
        float scalar;
        memcpy(&scalar, &op->extra, sizeof scalar);
        for (int64_t i = 0; i < sizes[0]; i++)
            for (int64_t j = 0; j < sizes[1]; j++)
                for (int64_t k = 0; k < sizes[2]; k++) {
                    char *o = out + (i * so[0] + j * so[1] + k * so[2]) * wide_out;
                    const char *x = a + (i * sa[0] + j * sa[1] + k * sa[2]) * wide_a;
                    const char *y = b + (i * sb[0] + j * sb[1] + k * sb[2]) * wide_b;
                    if (compute)
                        compute(op, o, x, y, scalar);
                    else {
                        const float *of = (const float *)x;
                        *(float *)o = (op->extra == 16 ? total_16(of, sizes[3]) : total_8(of, sizes[3])) / (float)sizes[3];
                    }
                }
    }
    return 0;
}

/* Some of one expert's outputs times its weight: float, or rounded where weights are bfloat16 as outputs are. A
   function of its own, so that no compiler joins product and sum to one operation without a rounding between. */
static __attribute__((noinline)) void weighted(float *restrict terms, const uint16_t *outputs, float weight,
                                               int64_t count, int64_t dtype) {
    if (dtype == FLOAT)
        for (int64_t at = 0; at < count; at++)
            terms[at] = wide(outputs[at]) * weight;
    else
        for (int64_t at = 0; at < count; at++)
            terms[at] = wide(narrow(wide(outputs[at]) * weight));
}

enum { COLUMNS = 256 };

/* outputs [top_k, hidden] by weights [top_k], added up into out [hidden] in the order of torch's kernel on vectors of
   so many lanes, for less than 16 experts: one after the other where four vectors of columns are left, else four
   partial sums, of every fourth expert. */
void melinoe_combine(const uint16_t *outputs, const void *weights, uint16_t *out, int64_t top_k, int64_t hidden,
                     int64_t lanes, int64_t dtype) {
    const int64_t blocks = hidden / (PARTIAL * lanes) * (PARTIAL * lanes), fours = top_k / PARTIAL * PARTIAL;
    int64_t count;
    for (int64_t at = 0; at < hidden; at += count) {
        const int64_t end = at < blocks ? blocks : hidden;
        count = end - at < COLUMNS ? end - at : COLUMNS;
        float sums[PARTIAL][COLUMNS] = {{0}}, terms[COLUMNS];
        for (int64_t expert = 0; expert < top_k; expert++) {
            weighted(terms, outputs + expert * hidden + at, get(weights, expert, (int)dtype), count, dtype);
            float *into = sums[at >= blocks && expert < fours ? expert % PARTIAL : 0];
            for (int64_t place = 0; place < count; place++)
                into[place] += terms[place];
        }
        for (int64_t place = 0; place < count; place++)
            out[at + place] = narrow(((sums[0][place] + sums[1][place]) + sums[2][place]) + sums[3][place]);
    }
}

/* A token's rows [heads, row] of bytes behind those of other tokens, which lie apart by heads. */
void melinoe_write_behind(char *memory, const char *rows, int64_t heads, int64_t row, int64_t apart) {
    for (int64_t head = 0; head < heads; head++)
        memcpy(memory + head * apart, rows + head * row, (size_t)row);
}
