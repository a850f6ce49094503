// What the kernels offer to Python, and to each other.

#pragma once

#include "memory.h"

// How the numbers of a weight lie in its rows. The first five are numbers by themselves. kInt8 is what products in 8
// bits are computed from; other products take its numbers times their scales. Those from kQ8_0 on are the blocks of
// GGUF files, see blocks.h; and those from kFourBits on have their scales beside them, see beside.h.
enum Format {
    kBfloat16 = 0, kFloat16 = 1, kFloat32 = 2, kFloat8E4m3 = 3, kFloat8E5m2 = 4, kInt8 = 5,
    kQ8_0 = 6, kQ4_0 = 7, kQ4_1 = 8, kQ5_0 = 9, kQ5_1 = 10, kIQ4_NL = 11,
    kQ2_K = 12, kQ3_K = 13, kQ4_K = 14, kQ5_K = 15, kQ6_K = 16, kIQ4_XS = 17,
    kFourBits = 18, kFourBitsNested = 19, kNVFP4 = 20, kMXFP8 = 21, kFloat8E4m3InBlocks = 22, kFloat8E5m2InBlocks = 23
};

// Scales beside the numbers of a piece: each is for so many numbers along the depth and so many columns, both powers of
// two, of which the bits are given. The scales of a column take `in_row` places, and may begin anywhere: float32 of
// kFourBits and float8 in blocks, row by row; bytes of kFourBitsNested, which number the values of `codes`, each times
// the number of `outer` that is for so many of them, plus `offset`; and bytes in tiles of kNVFP4 and kMXFP8. 4 bits
// number the sixteen values of `table`.
struct Beside {
    const void* scales;
    const float *table, *codes, *outer;
    Index in_row;
    float offset;
    int across_bits, down_bits, outer_bits;
};

// Some columns of a weight, row by row: [columns, depth] of a Format. The values may begin anywhere; with blocks the
// depth is a multiple of a block's. Numbers of a byte have the `scales` of their columns, which may be null, and those of
// kInt8 the `unit` as well; of kNVFP4 the scales beside have it. All numbers along the depth are multiplied by `factors`,
// which may be null. Each of these products is rounded to float32. Where `turned` is not 0, numbers of kInt8 were rotated in
// groups of so many along the depth, see turned.h; that is 4, 16, 64 or 256, divides the depth, and `unit` is 1.
struct Piece {
    const void* values;
    const float *scales, *factors;
    Index columns;
    float unit;
    int format, turned;
    Beside beside;
};

// A weight [columns, depth], in panels or, where these are null, in pieces, one above the other. `kind` is a number of
// the instruction set's with_kind.
struct Matrix {
    const void* panels;
    const Piece* pieces;
    Index piece_count, columns, depth;
    int is_gated, kind;
};

// The weights of an encoder's layer, `inner` being the feed-forward's first, and numbers that belong to them.
struct BlockWeights {
    Matrix qkv, o, inner, wo;
    Index heads;
    float epsilon;
    int activation;
};

// What attends to what, and with which bias: see t5_attention.
struct Bias {
    const int64_t* documents;
    Index count;
    const float* table;
    Index table_reach;
    float scale;
};

// Activations are in bfloat16 or float32; the residual, the norm's weight and scales always are in float32. Weights in
// bytes are panels. Where an int is returned, it is a Status.
#pragma GCC visibility push(default)  // all else is hidden: several instruction sets may be loaded at once
extern "C" {

// Whether the system lets this process use the instructions; to be asked before anything else is called.
int t5_is_permitted();

// How many threads a call takes at most, and whether they are the kernels' own: else they are those of OpenMP's runtime.
int t5_threads();
int t5_has_own_threads();

// Sets the number of threads where they are the kernels' own.
void t5_set_threads(int count);

// How many steps the panels of a weight take.
Index t5_panel_steps(const Matrix* weight);

// A weight in panels.
void t5_to_panels(const Matrix* weight, void* panels);

// The reverse: panels to a weight [columns, depth].
void t5_from_panels(const Matrix* weight, void* values);

// act(norm(residual) · weightᵀ), or act(norm(residual) · gateᵀ) · (norm(residual) · upᵀ). The norm's weight may be null.
int t5_normed_product(const float* residual, Index rows, const float* norm_weight, float epsilon, const Matrix* weight,
                      int activation, void* out);

// residual += x · weightᵀ, in float32.
int t5_added_product(const void* x, Index rows, const Matrix* weight, float* residual);

// x · weightᵀ of a weight that is not gated, rounded once to what x is in.
int t5_product(const void* x, Index rows, const Matrix* weight, void* out);

// softmax(q · kᵀ · scale + bias) · v for every document and head. The documents are one behind the other, and are all of
// the rows; else nothing is computed. `table` is the bias by distance, [heads,
// 2 · table_reach + 1]; `projected` is [tokens, 3 · heads · size], the result [tokens, heads · size], both in float32
// or in bfloat16.
int t5_attention(const void* projected, Index rows, Index heads, Index size, const Bias* bias, int in_float32, void* out);

// A layer of the encoder: attention and feed-forward, each added to the residual. Activations are put into `attended`,
// [rows, depth of o], and `wide`: queries, keys and values first, and what wo is multiplied with later.
int t5_block(const BlockWeights* weights, float* residual, Index rows, const float* attention_norm,
             const float* dense_norm, const Bias* bias, void* wide, void* attended);

// Multiplies in all threads at once, for some nanoseconds a round. The result is the number of operations: a product and its sum
// are two. `kind` is a number of with_kind.
Index t5_multiply_in_registers(int kind, Index rounds);

}  // extern "C"
#pragma GCC visibility pop
