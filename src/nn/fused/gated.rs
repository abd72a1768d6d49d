//! Numbers and their gates: `silu(gate) * xs`, which is SwiGLU, and `sigmoid(gate) * xs`.

use super::{BLOCK, Gate, Held, fits, in_blocks, values, vectorized};
#[cfg(any(feature = "cuda", feature = "cuda-host"))]
use crate::cuda::layers;
use candle_core::{CpuStorage, CustomOp2, DType, Device, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

/// `f(gate) * xs` for two tensors of one shape, computed in f32; in `dtype`.
pub(crate) fn gated(xs: &Tensor, (gate, kind): (&Tensor, Gate), dtype: DType) -> Result<Tensor> {
    if gate.dims() != xs.dims() {
        bail!("gated: gate is {:?} and xs {:?}, they must have one shape", gate.dims(), xs.dims());
    }
    #[cfg(any(feature = "cuda", feature = "cuda-host"))]
    if layers::takes_pointwise(&[xs, gate]) {
        // In 16 bits only where nothing is lost by that.
        let inner = if xs.dtype() == dtype && gate.dtype() == dtype { dtype } else { DType::F32 };
        return layers::gated(&xs.to_dtype(inner)?, (&gate.to_dtype(inner)?, kind))?.to_dtype(dtype);
    }
    let (xs, gate) = (xs.to_dtype(DType::F32)?, gate.to_dtype(DType::F32)?);
    let ys = match fits(&[&xs, &gate]) {
        true => gate.contiguous()?.apply_op2(&xs.contiguous()?, Gated(kind))?,
        false => composed(&xs, (&gate, kind))?,
    };
    ys.to_dtype(dtype)
}

fn composed(xs: &Tensor, (gate, kind): (&Tensor, Gate)) -> Result<Tensor> {
    kind.composed(gate)? * xs
}

struct Gated(Gate);

impl CustomOp2 for Gated {
    fn name(&self) -> &'static str {
        "gated"
    }

    fn cpu_fwd(
        &self,
        gate: &CpuStorage,
        gate_layout: &Layout,
        xs: &CpuStorage,
        xs_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (gate, xs) = (values(gate, gate_layout)?, values(xs, xs_layout)?);
        let y = in_blocks(gate.len(), BLOCK, |at, y| {
            vectorized(
                #[inline(always)]
                || {
                    for ((y, gate), x) in y.iter_mut().zip(&gate[at.clone()]).zip(&xs[at]) {
                        *y = self.0.value(*gate) * x;
                    }
                },
            );
        });
        Ok((CpuStorage::F32(y), gate_layout.shape().clone()))
    }

    fn bwd(
        &self,
        gate: &Tensor,
        xs: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        let shape = gate.shape();
        let [gate, xs, dy] = [&Held::new(gate), &Held::new(xs), &Held::new(&dy)];
        let [gate, xs, dy] = [gate.values()?, xs.values()?, dy.values()?];
        let (mut dgate, mut dx) = (vec![0.; gate.len()], vec![0.; gate.len()]);
        let inputs = gate.par_chunks(BLOCK).zip(xs.par_chunks(BLOCK)).zip(dy.par_chunks(BLOCK));
        let outputs = dgate.par_chunks_mut(BLOCK).zip(dx.par_chunks_mut(BLOCK));
        outputs.zip(inputs).for_each(|((dgate, dx), ((gate, xs), dy))| {
            vectorized(
                #[inline(always)]
                || {
                    for (((dgate, dx), dy), (gate, x)) in
                        dgate.iter_mut().zip(dx).zip(dy).zip(gate.iter().zip(xs))
                    {
                        *dgate = dy * x * self.0.slope(*gate);
                        *dx = dy * self.0.value(*gate);
                    }
                },
            );
        });
        let tensor = |values| Tensor::from_vec(values, shape, &Device::Cpu);
        Ok((Some(tensor(dgate)?), Some(tensor(dx)?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::fused::tests::agree;

    #[test]
    fn shapes_that_differ_are_refused() -> Result<()> {
        let zeros = |dims: &[usize]| Tensor::zeros(dims, DType::F32, &Device::Cpu);
        for (gate, xs) in [(&[2, 3][..], &[3, 2][..]), (&[2, 3], &[6]), (&[2, 3], &[1, 3]), (&[2], &[3])] {
            let refused = gated(&zeros(xs)?, (&zeros(gate)?, Gate::Silu), DType::F32);
            assert!(refused.is_err(), "{gate:?} {xs:?}");
        }
        Ok(())
    }

    #[test]
    fn agrees_with_its_composition() -> Result<()> {
        for shape in [&[1, 1][..], &[3, 5], &[2, 100, 200]] {
            for kind in [Gate::Silu, Gate::Sigmoid] {
                let fused = |x: &[Tensor]| gated(&x[0], (&x[1], kind), DType::F32);
                agree(&[shape, shape], fused, |x| composed(&x[0], (&x[1], kind)))?;
            }
        }
        Ok(())
    }
}
