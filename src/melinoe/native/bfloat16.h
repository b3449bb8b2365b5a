/* bfloat16 as both kernels read, round and gate it. */

#include <math.h>
#include <stdint.h>
#include <string.h>

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

/* silu(gate) * up of one row of both [2 * inner] at a place, each step rounded as torch does one by one. */
static inline float gated(const uint16_t *both, int64_t place, int64_t inner) {
    const float value = wide(both[place]);
    const float silu = wide(narrow(value / (1.0f + expf(-value))));
    return wide(narrow(silu * wide(both[inner + place])));
}
