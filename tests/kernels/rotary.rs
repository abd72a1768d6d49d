//! Rotary embedding on the kernel, against the composition in f32 on the CPU.

use crate::compare::{close, inner, values};
use crate::convolutions::{DTYPES, Lies};
use crate::kernels::limits;
use crate::on_kernels;
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_linear_attn::nn::{RotaryConfig, RotaryEmbedding, RotaryScaling};
use rand::{Rng, SeedableRng, rngs::StdRng};

#[derive(Debug, Clone)]
pub struct Rotary {
    /// B, T, H and D.
    pub dims: [usize; 4],
    pub rotated: usize,
    /// Of the tokens; `None`: from `offset` on in each sequence.
    pub positions: Option<Vec<usize>>,
    pub offset: usize,
    pub scaling: RotaryScaling,
    pub dtype: DType,
    pub lies: Lies,
}

impl Default for Rotary {
    fn default() -> Self {
        Self {
            dims: [2, 5, 3, 32],
            rotated: 32,
            positions: None,
            offset: 3,
            scaling: RotaryScaling::None,
            dtype: DType::F32,
            lies: Lies::Contiguous,
        }
    }
}

const YARN: RotaryScaling = RotaryScaling::Yarn {
    factor: 4.,
    beta_fast: 32.,
    beta_slow: 1.,
    original_len: 2048.,
    attention_factor: 1.25,
    truncate: true,
};

impl Rotary {
    /// The result and the gradient of x, with all numbers in `dtype`.
    fn run(&self, [x, of_y]: &[Tensor; 2], dtype: DType, device: &Device) -> Result<[Tensor; 2]> {
        let [batch, tokens, _, width] = self.dims;
        let rotary = RotaryEmbedding::from_config(&RotaryConfig {
            head_dim: width,
            rotary_dim: self.rotated,
            base: 1e4,
            scaling: self.scaling,
        })?;
        let base = |x: &Tensor| self.lies.base(&x.to_dtype(dtype)?.to_device(device)?);
        let var = Var::from_tensor(&base(x)?)?;
        let xs = self.lies.view(&var, width)?;
        let from_offset = || (0..batch).flat_map(|_| self.offset..self.offset + tokens).collect();
        let y = rotary.forward_at(&xs, &self.positions.clone().unwrap_or_else(from_offset))?;
        let grads = inner(&y, &self.lies.view(&base(of_y)?, width)?)?.backward()?;
        let Some(dx) = grads.get(&var) else { candle_core::bail!("there is no dx") };
        Ok([y, self.lies.view(dx, width)?])
    }

    pub fn check(&self) {
        let run = || {
            // The same ones each time: of few numbers in 16 bits, a draw in a thousand is rounded by more than the limit.
            let mut rng = StdRng::seed_from_u64(self.dims.iter().fold(7, |seed, x| seed * 31 + *x as u64));
            let mut random = || {
                let numbers: Vec<f32> =
                    (0..self.dims.iter().product()).map(|_| rng.random_range(-2.0..2.0)).collect();
                Tensor::from_vec(numbers, &self.dims, &Device::Cpu)?.to_dtype(self.dtype)
            };
            let numbers = [random()?, random()?];
            let want = self.run(&numbers, DType::F32, &Device::Cpu)?;
            let found = on_kernels(|device| self.run(&numbers, self.dtype, device))?;
            for ((name, found), want) in ["y", "dx"].into_iter().zip(found).zip(&want) {
                close(&found, &values(want)?, self.dtype, limits(self.dtype).out, name)?;
            }
            Ok::<_, candle_core::Error>(())
        };
        run().unwrap_or_else(|e| panic!("{self:?}: {e}"));
    }
}

/// All of a head and a part of it, whole vectors and others, more heads than a thread takes.
#[test]
fn sizes_in_every_dtype() {
    for (width, rotated) in
        [(2, 2), (6, 4), (7, 2), (16, 16), (64, 32), (64, 64), (80, 24), (128, 16), (256, 64)]
    {
        for heads in [1, 3, 4, 9] {
            for dtype in DTYPES {
                Rotary { dims: [2, 5, heads, width], rotated, dtype, ..Default::default() }.check();
            }
        }
    }
}

#[test]
fn positions() {
    for offset in [0, 1, 4095, 100_000, 1_000_000] {
        for dtype in DTYPES {
            Rotary { offset, dtype, ..Default::default() }.check();
        }
    }
    // Packed sequences; entries that begin in different places; a distance that is not 1.
    let packed = vec![0, 1, 2, 0, 0, 1, 100_000, 100_001, 7, 8];
    let apart = vec![4, 5, 6, 7, 8, 9, 10, 11, 12, 13];
    for positions in [packed, apart, (0..10).map(|t| 3 * t).collect()] {
        for dims in [[1, 10, 3, 32], [2, 5, 5, 32]] {
            Rotary { positions: Some(positions.clone()), dims, rotated: 16, ..Default::default() }.check();
        }
    }
}

#[test]
fn layouts_and_a_factor() {
    for lies in [Lies::Window(5), Lies::Window(8), Lies::Swapped] {
        for dtype in DTYPES {
            for rotated in [16, 32] {
                Rotary { lies, dtype, rotated, scaling: YARN, ..Default::default() }.check();
            }
        }
    }
}

#[test]
fn no_tokens() -> Result<()> {
    on_kernels(|device| {
        let rotary = RotaryEmbedding::new(8, 1e4)?;
        for dims in [(2, 0, 3, 8), (0, 3, 3, 8), (2, 3, 0, 8)] {
            let x = Tensor::zeros(dims, DType::BF16, device)?;
            assert_eq!(rotary.forward(&x, 5)?.shape(), x.shape());
        }
        Ok(())
    })
}

/// What no device can count.
#[test]
fn positions_too_far_are_refused() -> Result<()> {
    on_kernels(|device| {
        let rotary = RotaryEmbedding::new(8, 1e4)?;
        let x = Tensor::zeros((1, 2, 1, 8), DType::F32, device)?;
        assert!(rotary.forward_at(&x, &[usize::MAX - 1, usize::MAX]).is_err());
        assert!(rotary.forward_at(&x, &[0, 1 << 32]).is_err());
        Ok(())
    })
}
