// Routed LoRA on a CPU in one call: gates, choice of experts, and deltas added to the outputs of the base's linears.
//
//   y_n[t] += sum_k w[t,n,k] * s[n,e] * (x[t] A[n,e]^T) B[n,e]^T,   e = ids[t,n,k], experts in rising order
//
// Twins: ../reference.py and ../../gate/reference.py. A token's sums are made in an order of its own: its bits depend
// neither on other tokens nor on the threads. Only matrices in use are read. Of few tokens, threads share the rows of A
// and the columns of the outputs; of many, the tokens.
//
// Shapes: T tokens, N linears that share one input, E experts held, F experts the gates know, P = N * F, K slots,
// S = T * K, H input width, O_n output widths, Y of all of them, R largest rank, G slots of the roster.
#include <omp.h>
#include <stdlib.h>

#include "choice.h"

#define FEW 32            // tokens that a team serves together
#define LOGITS (1 << 18)  // most logits of a block, if it has more than TILE tokens
#define WORTH 300000      // numbers read and products made that are worth another thread

static const Part ALONE = {0, 1};

typedef struct {  // some slots of expert e at linear n: those from `at` on in the order, at most BLOCK
    int64_t n, e, at, slots;
    int64_t before;  // rows of the A matrices in use that come before this one
} Use;

typedef void Step(const Group *g, const Pass *p, const Block *b, Part part, Use use);

static void for_each_use(const Group *g, const Pass *p, const Block *b, Part part, Step *step) {
    int64_t before = 0;
    for (int64_t n = 0; n < g->linears; n++)
        for (int64_t e = 0; e < g->experts; e++) {
            const int32_t *start = b->start_NE + n * (g->experts + 1) + e;
            for (int64_t at = start[0]; at < start[1]; at += BLOCK)
                step(g, p, b, part, (Use){n, e, at, start[1] - at < BLOCK ? start[1] - at : BLOCK, before});
            if (start[1] > start[0]) before += g->rank_NE[n * g->experts + e];
        }
}

// z = w s (x A^T). The team shares the rows of all matrices in use: a thread reads neighbouring ones as far as it can.
static void shrink(const Group *g, const Pass *p, const Block *b, Part part, Use use) {
    const int64_t n = use.n, at = use.at, slots = use.slots, pair = n * g->experts + use.e, rank = g->rank_NE[pair];
    const int64_t before = n * b->tokens * p->slots, stride = stride_of(b->tokens * p->slots);
    const int32_t *order = b->order_NS + before + at;
    float *z = b->z_NRS + n * g->max_rank * stride + at;
    const float *x[BLOCK];
    int64_t from, to;
    share(part, (b->rows + TILE - 1) / TILE, &from, &to);
    from = from * TILE > use.before ? from * TILE - use.before : 0;
    to = to * TILE - use.before < rank ? to * TILE - use.before : rank;
    for (int64_t s = 0; s < slots; s++) x[s] = b->x[order[s] / p->slots];
    dots(z, stride, x, slots, (const char *)g->a_NE[pair], from, to, g->inputs, g->half_NE[pair]);
    for (int64_t r = from; r < to; r++)
        for (int64_t s = 0; s < slots; s++) z[r * stride + s] *= b->weights_NS[before + order[s]] * g->scale_NE[pair];
}

// This thread's columns of linear n. The team shares those of all linears in a row, as the base's product does: outputs
// stay in the cache of their core.
static void columns(const Group *g, Part part, int64_t n, int64_t *first, int64_t *last) {
    int64_t before = 0, all = 0;
    for (int64_t m = 0; m < g->linears; m++) {
        before += m < n ? stride_of(g->width_N[m]) : 0;
        all += stride_of(g->width_N[m]);
    }
    share(part, all / LANES, first, last);
    *first = *first * LANES > before ? *first * LANES - before : 0;
    *last = *last * LANES > before ? *last * LANES - before : 0;
    *last = *last < g->width_N[n] ? *last : g->width_N[n];
}

// y += z B^T
static void expand(const Group *g, const Pass *p, const Block *b, Part part, Use use) {
    const int64_t n = use.n, at = use.at, slots = use.slots, pair = n * g->experts + use.e;
    const int64_t stride = stride_of(b->tokens * p->slots);
    const int32_t *order = b->order_NS + n * b->tokens * p->slots + at;
    const float *z = b->z_NRS + n * g->max_rank * stride + at;
    float *y[BLOCK];
    int64_t first, last;
    columns(g, part, n, &first, &last);
    for (int64_t s = 0; s < slots; s++) y[s] = b->y[order[s] / p->slots] + g->first_N[n];
    add_products(y, z, stride, slots, (const char *)g->b_NE[pair], g->rank_NE[pair], g->width_N[n], first, last,
                 g->half_NE[pair]);
}

