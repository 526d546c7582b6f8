/* What kernels of products.h share: a task, and how outputs are stored. */

typedef struct {
    const Product *product;
    int64_t first, last; /* panels */
    int64_t rows;
    const char *x;
    int64_t x_row_bytes;
    char *out;
    int64_t out_row_bytes;
    char *scratch;
} Part;

/* The outputs of a panel. */
typedef struct {
    int64_t offset; /* bytes from the start of a row */
    int64_t count;  /* at most PANEL */
    int biased;
    vf bias[2];
} Outputs;

static Outputs outputs_of(const Product *p, int64_t panel)
{
    int64_t first = panel * PANEL;
    Outputs outputs = {first * size_of((int)p->dtype), least(p->outputs - first, PANEL), p->bias != NULL, {{0}}};
    float bias[PANEL] = {0};
    if (p->bias)
        memcpy(bias, p->bias + first, (size_t)outputs.count * 4);
    outputs.bias[0] = load(bias), outputs.bias[1] = load(bias + W);
    return outputs;
}

typedef uint16_t vh __attribute__((vector_size(2 * W)));
typedef uint16_t vh_memory __attribute__((vector_size(2 * W), aligned(2), may_alias));

INLINE void store_half(const int dtype, char *out, vf x)
{
    if (dtype == FLOAT32)
        store((float *)out, x);
    else
        *(vh_memory *)out = __builtin_convertvector(round_to_bfloat16(x) >> 16, vh);
}

/* Adds the bias to the sums of a row, and stores them. */
INLINE void store_outputs(const int dtype, const Outputs *outputs, char *row, vf a, vf b)
{
    if (outputs->biased)
        a += outputs->bias[0], b += outputs->bias[1];
    char whole[PANEL * 4], *to = outputs->count == PANEL ? row + outputs->offset : whole;
    store_half(dtype, to, a);
    store_half(dtype, to + W * size_of(dtype), b);
    if (outputs->count < PANEL)
        memcpy(row + outputs->offset, whole, (size_t)(outputs->count * size_of(dtype)));
}
