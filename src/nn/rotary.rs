//! Rotary position embedding ([Su et al., 2021](https://arxiv.org/abs/2104.09864)), the form that rotates the two halves
//! of a head against each other.

use candle_core::{D, DType, Result, Tensor, bail};

/// `[x1, x2] -> [x1 cos - x2 sin, x2 cos + x1 sin]` with the angle `t / base^(2i / dim)` for channel i of token t,
/// computed in f32.
///
/// candle-nn's `rope` has no backward; this one is made of plain tensor operations.
#[derive(Debug, Clone)]
pub struct RotaryEmbedding {
    inverse_frequencies: Vec<f32>,
}

impl RotaryEmbedding {
    /// For heads of `dim` channels, an even number.
    pub fn new(dim: usize, base: f64) -> Result<Self> {
        if dim == 0 || !dim.is_multiple_of(2) {
            bail!("rotary embedding: the head has {dim} channels, it must have an even number of them");
        }
        if !(base.is_finite() && base > 0.) {
            bail!("rotary embedding: the base is {base}, it must be finite and above 0");
        }
        let inverse_frequency = |i| (1. / base.powf((2 * i) as f64 / dim as f64)) as f32;
        Ok(Self { inverse_frequencies: (0..dim / 2).map(inverse_frequency).collect() })
    }

    /// `xs: [B, T, H, dim]`, whose first token has position `offset`, to the same shape and dtype.
    pub fn forward(&self, xs: &Tensor, offset: usize) -> Result<Tensor> {
        let (batch, tokens, _, _) = xs.dims4()?;
        let Some(end) = offset.checked_add(tokens) else {
            bail!("rotary embedding: offset is {offset}, it must be less: {tokens} tokens follow it");
        };
        let positions: Vec<usize> = (0..batch).flat_map(|_| offset..end).collect();
        self.forward_at(xs, &positions)
    }

    /// `xs: [B, T, H, dim]` whose tokens have these B * T positions, to the same shape and dtype.
    pub fn forward_at(&self, xs: &Tensor, positions: &[usize]) -> Result<Tensor> {
        let half = self.inverse_frequencies.len();
        let (batch, tokens, _, dim) = xs.dims4()?;
        if dim != 2 * half {
            bail!("rotary embedding: xs has heads of {dim} channels, it must be {}", 2 * half);
        }
        if positions.len() != batch * tokens {
            bail!(
                "rotary embedding: {} positions were given, {batch} x {tokens} tokens need as many",
                positions.len()
            );
        }
        // One table does for all sequences that are at the same place, as they mostly are.
        let (first, mut others) =
            (&positions[..tokens.min(positions.len())], positions.chunks(tokens.max(1)));
        let rows = if others.all(|row| row == first) { first } else { positions };
        let (cos, sin) = self.tables(rows, tokens, xs)?;
        let wide = xs.to_dtype(DType::F32)?;
        let x1 = wide.narrow(D::Minus1, 0, half)?;
        let x2 = wide.narrow(D::Minus1, half, half)?;
        let y1 = (x1.broadcast_mul(&cos)? - x2.broadcast_mul(&sin)?)?;
        let y2 = (x2.broadcast_mul(&cos)? + x1.broadcast_mul(&sin)?)?;
        Tensor::cat(&[y1, y2], D::Minus1)?.to_dtype(xs.dtype())
    }

    /// cos and sin, `[1 or B, T, 1, dim / 2]`. The product of position and frequency is rounded to f32, as where the
    /// checkpoints were trained.
    fn tables(&self, positions: &[usize], tokens: usize, like: &Tensor) -> Result<(Tensor, Tensor)> {
        let half = self.inverse_frequencies.len();
        let angles =
            positions.iter().flat_map(|t| self.inverse_frequencies.iter().map(move |f| *t as f32 * f));
        let shape = (positions.len().checked_div(tokens).unwrap_or(1), tokens, 1, half);
        let angles = Tensor::from_vec(angles.collect::<Vec<f32>>(), shape, like.device())?;
        Ok((angles.cos()?, angles.sin()?))
    }
}
