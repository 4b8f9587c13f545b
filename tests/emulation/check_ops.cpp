// Prints the result of each wide intrinsic that kernels may use, over fixed inputs with every special value in them.
// Compiled against the emulation, and where the processor has the instructions against those: the lines must agree.
#include <cstdio>
#include <cstring>

#include "cpu/vec.h"

namespace tpweave {
namespace TPWEAVE_ISA_NAMESPACE {
namespace {

uint32_t next_random(uint32_t* state) {
  *state = *state * 1664525u + 1013904223u;
  return *state >> 3 ^ *state << 7;
}

void print_floats(const char* name, const float* values, int count) {
  std::printf("%s", name);
  for (int i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, values + i, sizeof(bits));
    // Which NaN comes out is not promised.
    if (values[i] != values[i]) bits = 0x7fc00000u;
    std::printf(" %08x", bits);
  }
  std::printf("\n");
}

template <typename V>
void print_bytes(const char* name, const V& v) {
  const auto* bytes = reinterpret_cast<const unsigned char*>(&v);
  std::printf("%s ", name);
  for (size_t i = 0; i < sizeof(V); ++i) std::printf("%02x", bytes[i]);
  std::printf("\n");
}

void print(const char* name, __m512 v) {
  float lanes[16];
  std::memcpy(lanes, &v, sizeof(v));
  print_floats(name, lanes, 16);
}
void print(const char* name, __m256 v) {
  float lanes[8];
  std::memcpy(lanes, &v, sizeof(v));
  print_floats(name, lanes, 8);
}
void print(const char* name, float v) { print_floats(name, &v, 1); }
void print(const char* name, __m512i v) { print_bytes(name, v); }
void print(const char* name, __m256i v) { print_bytes(name, v); }
void print(const char* name, __m128i v) { print_bytes(name, v); }
void print(const char* name, uint64_t v) { print_bytes(name, v); }

#define SHOW(expression) print(#expression, expression)
#define SHOW_MASK(expression) print(#expression, static_cast<uint64_t>(expression))

void show_floats(__m512 a, __m512 b, __m512 c, __mmask16 k) {
  SHOW(_mm512_add_ps(a, b));
  SHOW(_mm512_mask_add_ps(c, k, a, b));
  SHOW(_mm512_maskz_mul_ps(k, a, b));
  SHOW(_mm512_div_ps(a, b));
  SHOW(_mm512_max_ps(a, b));
  SHOW(_mm512_min_ps(a, b));
  SHOW(_mm512_fmadd_ps(a, b, c));
  SHOW(_mm512_fmsub_ps(a, b, c));
  SHOW(_mm512_fnmadd_ps(a, b, c));
  SHOW(_mm512_fnmsub_ps(a, b, c));
  SHOW(_mm512_mask_fmadd_ps(a, k, b, c));
  SHOW(_mm512_mask3_fmadd_ps(a, b, c, k));
  SHOW(_mm512_maskz_fmadd_ps(k, a, b, c));
  SHOW(_mm512_sqrt_ps(a));
  SHOW(_mm512_abs_ps(a));
  SHOW(_mm512_scalef_ps(a, b));
  SHOW(_mm512_getexp_ps(a));
  SHOW(_mm512_roundscale_ps(a, 8));
  SHOW(_mm512_roundscale_ps(a, 9));
  SHOW(_mm512_roundscale_ps(a, 10));
  SHOW(_mm512_roundscale_ps(a, 11));
  SHOW(_mm512_roundscale_ps(a, 0x28));
  SHOW(_mm512_reduce_ps(a, 8));
  SHOW(_mm512_xor_ps(a, b));
  SHOW(_mm512_andnot_ps(a, b));
  SHOW(_mm512_reduce_add_ps(c));
  SHOW(_mm512_reduce_max_ps(c));
  SHOW(_mm512_reduce_min_ps(c));
  SHOW(_mm512_mask_blend_ps(k, a, b));
  SHOW(_mm512_maskz_mov_ps(k, a));
  SHOW(_mm512_cvtps_epi32(a));
  SHOW(_mm512_cvttps_epi32(a));
  SHOW(_mm512_cvtps_ph(a, 0));
  SHOW(_mm512_cvtps_ph(a, 3));
  SHOW(_mm512_cvtph_ps(_mm512_cvtps_ph(b, 0)));
  SHOW(_mm512_unpacklo_ps(a, b));
  SHOW(_mm512_unpackhi_ps(a, b));
  SHOW(_mm512_shuffle_ps(a, b, 0x72));
  SHOW(_mm512_shuffle_f32x4(a, b, 0x9c));
  SHOW(_mm512_permute_ps(a, 0x1b));
  SHOW(_mm512_movehdup_ps(a));
  SHOW(_mm512_moveldup_ps(a));
  SHOW(_mm512_permutexvar_ps(_mm512_castps_si512(b), a));
  SHOW(_mm512_permutex2var_ps(a, _mm512_castps_si512(c), b));
  SHOW(_mm512_extractf32x8_ps(a, 1));
  SHOW(_mm512_insertf32x8(a, _mm512_castps512_ps256(b), 1));
  SHOW(_mm512_broadcast_f32x8(_mm512_castps512_ps256(b)));
  SHOW_MASK(_mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ));
  SHOW_MASK(_mm512_cmp_ps_mask(a, b, _CMP_LT_OS));
  SHOW_MASK(_mm512_cmp_ps_mask(a, b, _CMP_LE_OQ));
  SHOW_MASK(_mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q));
  SHOW_MASK(_mm512_cmp_ps_mask(a, b, _CMP_NEQ_UQ));
  SHOW_MASK(_mm512_cmp_ps_mask(a, b, _CMP_NLT_US));
  SHOW_MASK(_mm512_cmp_ps_mask(a, b, _CMP_NLE_UQ));
  SHOW_MASK(_mm512_cmp_ps_mask(a, b, _CMP_ORD_Q));
  SHOW_MASK(_mm512_cmp_ps_mask(a, b, _CMP_EQ_UQ));
  SHOW_MASK(_mm512_cmp_ps_mask(a, b, _CMP_NGE_UQ));
  SHOW_MASK(_mm512_cmp_ps_mask(a, b, _CMP_NGT_US));
  SHOW_MASK(_mm512_cmp_ps_mask(a, b, _CMP_NEQ_OQ));
  SHOW_MASK(_mm512_cmp_ps_mask(a, b, _CMP_GE_OQ));
  SHOW_MASK(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ));
  SHOW_MASK(_mm512_mask_cmp_ps_mask(k, a, b, _CMP_GT_OQ));
}

