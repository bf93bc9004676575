// For the tests of the emulator alone: conversions and single instructions, by one warp.
#include "common/reduce.cuh"
#include "projection/activation.cuh"

struct InstructionParams {
    device_ptr in, out;
};

// f32 -> f16 -> f32 and f32 -> bf16 -> f32 of in[i], to out[2 i], out[2 i + 1], for a block's 32 values.
KERNEL(convert, InstructionParams, 32) {
    const uint32_t i = blockIdx.x * 32 + threadIdx.x;
    const float x = global<const float>(p.in)[i];
    global<float>(p.out)[2 * i] = to_float(from_float<__half>(x));
    global<float>(p.out)[2 * i + 1] = to_float(from_float<__nv_bfloat16>(x));
}

// out [16, 8] = in [16, 8] times (in + 128) [8, 8] with tf32 operands.
KERNEL(tf32, InstructionParams, 32) {
    const float *x = global<const float>(p.in), *w = x + 128;
    const int row = threadIdx.x / 4, col = threadIdx.x % 4;
    uint32_t a[4];
    for (int i = 0; i < 4; ++i) a[i] = ptx::cvt_rna_tf32(x[(row + 8 * (i % 2)) * 8 + col + 4 * (i / 2)]);
    float d[4] = {};
    ptx::mma_m16n8k8_tf32(d, a, ptx::cvt_rna_tf32(w[col * 8 + row]), ptx::cvt_rna_tf32(w[(col + 4) * 8 + row]));
    for (int i = 0; i < 4; ++i) global<float>(p.out)[(row + 8 * (i / 2)) * 8 + 2 * col + i % 2] = d[i];
}

// Two 8x8 matrices of 16-bit elements through shared memory: out [4, 64], the first and both transposed, x1 and x2.
struct MatrixStorage {
    __half at[16][8];
};
KERNEL(transpose, InstructionParams, 32) {
    auto& shared = ptx::shared_storage<MatrixStorage>();
    const int lane = threadIdx.x, row = lane / 4, col = 2 * (lane % 4);
    if (lane < 16) ptx::cp_async<16>(shared.at[lane], global<const __half>(p.in) + 8 * lane);
    ptx::cp_async_commit_group();
    ptx::cp_async_wait_group<0>();
    __syncwarp();
    uint32_t r[4];
    uint32_t(&pair)[2] = reinterpret_cast<uint32_t(&)[2]>(r[2]);
    ptx::ldmatrix_x1<false>(r[0], shared.at[lane % 8]);
    ptx::ldmatrix_x1<true>(r[1], shared.at[lane % 8]);
    ptx::ldmatrix_x2<true>(pair, shared.at[lane % 16]);
    for (int i = 0; i < 4; ++i) memcpy(global<__half>(p.out) + 64 * i + row * 8 + col, &r[i], 4);
}

// out [96] = in [96], but zero at every third element. Two warps copy, each the other's part, in units of one and two
// f32; the last third goes by the reciprocal's reciprocal.
struct CopyStorage {
    float at[64];
};
KERNEL(copies, InstructionParams, 64) {
    auto& shared = ptx::shared_storage<CopyStorage>();
    const float* in = global<const float>(p.in);
    float* out = global<float>(p.out);
    const int i = threadIdx.x;
    if (i < 32) ptx::cp_async<4>(&shared.at[i], in + i, i % 3 != 2);
    else if (i < 48) ptx::cp_async<8>(&shared.at[2 * i - 32], in + 2 * i - 32);
    ptx::cp_async_commit_group();
    ptx::cp_async_wait_group<0>();
    ptx::bar_sync(1, 64);
    const int other = (i + 32) % 64;
    out[other] = other % 3 != 2 ? shared.at[other] : 0.0f;
    if (i < 32) out[64 + i] = i % 3 != 1 ? ptx::rcp_approx(ptx::rcp_approx(in[64 + i])) : 0.0f;
}

// out [7, 32]: sum and maximum over the warp, shuffles by index and down, 2^x, whether any is above 1, and above 100.
KERNEL(shuffle, InstructionParams, 32) {
    const int lane = threadIdx.x;
    const float x = global<const float>(p.in)[lane];
    float* out = global<float>(p.out) + lane;
    out[0] = warp_sum(x);
    out[32] = warp_max(x);
    out[64] = ptx::shfl_idx(x, (lane + 5) % 32);
    out[96] = ptx::shfl_down(x, 3);
    out[128] = ptx::ex2_approx(x);
    out[160] = ptx::any(x > 1.0f);
    out[192] = ptx::any(x > 100.0f);
}

// out [2, 32 blocks]: GELU and its derivative.
KERNEL(gelus, InstructionParams, 32) {
    const uint32_t at = blockIdx.x * 32 + threadIdx.x;
    const float x = global<const float>(p.in)[at];
    global<float>(p.out)[at] = gelu(x);
    global<float>(p.out)[gridDim.x * 32 + at] = gelu_derivative(x);
}
