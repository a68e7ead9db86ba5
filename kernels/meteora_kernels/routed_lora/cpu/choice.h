// A block of tokens, and the choice of its experts. Twin: ../../gate/reference.py. Shapes as in routed_lora.c.
#include <math.h>

#include "products.h"

#define BLOCK 64  // most tokens that are served together

typedef struct {  // a group of linears; see Group in operators.py
    int64_t linears, experts, known, inputs, outputs, max_rank, half;
    const int64_t *a_NE, *b_NE;
    const int32_t *rank_NE;
    const float *scale_NE;
    const int64_t *first_N, *width_N;
    const float *gate_PH;
    const uint8_t *absent_N;
    const int64_t *local_G;
    const uint8_t *half_NE;  // pairs of bfloat16; `half` is the inputs and outputs
} Group;

typedef struct {  // a pass and its choice; see Pass in operators.py
    int64_t tokens, threads, slots, gated, by_linear;
    const uint8_t *auto_T;
    const int64_t *top_k_T;
    const float *temperature_T;
    const int64_t *ids;
    const float *weights;
    const uint8_t *prototype_F;
    const int64_t *slot_F;
    float *shares_TF;
    int64_t *uses_G;
} Pass;

typedef struct {  // tokens that are served together
    int64_t first, tokens;
    const char *x_rows[BLOCK];
    char *y_rows[BLOCK];
    const float *x[BLOCK];  // the same in fp32
    float *y[BLOCK];        // or what is to be added to them, where they are bfloat16
    float *logits_PT, *z_NRS, *x_TH, *y_TY, *weights_NS;
    int64_t *ids_NS;    // by the gates' numbers, then by place
    int32_t *order_NS;  // t * K + k by expert, rising
    int32_t *start_NE;  // where each expert's begin, and the end
    int64_t rows;       // of the A matrices in use
} Block;

typedef struct {  // a thread, number `me` of those that serve a block together
    int me, team;
} Part;

static void share(Part part, int64_t units, int64_t *from, int64_t *to) {
    *from = units * part.me / part.team, *to = units * (part.me + 1) / part.team;
}

// Numbers from one row of a matrix of the team to the next: threads write rows, and a line of the cache has one writer.
static int64_t stride_of(int64_t columns) { return (columns + LANES - 1) / LANES * LANES; }

static int by_gate(const Pass *p, int64_t t) { return p->gated && (!p->auto_T || p->auto_T[t]); }

// Logits of the tokens that want some, neighbours where they are packed.
static void compute_logits(const Group *g, const Pass *p, const Block *b, Part part) {
    const int64_t rows = g->linears * g->known;
    const float *x[BLOCK];
    int64_t gated = 0, from, to;
    for (int64_t t = 0; t < b->tokens; t++)
        if (by_gate(p, b->first + t)) x[gated++] = b->x[t];
    share(part, (rows + TILE - 1) / TILE, &from, &to);
    to = to * TILE < rows ? to * TILE : rows;
    dots(b->logits_PT, stride_of(b->tokens), x, gated, (const char *)g->gate_PH, from * TILE, to, g->inputs, 0);
}

// The top k logits of token t, ties to the smaller number and NaN first as torch sorts, and their weights.
static void choose_by_gate(const float *logits, int64_t stride, const Group *g, const Pass *p, int64_t t, int64_t *ids,
                           float *weights) {
    const int64_t wanted = p->top_k_T ? p->top_k_T[t] : p->slots, k = wanted < g->known ? wanted : g->known;
    const float temperature = p->temperature_T ? p->temperature_T[t] : 1.0f;
    int64_t found = 0;
    for (int64_t e = 0; e < g->known; e++) {
        const float logit = logits[e * stride], score = p->prototype_F && p->prototype_F[e] ? fabsf(logit) : logit;
        int64_t at = found;
        while (at > 0 && (score > weights[at - 1] || (isnan(score) && !isnan(weights[at - 1])))) at--;
        if (at == k) continue;
        if (found < k) found++;
        for (int64_t j = found - 1; j > at; j--) ids[j] = ids[j - 1], weights[j] = weights[j - 1];
        ids[at] = e, weights[at] = score;
    }
    const float most = weights[0];
    float sum = 0.0f;
    for (int64_t j = 0; j < k; j++) sum += weights[j] = expf((weights[j] - most) / temperature);
    for (int64_t j = 0; j < k; j++) weights[j] = k == 1 ? 1.0f : weights[j] / sum;
    for (int64_t j = k; j < p->slots; j++) ids[j] = -1, weights[j] = 0.0f;
}

