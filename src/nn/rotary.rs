//! Rotary position embedding ([Su et al., 2021](https://arxiv.org/abs/2104.09864)), the form that rotates the two halves
//! of a head against each other.

#[cfg(any(feature = "cuda", feature = "cuda-host"))]
use crate::cuda::layers;
use crate::nn::RotaryScaling;
use candle_core::{D, DType, Result, Tensor, bail};
#[cfg(any(feature = "cuda", feature = "cuda-host"))]
use std::sync::{Arc, Mutex, PoisonError};

/// `[x1, x2] -> [x1 cos - x2 sin, x2 cos + x1 sin]` with the angle `t / base^(2i / dim)` for channel i of token t,
/// computed in f32.
///
/// candle-nn's `rope` has no backward. This one is a CUDA kernel, and plain tensor operations on other devices.
#[derive(Debug, Clone)]
pub struct RotaryEmbedding {
    inverse_frequencies: Vec<f32>,
    /// On sines and cosines.
    factor: f64,
    head_dim: usize,
    #[cfg(any(feature = "cuda", feature = "cuda-host"))]
    on_device: OnDevice,
}

/// What a [`RotaryEmbedding`] is made from where it is more than a base.
#[derive(Debug, Clone, PartialEq)]
pub struct RotaryConfig {
    /// Channels of a head.
    pub head_dim: usize,
    /// How many of them are rotated, an even number: the first ones. The others stay as they are.
    pub rotary_dim: usize,
    /// The base of the frequencies.
    pub base: f64,
    /// How they are stretched.
    pub scaling: RotaryScaling,
}

impl RotaryEmbedding {
    /// For heads of `dim` channels, an even number.
    pub fn new(dim: usize, base: f64) -> Result<Self> {
        Self::from_config(&RotaryConfig {
            head_dim: dim,
            rotary_dim: dim,
            base,
            scaling: RotaryScaling::None,
        })
    }

    /// For heads of which a part is rotated, or frequencies that are stretched.
    ///
    /// # Errors
    /// A number of channels that is odd, 0 or more than the head has; a base or a factor that is not above 0.
    pub fn from_config(cfg: &RotaryConfig) -> Result<Self> {
        let RotaryConfig { head_dim, rotary_dim: dim, base, scaling } = *cfg;
        if dim > head_dim {
            bail!("rotary embedding: {dim} channels are to be rotated, the head has {head_dim}");
        }
        if dim == 0 || !dim.is_multiple_of(2) {
            bail!("rotary embedding: the head has {dim} channels, it must have an even number of them");
        }
        if !(base.is_finite() && base > 0.) {
            bail!("rotary embedding: the base is {base}, it must be finite and above 0");
        }
        let (frequencies, factor) = scaling.frequencies(dim, base)?;
        let inverse_frequencies = frequencies.iter().map(|f| *f as f32).collect();
        Ok(Self {
            inverse_frequencies,
            factor,
            head_dim,
            #[cfg(any(feature = "cuda", feature = "cuda-host"))]
            on_device: OnDevice::default(),
        })
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
        let [ys] = self.rotate([xs], positions)?;
        Ok(ys)
    }

    /// [`forward_at`](Self::forward_at) for several tensors, which share what is made of the positions.
    pub(crate) fn rotate<const N: usize>(
        &self,
        xs: [&Tensor; N],
        positions: &[usize],
    ) -> Result<[Tensor; N]> {
        let mut ys = xs.map(Tensor::clone);
        let Some(first) = xs.first() else { return Ok(ys) };
        for x in xs {
            self.check(x, positions)?;
        }
        #[cfg(any(feature = "cuda", feature = "cuda-host"))]
        if layers::takes(&xs) {
            let rotation = self.rotation(first, positions)?;
            for y in &mut ys {
                *y = layers::rotate(y, &rotation)?;
            }
            return Ok(ys);
        }
        let tables = self.tables(first, positions)?;
        for y in &mut ys {
            *y = self.composed(y, &tables)?;
        }
        Ok(ys)
    }

    fn check(&self, xs: &Tensor, positions: &[usize]) -> Result<()> {
        let (batch, tokens, _, dim) = xs.dims4()?;
        if dim != self.head_dim {
            bail!("rotary embedding: xs has heads of {dim} channels, it must be {}", self.head_dim);
        }
        if positions.len() != batch * tokens {
            bail!(
                "rotary embedding: {} positions were given, {batch} x {tokens} tokens need as many",
                positions.len()
            );
        }
        Ok(())
    }

