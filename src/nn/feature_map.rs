//! Feature maps: what queries and keys go through in place of the softmax.

use crate::nn::{Activation, Linear};
use candle_core::{D, DType, Result, Tensor, bail};
use candle_nn::VarBuilder;

/// How many rolled copies DPFP multiplies by.
const DPFP_NU: usize = 4;

/// Which feature map a layer uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum FeatureMapKind {
    /// The product of two learned projections, D to D.
    #[default]
    ElementwiseProduct,
    /// `softmax([2 W x, -2 W x])`, D to 2D ([Zhang et al., 2024](https://arxiv.org/abs/2402.04347)).
    Hedgehog,
    /// `relu(W x)`, D to D ([Kasai et al., 2021](https://arxiv.org/abs/2103.13076)).
    T2r,
    /// Products of `relu([x, -x])` with four rolled copies of itself, D to 8D
    /// ([Schlag et al., 2021](https://arxiv.org/abs/2102.11174)).
    Dpfp,
    /// `elu(x) + 1` ([Katharopoulos et al., 2020](https://arxiv.org/abs/2006.16236)).
    Elu,
    /// `relu(x)`
    Relu,
    /// `x`
    Identity,
}

impl FeatureMapKind {
    const NAMES: [(&'static str, Self); 7] = [
        ("elementwise_product", Self::ElementwiseProduct),
        ("hedgehog", Self::Hedgehog),
        ("t2r", Self::T2r),
        ("dpfp", Self::Dpfp),
        ("elu", Self::Elu),
        ("relu", Self::Relu),
        ("identity", Self::Identity),
    ];

    /// The kind that a configuration calls `name`.
    pub fn from_name(name: &str) -> Result<Self> {
        match Self::NAMES.iter().find(|(known, _)| *known == name) {
            Some((_, kind)) => Ok(*kind),
            None => {
                let known = Self::NAMES.map(|(known, _)| known);
                bail!("is \"{name}\", it must be one of {}", known.join(", "))
            }
        }
    }
}

/// A feature map with its parameters.
#[derive(Debug, Clone)]
pub struct FeatureMap {
    kind: FeatureMapKind,
    layers: Vec<Linear>,
}

impl FeatureMap {
    /// A map for heads of `head_dim` channels. The learned ones read `layer1` and `layer2` (elementwise_product, with
    /// biases) or `layer` (hedgehog with, t2r without a bias), each `[head_dim, head_dim]`.
    pub fn new(kind: FeatureMapKind, head_dim: usize, stdev: f64, vb: VarBuilder) -> Result<Self> {
        let layer = |name: &str, bias| Linear::new(head_dim, head_dim, bias, stdev, vb.pp(name));
        let layers = match kind {
            FeatureMapKind::ElementwiseProduct => {
                vec![layer("layer1", true)?, layer("layer2", true)?]
            }
            FeatureMapKind::Hedgehog => vec![layer("layer", true)?],
            FeatureMapKind::T2r => vec![layer("layer", false)?],
            _ => vec![],
        };
        Ok(Self { kind, layers })
    }

    /// `[.., D]` to `[.., D']` in the same dtype; see [`FeatureMapKind`] for D'.
    pub fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        match (self.kind, self.layers.as_slice()) {
            (FeatureMapKind::ElementwiseProduct, [layer1, layer2]) => {
                layer1.forward(xs)? * layer2.forward(xs)?
            }
            (FeatureMapKind::Hedgehog, [layer]) => {
                let ys = (layer.forward(xs)?.to_dtype(DType::F32)? * 2.)?;
                let ys = Tensor::cat(&[&ys, &ys.neg()?], D::Minus1)?;
                candle_nn::ops::softmax(&ys, D::Minus1)?.to_dtype(xs.dtype())
            }
            (FeatureMapKind::T2r, [layer]) => layer.forward(xs)?.relu(),
            (FeatureMapKind::Dpfp, _) => dpfp(xs),
            (FeatureMapKind::Elu, _) => Activation::EluPlusOne.forward(xs),
            (FeatureMapKind::Relu, _) => xs.relu(),
            _ => Ok(xs.clone()),
        }
    }
}

fn dpfp(xs: &Tensor) -> Result<Tensor> {
    if matches!(xs.dims(), [] | [.., 0]) {
        bail!("dpfp: xs is {:?}, its last dimension must be at least 1", xs.dims());
    }
    let xs = Tensor::cat(&[xs.relu()?, xs.neg()?.relu()?], D::Minus1)?;
    let products: Vec<Tensor> =
        (1..=DPFP_NU).map(|shift| &xs * xs.roll(shift as i32, D::Minus1)?).collect::<Result<_>>()?;
    Tensor::cat(&products, D::Minus1)
}