void show_integers(__m512i a, __m512i b, __m512i c, __mmask16 k) {
  SHOW(_mm512_add_epi8(a, b));
  SHOW(_mm512_add_epi16(a, b));
  SHOW(_mm512_add_epi32(a, b));
  SHOW(_mm512_sub_epi64(a, b));
  SHOW(_mm512_max_epi32(a, b));
  SHOW(_mm512_min_epi16(a, b));
  SHOW(_mm512_max_epu32(a, b));
  SHOW(_mm512_min_epu8(a, b));
  SHOW(_mm512_abs_epi32(a));
  SHOW(_mm512_mullo_epi16(a, b));
  SHOW(_mm512_mullo_epi32(a, b));
  SHOW(_mm512_mulhi_epi16(a, b));
  SHOW(_mm512_mul_epu32(a, b));
  SHOW(_mm512_mul_epi32(a, b));
  SHOW(_mm512_madd_epi16(a, b));
  SHOW(_mm512_andnot_si512(a, b));
  SHOW(_mm512_ternarylogic_epi32(a, b, c, 0xca));
  SHOW(_mm512_ternarylogic_epi32(a, b, c, 0x96));
  SHOW(_mm512_slli_epi16(a, 5));
  SHOW(_mm512_slli_epi32(a, 16));
  SHOW(_mm512_srli_epi32(a, 13));
  SHOW(_mm512_srai_epi32(a, 7));
  SHOW(_mm512_srai_epi16(a, 3));
  SHOW(_mm512_srli_epi64(a, 40));
  SHOW(_mm512_sllv_epi32(a, _mm512_and_si512(b, _mm512_set1_epi32(63))));
  SHOW(_mm512_srlv_epi32(a, _mm512_and_si512(b, _mm512_set1_epi32(63))));
  SHOW(_mm512_mask_add_epi32(c, k, a, b));
  SHOW(_mm512_maskz_and_epi32(k, a, b));
  SHOW_MASK(_mm512_cmpeq_epi8_mask(a, b));
  SHOW_MASK(_mm512_cmplt_epi16_mask(a, b));
  SHOW_MASK(_mm512_cmpgt_epi32_mask(a, b));
  SHOW_MASK(_mm512_cmple_epu32_mask(a, b));
  SHOW_MASK(_mm512_cmpge_epi64_mask(a, b));
  SHOW_MASK(_mm512_cmpneq_epi32_mask(a, c));
  SHOW_MASK(_mm512_test_epi32_mask(a, b));
  SHOW_MASK(_mm512_testn_epi32_mask(a, b));
  SHOW(_mm512_cvtepi8_epi16(_mm512_castsi512_si256(a)));
  SHOW(_mm512_cvtepu8_epi16(_mm512_castsi512_si256(a)));
  SHOW(_mm512_cvtepi8_epi32(_mm512_castsi512_si128(a)));
  SHOW(_mm512_cvtepu8_epi32(_mm512_castsi512_si128(a)));
  SHOW(_mm512_cvtepi16_epi32(_mm512_castsi512_si256(a)));
  SHOW(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(a)));
  SHOW(_mm512_maskz_cvtepu16_epi32(k, _mm512_castsi512_si256(a)));
  SHOW(_mm512_cvtepi32_epi64(_mm512_castsi512_si256(a)));
  SHOW(_mm512_cvtepi16_epi8(a));
  SHOW(_mm512_cvtepi32_epi8(a));
  SHOW(_mm512_cvtepi32_epi16(a));
  SHOW(_mm512_cvtsepi32_epi8(a));
  SHOW(_mm512_cvtsepi32_epi16(a));
  SHOW(_mm512_cvtusepi32_epi16(a));
  SHOW(_mm512_cvtepi32_ps(a));
  SHOW(_mm512_cvtepu32_ps(a));
  SHOW(_mm512_unpacklo_epi8(a, b));
  SHOW(_mm512_unpackhi_epi16(a, b));
  SHOW(_mm512_unpacklo_epi32(a, b));
  SHOW(_mm512_unpackhi_epi32(a, b));
  SHOW(_mm512_unpacklo_epi64(a, b));
  SHOW(_mm512_unpackhi_epi64(a, b));
  SHOW(_mm512_shuffle_i32x4(a, b, 0x88));
  SHOW(_mm512_shuffle_i64x2(a, b, 0x6d));
  SHOW(_mm512_shuffle_epi32(a, static_cast<_MM_PERM_ENUM>(0x4e)));
  SHOW(_mm512_shuffle_epi8(a, b));
  SHOW(_mm512_permutex_epi64(a, 0xd8));
  SHOW(_mm512_alignr_epi32(a, b, 3));
  SHOW(_mm512_permutexvar_epi16(b, a));
  SHOW(_mm512_permutexvar_epi32(b, a));
  SHOW(_mm512_permutexvar_epi64(b, a));
  SHOW(_mm512_permutex2var_epi16(a, c, b));
  SHOW(_mm512_permutex2var_epi32(a, c, b));
  SHOW(_mm512_packs_epi32(a, b));
  SHOW(_mm512_packus_epi32(a, b));
  SHOW(_mm512_packs_epi16(a, b));
  SHOW(_mm512_extracti64x4_epi64(a, 1));
  SHOW(_mm512_extracti32x4_epi32(a, 2));
  SHOW(_mm512_inserti64x4(a, _mm512_castsi512_si256(b), 1));
  SHOW(_mm512_broadcast_i32x4(_mm512_castsi512_si128(b)));
  SHOW_MASK(static_cast<uint32_t>(_mm512_reduce_add_epi32(a)));
  SHOW_MASK(static_cast<uint32_t>(_mm512_reduce_max_epi32(a)));
}

