// Products of few tokens with the rows of a matrix, fp32 or bfloat16, summed in fp32.
//
// The order of every sum follows from the width alone: how many tokens or rows are multiplied at once does not matter.
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define LANES 16  // of a vector, on any machine: they decide the order of sums
#define TILE 4    // tokens, or rows of a matrix, that are multiplied at once

typedef float floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

INLINE int64_t row_bytes(int64_t width, int half) { return width * (half ? 2 : 4); }

INLINE float widen(const void *row, int64_t i, int half) {
    if (!half) return ((const float *)row)[i];
    const uint32_t word = (uint32_t)((const uint16_t *)row)[i] << 16;
    float number;
    memcpy(&number, &word, sizeof number);
    return number;
}

INLINE uint16_t narrow(float number) {  // to the nearest, ties to even
    uint32_t word;
    memcpy(&word, &number, sizeof word);
    if (number != number) return 0x7fc0;
    return (uint16_t)((word + 0x7fff + ((word >> 16) & 1)) >> 16);
}

INLINE floats load(const char *row, int64_t i, int half) {
    if (!half) return *(const floats *)(row + 4 * i);
    return (floats)(__builtin_convertvector(*(const halves *)(row + 2 * i), words) << 16);
}

INLINE float total(floats v) {
    typedef float eight __attribute__((vector_size(32)));
    typedef float four __attribute__((vector_size(16)));
    union { floats all; eight part[2]; } of16 = {v};
    union { eight all; four part[2]; } of8 = {of16.part[0] + of16.part[1]};
    const four sum = of8.part[0] + of8.part[1];
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

// out[r * stride + t] = x[t] . row r
INLINE void dot_tile(float *out, int64_t stride, const float *const *x, int tokens, const char *row, int rows,
                     int64_t width, int half) {
    const int64_t bytes = row_bytes(width, half);
    floats sum[TILE][TILE];
    int64_t i = 0;
    for (int t = 0; t < tokens; t++)
        for (int r = 0; r < rows; r++) sum[t][r] = (floats){0};
    for (; i + LANES <= width; i += LANES)
        for (int r = 0; r < rows; r++) {
            const floats a = load(row + r * bytes, i, half);
            for (int t = 0; t < tokens; t++) sum[t][r] += *(const floats *)(x[t] + i) * a;
        }
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tokens; t++) {
            float dot = total(sum[t][r]);
            for (int64_t j = i; j < width; j++) dot += x[t][j] * widen(row + r * bytes, j, half);
            out[r * stride + t] = dot;
        }
}

// y[t] += sum over r of c[r * stride + t] * row r, columns from first to last; first is a multiple of LANES.
INLINE void add_tile(float *const *y, const float *c, int64_t stride, int tokens, const char *row, int rows,
                     int64_t width, int64_t first, int64_t last, int half) {
    const int64_t bytes = row_bytes(width, half);
    int64_t i = first;
    for (; i + LANES <= last; i += LANES) {
        floats sum[TILE];
        for (int t = 0; t < tokens; t++) sum[t] = *(const floats *)(y[t] + i);
        for (int r = 0; r < rows; r++) {
            const floats b = load(row + r * bytes, i, half);
            for (int t = 0; t < tokens; t++) sum[t] += c[r * stride + t] * b;
        }
        for (int t = 0; t < tokens; t++) *(floats *)(y[t] + i) = sum[t];
    }
    for (; i < last; i++)
        for (int r = 0; r < rows; r++)
            for (int t = 0; t < tokens; t++) y[t][i] += c[r * stride + t] * widen(row + r * bytes, i, half);
}

// Calls a tile with sizes the compiler knows: tokens 1 to 4, rows 1 or 4.
#define SIZED(call, tokens, rows, half)                               \
    switch ((half ? 8 : 0) + (rows == TILE ? 4 : 0) + tokens - 1) {   \
        case 0: call(1, 1, 0); break;                                 \
        case 1: call(2, 1, 0); break;                                 \
        case 2: call(3, 1, 0); break;                                 \
        case 3: call(4, 1, 0); break;                                 \
        case 4: call(1, 4, 0); break;                                 \
        case 5: call(2, 4, 0); break;                                 \
        case 6: call(3, 4, 0); break;                                 \
        case 7: call(4, 4, 0); break;                                 \
        case 8: call(1, 1, 1); break;                                 \
        case 9: call(2, 1, 1); break;                                 \
        case 10: call(3, 1, 1); break;                                \
        case 11: call(4, 1, 1); break;                                \
        case 12: call(1, 4, 1); break;                                \
        case 13: call(2, 4, 1); break;                                \
        case 14: call(3, 4, 1); break;                                \
        case 15: call(4, 4, 1); break;                                \
    }

// out[r * stride + t] = x[t] . row r, rows from first to last of a matrix.
static void dots(float *out, int64_t stride, const float *const *x, int64_t tokens, const char *matrix, int64_t first,
                 int64_t last, int64_t width, int half) {
    for (int64_t r = first, rows; r < last; r += rows) {
        const char *row = matrix + r * row_bytes(width, half);
        rows = last - r < TILE ? 1 : TILE;
        for (int64_t t = 0, some; t < tokens; t += some) {
            some = tokens - t < TILE ? tokens - t : TILE;
#define CALL(tokens, rows, half) dot_tile(out + r * stride + t, stride, x + t, tokens, row, rows, width, half)
            SIZED(CALL, some, rows, half)
#undef CALL
        }
    }
}

// y[t] += sum over r of c[r * stride + t] * row r, all rows of a matrix, columns from first to last.
static void add_products(float *const *y, const float *c, int64_t stride, int64_t tokens, const char *matrix,
                         int64_t rank, int64_t width, int64_t first, int64_t last, int half) {
    for (int64_t r = 0, rows; r < rank; r += rows) {
        const char *row = matrix + r * row_bytes(width, half);
        rows = rank - r < TILE ? 1 : TILE;
        for (int64_t t = 0, some; t < tokens; t += some) {
            some = tokens - t < TILE ? tokens - t : TILE;
#define CALL(tokens, rows, half) \
    add_tile(y + t, c + r * stride + t, stride, tokens, row, rows, width, first, last, half)
            SIZED(CALL, some, rows, half)
#undef CALL
        }
    }
}
