//! `silu(gate) * up`.

use super::{BLOCK, Held, fits, in_blocks, sigmoid, silu_slope, values, vectorized};
use candle_core::{CpuStorage, CustomOp2, Device, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

/// `silu(gate) * up` for two tensors of one shape, f32.
pub(crate) fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    if gate.dims() != up.dims() {
        bail!("swiglu: gate is {:?} and up {:?}, they must have one shape", gate.dims(), up.dims());
    }
    match fits(&[gate, up]) {
        true => gate.contiguous()?.apply_op2(&up.contiguous()?, Swiglu),
        false => composed(gate, up),
    }
}

fn composed(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    gate.silu()? * up
}

struct Swiglu;

impl CustomOp2 for Swiglu {
    fn name(&self) -> &'static str {
        "swiglu"
    }

    fn cpu_fwd(
        &self,
        gate: &CpuStorage,
        gate_layout: &Layout,
        up: &CpuStorage,
        up_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (gate, up) = (values(gate, gate_layout)?, values(up, up_layout)?);
        let y = in_blocks(gate.len(), BLOCK, |at, y| {
            vectorized(
                #[inline(always)]
                || {
                    for ((y, gate), up) in y.iter_mut().zip(&gate[at.clone()]).zip(&up[at]) {
                        *y = gate * sigmoid(*gate) * up;
                    }
                },
            );
        });
        Ok((CpuStorage::F32(y), gate_layout.shape().clone()))
    }

    fn bwd(
        &self,
        gate: &Tensor,
        up: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        let shape = gate.shape();
        let [gate, up, dy] = [&Held::new(gate), &Held::new(up), &Held::new(&dy)];
        let [gate, up, dy] = [gate.values()?, up.values()?, dy.values()?];
        let (mut dgate, mut dup) = (vec![0.; gate.len()], vec![0.; gate.len()]);
        let inputs = gate.par_chunks(BLOCK).zip(up.par_chunks(BLOCK)).zip(dy.par_chunks(BLOCK));
        let outputs = dgate.par_chunks_mut(BLOCK).zip(dup.par_chunks_mut(BLOCK));
        outputs.zip(inputs).for_each(|((dgate, dup), ((gate, up), dy))| {
            vectorized(
                #[inline(always)]
                || {
                    for (((dgate, dup), dy), (gate, up)) in
                        dgate.iter_mut().zip(dup).zip(dy).zip(gate.iter().zip(up))
                    {
                        *dgate = dy * up * silu_slope(*gate);
                        *dup = dy * gate * sigmoid(*gate);
                    }
                },
            );
        });
        let tensor = |values| Tensor::from_vec(values, shape, &Device::Cpu);
        Ok((Some(tensor(dgate)?), Some(tensor(dup)?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::fused::tests::agree;

    #[test]
    fn shapes_that_differ_are_refused() -> Result<()> {
        let zeros = |dims: &[usize]| Tensor::zeros(dims, candle_core::DType::F32, &Device::Cpu);
        for (gate, up) in [(&[2, 3][..], &[3, 2][..]), (&[2, 3], &[6]), (&[2, 3], &[1, 3]), (&[2], &[3])] {
            assert!(swiglu(&zeros(gate)?, &zeros(up)?).is_err(), "{gate:?} {up:?}");
        }
        Ok(())
    }

    #[test]
    fn agrees_with_its_composition() -> Result<()> {
        for shape in [&[1, 1][..], &[3, 5], &[2, 100, 200]] {
            agree(&[shape, shape], |x| swiglu(&x[0], &x[1]), |x| composed(&x[0], &x[1]))?;
        }
        Ok(())
    }
}
