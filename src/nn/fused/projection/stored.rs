//! Weights in the formats they are stored in, read as vectors of f32.

use super::lanes::{bf16s, f16s, from_f16, high_bits, i8_unit, i8s, low_bits, u8s};
use half::{bf16, f16};
use pulp::Simd;

/// The elements of a matrix, row after row. Rows of quantized blocks are whole blocks.
#[derive(Clone, Copy)]
pub(in crate::nn) enum Stored<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    BF16(&'a [bf16]),
    Q8_0(&'a [Q8_0]),
    Q4K(&'a [Q4K]),
}

impl Stored<'_> {
    /// How many elements there are.
    pub fn len(self) -> usize {
        match self {
            Self::F32(x) => x.len(),
            Self::F16(x) => x.len(),
            Self::BF16(x) => x.len(),
            Self::Q8_0(x) => x.len() * Q8_0::LEN,
            Self::Q4K(x) => x.len() * Q4K::LEN,
        }
    }
}

/// A block of 32 elements: a scale in f16, then a signed byte for each.
pub(in crate::nn) type Q8_0 = [u8; 34];
/// A block of 256 elements: a scale and a step of minima in f16, eight pairs of a scale and a minimum of six bits, then
/// four bits for each element.
pub(in crate::nn) type Q4K = [u8; 144];

/// The elements of a block.
pub(in crate::nn) trait Block {
    const LEN: usize;
}

impl Block for Q8_0 {
    const LEN: usize = 32;
}

impl Block for Q4K {
    const LEN: usize = 256;
}

/// Elements of a part: whole vectors on every machine.
pub(super) const PART: usize = 32;
/// Parts of a span.
pub(super) const PARTS: usize = 8;
/// Elements of a span.
pub(super) const SPAN: usize = PARTS * PART;

/// Weights that are read a span at a time.
pub(super) trait Format: Copy + Sync {
    /// Rows are whole groups of so many elements, or are taken as such with zeros at the end.
    const GROUP: usize;
    /// Elements of a part.
    const PART: usize;
    /// Rows whose weights are read side by side where there is one row of inputs: as many as keep the units busy, and few
    /// enough for the sums to stay in registers.
    const STREAMS: usize;
    /// The elements of a span as they are stored.
    type Span;
    /// What they are made with.
    type Scales: Copy + Default;

    /// The span that begins with element `at`.
    fn span(&self, at: usize) -> &Self::Span;

    /// Of a span that ends early, at element `end`, with zeros behind it.
    fn rest(self, at: usize, end: usize) -> Self::Span;

    fn scales<S: Simd>(simd: S, span: &Self::Span) -> Self::Scales;

    /// The vectors of a part, one after the other.
    fn part<S: Simd>(
        simd: S,
        span: &Self::Span,
        part: usize,
        scales: &Self::Scales,
        each: impl FnMut(usize, S::f32s),
    );
}

/// A format without blocks.
macro_rules! plain {
    ($element:ty, $zero:expr, |$simd:ident, $part:ident, $i:ident| $vector:expr) => {
        impl Format for &[$element] {
            const GROUP: usize = PART;
            const PART: usize = PART;
            const STREAMS: usize = 8;
            type Span = [$element; SPAN];
            type Scales = ();

            #[inline(always)]
            fn span(&self, at: usize) -> &Self::Span {
                whole(&self[at..])
            }

            fn rest(self, at: usize, end: usize) -> Self::Span {
                rest(&self[at..end], $zero)
            }

            #[inline(always)]
            fn scales<S: Simd>(_: S, _: &Self::Span) {}

            #[inline(always)]
            fn part<S: Simd>(
                $simd: S,
                span: &Self::Span,
                part: usize,
                _: &(),
                mut each: impl FnMut(usize, S::f32s),
            ) {
                let $part = whole(&span[part * PART..]);
                for i in 0..PART / S::F32_LANES {
                    let $i = i;
                    each(i, $vector);
                }
            }
        }
    };
}

plain!(f32, 0., |_simd, part, i| vector_of::<S>(part, i));
plain!(f16, f16::ZERO, |simd, part, i| f16s::<S, PART>(simd, part, i));
plain!(bf16, bf16::ZERO, |simd, part, i| bf16s::<S, PART>(simd, part, i));

impl Format for &[Q8_0] {
    const GROUP: usize = Q8_0::LEN;
    const PART: usize = PART;
    const STREAMS: usize = 4;
    type Span = [Q8_0; PARTS];
    /// Twice as many as there are, for the widest vectors.
    type Scales = [f32; 2 * PARTS];

    #[inline(always)]
    fn span(&self, at: usize) -> &Self::Span {
        whole(&self[at / Q8_0::LEN..])
    }

    fn rest(self, at: usize, end: usize) -> Self::Span {
        rest(&self[at / Q8_0::LEN..end / Q8_0::LEN], [0; _])
    }

    /// Together, which is less work than one by one.
    #[inline(always)]
    fn scales<S: Simd>(simd: S, span: &Self::Span) -> Self::Scales {
        let mut halves = [f16::ZERO; 2 * PARTS];
        for (half, block) in halves.iter_mut().zip(span) {
            *half = half_at(block, 0);
        }
        let mut scales = Self::Scales::default();
        let (vectors, unit) = (S::as_mut_simd_f32s(&mut scales).0, simd.splat_f32s(1. / i8_unit::<S>()));
        for (i, vector) in vectors.iter_mut().enumerate().take(PARTS.div_ceil(S::F32_LANES)) {
            *vector = simd.mul_f32s(unit, f16s(simd, &halves, i));
        }
        scales
    }

    #[inline(always)]
    fn part<S: Simd>(
        simd: S,
        span: &Self::Span,
        part: usize,
        scales: &Self::Scales,
        mut each: impl FnMut(usize, S::f32s),
    ) {
        let (bytes, scale) = (whole::<_, PART>(&span[part][2..]), simd.splat_f32s(scales[part]));
        for i in 0..PART / S::F32_LANES {
            each(i, simd.mul_f32s(scale, i8s(simd, bytes, i)));
        }
    }
}

impl Format for &[Q4K] {
    const GROUP: usize = Q4K::LEN;
    const PART: usize = 2 * PART;
    const STREAMS: usize = 4;
    type Span = Q4K;
    /// Of all parts, then their minima.
    type Scales = [f32; 2 * PARTS];

    #[inline(always)]
    fn span(&self, at: usize) -> &Self::Span {
        &self[at / Q4K::LEN]
    }

    fn rest(self, at: usize, _: usize) -> Self::Span {
        *self.span(at)
    }

    #[inline(always)]
    fn scales<S: Simd>(simd: S, block: &Q4K) -> Self::Scales {
        let (scale, step) = (from_f16(half_at(block, 0)), from_f16(half_at(block, 2)));
        let packed = scales_and_mins(&block[4..16]);
        let mut scales = Self::Scales::default();
        for (i, vector) in S::as_mut_simd_f32s(&mut scales).0.iter_mut().enumerate() {
            *vector = u8s(simd, &packed, i);
        }
        for part in 0..PARTS {
            scales[part] *= scale;
            scales[PARTS + part] *= -step;
        }
        scales
    }

    /// Two of eight parts share 32 bytes: the first has the low four bits, the second the high ones.
    #[inline(always)]
    fn part<S: Simd>(
        simd: S,
        block: &Q4K,
        part: usize,
        scales: &Self::Scales,
        mut each: impl FnMut(usize, S::f32s),
    ) {
        let bytes = whole::<_, PART>(&block[16 + part * PART..]);
        let vectors = PART / S::F32_LANES;
        for high in [false, true] {
            let part = 2 * part + usize::from(high);
            let (scale, min) = (simd.splat_f32s(scales[part]), simd.splat_f32s(scales[PARTS + part]));
            for i in 0..vectors {
                let x = if high { high_bits(simd, bytes, i) } else { low_bits(simd, bytes, i) };
                each(usize::from(high) * vectors + i, simd.mul_add_e_f32s(scale, x, min));
            }
        }
    }
}

#[inline(always)]
fn vector_of<S: Simd>(part: &[f32; PART], i: usize) -> S::f32s {
    S::as_simd_f32s(part).0[i]
}

#[inline(always)]
fn whole<T, const N: usize>(from: &[T]) -> &[T; N] {
    from.first_chunk().expect("a span that ends within the weights")
}

fn rest<T: Copy, const N: usize>(from: &[T], zero: T) -> [T; N] {
    let mut span = [zero; N];
    span[..from.len()].copy_from_slice(from);
    span
}

#[inline(always)]
fn half_at(block: &[u8], at: usize) -> f16 {
    f16::from_le_bytes([block[at], block[at + 1]])
}

/// The six-bit numbers of all parts, scales and then minima: the first four lie in bytes of their own, whose two high bits
/// belong to the others.
#[inline(always)]
fn scales_and_mins(packed: &[u8]) -> [u8; 16] {
    let four = |i: usize| u32::from_le_bytes([packed[i], packed[i + 1], packed[i + 2], packed[i + 3]]);
    let (scales, mins, low) = (four(0), four(4), four(8));
    let all = |first: u32, low: u32| {
        let first_four = first & 0x3f3f_3f3f;
        let others = (low & 0x0f0f_0f0f) | (first >> 6 & 0x0303_0303) << 4;
        u128::from(first_four) | u128::from(others) << 32
    };
    (all(scales, low) | all(mins, low >> 4) << 64).to_le_bytes()
}
