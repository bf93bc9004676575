// wgmma.mma_async as PTX: m64nNk16 of 16-bit operands, m64nNk8 of tf32, f32 accumulators, for every N. PTX names each
// register of the accumulator in the text of the instruction, so there is a line for each N; included by ptx_sm90.cuh.
#pragma once

namespace ptx {

template <int N> struct Wgmma;

// Operands follow the N / 2 accumulators: i0 is the number of the first one.
#define WGMMA_SHARED(N, shape, type, transposed, i0, i1, i2)                        \
    asm volatile("{.reg .pred p; setp.ne.b32 p, %" #i2 ", 0; "                      \
                 "wgmma.mma_async.sync.aligned.m64n" #N shape ".f32." type "." type \
                 " {" WGMMA_LIST_##N "}, %" #i0 ", %" #i1 ", p, 1, 1" transposed ";}"
#define WGMMA_REGISTERS(N, shape, type, transposed, i0, i1, i2, i3, i4, i5)         \
    asm volatile("{.reg .pred p; setp.ne.b32 p, %" #i5 ", 0; "                      \
                 "wgmma.mma_async.sync.aligned.m64n" #N shape ".f32." type "." type \
                 " {" WGMMA_LIST_##N "}, {%" #i0 ", %" #i1 ", %" #i2 ", %" #i3 "}, %" #i4 ", p, 1, 1" transposed ";}"

#define WGMMA(N, i0, i1, i2, i3, i4, i5, i6)                                                                   \
    template <> struct Wgmma<N> {                                                                              \
        using D = float[N / 2];                                                                                \
        template <int kTransA, int kTransB>                                                                    \
        static PTX void mma(D& d, uint64_t a, uint64_t b, int scale_d, __nv_bfloat16) {                        \
            WGMMA_SHARED(N, "k16", "bf16", ", %" #i3 ", %" #i4, i0, i1, i2)                                    \
            : WGMMA_OUT_##N : "l"(a), "l"(b), "r"(scale_d), "n"(kTransA), "n"(kTransB));                       \
        }                                                                                                      \
        template <int kTransA, int kTransB>                                                                    \
        static PTX void mma(D& d, uint64_t a, uint64_t b, int scale_d, __half) {                               \
            WGMMA_SHARED(N, "k16", "f16", ", %" #i3 ", %" #i4, i0, i1, i2)                                     \
            : WGMMA_OUT_##N : "l"(a), "l"(b), "r"(scale_d), "n"(kTransA), "n"(kTransB));                       \
        }                                                                                                      \
        template <int kTransB>                                                                                 \
        static PTX void mma(D& d, const uint32_t (&a)[4], uint64_t b, int scale_d, __nv_bfloat16) {            \
            WGMMA_REGISTERS(N, "k16", "bf16", ", %" #i6, i0, i1, i2, i3, i4, i5)                               \
            : WGMMA_OUT_##N : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(scale_d), "n"(kTransB)); \
        }                                                                                                      \
        template <int kTransB>                                                                                 \
        static PTX void mma(D& d, const uint32_t (&a)[4], uint64_t b, int scale_d, __half) {                   \
            WGMMA_REGISTERS(N, "k16", "f16", ", %" #i6, i0, i1, i2, i3, i4, i5)                                \
            : WGMMA_OUT_##N : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(scale_d), "n"(kTransB)); \
        }                                                                                                      \
        static PTX void mma_tf32(D& d, uint64_t a, uint64_t b, int scale_d) {                                  \
            WGMMA_SHARED(N, "k8", "tf32", "", i0, i1, i2) : WGMMA_OUT_##N : "l"(a), "l"(b), "r"(scale_d));     \
        }                                                                                                      \
        static PTX void mma_tf32(D& d, const uint32_t (&a)[4], uint64_t b, int scale_d) {                      \
            WGMMA_REGISTERS(N, "k8", "tf32", "", i0, i1, i2, i3, i4, i5)                                       \
            : WGMMA_OUT_##N : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(scale_d));               \
        }                                                                                                      \
    };

// clang-format off
#define WGMMA_D(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define WGMMA_LIST_8 "%0,%1,%2,%3"
#define WGMMA_LIST_16 WGMMA_LIST_8 ",%4,%5,%6,%7"
#define WGMMA_LIST_24 WGMMA_LIST_16 ",%8,%9,%10,%11"
#define WGMMA_LIST_32 WGMMA_LIST_24 ",%12,%13,%14,%15"
#define WGMMA_LIST_40 WGMMA_LIST_32 ",%16,%17,%18,%19"
#define WGMMA_LIST_48 WGMMA_LIST_40 ",%20,%21,%22,%23"
#define WGMMA_LIST_56 WGMMA_LIST_48 ",%24,%25,%26,%27"
#define WGMMA_LIST_64 WGMMA_LIST_56 ",%28,%29,%30,%31"
#define WGMMA_LIST_72 WGMMA_LIST_64 ",%32,%33,%34,%35"
#define WGMMA_LIST_80 WGMMA_LIST_72 ",%36,%37,%38,%39"
#define WGMMA_LIST_88 WGMMA_LIST_80 ",%40,%41,%42,%43"
#define WGMMA_LIST_96 WGMMA_LIST_88 ",%44,%45,%46,%47"
#define WGMMA_LIST_104 WGMMA_LIST_96 ",%48,%49,%50,%51"
#define WGMMA_LIST_112 WGMMA_LIST_104 ",%52,%53,%54,%55"
#define WGMMA_LIST_120 WGMMA_LIST_112 ",%56,%57,%58,%59"
#define WGMMA_LIST_128 WGMMA_LIST_120 ",%60,%61,%62,%63"
#define WGMMA_LIST_136 WGMMA_LIST_128 ",%64,%65,%66,%67"
#define WGMMA_LIST_144 WGMMA_LIST_136 ",%68,%69,%70,%71"
#define WGMMA_LIST_152 WGMMA_LIST_144 ",%72,%73,%74,%75"
#define WGMMA_LIST_160 WGMMA_LIST_152 ",%76,%77,%78,%79"
#define WGMMA_LIST_168 WGMMA_LIST_160 ",%80,%81,%82,%83"
#define WGMMA_LIST_176 WGMMA_LIST_168 ",%84,%85,%86,%87"
#define WGMMA_LIST_184 WGMMA_LIST_176 ",%88,%89,%90,%91"
#define WGMMA_LIST_192 WGMMA_LIST_184 ",%92,%93,%94,%95"
#define WGMMA_LIST_200 WGMMA_LIST_192 ",%96,%97,%98,%99"
#define WGMMA_LIST_208 WGMMA_LIST_200 ",%100,%101,%102,%103"
#define WGMMA_LIST_216 WGMMA_LIST_208 ",%104,%105,%106,%107"
#define WGMMA_LIST_224 WGMMA_LIST_216 ",%108,%109,%110,%111"
#define WGMMA_LIST_232 WGMMA_LIST_224 ",%112,%113,%114,%115"
#define WGMMA_LIST_240 WGMMA_LIST_232 ",%116,%117,%118,%119"
#define WGMMA_LIST_248 WGMMA_LIST_240 ",%120,%121,%122,%123"
#define WGMMA_LIST_256 WGMMA_LIST_248 ",%124,%125,%126,%127"
#define WGMMA_OUT_8 WGMMA_D(0)
#define WGMMA_OUT_16 WGMMA_OUT_8, WGMMA_D(4)
#define WGMMA_OUT_24 WGMMA_OUT_16, WGMMA_D(8)
#define WGMMA_OUT_32 WGMMA_OUT_24, WGMMA_D(12)
#define WGMMA_OUT_40 WGMMA_OUT_32, WGMMA_D(16)
#define WGMMA_OUT_48 WGMMA_OUT_40, WGMMA_D(20)
#define WGMMA_OUT_56 WGMMA_OUT_48, WGMMA_D(24)
#define WGMMA_OUT_64 WGMMA_OUT_56, WGMMA_D(28)
#define WGMMA_OUT_72 WGMMA_OUT_64, WGMMA_D(32)
#define WGMMA_OUT_80 WGMMA_OUT_72, WGMMA_D(36)
#define WGMMA_OUT_88 WGMMA_OUT_80, WGMMA_D(40)
#define WGMMA_OUT_96 WGMMA_OUT_88, WGMMA_D(44)
#define WGMMA_OUT_104 WGMMA_OUT_96, WGMMA_D(48)
#define WGMMA_OUT_112 WGMMA_OUT_104, WGMMA_D(52)
#define WGMMA_OUT_120 WGMMA_OUT_112, WGMMA_D(56)
#define WGMMA_OUT_128 WGMMA_OUT_120, WGMMA_D(60)
#define WGMMA_OUT_136 WGMMA_OUT_128, WGMMA_D(64)
#define WGMMA_OUT_144 WGMMA_OUT_136, WGMMA_D(68)
#define WGMMA_OUT_152 WGMMA_OUT_144, WGMMA_D(72)
#define WGMMA_OUT_160 WGMMA_OUT_152, WGMMA_D(76)
#define WGMMA_OUT_168 WGMMA_OUT_160, WGMMA_D(80)
#define WGMMA_OUT_176 WGMMA_OUT_168, WGMMA_D(84)
#define WGMMA_OUT_184 WGMMA_OUT_176, WGMMA_D(88)
#define WGMMA_OUT_192 WGMMA_OUT_184, WGMMA_D(92)
#define WGMMA_OUT_200 WGMMA_OUT_192, WGMMA_D(96)
#define WGMMA_OUT_208 WGMMA_OUT_200, WGMMA_D(100)
#define WGMMA_OUT_216 WGMMA_OUT_208, WGMMA_D(104)
#define WGMMA_OUT_224 WGMMA_OUT_216, WGMMA_D(108)
#define WGMMA_OUT_232 WGMMA_OUT_224, WGMMA_D(112)
#define WGMMA_OUT_240 WGMMA_OUT_232, WGMMA_D(116)
#define WGMMA_OUT_248 WGMMA_OUT_240, WGMMA_D(120)
#define WGMMA_OUT_256 WGMMA_OUT_248, WGMMA_D(124)
WGMMA(8, 4, 5, 6, 7, 8, 9, 10)
WGMMA(16, 8, 9, 10, 11, 12, 13, 14)
WGMMA(24, 12, 13, 14, 15, 16, 17, 18)
WGMMA(32, 16, 17, 18, 19, 20, 21, 22)
WGMMA(40, 20, 21, 22, 23, 24, 25, 26)
WGMMA(48, 24, 25, 26, 27, 28, 29, 30)
WGMMA(56, 28, 29, 30, 31, 32, 33, 34)
WGMMA(64, 32, 33, 34, 35, 36, 37, 38)
WGMMA(72, 36, 37, 38, 39, 40, 41, 42)
WGMMA(80, 40, 41, 42, 43, 44, 45, 46)
WGMMA(88, 44, 45, 46, 47, 48, 49, 50)
WGMMA(96, 48, 49, 50, 51, 52, 53, 54)
WGMMA(104, 52, 53, 54, 55, 56, 57, 58)
WGMMA(112, 56, 57, 58, 59, 60, 61, 62)
WGMMA(120, 60, 61, 62, 63, 64, 65, 66)
WGMMA(128, 64, 65, 66, 67, 68, 69, 70)
WGMMA(136, 68, 69, 70, 71, 72, 73, 74)
WGMMA(144, 72, 73, 74, 75, 76, 77, 78)
WGMMA(152, 76, 77, 78, 79, 80, 81, 82)
WGMMA(160, 80, 81, 82, 83, 84, 85, 86)
WGMMA(168, 84, 85, 86, 87, 88, 89, 90)
WGMMA(176, 88, 89, 90, 91, 92, 93, 94)
WGMMA(184, 92, 93, 94, 95, 96, 97, 98)
WGMMA(192, 96, 97, 98, 99, 100, 101, 102)
WGMMA(200, 100, 101, 102, 103, 104, 105, 106)
WGMMA(208, 104, 105, 106, 107, 108, 109, 110)
WGMMA(216, 108, 109, 110, 111, 112, 113, 114)
WGMMA(224, 112, 113, 114, 115, 116, 117, 118)
WGMMA(232, 116, 117, 118, 119, 120, 121, 122)
WGMMA(240, 120, 121, 122, 123, 124, 125, 126)
WGMMA(248, 124, 125, 126, 127, 128, 129, 130)
WGMMA(256, 128, 129, 130, 131, 132, 133, 134)
// clang-format on

}  // namespace ptx
