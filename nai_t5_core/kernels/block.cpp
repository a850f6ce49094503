// A layer of the encoder in one call. Five calls from Python took a twentieth of the time of a short prompt.

#include "kernels.h"
#include "tiles.h"

int t5_block(const BlockWeights* weights, float* residual, long rows, const float* attention_norm,
             const float* dense_norm, const Bias* bias) {
    const auto& [qkv, o, inner, wo, heads, epsilon, activation] = *weights;
    const int in_float32 = with_kind(qkv.kind, [](auto kind) { return sizeof(typename decltype(kind)::Number) == 4; });
    const long number = in_float32 ? 4 : 2;
    // First of queries, keys and values, then within the feed-forward.
    const Buffer<char> wide = allocate<char>(rows * std::max(qkv.columns, wo.depth) * number);
    const Buffer<char> attended = allocate<char>(rows * o.depth * number);
    if (!wide || !attended) return kOutOfMemory;

    int status = t5_normed_product(residual, rows, attention_norm, epsilon, &qkv, kNone, wide.get());
    if (status == kOk) status = t5_attention(wide.get(), heads, o.depth / heads, bias, in_float32, attended.get());
    if (status == kOk) status = t5_added_product(attended.get(), rows, &o, residual);
    if (status == kOk) status = t5_normed_product(residual, rows, dense_norm, epsilon, &inner, activation, wide.get());
    if (status == kOk) status = t5_added_product(wide.get(), rows, &wo, residual);
    return status;
}
