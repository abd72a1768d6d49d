//! Cross entropy between logits and the next tokens.

use candle_core::{CpuStorage, CustomOp1, Device, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

/// Negative log likelihood of each target, `[N]` f32, for `logits` `[N, vocab]` f32 and `targets` `[N]` u32.
///
/// Composed of Candle's operators it makes a dozen passes over the largest tensor of the whole step on one thread; on a CPU
/// it is therefore an operator of its own that makes one forward and one backward, on all threads.
pub fn token_nll(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    if logits.device().is_cpu() {
        let op = TokenNll { targets: targets.to_vec1()? };
        return logits.contiguous()?.apply_op1(op);
    }
    composed_token_nll(logits, targets)
}

/// The same in plain tensor operations.
pub fn composed_token_nll(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let log_probs = candle_nn::ops::log_softmax(logits, 1)?;
    log_probs.gather(&targets.unsqueeze(1)?, 1)?.squeeze(1)?.neg()
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