void show_memory(__m512i a, __mmask16 k) {
  int32_t room[16] = {};
  _mm512_mask_storeu_epi32(room, k, a);
  SHOW(_mm512_loadu_si512(room));
  _mm512_mask_storeu_epi16(room, k, a);
  SHOW(_mm512_maskz_loadu_epi16(0x5a5a, room));
  SHOW(_mm512_mask_loadu_epi32(a, 0x0ff0, room));
  _mm512_mask_storeu_ps(room, k, _mm512_castsi512_ps(a));
  SHOW(_mm512_castps_si512(_mm512_maskz_loadu_ps(0x1234, room)));
  _mm256_mask_storeu_epi16(room, k, _mm512_castsi512_si256(a));
  SHOW(_mm256_maskz_loadu_epi16(0x7ff0, room));
  _mm512_mask_cvtepi32_storeu_epi16(room, k, a);
  SHOW(_mm512_loadu_si512(room));
}

#if TPWEAVE_ISA_LEVEL >= 3
void show_bf16(__m512 a, __m512 b) {
  print_bytes("_mm512_cvtneps_pbh", _mm512_cvtneps_pbh(a));
  print_bytes("_mm512_cvtne2ps_pbh", _mm512_cvtne2ps_pbh(a, b));
  SHOW(_mm512_cvtpbh_ps(_mm512_cvtneps_pbh(a)));
  // Pairs whose odd half is zero, and sums of small integers: no processor has a choice of rounding there.
  const __m512i odd = _mm512_set1_epi32(0xffff);
  const __m512bh x = reinterpret_cast<__m512bh>(_mm512_and_si512(_mm512_castps_si512(a), odd));
  const __m512bh y = reinterpret_cast<__m512bh>(_mm512_and_si512(_mm512_castps_si512(b), odd));
  SHOW(_mm512_dpbf16_ps(_mm512_setzero_ps(), x, y));
  float small[32];
  for (int i = 0; i < 32; ++i) small[i] = static_cast<float>(i % 7 - 3);
  const __m512bh u = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(small), _mm512_loadu_ps(small + 16));
  const __m512bh v = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(small + 16), _mm512_loadu_ps(small + 3));
  SHOW(_mm512_dpbf16_ps(_mm512_loadu_ps(small + 5), u, v));
}
#endif

}  // namespace

