// A layer of the encoder in one call: with a short prompt, what Python does between five is felt.

#include "kernels.h"
#include "tiles.h"

int t5_block(const BlockWeights* weights, float* residual, Index rows, const float* attention_norm,
             const float* dense_norm, const Bias* bias, void* wide, void* attended) {
    const auto& [qkv, o, inner, wo, heads, epsilon, activation] = *weights;
    const int in_float32 = with_kind(qkv.kind, [](auto kind) { return sizeof(typename decltype(kind)::Number) == 4; });
    int status = t5_normed_product(residual, rows, attention_norm, epsilon, &qkv, kNone, wide);
    if (status == kOk) status = t5_attention(wide, rows, heads, o.depth / heads, bias, in_float32, attended);
    if (status == kOk) status = t5_added_product(attended, rows, &o, residual);
    if (status == kOk) status = t5_normed_product(residual, rows, dense_norm, epsilon, &inner, activation, wide);
    if (status == kOk) status = t5_added_product(wide, rows, &wo, residual);
    return status;
}
