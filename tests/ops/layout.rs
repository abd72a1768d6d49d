//! Ways for a tensor to lie in memory: strides, offsets, repeated elements.

use crate::case::{ARGS, Case, Vars};
use crate::compare::{close, values};
use crate::run::{Graph, MODES};
use candle_core::{DType, Device, Result, Shape, Tensor, Var};

/// A way for a tensor of some shape to lie in memory.
#[derive(Debug, Clone, Copy)]
pub enum Layout {
    /// Two dimensions swapped: 1 and 2 is heads before time, 2 and 3 a last dimension that is not contiguous.
    Swapped(usize, usize),
    /// All dimensions in reverse order.
    Reversed,
    /// A window of something larger in each dimension, with NaN around it.
    Window,
    /// One dimension repeated with stride zero.
    Repeated(usize),
}

pub const ALL: [Layout; 9] = [
    Layout::Swapped(1, 2),
    Layout::Swapped(2, 3),
    Layout::Swapped(0, 1),
    Layout::Reversed,
    Layout::Window,
    Layout::Repeated(0),
    Layout::Repeated(1),
    Layout::Repeated(2),
    Layout::Repeated(3),
];

impl Layout {
    /// Whether a tensor of this rank can lie so.
    pub fn fits(self, rank: usize) -> bool {
        match self {
            Layout::Swapped(_, dim) | Layout::Repeated(dim) => dim < rank,
            Layout::Reversed | Layout::Window => true,
        }
    }

    /// A contiguous tensor whose [`view`](Self::view) is `x` (`x` along one index of a repeated dimension).
    pub fn base(self, x: &Tensor) -> Result<Tensor> {
        match self {
            Layout::Repeated(dim) => x.narrow(dim, 0, 1)?.contiguous(),
            Layout::Window => {
                let mut base = x.clone();
                for dim in 0..x.rank() {
                    let pad = |base: &Tensor, n: usize| {
                        let mut dims = base.dims().to_vec();
                        dims[dim] = n;
                        Tensor::full(f32::NAN, dims, x.device())?.to_dtype(x.dtype())
                    };
                    base = Tensor::cat(&[&pad(&base, 1)?, &base, &pad(&base, 2)?], dim)?;
                }
                Ok(base)
            }
            _ => self.view(x, x.shape())?.contiguous(),
        }
    }

    pub fn view(self, base: &Tensor, shape: &Shape) -> Result<Tensor> {
        match self {
            Layout::Swapped(i, j) => base.transpose(i, j),
            Layout::Reversed => base.permute((0..base.rank()).rev().collect::<Vec<_>>()),
            Layout::Repeated(_) => base.broadcast_as(shape),
            Layout::Window => {
                let mut dims = shape.dims().iter().enumerate();
                dims.try_fold(base.clone(), |x, (dim, &n)| x.narrow(dim, 1, n))
            }
        }
    }

    /// The gradient of the base, from that of the view.
    pub fn base_gradient(self, grad: &Tensor) -> Result<Tensor> {
        match self {
            Layout::Swapped(..) | Layout::Reversed => self.base(grad),
            Layout::Repeated(dim) => grad.sum_keepdim(dim),
            Layout::Window => (0..grad.rank()).try_fold(grad.clone(), |x, dim| x.pad_with_zeros(dim, 1, 2)),
        }
    }
}

/// Every mode on `device`, within `limits` for the outputs and for the gradients. Each argument that `chosen` names lies in
/// `layout`; the rest are contiguous.
pub fn check_on(device: &Device, case: &Case, layout: Layout, chosen: &[usize], limits: [f64; 2]) {
    let mut inputs = case.inputs().unwrap().on(device).unwrap();
    let mut vars: Vars = Default::default();
    let mut args = inputs.args.clone();
    let lies_so = |i: usize, x: &Tensor| chosen.contains(&i) && layout.fits(x.rank());
    for i in 0..ARGS.len() {
        let Some(x) = &inputs.args[i] else { continue };
        let var = match lies_so(i, x) {
            true => Var::from_tensor(&layout.base(x).unwrap()).unwrap(),
            false => Var::from_tensor(x).unwrap(),
        };
        let seen = match lies_so(i, x) {
            true => layout.view(&var, x.shape()).unwrap(),
            false => var.as_tensor().clone(),
        };
        args[i] = Some(seen);
        vars[i] = Some(var);
    }
    inputs.args = args.clone().map(|x| x.map(|x| x.detach()));
    let want = case.expected(&inputs, [true; 3]).unwrap();
    let outputs_only = Graph { loss: [true; 3], ..Graph::NONE };
    for mode in MODES {
        let label = format!("{layout:?} of {chosen:?}, {mode:?}, {case:?}");
        let (outputs, store) = case
            .run_on(mode, &args, &inputs.cotangents, [true; 3])
            .unwrap_or_else(|e| panic!("{label}: {e}"));
        let untracked = case.run(mode, &inputs, outputs_only).unwrap();
        for outputs in [&outputs, &untracked.outputs] {
            for (x, want) in outputs.iter().zip(&want.outputs) {
                if let Some(x) = x {
                    close(x, want, DType::F32, limits[0], &label).unwrap();
                }
            }
        }
        for (i, var) in vars.iter().enumerate() {
            let (Some(var), Some(x)) = (var, &inputs.args[i]) else {
                continue;
            };
            let grad = Tensor::from_slice(&want.grads[i], x.shape(), &Device::Cpu).unwrap();
            let grad = match lies_so(i, x) {
                true => layout.base_gradient(&grad).unwrap(),
                false => grad,
            };
            let got = store.as_ref().and_then(|s| s.get(var)).unwrap();
            let label = format!("gradient of {}, {label}", ARGS[i]);
            close(got, &values(&grad).unwrap(), DType::F32, limits[1], &label).unwrap();
        }
    }
}