void show_all() {
  const uint32_t special[] = {0x00000000, 0x80000000, 0x7f800000, 0xff800000, 0x7fc00000, 0x00000001,
                              0x807fffff, 0x3f000000, 0xbfc00000, 0x40200000, 0x4f000000, 0xcf000000,
                              0x7f7fffff, 0x477ff000, 0x33000001, 0x3f808000};
  uint32_t state = 7;
  for (int round = 0; round < 40; ++round) {
    uint32_t words[3][16];
    for (int v = 0; v < 3; ++v) {
      for (int i = 0; i < 16; ++i) {
        const uint32_t random = next_random(&state);
        // Any bits; values of ordinary size; special values.
        words[v][i] = round % 4 == 0 ? random : (random & 0x83ffffffu) + 0x3c000000u;
        if (round % 4 == 3 && next_random(&state) % 3 == 0) words[v][i] = special[random % 16];
      }
    }
    const auto k = static_cast<__mmask16>(next_random(&state));
    const __m512i a = _mm512_loadu_si512(words[0]), b = _mm512_loadu_si512(words[1]), c = _mm512_loadu_si512(words[2]);
    show_floats(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), _mm512_castsi512_ps(c), k);
    show_integers(a, b, c, k);
    show_memory(a, k);
#if TPWEAVE_ISA_LEVEL >= 3
    show_bf16(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b));
#endif
  }
}

}  // namespace TPWEAVE_ISA_NAMESPACE
}  // namespace tpweave

int main() {
  tpweave::TPWEAVE_ISA_NAMESPACE::show_all();
  return 0;
}
