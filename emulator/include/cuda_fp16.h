// Stands in for CUDA's header: half precision as its bits, conversions rounding to nearest even.
#pragma once
#include <bit>
#include <cstdint>

struct __half {
    uint16_t bits;
};

inline float __half2float(__half x) {
    const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, exponent = x.bits >> 10 & 31u, mantissa = x.bits & 0x3FFu;
    if (exponent == 31) return std::bit_cast<float>(sign | 0x7F800000u | mantissa << 13);
    if (exponent != 0) return std::bit_cast<float>(sign | (exponent + 112) << 23 | mantissa << 13);
    const float subnormal = float(mantissa) * 0x1p-24f;
    return sign ? -subnormal : subnormal;
}

inline __half __float2half_rn(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x), magnitude = bits & 0x7FFFFFFFu;
    const uint16_t sign = uint16_t(bits >> 16 & 0x8000u);
    if (magnitude > 0x7F800000u) return {0x7FFF};                                  // NaN
    if (magnitude >= 0x477FF000u) return {uint16_t(sign | 0x7C00u)};               // rounds to 65536 or more: infinity
    if (magnitude < 0x38800000u) {                                                 // below 2^-14: a multiple of 2^-24
        const float rounded = std::bit_cast<float>(magnitude) + 0.5f;              // 0.5 has 2^-24 as its last bit
        return {uint16_t(sign | (std::bit_cast<uint32_t>(rounded) - 0x3F000000u))};
    }
    return {uint16_t(sign | (magnitude - 0x38000000u + 0xFFFu + (magnitude >> 13 & 1u)) >> 13)};
}

struct alignas(4) __half2 {
    __half x, y;
};
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
