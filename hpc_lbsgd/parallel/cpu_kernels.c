/* Fixed point on a CPU: what torch does in five passes over a bucket, in one, to the same bits (cpu_kernels.py).

   add           totals += round(gradients * scale), flags what is out of range, clears the gradients
   take          gradients = totals * unit
   add_int32     the same with a scale a tensor, and the largest of each, which says whether all was in range
   take_int32

   Scales and units are powers of two, products by them exact. All loops are ones that compilers turn into vectors: no
   branch, no call, and whole numbers from float64 and back by adding 3 * 2^51, next to which a number below 2^51 keeps
   no fraction (halves to even) and is the sum's last 52 bits. In int64 a block with a larger number in it goes one by
   one; in int32 such a step is thrown away. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifndef SOURCE
#define SOURCE 0
#endif
/* A digest of this file, given by who compiles it (setup.py): that of the file beside the library, or it is not used. */
const uint64_t hpc_lbsgd_source = SOURCE;

#if defined __FAST_MATH__ || __FINITE_MATH_ONLY__
#error "NaN and infinity must be seen: no -ffast-math"
#endif

enum { BLOCK = 1024 }; /* it lies in the nearest cache while it is gone through again */

/* Compiled for any x86, and once more for those of the last ten years; which of them runs is settled at load time. */
#if defined __x86_64__ && defined __gnu_linux__ && defined __GNUC__ && !defined __clang__
#define EACH_CPU __attribute__((target_clones("avx2", "default")))
#else
#define EACH_CPU
#endif
#define INLINE static inline __attribute__((always_inline))

static const double BESIDE = 6755399441055744.0; /* 3 * 2^51 */
static const double SMALL = 1125899906842624.0;  /* 2^50 */

INLINE int64_t bits_of(double value) {
    int64_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

INLINE double value_of(int64_t bits) {
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE int add_block(float *restrict gradients, int64_t *restrict totals, int64_t size, double scale, float largest,
                     int first) {
    const int64_t beside = bits_of(BESIDE);
    const float small = (float)((largest < SMALL ? largest : SMALL) / scale);
    int large = 0, out_of_range = 0;
    for (int64_t i = 0; i < size; i++) large |= !(fabsf(gradients[i]) <= small); /* NaN is not */
    if (large) {
        for (int64_t i = 0; i < size; i++) {
            double rounded = nearbyint(gradients[i] * scale);
            int fits = fabs(rounded) <= largest;
            int64_t whole = fabs(rounded) < 0x1p63 ? (int64_t)rounded : INT64_MIN; /* as x86 makes them */
            out_of_range |= !fits;
            totals[i] = first ? whole : (int64_t)((uint64_t)totals[i] + (uint64_t)whole);
        }
    } else if (first) {
        for (int64_t i = 0; i < size; i++) totals[i] = bits_of(gradients[i] * scale + BESIDE) - beside;
    } else {
        for (int64_t i = 0; i < size; i++) {
            uint64_t whole = (uint64_t)(bits_of(gradients[i] * scale + BESIDE) - beside);
            totals[i] = (int64_t)((uint64_t)totals[i] + whole); /* a step that is flagged may wrap */
        }
    }
    return out_of_range;
}

INLINE void take_block(const int64_t *restrict totals, float *restrict gradients, int64_t size, float unit) {
    const int64_t beside = bits_of(BESIDE);
    uint64_t large = 0;
    for (int64_t i = 0; i < size; i++) large |= ((uint64_t)totals[i] + ((uint64_t)1 << 50)) >> 51;
    if (large) {
        for (int64_t i = 0; i < size; i++) gradients[i] = (float)totals[i] * unit;
    } else {
        for (int64_t i = 0; i < size; i++) gradients[i] = (float)(value_of(totals[i] + beside) - BESIDE) * unit;
    }
}

/* The largest, as bits without their sign, which are in the order of the numbers; infinity and NaN are beyond all. */
INLINE uint32_t largest_in(const float *restrict gradients, int64_t size) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < size; i++) {
        uint32_t bits;
        memcpy(&bits, gradients + i, sizeof bits);
        bits &= 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    return largest;
}

INLINE void add_block_int32(const float *restrict gradients, uint32_t *restrict totals, int64_t size, float scale,
                            int first) {
    const int64_t beside = bits_of(BESIDE);
    if (first) {
        for (int64_t i = 0; i < size; i++) totals[i] = (uint32_t)(bits_of(gradients[i] * scale + BESIDE) - beside);
    } else {
        for (int64_t i = 0; i < size; i++) totals[i] += (uint32_t)(bits_of(gradients[i] * scale + BESIDE) - beside);
    }
}

INLINE int64_t block_at(int64_t start, int64_t size, int64_t statistics) {
    int64_t end = start < statistics ? statistics : size; /* of what has one unit */
    return end - start < BLOCK ? end - start : BLOCK;
}

EACH_CPU
void hpc_lbsgd_add(float *gradients, int64_t *totals, uint8_t *flag, int64_t size, int64_t statistics, double scale,
                   double statistics_scale, double largest, int first, int clear) {
    for (int64_t i = 0, length; i < size; i += length) {
        length = block_at(i, size, statistics);
        if (add_block(gradients + i, totals + i, length, i < statistics ? statistics_scale : scale, (float)largest,
                      first))
            *flag = 1;
        if (clear) memset(gradients + i, 0, (size_t)length * sizeof *gradients);
    }
}

EACH_CPU
void hpc_lbsgd_take(const int64_t *totals, float *gradients, int64_t size, int64_t statistics, double unit,
                    double statistics_unit) {
    for (int64_t i = 0, length; i < size; i += length) {
        length = block_at(i, size, statistics);
        take_block(totals + i, gradients + i, length, (float)(i < statistics ? statistics_unit : unit));
    }
}

/* ends: where each tensor's part of the bucket ends, and the next one's begins */
EACH_CPU
void hpc_lbsgd_add_int32(float *gradients, uint32_t *totals, int64_t tensors, const int64_t *ends, const double *scales,
                         float *largest, int first, int clear) {
    for (int64_t tensor = 0, i = 0; tensor < tensors; tensor++) {
        uint32_t most = 0;
        for (int64_t length; i < ends[tensor]; i += length) {
            length = block_at(i, ends[tensor], 0);
            uint32_t here = largest_in(gradients + i, length);
            most = here > most ? here : most;
            add_block_int32(gradients + i, totals + i, length, (float)scales[tensor], first);
            if (clear) memset(gradients + i, 0, (size_t)length * sizeof *gradients);
        }
        memcpy(largest + tensor, &most, sizeof most);
    }
}

EACH_CPU
void hpc_lbsgd_take_int32(const int32_t *restrict totals, float *restrict gradients, int64_t tensors,
                          const int64_t *ends, const double *scales) {
    for (int64_t tensor = 0, i = 0; tensor < tensors; tensor++) {
        const float unit = (float)(1 / scales[tensor]);
        for (; i < ends[tensor]; i++) gradients[i] = (float)totals[i] * unit;
    }
}
