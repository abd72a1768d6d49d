//! Cross entropy between logits and the next tokens.

use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, Device, Layout, Result, Shape, Storage, Tensor,
    backend::BackendStorage, bail,
};
use rayon::prelude::*;

/// Negative log likelihood of each target, `[N]` f32, for `logits` `[N, vocab]` f32 and `targets` `[N]` u32.
///
/// Composed of Candle's operators it makes a dozen passes over the largest tensor of the whole step, on a CPU on one thread;
/// there it is therefore an operator of its own that makes one forward and one backward, on all threads.
pub fn token_nll(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    if logits.device().is_cpu() {
        let op = TokenNll { targets: targets.to_vec1()? };
        return logits.contiguous()?.apply_op1(op);
    }
    composed_token_nll(logits, targets)
}

/// The same in plain tensor operations. The gradient is written out: the one that Candle would derive keeps all that is
/// between logits and result, and passes over each of it several times.
pub fn composed_token_nll(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let (given, targets) = (logits.detach(), targets.unsqueeze(1)?);
    let max = given.max_keepdim(1)?;
    let normalizer = (given.broadcast_sub(&max)?.exp()?.sum_keepdim(1)?.log()? + max)?;
    let nll = (&normalizer - given.gather(&targets, 1)?)?.squeeze(1)?;
    logits.apply_op1(ComposedNll { targets, normalizer, nll })
}

struct ComposedNll {
    /// `[N, 1]`, as the normaliser, the logarithm of the sum of exponentials.
    targets: Tensor,
    normalizer: Tensor,
    /// The result, which is there before the operation: an operation has no other way to bring its gradient along.
    nll: Tensor,
}

impl CustomOp1 for ComposedNll {
    fn name(&self) -> &'static str {
        "composed_token_nll"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        let (storage, layout) = self.nll.storage_and_layout();
        match &*storage {
            Storage::Cpu(storage) => Ok((storage.try_clone(layout)?, self.nll.shape().clone())),
            _ => bail!("{}: logits must be where the result is", self.name()),
        }
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        let (storage, layout) = self.nll.storage_and_layout();
        match &*storage {
            Storage::Cuda(storage) => Ok((storage.try_clone(layout)?, self.nll.shape().clone())),
            _ => bail!("{}: logits must be where the result is", self.name()),
        }
    }

    fn bwd(&self, logits: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let grad = grad.unsqueeze(1)?.contiguous()?;
        let softmax = logits.detach().broadcast_sub(&self.normalizer)?.exp()?;
        let gradient = softmax.broadcast_mul(&grad)?;
        gradient.scatter_add_set(&self.targets, &grad.neg()?, 1)?;
        Ok(Some(gradient))
    }
}

struct TokenNll {
    targets: Vec<u32>,
}

impl TokenNll {
    /// Rows of contiguous `[N, vocab]` logits.
    fn rows<'a>(&self, storage: &'a CpuStorage, layout: &Layout) -> Result<(&'a [f32], usize)> {
        let (rows, vocab) = layout.shape().dims2()?;
        if rows != self.targets.len() {
            bail!("token_nll: {rows} rows of logits, must be {} as the targets", self.targets.len());
        }
        if let Some(target) = self.targets.iter().find(|&&t| t as usize >= vocab) {
            bail!("token_nll: target {target}, must be less than the {vocab} logits");
        }
        let Some((start, end)) = layout.contiguous_offsets() else {
            bail!("token_nll: logits must be contiguous");
        };
        Ok((&storage.as_slice::<f32>()?[start..end], vocab))
    }
}

impl CustomOp1 for TokenNll {
    fn name(&self) -> &'static str {
        "token_nll"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (logits, vocab) = self.rows(storage, layout)?;
        let nll: Vec<f32> = logits
            .par_chunks_exact(vocab)
            .zip(&self.targets)
            .map(|(row, &target)| {
                let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let sum: f32 = row.iter().map(|x| (x - max).exp()).sum();
                max + sum.ln() - row[target as usize]
            })
            .collect();
        let shape = Shape::from(nll.len());
        Ok((CpuStorage::F32(nll), shape))
    }

    /// `d nll / d logits = softmax(logits) - onehot(target)`; the normaliser is `nll + logits[target]`.
    fn bwd(&self, logits: &Tensor, nll: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (nll, grad) = (nll.to_vec1::<f32>()?, grad.to_vec1::<f32>()?);
        let (storage, layout) = logits.storage_and_layout();
        let candle_core::Storage::Cpu(storage) = &*storage else {
            bail!("token_nll: logits must be on the cpu");
        };
        let (rows, vocab) = self.rows(storage, layout)?;
        let mut out = vec![0f32; rows.len()];
        out.par_chunks_exact_mut(vocab).zip(rows.par_chunks_exact(vocab)).enumerate().for_each(
            |(i, (out, row))| {
                let target = self.targets[i] as usize;
                let normalizer = nll[i] + row[target];
                for (out, x) in out.iter_mut().zip(row) {
                    *out = grad[i] * (x - normalizer).exp();
                }
                out[target] -= grad[i];
            },
        );
        Tensor::from_vec(out, logits.shape(), &Device::Cpu).map(Some)
    }
}
