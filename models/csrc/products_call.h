/* Products as other kernels call them: by addresses of functions of products.c, so that each source is compiled once. */
#pragma once
#include <stdint.h>

typedef struct {
    int64_t outputs, inputs;
    int64_t dtype;        /* FLOAT32 or BFLOAT16, of x, weight and out */
    const char *weight;   /* packed by `rollout_pack_weight` */
    const float *bias;    /* [outputs], or NULL */
} Product;

/* The signatures of `product_tasks`, `product_scratch_bytes` and `product_task`. */
typedef int64_t ProductTasks(const Product *p, int64_t rows, int64_t threads);
typedef int64_t ProductScratchBytes(const Product *p, int64_t rows);
typedef void ProductTask(const Product *p, int64_t rows, const char *x, int64_t x_row_bytes, char *out,
                         int64_t out_row_bytes, int64_t task, int64_t threads, char *scratch);