// Deltas of bfloat16 outputs are rounded once, with the outputs.
static void add_deltas(const Group *g, const Block *b, Part part) {
    for (int64_t n = 0, first, last; n < g->linears; n++) {
        columns(g, part, n, &first, &last);
        for (int64_t t = 0; t < b->tokens; t++) {
            uint16_t *y = (uint16_t *)b->y_rows[t] + g->first_N[n];
            for (int64_t i = first; i < last; i++) y[i] = narrow(widen(y, i, 1) + b->y[t][g->first_N[n] + i]);
        }
    }
}

// Counts the rows of A in use, and says how many threads they are worth.
static int threads_for_uses(const Group *g, Block *b, int64_t threads) {
    int64_t work = 0;
    b->rows = 0;
    for (int64_t n = 0; n < g->linears; n++)
        for (int64_t e = 0; e < g->experts; e++) {
            const int32_t *start = b->start_NE + n * (g->experts + 1) + e;
            const int64_t numbers = g->rank_NE[n * g->experts + e] * (g->inputs + g->width_N[n]);
            if (start[1] == start[0]) continue;
            work += numbers * (TILE + start[1] - start[0]);
            b->rows += g->rank_NE[n * g->experts + e];
        }
    return work < WORTH ? 1 : (int)threads;
}

static void serve(const Group *g, const Pass *p, Block *b, int64_t threads) {
    const int64_t gates = g->linears * g->known * g->inputs * (TILE + b->tokens);
    if (p->gated) {
#pragma omp parallel num_threads((int)threads) if (threads > 1 && gates > WORTH)
        compute_logits(g, p, b, (Part){omp_get_thread_num(), omp_get_num_threads()});
    }
    for (int64_t n = 0; n < g->linears; n++) choose(g, p, b, n);
    if (p->uses_G || p->shares_TF) {
#pragma omp critical
        account(g, p, b);
    }
    for (int64_t n = 0; n < g->linears; n++) sort(g, p, b, n);
    const int team = threads_for_uses(g, b, threads);
#pragma omp parallel num_threads(team) if (team > 1)
    {
        const Part part = team > 1 ? (Part){omp_get_thread_num(), omp_get_num_threads()} : ALONE;
        for_each_use(g, p, b, part, shrink);
        if (team > 1) {
#pragma omp barrier
        }
        for_each_use(g, p, b, part, expand);
        if (g->half) add_deltas(g, b, part);
    }
}

static void *take(int64_t *at, char *memory, int64_t numbers, int64_t size) {
    const int64_t from = *at;
    *at += (numbers * size + 63) / 64 * 64;
    return memory && numbers ? memory + from : 0;
}

// Gives a block its memory; returns how many bytes that is.
static int64_t lay_out(const Group *g, const Pass *p, int64_t tokens, char *memory, Block *b) {
    const int64_t slots = tokens * p->slots, half = g->half;
    int64_t bytes = 63 & -(int64_t)memory;
    b->logits_PT = take(&bytes, memory, p->gated ? g->linears * g->known * stride_of(tokens) : 0, 4);
    b->z_NRS = take(&bytes, memory, g->linears * g->max_rank * stride_of(slots), 4);
    b->x_TH = take(&bytes, memory, half ? tokens * g->inputs : 0, 4);
    b->y_TY = take(&bytes, memory, half ? tokens * g->outputs : 0, 4);
    b->weights_NS = take(&bytes, memory, g->linears * slots, 4);
    b->ids_NS = take(&bytes, memory, g->linears * slots, 8);
    b->order_NS = take(&bytes, memory, g->linears * slots, 4);
    b->start_NE = take(&bytes, memory, g->linears * (g->experts + 1), 4);
    return bytes + 64;
}

