//! Root-mean-square normalisation ([Zhang and Sennrich, 2019](https://arxiv.org/abs/1910.07467)).

use crate::nn::fused;
pub use crate::nn::fused::Gate as NormGate;
use candle_core::{DType, Module, Result, Tensor, bail};
use candle_nn::{Init, VarBuilder};

/// `y = x / sqrt(mean(x^2) + eps) * weight` over the last dimension, computed in f32.
///
/// candle-nn's fused `rms_norm` has no backward: a layer that used it would train without gradients below the norm.
#[derive(Debug, Clone)]
pub struct RmsNorm {
    weight: Tensor,
    /// What is added to it.
    offset: f64,
    eps: f64,
}

impl RmsNorm {
    /// A norm over `size` channels. With `affine` it reads `weight` of shape `[size]`, 1 when fresh; without, it has no
    /// parameters.
    ///
    /// # Errors
    /// An `eps` that is not 0 or a positive number; whatever `vb` has to say of the tensor.
    pub fn new(size: usize, eps: f64, affine: bool, vb: VarBuilder) -> Result<Self> {
        check_eps(eps)?;
        let weight = match affine {
            true => vb.get_with_hints(size, "weight", Init::Const(1.))?,
            false => Tensor::ones(size, DType::F32, vb.device())?,
        };
        Ok(Self { weight, offset: 0., eps })
    }

    /// A norm whose parameter `weight` is stored as its difference from 1, 0 when fresh.
    ///
    /// # Errors
    /// Those of [`new`](Self::new).
    pub fn zero_centered(size: usize, eps: f64, vb: VarBuilder) -> Result<Self> {
        check_eps(eps)?;
        let norm = Self { weight: vb.get_with_hints(size, "weight", Init::Const(0.))?, offset: 1., eps };
        // One that is trained changes; any other is added up here and not in every call.
        if norm.weight.track_op() {
            return Ok(norm);
        }
        Ok(Self { weight: norm.full_weight()?, offset: 0., eps })
    }

    /// As it is stored if nothing is to be added to it.
    fn full_weight(&self) -> Result<Tensor> {
        if self.offset == 0. {
            return Ok(self.weight.clone());
        }
        self.weight.to_dtype(DType::F32)? + self.offset
    }

    /// `[.., size]` to the same shape and dtype.
    pub fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        self.forward_to(xs, xs.dtype())
    }

    /// [`forward`](Self::forward), in the dtype that comes next.
    pub(crate) fn forward_to(&self, xs: &Tensor, dtype: DType) -> Result<Tensor> {
        fused::rms_norm(xs, &self.full_weight()?, self.eps, dtype)
    }

    /// `xs + added`, and [`forward`](Self::forward) of it.
    pub(crate) fn forward_of_sum(&self, xs: &Tensor, added: &Tensor) -> Result<(Tensor, Tensor)> {
        fused::rms_norm_of_sum(xs, added, &self.full_weight()?, self.eps)
    }

    /// [`forward`](Self::forward) times a function of `gate`, in one operation with a gradient; in the shape of `gate`, which
    /// has the elements of `xs` in their order.
    pub fn forward_gated(&self, xs: &Tensor, gate: &Tensor, kind: NormGate) -> Result<Tensor> {
        self.forward_gated_to(xs, (gate, kind), xs.dtype())
    }

    /// The same in the dtype that comes next.
    pub(crate) fn forward_gated_to(
        &self,
        xs: &Tensor,
        gate: (&Tensor, NormGate),
        dtype: DType,
    ) -> Result<Tensor> {
        fused::rms_norm_gated(xs, &self.full_weight()?, gate, self.eps, dtype)
    }
}

/// Refuses an epsilon with which a norm may be that of a negative number.
pub(crate) fn check_eps(eps: f64) -> Result<()> {
    if !(eps >= 0. && eps.is_finite()) {
        bail!("eps is {eps}, it must be 0 or a positive number");
    }
    Ok(())
}

/// `y = x / sqrt(sum(x^2) + eps)` over the last dimension, computed in f32: what delta rules do to queries and keys. One
/// operation with a gradient; to the same shape and dtype.
pub fn l2_norm(xs: &Tensor, eps: f64) -> Result<Tensor> {
    fused::l2_norm(xs, eps)
}

impl Module for RmsNorm {
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        self.forward(xs)
    }
}
