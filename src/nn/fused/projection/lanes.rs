//! Narrow numbers into a vector of f32, for which [`Simd`] has no operations: the machine's own where it is an x86 with
//! AVX2 or AVX-512, loops elsewhere.

use half::{bf16, f16};
use pulp::Simd;
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

/// Defines a function that widens the first elements of a slice, as many as a vector has.
macro_rules! widening {
    ($(#[$doc:meta])* $name:ident($from:ty) { 16 => |$x:ident| $avx512:expr, 8 => |$y:ident| $avx2:expr, _ => $one:expr }) => {
        $(#[$doc])*
        #[inline(always)]
        pub(super) fn $name<S: Simd>(simd: S, from: &[$from]) -> S::f32s {
            let from = &from[..S::F32_LANES];
            #[cfg(target_arch = "x86_64")]
            {
                // SAFETY: vectors of 16 lanes mean AVX-512 here and of 8 lanes AVX2, the slice is as long as what is read,
                // and the types are vectors of as many f32.
                unsafe {
                    if S::F32_LANES == 16 {
                        let $x = from.as_ptr().cast();
                        return std::mem::transmute_copy::<__m512, _>(&$avx512);
                    }
                    if S::F32_LANES == 8 {
                        let $y = from.as_ptr().cast();
                        return std::mem::transmute_copy::<__m256, _>(&$avx2);
                    }
                }
            }
            let mut vector = [simd.splat_f32s(0.)];
            for (y, x) in pulp::bytemuck::cast_slice_mut::<_, f32>(&mut vector).iter_mut().zip(from) {
                *y = $one(*x);
            }
            vector[0]
        }
    };
}

widening!(bf16s(bf16) {
    16 => |x| _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(x)))),
    8 => |y| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(y)))),
    _ => bf16::to_f32
});

widening!(
    /// AVX2 alone does not promise the instruction for f16, though every machine with it has it.
    f16s(f16) {
    16 => |x| _mm512_cvtph_ps(_mm256_loadu_si256(x)),
    8 => |y| f16s_avx2(y),
    _ => f16::to_f32
});

widening!(
    /// Signed bytes.
    i8s(u8) {
    16 => |x| _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(x))),
    8 => |y| _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(y))),
    _ => |x| f32::from(x as i8)
});

widening!(
    /// The low four bits of bytes.
    low_bits(u8) {
    16 => |x| _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_cvtepu8_epi32(_mm_loadu_si128(x)), _mm512_set1_epi32(15))),
    8 => |y| _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_cvtepu8_epi32(_mm_loadl_epi64(y)), _mm256_set1_epi32(15))),
    _ => |x| f32::from(x & 15)
});

widening!(
    /// The high four bits of bytes.
    high_bits(u8) {
    16 => |x| _mm512_cvtepi32_ps(_mm512_srli_epi32::<4>(_mm512_cvtepu8_epi32(_mm_loadu_si128(x)))),
    8 => |y| _mm256_cvtepi32_ps(_mm256_srli_epi32::<4>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(y)))),
    _ => |x| f32::from(x >> 4)
});

/// Exact, subnormals, infinities and NaN too; no operation meets a subnormal f32, which would take a hundred cycles.
#[inline(always)]
pub(super) fn from_f16(x: f16) -> f32 {
    let bits = u32::from(x.to_bits());
    let (magnitude, sign) = ((bits & 0x7fff) << 13, (bits & 0x8000) << 16);
    let shifted = magnitude + ((127 - 15) << 23);
    let value = match bits >> 10 & 31 {
        0 => (f32::from_bits(shifted + (1 << 23)) - f32::from_bits((127 - 14) << 23)).to_bits(),
        31 => magnitude | 0x7f80_0000,
        _ => shifted,
    };
    f32::from_bits(value | sign)
}

/// One number for all lanes.
#[inline(always)]
pub(super) fn splat_f16<S: Simd>(simd: S, x: f16) -> S::f32s {
    #[cfg(target_arch = "x86_64")]
    if S::F32_LANES == 16 {
        // SAFETY: vectors of 16 lanes mean AVX-512 here.
        return unsafe {
            let wide = _mm512_cvtph_ps(_mm256_set1_epi16(x.to_bits() as i16));
            std::mem::transmute_copy::<__m512, _>(&wide)
        };
    }
    simd.splat_f32s(from_f16(x))
}

/// # Safety
/// AVX2, and eight elements at `x`.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn f16s_avx2(x: *const __m128i) -> __m256 {
    // SAFETY: what the caller promises.
    unsafe {
        let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(x));
        let sign = _mm256_slli_epi32::<16>(_mm256_and_si256(bits, _mm256_set1_epi32(0x8000)));
        let magnitude = _mm256_slli_epi32::<13>(_mm256_and_si256(bits, _mm256_set1_epi32(0x7fff)));
        let shifted = _mm256_add_epi32(magnitude, _mm256_set1_epi32((127 - 15) << 23));
        // As in `from_f16`.
        let smallest = _mm256_set1_ps(f32::from_bits((127 - 14) << 23));
        let raised = _mm256_castsi256_ps(_mm256_add_epi32(shifted, _mm256_set1_epi32(1 << 23)));
        let small = _mm256_castps_si256(_mm256_sub_ps(raised, smallest));
        let is_small = _mm256_cmpgt_epi32(_mm256_set1_epi32(1 << 23), magnitude);
        let special = _mm256_or_si256(magnitude, _mm256_set1_epi32(0x7f80_0000));
        let is_special = _mm256_cmpgt_epi32(magnitude, _mm256_set1_epi32((31 << 23) - 1));
        let value = _mm256_blendv_epi8(_mm256_blendv_epi8(shifted, small, is_small), special, is_special);
        _mm256_castsi256_ps(_mm256_or_si256(value, sign))
    }
}
