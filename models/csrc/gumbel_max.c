/* Gumbel-max sampling in two levels on a CPU; models/sampling/gumbel_cpu.py builds, loads and calls it.
 *
 * One pass over a row's logits, one block of the vocabulary at a time, computes the block's maximum and its sum of
 * exponentials while the block is in the L1 cache. Noise is then drawn for the blocks, and for the tokens of the
 * winning block. The sample is that of models/sampling/sampler.py, from the same random bits; only the order of
 * summation differs. Rows are independent, so a row's sample does not depend on the batch composition.
 */
#include "threads.h"
#include "vectors.h"

enum { BLOCK = 256 };

typedef struct {
    int64_t rows, vocabulary, dtype;
    const void *logits;          /* [rows, vocabulary] */
    const float *temperatures;   /* [rows]; 0 means greedy */
    const int64_t *keys;         /* [rows, 2] 32-bit words */
    const int64_t *samples;      /* [rows] */
    const int64_t *positions;    /* [rows] */
    double *sums;                /* [rows, blocks] scratch: the log-sum of each block */
    int64_t *tokens;             /* [rows] out */
    double *totals;              /* [rows] out: log(sum(exp(logits / temperature))) */
    float *logprobs;             /* [rows] out */
    Parallel *parallel;          /* or null: one thread */
    int64_t threads;
    int64_t next;                /* next row that no thread has taken */
} Batch;

/* ---- random numbers: Philox4x32-10 (Salmon et al., SC 2011), as in models/sampling/philox.py ------------------- */

static void philox(uint32_t c[4], uint32_t k0, uint32_t k1)
{
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = (uint64_t)0xD2511F53u * c[0], p1 = (uint64_t)0xCD9E8D57u * c[2];
        uint32_t c1 = c[1], c3 = c[3];
        c[0] = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
        c[1] = (uint32_t)p1;
        c[2] = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c[3] = (uint32_t)p0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
}

/* Standard Gumbel noise by index; each counter yields four words. */
typedef struct {
    uint32_t key[2], sample, position, words[4];
    int64_t counter; /* counter of `words`; -1: none */
} Noise;

static double gumbel(Noise *noise, int64_t index)
{
    if (noise->counter != index / 4) {
        noise->counter = index / 4;
        uint32_t c[4] = {(uint32_t)(index / 4), noise->position, noise->sample, 0};
        philox(c, noise->key[0], noise->key[1]);
        memcpy(noise->words, c, sizeof c);
    }
    return -log(-log((noise->words[index % 4] + 0.5) * 0x1p-32));
}

/* ---- one block of the vocabulary ------------------------------------------------------------------------------- */

/* Computes the scores of a block, -infinity past the end of the vocabulary. */
static void scores_of(const Batch *b, int64_t row, int64_t block, float *scores)
{
    float temperature = b->temperatures[row] > 0 ? b->temperatures[row] : 1.0f;
    int64_t start = row * b->vocabulary + block * BLOCK, left = b->vocabulary - block * BLOCK;
    int64_t count = left < BLOCK ? left : BLOCK;
    if (b->dtype == FLOAT32) {
        memcpy(scores, (const float *)b->logits + start, (size_t)count * sizeof(float));
    } else {
        const uint16_t *logits = (const uint16_t *)b->logits + start;
        uint32_t words[BLOCK];
        for (int64_t i = 0; i < count; i++)
            words[i] = (uint32_t)logits[i] << 16;
        memcpy(scores, words, (size_t)count * sizeof(float));
    }
    if (temperature != 1.0f)
        for (int64_t i = 0; i < count; i++)
            scores[i] /= temperature;
    for (int64_t i = count; i < BLOCK; i++)
        scores[i] = -INFINITY;
}

/* Returns log(sum(exp(scores))) and sets `top_score` to the largest score. */
static double log_sum(const float *scores, float *top_score)
{
    vf most = load(scores), sums = {0}, others = {0};
    for (int64_t at = W; at < BLOCK; at += W) {
        vf x = load(scores + at);
        most = larger(x, most);
    }
    float top = most[0];
    for (int i = 1; i < W; i++)
        top = most[i] > top ? most[i] : top;
    *top_score = top;
    if (top == -INFINITY)
        top = 0; /* all -infinity: subtracting it would give NaN */
    for (int64_t at = 0; at < BLOCK; at += 2 * W) { /* two sums, to hide latency */
        sums += exponential(load(scores + at) - top);
        others += exponential(load(scores + at + W) - top);
    }
    double sum = 0;
    sums += others;
    for (int i = 0; i < W; i++)
        sum += sums[i];
    return (double)top + log(sum);
}

/* ---- one row --------------------------------------------------------------------------------------------------- */

/* Returns the most likely token of a block; the first one among equals. */
static int64_t argmax(const float *scores)
{
    int64_t best = 0;
    for (int64_t i = 1; i < BLOCK; i++)
        if (scores[i] > scores[best])
            best = i;
    return best;
}

static void sample_row(Batch *b, int64_t row)
{
    int64_t blocks = (b->vocabulary + BLOCK - 1) / BLOCK, winner = 0, inside = 0;
    double *sums = b->sums + row * blocks, top = -INFINITY, best = -INFINITY, total = 0;
    float scores[BLOCK];
    int greedy = !(b->temperatures[row] > 0);
    Noise noise = {{(uint32_t)b->keys[2 * row], (uint32_t)b->keys[2 * row + 1]},
                   (uint32_t)b->samples[row], (uint32_t)b->positions[row], {0}, -1};
    for (int64_t block = 0; block < blocks; block++) {
        float largest;
        scores_of(b, row, block, scores);
        sums[block] = log_sum(scores, &largest);
        top = sums[block] > top ? sums[block] : top;
        double drawn = greedy ? largest : sums[block] + gumbel(&noise, block);
        if (drawn > best) {
            best = drawn;
            winner = block;
        }
    }
    for (int64_t block = 0; block < blocks; block++)
        total += exp(sums[block] - top);
    scores_of(b, row, winner, scores);
    if (greedy) {
        inside = argmax(scores);
    } else {
        best = -INFINITY;
        for (int64_t i = 0; i < BLOCK; i++) {
            double drawn = scores[i] + gumbel(&noise, blocks + i);
            if (drawn > best) {
                best = drawn;
                inside = i;
            }
        }
    }
    b->tokens[row] = winner * BLOCK + inside;
    b->totals[row] = top + log(total);
    b->logprobs[row] = (float)(scores[inside] - b->totals[row]);
}

static void work(void *batch)
{
    Batch *b = batch;
    for (;;) {
        int64_t row = __atomic_fetch_add(&b->next, 1, __ATOMIC_RELAXED);
        if (row >= b->rows)
            return;
        sample_row(b, row);
    }
}

void rollout_sample(Batch *b)
{
    b->next = 0;
    if (b->parallel && b->threads > 1 && b->rows > 1)
        b->parallel(work, b, (unsigned)b->threads, 0);
    else
        work(b);
}