static void serve_tokens(const Group *g, const Pass *p, const char *x, char *y, int64_t first, int64_t tokens,
                         int64_t threads, char *memory) {
    Block b = {.first = first, .tokens = tokens};
    lay_out(g, p, tokens, memory, &b);
    for (int64_t t = 0; t < tokens; t++) {
        b.x_rows[t] = x + row_bytes((first + t) * g->inputs, (int)g->half);
        b.y_rows[t] = y + row_bytes((first + t) * g->outputs, (int)g->half);
        b.x[t] = g->half ? b.x_TH + t * g->inputs : (const float *)b.x_rows[t];
        b.y[t] = g->half ? b.y_TY + t * g->outputs : (float *)b.y_rows[t];
    }
    if (g->half) {
        memset(b.y_TY, 0, tokens * g->outputs * sizeof *b.y_TY);
        for (int64_t i = 0; i < tokens * g->inputs; i++) b.x_TH[i] = widen(b.x_rows[0], i, 1);
    }
    serve(g, p, &b, threads);
}

// Tokens of a block: all of few; as many for each thread of many, and few where there are many experts.
static int64_t block_tokens(const Group *g, const Pass *p) {
    const int64_t gates = p->gated && g->known ? g->linears * g->known : 1;
    int64_t most = LOGITS / gates < BLOCK ? LOGITS / gates : BLOCK;
    if (p->tokens <= FEW) return p->tokens ? p->tokens : 1;
    most = most < TILE ? TILE : most;
    const int64_t blocks = (p->tokens + most * p->threads - 1) / (most * p->threads) * p->threads;
    return (p->tokens + blocks - 1) / blocks;
}

// Memory that a call needs beside its arguments, in bytes.
int64_t memory_of_routed_lora(const Group *g, const Pass *p) {
    Block b;
    return (p->tokens <= FEW ? 1 : p->threads) * lay_out(g, p, block_tokens(g, p), 0, &b);
}

// Adds to y_TY for x_TH. Returns 0, or 1 for want of memory, and then y is as it was.
int add_routed_lora(const Group *g, const Pass *p, const char *x, char *y) {
    const int64_t bytes = memory_of_routed_lora(g, p), size = block_tokens(g, p), tokens = p->tokens;
    char *memory = malloc(bytes);
    if (!memory) return 1;
    if (tokens <= FEW) {
        serve_tokens(g, p, x, y, 0, tokens, p->threads, memory);
    } else {
#pragma omp parallel for num_threads((int)p->threads) schedule(static)
        for (int64_t first = 0; first < tokens; first += size)
            serve_tokens(g, p, x, y, first, tokens - first < size ? tokens - first : size, 1,
                         memory + omp_get_thread_num() * (bytes / p->threads));
    }
    free(memory);
    return 0;
}

// out_TP = x_TH gate_PH^T, fp32, as the call above computes it.
void gate_logits(const float *x_TH, const float *gate_PH, float *out_PT, int64_t tokens, int64_t rows, int64_t width,
                 int64_t threads) {
#pragma omp parallel for num_threads((int)threads) schedule(static) if (threads > 1 && tokens > TILE)
    for (int64_t first = 0; first < tokens; first += TILE) {
        const float *x[TILE];
        const int64_t some = tokens - first < TILE ? tokens - first : TILE;
        for (int64_t t = 0; t < some; t++) x[t] = x_TH + (first + t) * width;
        dots(out_PT + first, tokens, x, some, (const char *)gate_PH, 0, rows, width, 0);
    }
}

// Ids and weights [T, N, K] by logits that are there already; `auto_T` and the others as in Pass.
void choose_experts(const float *logits_TNF, int64_t tokens, int64_t linears, int64_t known, int64_t slots,
                    const uint8_t *auto_T, const int64_t *top_k_T, const float *temperature_T, const int64_t *ids_TK,
                    const float *weights_TK, const uint8_t *prototype_F, int64_t *ids_TNK, float *weights_TNK) {
    const Group g = {.linears = linears, .known = known};
    const Pass p = {.tokens = tokens, .slots = slots, .gated = 1, .auto_T = auto_T, .top_k_T = top_k_T,
                    .temperature_T = temperature_T, .prototype_F = prototype_F};
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t n = 0; n < linears; n++) {
            const int64_t at = (t * linears + n) * slots;
            if (by_gate(&p, t)) {
                choose_by_gate(logits_TNF + (t * linears + n) * known, 1, &g, &p, t, ids_TNK + at, weights_TNK + at);
                continue;
            }
            memcpy(ids_TNK + at, ids_TK + t * slots, slots * sizeof *ids_TNK);
            memcpy(weights_TNK + at, weights_TK + t * slots, slots * sizeof *weights_TNK);
        }
}