// Experts and weights of linear n.
static void choose(const Group *g, const Pass *p, const Block *b, int64_t n) {
    const int absent = g->absent_N && g->absent_N[n];
    const float *logits = b->logits_PT + n * g->known * stride_of(b->tokens);
    for (int64_t t = 0; t < b->tokens; t++) {
        const int64_t token = b->first + t, named = (p->by_linear ? token * g->linears + n : token) * p->slots;
        int64_t *ids = b->ids_NS + (n * b->tokens + t) * p->slots;
        float *weights = b->weights_NS + (n * b->tokens + t) * p->slots;
        const int gated = by_gate(p, token);
        if (gated && !absent) choose_by_gate(logits, stride_of(b->tokens), g, p, token, ids, weights);
        logits += gated;
        for (int64_t k = 0; k < p->slots && (absent || !gated); k++) {
            ids[k] = absent ? -1 : p->ids[named + k];
            weights[k] = absent ? 0.0f : p->weights[named + k];
        }
    }
}

static int64_t slot_of(const Pass *p, int64_t id) { return p->slot_F ? p->slot_F[id] : id; }

// Where an expert's matrices are, -1 for nowhere here.
static int64_t held(const Group *g, const Pass *p, int64_t id) {
    if (id < 0) return -1;
    return g->local_G ? g->local_G[slot_of(p, id)] : slot_of(p, id);
}

static void account(const Group *g, const Pass *p, const Block *b) {
    const int64_t slots = b->tokens * p->slots;
    for (int64_t s = 0; s < g->linears * slots; s++) {
        const int64_t id = b->ids_NS[s], token = b->first + s % slots / p->slots;
        if (id < 0) continue;
        if (p->uses_G) p->uses_G[slot_of(p, id)]++;
        if (p->shares_TF) p->shares_TF[token * g->known + id] += b->weights_NS[s];
    }
}

// From the gates' numbers to places here, for slots of one token; what names an expert again adds to its weight.
static void locate(const Group *g, const Pass *p, int64_t *ids, float *weights) {
    for (int64_t k = 0; k < p->slots; k++) {
        ids[k] = held(g, p, ids[k]);
        for (int64_t j = 0; j < k && ids[k] >= 0; j++)
            if (ids[j] == ids[k]) weights[j] += weights[k], ids[k] = -1;
    }
}

// Slots of linear n by expert, rising.
static void sort(const Group *g, const Pass *p, const Block *b, int64_t n) {
    const int64_t slots = b->tokens * p->slots;
    int64_t *ids = b->ids_NS + n * slots;
    int32_t sum = 0, *start = b->start_NE + n * (g->experts + 1), *order = b->order_NS + n * slots;
    memset(start, 0, (g->experts + 1) * sizeof *start);
    for (int64_t t = 0; t < b->tokens; t++)
        locate(g, p, ids + t * p->slots, b->weights_NS + n * slots + t * p->slots);
    for (int64_t s = 0; s < slots; s++)
        if (ids[s] >= 0) start[ids[s]]++;
    for (int64_t e = 0; e <= g->experts; e++) sum += start[e], start[e] = sum;
    for (int64_t s = slots - 1; s >= 0; s--)
        if (ids[s] >= 0) order[--start[ids[s]]] = (int32_t)s;
}
