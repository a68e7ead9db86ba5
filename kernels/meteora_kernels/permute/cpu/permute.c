// Rows of an exchange on a CPU: choice of experts and what each rank gets of the tokens, in one call; and sums back.
//
// Twins: ../reference.py and ../../gate/reference.py. Every rank gets C rows, wanted there or not: those that nobody
// wants, and those past the T tokens, are zeros without experts.
//
// Shapes: D ranks, C rows for each, T tokens, N linears that share one input, K slots, H input width, O_n output widths,
// Y columns of the linears' outputs, G slots of the roster.
#include <omp.h>
#include <stdlib.h>

#include "../../routed_lora/cpu/choice.h"

#define SOME 16  // tokens that are chosen for together

typedef struct {  // what goes out; see lay_out in operators.py
    int64_t ranks, capacity, targets;
    const int64_t *target_DG;
    char *rows_DCH;
    int32_t *ids_DCNK;
    float *weights_DCNK;
} Outgoing;

static int64_t bytes_of_row(const Group *g) { return row_bytes(g->inputs, (int)g->half); }

// The row of one token, or of none, for every rank: ids and weights of its slots by linear, at `ids` and `weights`.
static void fill(const Group *g, const Pass *p, const Outgoing *out, int64_t token, const char *x, const int64_t *ids,
                 const float *weights, int64_t stride) {
    for (int64_t d = 0; d < out->ranks; d++) {
        const int64_t row = d * out->capacity + token, first = row * g->linears * p->slots;
        int wanted = 0;
        for (int64_t n = 0; n < g->linears; n++)
            for (int64_t k = 0; k < p->slots; k++) {
                const int64_t id = x ? ids[n * stride + k] : -1;
                const int64_t local = id < 0 ? -1 : out->target_DG[d * out->targets + slot_of(p, id)];
                out->ids_DCNK[first + n * p->slots + k] = (int32_t)local;
                out->weights_DCNK[first + n * p->slots + k] = local < 0 ? 0.0f : weights[n * stride + k];
                wanted |= local >= 0;
            }
        char *there = out->rows_DCH + row * bytes_of_row(g);
        if (wanted)
            memcpy(there, x, bytes_of_row(g));
        else
            memset(there, 0, bytes_of_row(g));
    }
}

// Some tokens from `first` on. Returns 1 for want of memory.
static int send(const Group *g, const Pass *p, const Outgoing *out, const char *x, int64_t first, int64_t tokens) {
    const int64_t slots = tokens * p->slots, logits = p->gated ? g->linears * g->known * stride_of(tokens) : 0;
    const int64_t wide = g->half ? tokens * g->inputs : 0;
    int64_t *ids = malloc(g->linears * slots * (sizeof *ids + sizeof(float)) + (logits + wide) * sizeof(float));
    if (!ids) return 1;
    Block b = {.first = first, .tokens = tokens, .ids_NS = ids, .weights_NS = (float *)(ids + g->linears * slots)};
    b.logits_PT = b.weights_NS + g->linears * slots;
    b.x_TH = b.logits_PT + logits;
    for (int64_t t = 0; t < tokens; t++) {
        b.x_rows[t] = x + (first + t) * bytes_of_row(g);
        b.x[t] = g->half ? b.x_TH + t * g->inputs : (const float *)b.x_rows[t];
        for (int64_t i = 0; g->half && i < g->inputs; i++) b.x_TH[t * g->inputs + i] = widen(b.x_rows[t], i, 1);
    }
    if (p->gated) compute_logits(g, p, &b, (Part){0, 1});
    for (int64_t n = 0; n < g->linears; n++) choose(g, p, &b, n);
    if (p->uses_G || p->shares_TF) {
#pragma omp critical
        account(g, p, &b);
    }
    for (int64_t t = 0; t < tokens; t++)
        fill(g, p, out, first + t, b.x_rows[t], ids + t * p->slots, b.weights_NS + t * p->slots, slots);
    free(ids);
    return 0;
}

// Fills what goes out for x_TH. Returns 1 for want of memory.
int lay_out_rows(const Group *g, const Pass *p, const Outgoing *out, const char *x) {
    int failed = 0;
#pragma omp parallel for num_threads((int)p->threads) schedule(static) if (p->threads > 1 && p->tokens > SOME)
    for (int64_t first = 0; first < p->tokens; first += SOME)
        if (send(g, p, out, x, first, p->tokens - first < SOME ? p->tokens - first : SOME)) {
#pragma omp atomic write
            failed = 1;
        }
    for (int64_t t = p->tokens; t < out->capacity; t++) fill(g, p, out, t, 0, 0, 0, 0);
    return failed;
}

// Puts the parts that came from every rank one after the other, ids as wide as others have them.
void join_rows(int64_t ranks, int64_t part_bytes, int64_t part_slots, const char *const *rows, const int32_t *const *ids,
               const float *const *weights, char *rows_MH, int64_t *ids_MNK, float *weights_MNK) {
    for (int64_t d = 0; d < ranks; d++) {
        memcpy(rows_MH + d * part_bytes, rows[d], part_bytes);
        memcpy(weights_MNK + d * part_slots, weights[d], part_slots * sizeof *weights_MNK);
        for (int64_t s = 0; s < part_slots; s++) ids_MNK[d * part_slots + s] = ids[d][s];
    }
}

// The sum of number i of every rank's part, in their order; in bfloat16 every sum is rounded.
INLINE float sum_of_parts(const char *const *parts, int64_t ranks, int64_t i, int half) {
    float sum = widen(parts[0], i, half);
    for (int64_t d = 1; d < ranks; d++) {
        sum += widen(parts[d], i, half);
        if (half) sum = widen(&(uint16_t){narrow(sum)}, 0, 1);
    }
    return sum;
}

// y += the sum of what came back from every rank.
void add_returned(const Group *g, int64_t ranks, int64_t tokens, int64_t columns, const char *const *parts, char *y) {
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t n = 0, from = t * columns; n < g->linears; from += g->width_N[n++]) {
            const int64_t to = t * g->outputs + g->first_N[n];
            int64_t i = 0;
            for (; !g->half && i + LANES <= g->width_N[n]; i += LANES) {
                floats sum = load(parts[0], from + i, 0);
                for (int64_t d = 1; d < ranks; d++) sum += load(parts[d], from + i, 0);
                *(floats *)((float *)y + to + i) += sum;
            }
            for (; i < g->width_N[n]; i++) {
                const float sum = sum_of_parts(parts, ranks, from + i, (int)g->half);
                if (g->half)
                    ((uint16_t *)y)[to + i] = narrow(widen(y, to + i, 1) + sum);
                else
                    ((float *)y)[to + i] += sum;
            }
        }
}