    /// What the kernel is told: if every sequence has the same consecutive positions, as they mostly do, only the first.
    #[cfg(any(feature = "cuda", feature = "cuda-host"))]
    fn rotation(&self, like: &Tensor, positions: &[usize]) -> Result<layers::Rotation> {
        let tokens = like.dim(1)?;
        let first = positions.first().copied().unwrap_or(0);
        let consecutive =
            |row: &[usize]| row.iter().enumerate().all(|(t, &at)| first.checked_add(t) == Some(at));
        let positions = match positions.chunks(tokens.max(1)).all(consecutive) {
            true => layers::Positions::From(first),
            false => {
                let each = |&at| u32::try_from(at).map_err(|_| too_far(at));
                let each = positions.iter().map(each).collect::<Result<Vec<u32>>>()?;
                let count = each.len();
                layers::Positions::Each(Tensor::from_vec(each, count, like.device())?)
            }
        };
        Ok(layers::Rotation {
            frequencies: self.on_device.frequencies(&self.inverse_frequencies, like)?,
            factor: self.factor,
            positions,
        })
    }

    /// cos and sin, `[1 or B, T, 1, dim / 2]`. The product of position and frequency is rounded to f32, as where the
    /// checkpoints were trained.
    fn tables(&self, like: &Tensor, positions: &[usize]) -> Result<[Tensor; 2]> {
        let (half, tokens) = (self.inverse_frequencies.len(), like.dim(1)?);
        // One table does for all sequences that are at the same place, as they mostly are.
        let (first, mut others) =
            (&positions[..tokens.min(positions.len())], positions.chunks(tokens.max(1)));
        let rows = if others.all(|row| row == first) { first } else { positions };
        let angles = rows.iter().flat_map(|t| self.inverse_frequencies.iter().map(move |f| *t as f32 * f));
        let shape = (rows.len().checked_div(tokens).unwrap_or(1), tokens, 1, half);
        let angles = Tensor::from_vec(angles.collect::<Vec<f32>>(), shape, like.device())?;
        let (cos, sin) = (angles.cos()?, angles.sin()?);
        if self.factor == 1. { Ok([cos, sin]) } else { Ok([(cos * self.factor)?, (sin * self.factor)?]) }
    }

    fn composed(&self, xs: &Tensor, [cos, sin]: &[Tensor; 2]) -> Result<Tensor> {
        let (half, dim) = (self.inverse_frequencies.len(), self.head_dim);
        let wide = xs.to_dtype(DType::F32)?;
        let x1 = wide.narrow(D::Minus1, 0, half)?;
        let x2 = wide.narrow(D::Minus1, half, half)?;
        let y1 = (x1.broadcast_mul(cos)? - x2.broadcast_mul(sin)?)?;
        let y2 = (x2.broadcast_mul(cos)? + x1.broadcast_mul(sin)?)?;
        if dim == 2 * half {
            return Tensor::cat(&[y1, y2], D::Minus1)?.to_dtype(xs.dtype());
        }
        let others = wide.narrow(D::Minus1, 2 * half, dim - 2 * half)?;
        Tensor::cat(&[y1, y2, others], D::Minus1)?.to_dtype(xs.dtype())
    }
}

/// The inverse frequencies on the devices where they were asked for.
#[cfg(any(feature = "cuda", feature = "cuda-host"))]
#[derive(Debug, Clone, Default)]
struct OnDevice(Arc<Mutex<Vec<Tensor>>>);

#[cfg(any(feature = "cuda", feature = "cuda-host"))]
impl OnDevice {
    fn frequencies(&self, inverse_frequencies: &[f32], like: &Tensor) -> Result<Tensor> {
        // What a panicking thread leaves behind is whole: the only change is a push.
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = known.iter().find(|x| x.device().same_device(like.device())) {
            return Ok(found.clone());
        }
        let new = Tensor::new(inverse_frequencies, like.device())?;
        known.push(new.clone());
        Ok(new)
    }
}

#[cfg(any(feature = "cuda", feature = "cuda-host"))]
fn too_far(position: usize) -> candle_core::Error {
    candle_core::Error::msg(format!("rotary embedding: position is {position}, it must be below 2^32"))
}
